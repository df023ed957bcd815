"""Table 2 of arXiv 2312.12431: the Inception Score, of the same cells as Table 1."""

from configs import cifar10
from configs.comparison import base_comparison, tables_1_and_2


def get_config():
    config = base_comparison()
    config.name = "table2_cifar10"
    config.title = "Table 2, CIFAR10: Inception Score"
    config.store = "cifar10"
    tables_1_and_2(config, cifar10.experiment("sn"))
    config.metrics = ("inception_score",)
    return config
