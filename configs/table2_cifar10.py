"""Table 2 of arXiv 2312.12431: the Inception Score of the same cells as Table 1."""

from configs import cifar10
from configs.comparison import paper_table


def get_config():
    title = "Table 2, CIFAR10: Inception Score"
    return paper_table("table2_cifar10", title, cifar10.get_config("sn"), "inception_score")
