"""Table 1 of arXiv 2312.12431: FID of B and SA with every reverse process, and controls."""

from configs import cifar10
from configs.comparison import base_comparison, published, tables_1_and_2


def get_config():
    config = base_comparison()
    config.name = "table1_cifar10"
    config.title = "Table 1, CIFAR10: FID"
    config.store = "cifar10"
    tables_1_and_2(config, cifar10.experiment("sn"))
    config.metrics = ("fid", "sample_variance")
    config.published = published("cifar10")
    return config
