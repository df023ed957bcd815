"""Table 3 of arXiv 2312.12431: FID of B and SA on CelebA-HQ 256x256, DDPM and DDIM."""

from configs import celebahq256
from configs.comparison import COLUMNS, CONTROLLED, base_comparison, baseline, part, sa


def get_config():
    config = base_comparison()
    config.name = "table3_celebahq256"
    config.title = "Table 3, CelebA-HQ 256x256: FID"
    config.store = "celebahq256"
    config.experiment = celebahq256.get_config("sn")
    config.trainings = {"b": baseline(), "sa": sa()}
    config.parts = {"main": part("Equal iterations", ("b", "sa"), CONTROLLED, COLUMNS)}
    config.tables = ("main",)
    config.metrics = ("fid", "sample_variance")
    return config
