"""Every covariance in the one sampler, with B and SA-2: digits, five seeds.

Analytic, NPR, SN and OCM learn or estimate the covariance before; probes and Lanczos take it from
the network's derivative at each step. The store is that of configs/digits_tables.py. See
docs/results/digits_covariances.md.
"""

from configs import digits_tables
from configs.comparison import CONTROLLED, COVARIANCES, part, sampling


def get_config():
    config = digits_tables.five_seeds(
        "digits_covariances", "Covariances of x_0 in the reverse step, on digits"
    )
    config.samplings = {
        "default": sampling(""),
        "probes4": sampling("4 probes", probes=4),
        "probes16": sampling("16 probes", probes=16),
    }
    steps = (5, 10, 25, 50)
    more = tuple(f"{name}/probes{m}" for m in (4, 16) for name in ("b", "sa"))
    probes = ("probes_ddpm", "probes_ddim")
    config.parts = {
        "rows": part("Equal steps", ("b", "sa"), (*CONTROLLED, *COVARIANCES), steps),
        "probes": part("More probes", ("b", *more), probes, steps[:-1]),
    }
    config.tables = ("rows", "probes")
    return config
