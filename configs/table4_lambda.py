"""Table 4 of arXiv 2312.12431 on CIFAR10: K = 2, 3, 4 with lambdas around 1, 0.3, 0.2.

These three settings are published; half and double of each lambda are ours.
"""

from configs import cifar10
from configs.comparison import CONTROLLED, base_comparison, baseline, part, sa

PUBLISHED = {2: 1.0, 3: 0.3, 4: 0.2}


def get_config():
    config = base_comparison()
    config.name = "table4_lambda"
    config.title = "Table 4, CIFAR10: FID over K and lambda"
    config.store = "cifar10"
    config.experiment = cifar10.get_config("sn")
    config.trainings = {"b": baseline()} | {
        f"sa{K}_{name}": sa(K, lam * factor)
        for K, lam in PUBLISHED.items()
        for name, factor in (("half", 0.5), ("published", 1.0), ("double", 2.0))
    }
    lines = ("b", *(f"sa{K}_{name}" for K in PUBLISHED for name in ("half", "published", "double")))
    config.parts = {"main": part("K and lambda", lines, CONTROLLED, (10, 25, 50, 100))}
    config.tables = ("main",)
    config.metrics = ("fid", "sample_variance")
    return config
