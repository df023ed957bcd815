"""backprop "one" against "all" on digits: five seeds, equal iterations or equal time.

A step with ``backprop="one"`` took 0.78 of the time of a step with ``"all"`` (docs/performance.md),
so 1.25 times the iterations fit into the time of ``"all"``. This comparison shares its store with
configs/digits_tables.py; cells computed there are not computed again.
"""

from configs import digits_tables
from configs.comparison import CONTROLLED, part, sa, training


def get_config():
    config = digits_tables.five_seeds("digits_one", "SA-2 with one backward pass a step, on digits")
    config.trainings = {
        "sa": sa(),
        "sa_one": sa(backprop="one"),
        "sa_one_longer": training(
            "{loss}, backprop one, 1.25 times the iterations",
            times={"iterations": 1.25},
            sa={"backprop": "one"},
        ),
    }
    steps = config.parts.main.steps
    config.parts = {
        "one": part("Equal iterations", ("sa", "sa_one"), CONTROLLED, steps),
        "time": part("Equal time", ("sa", "sa_one_longer"), CONTROLLED, steps),
    }
    config.tables = ("one", "time")
    return config
