"""What the gain of SA depends on: K and lambda, the average, the length and more; five seeds.

K and lambda are the three published settings (Table 4 of arXiv 2312.12431) and three others: those
of configs/digits_effect_tables.py, whose store this is. "Held out" trains on two thirds of the
digits and measures against the last third. A longer training goes on from a shorter one; 10,000
iterations, and B's 20,000 at equal compute, cost more than all the rest.
"""

from configs import digits_tables
from configs.comparison import CONTROLLED, baseline, part, sa, sampling, training

HELD_OUT = {"data": {"split": "train"}, "evaluate": {"reference": "test"}}


def both(name: str, title: str, **sections: dict) -> dict[str, dict]:
    """B and SA-2 with other settings, as trainings b_NAME and sa_NAME."""
    return {
        f"b_{name}": training(f"{{loss}}, {title}", sa={"lam": 0.0}, **sections),
        f"sa_{name}": training(f"{{loss}}, {title}", **sections),
    }


def get_config():
    config = digits_tables.five_seeds(
        "digits_ablations", "What the gain of SA depends on, on digits"
    )
    pairs = {"b": baseline(), "sa": sa()}
    weights = {
        "sa3_03": sa(3, 0.3),
        "sa4_02": sa(4, 0.2),
        "sa_02": sa(2, 0.2),
        "sa_3": sa(2, 3.0),
        "sa4": sa(4, 1.0),
    }
    averages = both("ema990", "average 0.99", base={"ema": 0.99})
    averages |= both("ema999", "average 0.999", base={"ema": 0.999})
    lengths = both("3000", "3,000 iterations", base={"iterations": 3000})
    longest = both("10000", "10,000 iterations", base={"iterations": 10_000})
    longest["b_20000"] = training(  # as many calls as SA-2 with 10,000
        "{loss}, 20,000 iterations", sa={"lam": 0.0}, base={"iterations": 20_000}
    )
    held_out = both("held", "held out", **HELD_OUT)
    bf16 = both("bf16", "trained in bf16", base={"precision": "bf16"})
    config.trainings = pairs | weights | averages | lengths | longest | held_out | bf16
    config.samplings = {
        "default": sampling(""),
        "shifted": sampling("shifted q 1/3", correction="shifted", q=1 / 3),
    }
    steps = (5, 10, 25, 50)
    tables = {
        "weights": ("K and lambda", (*pairs, *weights)),
        "average": ("The average of the weights", (*pairs, *averages)),
        "length": ("The length of the training", (*pairs, *lengths)),
        "longest": ("Ten times the training", (*pairs, *longest, "b_10000/shifted")),
        "held_out": ("Against unseen digits", tuple(held_out)),
        "precision": ("Trained in bf16", (*pairs, *bf16)),
    }
    config.parts = {name: part(*told, CONTROLLED, steps) for name, told in tables.items()}
    config.tables = tuple(tables)
    return config
