"""Table 2 of arXiv 2312.12431: the Inception Score, of the same cells as Table 1."""

from configs import celeba64
from configs.comparison import base_comparison, tables_1_and_2


def get_config():
    config = base_comparison()
    config.name = "table2_celeba64"
    config.title = "Table 2, CelebA 64x64: Inception Score"
    config.store = "celeba64"
    tables_1_and_2(config, celeba64.experiment("sn"))
    config.metrics = ("inception_score",)
    return config
