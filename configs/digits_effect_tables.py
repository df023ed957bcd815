"""Does SA act through q = lambda (K-1)/(K+lambda) alone, and at what price? Digits, five seeds.

SA-2 with lambda 3 and SA-4 with lambda 1 have the same q, 0.6. "Price of B" is SA-2 with ``reuse``
and half the images a step: as many network calls as the baseline. See docs/why_sa_works.md.
"""

from configs import digits_tables
from configs.comparison import CONTROLLED, baseline, part, sa, training


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
    config.parts = {
        "strength": part("Strengths", tuple(config.trainings), CONTROLLED, config.parts.main.steps),
    }
    config.tables = ("strength",)
    config.gap.trainings = ()
    return config
