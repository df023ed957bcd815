"""Options of the SA loss against SA-2 as it is: less variance, an easier start; digits, five seeds.

Shares its store with configs/digits_tables.py: what that has computed is not computed again.
"""

from configs import digits_tables
from configs.comparison import CONTROLLED, part, sa


def get_config():
    config = digits_tables.get_config()
    config.name = "digits_options"
    config.title = "Options of the SA loss on digits"
    config.seeds = (0, 1, 2, 3, 4)
    quarter = config.experiment.base.iterations // 4
    config.trainings = {"sa": sa(), "sa_reuse": sa(reuse=True), "sa_rise": sa(lam_warmup=quarter)}
    steps = config.parts.main.steps
    config.parts = {"options": part("Options", tuple(config.trainings), CONTROLLED, steps)}
    config.tables = ("options",)
    config.gap.trainings = ()
    return config
