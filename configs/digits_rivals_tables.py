"""SA against its rivals on digits, five seeds: input perturbation, epsilon scaling, a shifted step.

Input perturbation is arXiv 2301.11706, epsilon scaling arXiv 2308.15321. This comparison shares its
store with configs/digits_tables.py; cells computed there are not computed again.
"""

from configs import digits_tables
from configs.comparison import CONTROLLED, baseline, part, sa, sampling, training

PERTURBED = {"input_perturbation": 0.1}


def get_config():
    config = digits_tables.five_seeds("digits_rivals", "SA and its rivals on digits")
    config.trainings = {
        "b": baseline(),
        "sa": sa(),
        "perturbed": training("{loss}, input perturbation 0.1", sa={"lam": 0.0}, base=PERTURBED),
        "sa_perturbed": training("{loss}, input perturbation 0.1", base=PERTURBED),
    }
    config.samplings.update(
        line=sampling("epsilon scaling, fitted line", eps_scale="line"),
        shifted=sampling("shifted q 1/3", correction="shifted", q=1 / 3),
    )
    lines = (*config.trainings, "b/scaled", "b/line", "b/shifted")
    config.parts = {"rivals": part("Rivals", lines, CONTROLLED, (5, 10, 25, 50))}
    config.tables = ("rivals",)
    return config
