"""What the gain of SA depends on: K and lambda, the average, the length and more; five seeds.

K and lambda are those of configs/table4_lambda.py. "Held out" trains on two thirds of the digits
and measures against the last third. The store is that of configs/digits_tables.py; a longer
training goes on from a shorter one.
"""

from configs import digits_tables, table4_lambda
from configs.comparison import CONTROLLED, baseline, part, sa, sampling, training

HELD_OUT = {"data": {"split": "train"}, "evaluate": {"reference": "test"}}


def both(name: str, title: str, **sections: dict) -> dict[str, dict]:
    """B and SA-2 with other settings, as trainings b_NAME and sa_NAME."""
    return {
        f"b_{name}": training(f"B, {title}", sa={"lam": 0.0}, **sections),
        f"sa_{name}": training(f"SA-2, {title}", **sections),
    }


def get_config():
    config = digits_tables.five_seeds(
        "digits_ablations", "What the gain of SA depends on, on digits"
    )
    pairs = {"b": baseline(), "sa": sa()}
    weights = {
        f"sa{K}_{lam * factor:g}".replace(".", ""): sa(K, round(lam * factor, 2))
        for K, lam in table4_lambda.PUBLISHED.items()
        for factor in (0.5, 1.0, 2.0)
        if (K, factor) != (2, 1.0)
    }
    averages = both("ema990", "average 0.99", base={"ema": 0.99})
    averages |= both("ema999", "average 0.999", base={"ema": 0.999})
    lengths = both("3000", "3,000 iterations", base={"iterations": 3000})
    lengths |= both("10000", "10,000 iterations", base={"iterations": 10_000})
    held_out = both("held", "held out", **HELD_OUT)
    bf16 = both("bf16", "trained in bf16", base={"precision": "bf16"})
    config.trainings = pairs | weights | averages | lengths | held_out | bf16
    config.samplings = {
        "default": sampling(""),
        "unclipped": sampling("x_0 not clipped", clip_x0=False),
    }
    steps = (5, 10, 25, 50)
    tables = {
        "weights": ("K and lambda", (*pairs, *weights)),
        "average": ("The average of the weights", (*pairs, *averages)),
        "length": ("The length of the training", (*pairs, *lengths)),
        "clip": ("x_0 not clipped", ("b/unclipped", "sa/unclipped")),
        "held_out": ("Against unseen digits", tuple(held_out)),
        "precision": ("Trained in bf16", (*pairs, *bf16)),
    }
    config.parts = {name: part(*told, CONTROLLED, steps) for name, told in tables.items()}
    config.tables = tuple(tables)
    return config
