"""Rows of Table 1 on Fashion-MNIST, shortened for a CPU: half an hour on two cores.

0.2M parameters and 25,600 training images are too few for good pictures. Two seeds are too few to
draw a conclusion (docs/results/fashion_short.md). configs/fashion_tables.py is the full experiment.
"""

from configs import digits, fashion
from configs.comparison import base_comparison, baseline, part, sa


def get_config():
    config = base_comparison()
    config.name = config.store = "fashion_short"
    config.title = "The SA loss on Fashion-MNIST, shortened"
    config.seeds = (0, 1)
    experiment = fashion.get_config("sn")
    small = digits.get_config("sn")
    experiment.network = small.network
    experiment.base.update(small.base, iterations=800, batch_size=32)
    experiment.head.update(small.head, iterations=200, batch_size=32)
    experiment.sample.update(n_images=300, batch_size=100, steps=(10, 25))
    experiment.evaluate.features = ("fashion_classifier",)
    config.experiment = experiment
    config.trainings = {"b": baseline(), "sa": sa()}
    rows = ("ddpm_small", "sn_ddpm", "ddim")
    config.parts = {"main": part("Equal iterations", ("b", "sa"), rows, experiment.sample.steps)}
    config.tables = ("main",)
    config.gap.trainings = ()
    return config
