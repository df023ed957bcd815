"""Table 2 of arXiv 2312.12431: the Inception Score of the same cells as Table 1."""

from configs import celeba64
from configs.comparison import paper_table


def get_config():
    title = "Table 2, CelebA 64x64: Inception Score"
    return paper_table("table2_celeba64", title, celeba64.get_config("sn"), "inception_score")
