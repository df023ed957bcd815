"""All keys of a comparison, and the parts from which the papers' tables are built.

A comparison is a grid: trainings x seeds x reverse processes x steps. Each cell is computed once
and stored under the settings that determine it, so comparisons with one store share their cells.
Values are numbers and strings.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.base import KEYS as EXPERIMENT_KEYS
from configs.base import PROCESSES
from configs.keys import LARGEST_SEED, Keys, defaults, key
from configs.published import published

# The rows of the SA paper's Tables 1 and 2: each as B and SA.
ROWS = (
    "ddpm_small",
    "ddpm_big",
    "analytic_ddpm",
    "npr_ddpm",
    "sn_ddpm",
    "ddim",
    "analytic_ddim",
    "npr_ddim",
    "sn_ddim",
)
CONTROLLED = ("ddpm_small", "ddim")  # the rows of the controls
OCM = ("ocm_ddpm", "ocm_ddim")
# Every estimate of Cov[x_0 | x_t].
COVARIANCES = tuple(
    f"{name}_{forward}"
    for forward in ("ddpm", "ddim")
    for name in ("analytic", "npr", "sn", "ocm", "probes", "lanczos")
)
COLUMNS = (10, 25, 50, 100, 200, 1000)


def sampling(
    title: str,
    *,
    eps_scale: float | str = 1.0,
    correction: str = "",
    q: float = 0.0,
    **keys: object,
) -> dict:
    """A way to sample, given by the keys of experiment.sample that it changes.

    Args:
        eps_scale: factor of the predicted eps. Of the section eps_scale, 0: the fitted constant;
            "line": the fitted line.
        correction: "", or one of adapters.comparison.corrections.
        q: its strength; 0: the best predicted one for the data, the row and the number of steps.
    """
    return {
        "title": title,
        "eps_scale": eps_scale,
        "correction": correction,
        "q": q,
        "set": keys,
    }


KEYS: Keys = {
    "name": key("", "name of the report", filled=True),
    "title": key("", "title of the report"),
    "store": key("", "trainings and cells are in runs/compare/STORE", filled=True),
    # The common settings of all trainings; `seeds` sets its `seed` and `sample.seed`.
    "experiment": EXPERIMENT_KEYS,
    "seeds": key(
        (0,),
        "for weights, data order and noise in training, and for the samples",
        at_least=0,
        at_most=LARGEST_SEED,
        filled=True,
        distinct=True,
    ),
    "trainings": key({}, "by name, made by training()", free=True),
    "samplings": key(
        {"default": sampling("")}, "ways to sample, by name, made by sampling()", free=True
    ),
    "parts": key({}, "tables by name, made by part()", free=True),
    "tables": key((), "the parts to compute, in the order of the report", distinct=True),
    # Epsilon scaling (arXiv 2308.15321): eps is divided by a constant or by a line k n + c_0, which
    # minimises the first metric of one cell on images of another seed.
    "eps_scale": {
        "process": key("ddpm_small", "the row in which it is fitted", one_of=PROCESSES),
        "steps": key(10, "its number of steps", at_least=1),
        "n_images": key(1000, "its number of images", at_least=2),
        "low": key(0.9, "smallest factor of eps", above=0),
        "high": key(1.05, "largest factor of eps", above=0),
        "evaluations": key(10, "constants tried; of lines twice as many", at_least=1),
    },
    # Figure 4: the total gap from x_start.
    "gap": {
        "trainings": key((), "the trainings that have a curve"),
        "start": key(300, "the step at which the chains start", at_least=2),
        "n_images": key(256, "number of chains", at_least=2),
        "batch_size": key(64, "images a call of the network", at_least=1),
    },
    "published": key(
        {}, 'published numbers, by name: title, metric, source, values {"10": ...}', free=True
    ),
    "metrics": key((), "metrics for which the report has tables; (): all measured ones"),
}


# A comparison sets these keys of its experiment by others.
INSTEAD = {
    "experiment.seed": "seeds",
    "experiment.sample.seed": "seeds",
    "experiment.sample.steps": "parts.NAME.steps",
    "experiment.sample.processes": "parts.NAME.processes",
    "experiment.baseline": "trainings and parts.NAME.lines",
}


def base_comparison() -> ConfigDict:
    """An empty comparison, for an experiment to be set."""
    return defaults(KEYS)


def training(
    title: str, *, init: str = "", times: dict[str, float | str] | None = None, **sections: dict
) -> dict:
    """A training, given by the keys of the experiment that it changes.

    Args:
        title: "{loss}" in it stands for "B", or such as "SA-2": what is trained.
        init: another training, whose averaged network it starts from.
        times: factors of base.iterations and base.batch_size. "K" is the K of the section sa, and
            "1/K" its inverse.
    """
    return {"title": title, "init": init, "times": times or {}, "set": sections}


def part(
    title: str, lines: tuple[str, ...], processes: tuple[str, ...], steps: tuple[int, ...]
) -> dict:
    """A table: each reverse process with each line, a training or "TRAINING/SAMPLING", by steps.

    The other lines are compared with the first line.
    """
    return {"title": title, "lines": lines, "processes": processes, "steps": steps}


def baseline() -> dict:
    """The host's own training."""
    return training("{loss}", sa={"lam": 0.0})


