"""Table 1 of arXiv 2312.12431: FID of B and SA with every reverse process, and controls."""

from configs import celeba64
from configs.comparison import base_comparison, published, tables_1_and_2


def get_config():
    config = base_comparison()
    config.name = "table1_celeba64"
    config.title = "Table 1, CelebA 64x64: FID"
    config.store = "celeba64"
    tables_1_and_2(config, celeba64.experiment("sn"))
    config.metrics = ("fid", "sample_variance")
    config.published = published("celeba64")
    return config
