"""Table 1 of arXiv 2312.12431: FID of B and SA for all reverse processes, with controls."""

from configs import celeba64
from configs.comparison import paper_table


def get_config():
    title = "Table 1, CelebA 64x64: FID"
    return paper_table("table1_celeba64", title, celeba64.get_config("sn"), "fid")
