"""The cost of a grid, estimated before it is run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from adapters.comparison.grid import Line
from adapters.comparison.plan import Plan
from adapters.comparison.tasks import CellTask, EpsScaleTask, GapTask, StageTask, Task
from adapters.experiment.experiment import Experiment
from adapters.experiment.gamma_stage import GammaStage
from adapters.experiment.tables import table
from adapters.sampling.pipeline import slice_size

PROBE_SECONDS = 1.0
PROBE_FLOP = 1e10  # of one call, unless an image takes more


def plan_table(plan: Plan) -> str:
    """The tasks by kind: how many there are, how many are left, and their evaluations."""
    return _table(plan, ["evaluations"], lambda evaluations: [f"{evaluations:.3g}"])


def plan_text(plan: Plan) -> str:
    """``plan_table`` with the cost in FLOP and hours."""
    flop = flop_per_image(plan)
    rate = measured_rate(plan, flop)

    def cost(evaluations: float) -> list[str]:
        numbers = (evaluations, evaluations * flop / 1e15, evaluations / rate / 3600)
        return [f"{number:.3g}" for number in numbers]

    return (
        f"{_table(plan, ['evaluations', 'PFLOP', 'hours'], cost)}\n"
        f"An evaluation: one image through the network, {flop / 1e9:.3g} GFLOP; a backward pass "
        f"counts as two. Hours: one worker at {rate:.3g} evaluations a second, measured just now "
        "in forward passes on this machine.\n"
    )


def _table(plan: Plan, costs: Sequence[str], cost: Callable[[float], list[str]]) -> str:
    kinds: dict[str, list[Task]] = {}
    for task in plan.in_order():
        kinds.setdefault(kind_of(task), []).append(task)
    kinds["all"] = plan.in_order()
    rows = []
    for kind, tasks in kinds.items():
        left = [task for task in tasks if not task.is_done()]
        evaluations = sum(task.evaluations for task in left)
        rows.append([kind, str(len(tasks)), str(len(left)), *cost(evaluations)])
    store = plan.store
    title = f"{store.grid.config.name} in {store.folder} on {store.device}"
    return f"{title}\n\n{table(['', 'tasks', 'to do', *costs], rows, left=1)}"


def flop_per_image(plan: Plan) -> float:
    """FLOP of one forward pass of the noise network, counted without computing it."""
    call = _call(any_experiment(plan), torch.device("meta"), 1)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return float(counter.get_total_flops())


def measured_rate(plan: Plan, flop: float) -> float:
    """Images a second in forward passes on this machine; ``flop``: of one image.

    A large network gets one image a call, which bounds the memory and the time; a small one gets
    more, which are faster. It takes one call or about ``PROBE_SECONDS``.
    """
    experiment = any_experiment(plan)
    count = max(1, min(slice_size(experiment.image_shape), int(PROBE_FLOP / flop)))
    call = _call(experiment, experiment.device, count)
    seconds: list[float] = []
    with torch.no_grad():
        while sum(seconds) < PROBE_SECONDS:
            began = time.perf_counter()
            call().sum().item()
            seconds.append(time.perf_counter() - began)
    later = seconds[1:] or seconds  # the first call is slower
    return count * len(later) / sum(later)


def _call(experiment: Experiment, device: torch.device, count: int) -> Callable[[], Tensor]:
    """A call of a new noise network with this many images."""
    network = experiment.network(experiment.base_method, device).eval()
    x = torch.zeros(count, *experiment.image_shape, device=device)
    n = torch.ones(count, dtype=torch.int64, device=device)
    labels = {} if experiment.label_rows is None else {"y": torch.zeros_like(n)}
    return lambda: network(x, n, **labels)


def any_experiment(plan: Plan) -> Experiment:
    """An experiment of the grid's first training."""
    line = Line(next(iter(plan.store.grid.config.trainings)))
    return plan.store.experiment(line, plan.store.grid.seeds[0], None)


def kind_of(task: Task) -> str:
    """The row of a task in ``plan_table``."""
    if isinstance(task, StageTask):
        if isinstance(task.stage, GammaStage):
            return "Gamma"
        return "noise networks" if task.stage.trunk is None else "heads"
    names = {CellTask: "cells", EpsScaleTask: "epsilon scaling", GapTask: "gap curves"}
    return names[type(task)]
