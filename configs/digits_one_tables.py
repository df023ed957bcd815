"""One backward pass a step against all of them, on digits: five seeds, equal iterations.

Shares its store with configs/digits_tables.py: what that has computed is not computed again.
"""

from configs import digits_tables
from configs.comparison import CONTROLLED, part, sa


def get_config():
    config = digits_tables.get_config()
    config.name = "digits_one"
    config.title = "SA-2 with one backward pass a step, on digits"
    config.seeds = (0, 1, 2, 3, 4)
    config.trainings = {"sa": sa(), "sa_one": sa(backprop="one")}
    steps = config.parts.main.steps
    config.parts = {"one": part("One backward pass", ("sa", "sa_one"), CONTROLLED, steps)}
    config.tables = ("one",)
    config.gap.trainings = ()
    return config
