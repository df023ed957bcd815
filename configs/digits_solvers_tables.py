"""Today's solvers with B, SA-2 and the shift of the noise level: digits, five seeds.

DDIM at the solvers' steps tells what the solver adds and what its choice of steps. The store is
that of configs/digits_tables.py. See docs/sampling.md; the rows need the extra "diffusers".
"""

from configs import digits_tables
from configs.comparison import part, sampling

ROWS = ("ddpm_small", "ddim", "sn_ddim", "ddim_solver", "dpm_solver", "unipc", "deis", "ipndm")


def get_config():
    config = digits_tables.five_seeds("digits_solvers", "Fast solvers with the SA loss, on digits")
    config.samplings = {
        "default": sampling(""),
        "shifted": sampling("shifted q 1/3", correction="shifted", q=1 / 3),
    }
    lines = ("b", "sa", "b/shifted")
    config.parts = {"rows": part("Equal steps", lines, ROWS, (5, 8, 10, 15, 20, 25))}
    config.tables = ("rows",)
    return config
