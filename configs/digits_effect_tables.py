"""What SA does, and what does the same without training: digits, five seeds.

SA-2 with lambda 3 and SA-4 with lambda 1 have the same strength q = lambda (K-1)/(K+lambda), 0.6.
"Price of B" is SA-2 with ``reuse`` and half the images a step: as many network calls as B. The
corrections are those of sa_plugin.effect. See docs/why_sa_works.md.
"""

from configs import digits_tables
from configs.comparison import CONTROLLED, baseline, part, sa, sampling, training

OPTIMAL = ("analytic_ddpm", "npr_ddpm", "sn_ddpm", "analytic_ddim", "npr_ddim", "sn_ddim")


def get_config():
    config = digits_tables.get_config()
    config.name = "digits_effect"
    config.title = "What the SA loss does, on digits"
    config.seeds = (0, 1, 2, 3, 4)
    half = {"batch_size": config.experiment.base.batch_size // 2}
    config.trainings = {
        "b": baseline(),
        "sa": sa(),
        "sa_price": training("SA-2, price of B", sa={"reuse": True}, base=half),
        "sa_3": sa(2, 3.0),
        "sa4": sa(4, 1.0),
    }
    config.samplings = {
        "default": sampling(""),
        "spectral": sampling("spectral q 1/3", correction="spectral", q=1 / 3),
        "shifted": sampling("shifted q 1/3", correction="shifted", q=1 / 3),
        "spectral_best": sampling("spectral best q", correction="spectral"),
        "shifted_best": sampling("shifted best q", correction="shifted"),
    }
    steps = config.parts.main.steps
    corrected = tuple(f"b/{name}" for name in config.samplings if name != "default")
    few = ("b", "sa", "b/shifted", "b/shifted_best")
    config.parts = {
        "sampling": part("At sampling time", ("b", "sa", *corrected), CONTROLLED, steps),
        "strength": part("Strengths", tuple(config.trainings), CONTROLLED, steps),
        "optimal": part("With the optimal variances", few, OPTIMAL, (5, 10, 25)),
    }
    config.tables = ("sampling", "strength")
    config.gap.trainings = ()
    return config
