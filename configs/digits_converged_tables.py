"""Does the effect survive convergence? Digits, 6,000 iterations, images held out from training.

The rate falls to 0 over the second half. Two thirds of the digits are trained on; metrics compare
with the last third. See docs/why_sa_works.md.
"""

from configs import digits_effect_tables
from configs.comparison import CONTROLLED, baseline, part, sa, sampling


def get_config():
    config = digits_effect_tables.get_config()
    config.name = "digits_converged"
    config.title = "What the SA loss does after 6,000 iterations, against held-out digits"
    config.seeds = (0, 1, 2)
    config.experiment.data.split = "train"
    config.experiment.base.update(iterations=6000, lr_decay=3000, ema=0.997, ckpt_every=1000)
    config.experiment.evaluate.reference = "test"
    config.trainings = {"b": baseline(), "sa": sa()}
    config.samplings = {
        "default": sampling(""),
        "shifted_01": sampling("shifted q 0.1", correction="shifted", q=0.1),
        "shifted": sampling("shifted q 1/3", correction="shifted", q=1 / 3),
        "shifted_best": sampling("shifted best q", correction="shifted"),
    }
    lines = ("b", "sa", "b/shifted_01", "b/shifted", "b/shifted_best")
    config.parts = {"main": part("6,000 iterations", lines, CONTROLLED, (5, 10, 25, 50))}
    config.tables = ("main",)
    return config
