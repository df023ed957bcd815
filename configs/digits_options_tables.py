"""Options of the SA loss against plain SA-2: less variance, an easier start; digits, five seeds.

This comparison shares its store with configs/digits_tables.py; cells computed there are not
computed again.
"""

from configs import digits_tables
from configs.comparison import CONTROLLED, part, sa


def get_config():
    config = digits_tables.five_seeds("digits_options", "Options of the SA loss on digits")
    quarter = config.experiment.base.iterations // 4
    config.trainings = {"sa": sa(), "sa_reuse": sa(reuse=True), "sa_rise": sa(lam_warmup=quarter)}
    steps = config.parts.main.steps
    config.parts = {"options": part("Options", tuple(config.trainings), CONTROLLED, steps)}
    config.tables = ("options",)
    return config
