"""Tables 1 and 2 on scikit-learn's digits, with controls and gap curves; 33 minutes on 2 cores."""

from configs import digits
from configs.comparison import (
    CONTROLLED,
    ROWS,
    base_comparison,
    baseline,
    control_samplings,
    equal_compute,
    part,
    sa,
)


def get_config():
    config = base_comparison()
    config.name = config.store = "digits"
    config.title = "The SA loss and optimal reverse variances on digits"
    config.seeds = (0, 1, 2)
    config.experiment = digits.get_config("sn")
    config.trainings = {
        "b": baseline(),
        "sa": sa(),
        "b_equal": equal_compute(),
    }
    config.samplings = control_samplings()
    steps = tuple(config.experiment.sample.steps)
    few = steps[:-1]  # the last column of the controls would cost as much as all others
    unclipped = ("b/unclipped", "sa/unclipped")
    config.parts = {
        "main": part("Equal iterations", ("b", "sa"), ROWS, steps),
        "compute": part("Equal compute", ("b_equal", "sa"), CONTROLLED, few),
        "scaled": part("B with eps scaled", ("b/scaled", "b", "sa"), CONTROLLED, few),
        "unclipped": part("x_0 not clipped", unclipped, CONTROLLED, few),
    }
    config.tables = ("main", "compute", "scaled", "unclipped")
    config.gap.update(trainings=("b", "sa"), batch_size=256)
    return config


def five_seeds(name: str, title: str):
    """Another comparison of the same experiment and store: five seeds, no gap curves."""
    config = get_config()
    config.update(name=name, title=title, seeds=(0, 1, 2, 3, 4))
    config.gap.trainings = ()
    return config
