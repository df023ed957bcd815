"""Table 1 of arXiv 2312.12431: FID of B and SA for all reverse processes, with controls."""

from configs import cifar10
from configs.comparison import paper_table


def get_config():
    title = "Table 1, CIFAR10: FID"
    return paper_table("table1_cifar10", title, cifar10.get_config("sn"), "fid")