def equal_compute() -> dict:
    """The baseline with as many evaluations of the network as the experiment's SA-K."""
    return training("{loss}, equal compute", times={"iterations": "K"}, sa={"lam": 0.0})


def price_of_b() -> dict:
    """SA with as many evaluations of the network as B: 1/K of the images a step, ``sa.reuse``.

    The batch is rounded, so it must be a multiple of K for equal prices.
    """
    return training("{loss}, price of B", times={"batch_size": "1/K"}, sa={"reuse": True})


def sa(K: int | None = None, lam: float | None = None, **keys: object) -> dict:
    """SA-K; by default with the experiment's K and lambda. ``keys``: others of the section sa."""
    title = "{loss}" + "".join(f", {name} {value}" for name, value in keys.items())
    given = {name: value for name, value in (("K", K), ("lam", lam)) if value is not None}
    return training(title, sa={**given, **keys})


def control_samplings() -> dict[str, dict]:
    """The ways to sample that separate the effect of SA from simpler causes."""
    return {
        "default": sampling(""),
        "scaled": sampling("epsilon scaling, fitted constant", eps_scale=0.0),
        "unclipped": sampling("x_0 not clipped", clip_x0=False),
    }


def paper_table(name: str, title: str, experiment: ConfigDict, metric: str) -> ConfigDict:
    """Table 1 ("fid") or 2 ("inception_score") of DATA; ``name`` is TABLE_DATA.

    B and SA in all rows, and the controls in the rows of DDPM and DDIM.
    """
    data = name.split("_", 1)[1]
    config = base_comparison()
    config.name, config.title, config.store = name, title, data
    config.experiment = experiment
    config.metrics = (metric,)
    if metric == "fid":
        config.metrics += ("sample_variance",)
        config.published = published(data)
    config.trainings = {
        "b": baseline(),
        "sa": sa(),
        "b_equal": equal_compute(),
        "sa_one": sa(backprop="one"),
        "sa_theorem1": sa(weighting="theorem1"),
        "sa_relative": sa(weighting="relative"),
        "sa_shared": sa(noise="shared"),
        "sa_chain": sa(noise="chain"),
    }
    config.samplings = control_samplings()
    forms = ("b", "sa", "sa_one", "sa_theorem1", "sa_relative", "sa_shared", "sa_chain")
    unclipped = ("b/unclipped", "sa/unclipped")
    config.parts = {
        "main": part("Equal iterations", ("b", "sa"), ROWS, COLUMNS),
        "compute": part("Equal compute", ("b_equal", "sa"), ROWS, COLUMNS),
        "ocm": part("OCM, which the paper does not have", ("b", "sa"), OCM, COLUMNS),
        "scaled": part("B with eps scaled", ("b/scaled", "b", "sa"), CONTROLLED, COLUMNS),
        "unclipped": part("x_0 not clipped", unclipped, CONTROLLED, COLUMNS),
        "forms": part("Forms of the SA loss", forms, CONTROLLED, COLUMNS),
    }
    config.tables = ("main", "ocm", "compute", "scaled", "unclipped", "forms")
    return config
