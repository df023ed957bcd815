"""Figure 4 of arXiv 2312.12431 on CIFAR10: the total gap from x_300 for B and SA-2, 3, 4."""

from configs import cifar10
from configs.comparison import base_comparison, baseline, sa
from configs.table4_lambda import PUBLISHED


def get_config():
    config = base_comparison()
    config.name = "figure4_gap"
    config.title = "Figure 4, CIFAR10: the gap from x_300"
    config.store = "cifar10"
    config.experiment = cifar10.get_config("sn")
    config.trainings = {"b": baseline()} | {f"sa{K}": sa(K, lam) for K, lam in PUBLISHED.items()}
    config.gap.trainings = ("b", *(f"sa{K}" for K in PUBLISHED))
    return config
