"""Tables 1 and 2 on Fashion-MNIST at 32x32, with controls: about a day on one GPU (estimated)."""

from configs import fashion
from configs.comparison import base_comparison, tables_1_and_2


def get_config():
    config = base_comparison()
    config.name = config.store = "fashion"
    config.title = "The SA loss and optimal reverse variances on Fashion-MNIST"
    experiment = fashion.get_config("sn")
    experiment.evaluate.features = ("fashion_classifier", "pixels")
    tables_1_and_2(config, experiment, tuple(experiment.sample.steps))
    config.gap.trainings = ("b", "sa")
    return config
