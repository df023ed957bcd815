"""Compute the grid of a comparison, each cell once, and write its report.

    python -m adapters.compare --config configs/digits_tables.py
    python -m adapters.compare --config configs/table1_cifar10.py --dry_run
    python -m adapters.compare --config configs/table1_cifar10.py --scheduler tcp://HOST:8786

The same command continues an interrupted grid. A larger grid reuses the results that exist. With
``--scheduler`` the tasks run on a Dask cluster: see docs/comparison.md.
"""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from ml_collections import FrozenConfigDict

from adapters.comparison.cost import any_experiment, kind_of, plan_table, plan_text
from adapters.comparison.engine import (
    Outcome,
    Progress,
    in_local_processes,
    in_this_process,
    on_cluster,
)
from adapters.comparison.grid import Grid
from adapters.comparison.plan import Plan
from adapters.comparison.report import write_report
from adapters.comparison.store import Store
from adapters.experiment.checks import cautions, check_data
from adapters.experiment.config import (
    COMPARISON,
    LOCK_FILE,
    PATIENCE,
    read_command_line,
)
from adapters.experiment.own_images import check_images, record_images
from adapters.shell.command import EXIT_FAILED, exit_code, keep_freed_memory
from adapters.shell.locks import locked
from adapters.shell.options import own_options
from sa_files.writing import remove_unfinished

logger = logging.getLogger(__name__)

MODULE = "adapters.compare"
MOST_WORKERS = 8  # unless asked for more: each holds a network and the images' features


@dataclass(frozen=True)
class PlanMaker:
    """Makes the plan; can be sent to another process."""

    config: FrozenConfigDict
    workdir: Path
    device: str
    progress: bool = False

    def __call__(self) -> Plan:
        store = Store(Grid(self.config), self.workdir, self.device, self.progress)
        return Plan(store)


def compare(argv: Sequence[str]) -> bool:
    """Compute the grid and write the report; return whether all tasks are done."""
    args, rest = _parse(argv)
    line = read_command_line([argv[0], *rest], (), MODULE, COMPARISON)
    if args.workers is not None and args.workers < 1:
        raise ValueError(f"--workers must be >= 1, got {args.workers}")
    if args.workers is not None and args.scheduler is not None:
        raise ValueError("--workers and --scheduler exclude each other: a cluster has its workers")
    workers = args.workers or _default_workers(line.device)
    alone = workers == 1 and args.scheduler is None
    make_plan = PlanMaker(line.config, line.workdir, line.device, line.progress and alone)
    plan = make_plan()
    if line.dry_run:
        experiment = any_experiment(plan)
        if not all(task.is_done() for task in plan.tasks.values()):
            check_data(experiment.config.data)
        print(plan_text(plan))
        for caution in cautions(experiment, ("base", "head", "evaluate")):
            print(f"warning: {caution}")
        return True
    _ = plan.store.dataset  # raises for a missing dataset before anything is written
    own = [(line.workdir, data, dataset) for data, dataset in plan.store.datasets()]
    try:
        for images in own:
            check_images(*images)
    except ValueError as error:
        if not args.report_only:
            raise
        logger.warning("warning: %s", error)
    failures = []
    if not args.report_only:
        print(plan_table(plan), flush=True)
        with _claimed(line.workdir):
            for images in own:
                record_images(*images)
            plan.restore()
            failures = list(_computed(make_plan, plan, workers, args.scheduler))
    path = write_report(plan, f"python -m {MODULE} {shlex.join(argv[1:])}", failures)
    print(path.read_text().split("## Pictures")[0])
    print(path.with_suffix(".html"))
    missing = [task for task in plan.in_order() if not task.is_done()]
    if missing:
        print(f"{MODULE}: {len(missing)} tasks are not done; see {path}", file=sys.stderr)
    return not missing


def _computed(
    make_plan: PlanMaker, plan: Plan, workers: int, scheduler: str | None
) -> Iterator[Outcome]:
    """Compute what is missing, and tell how it goes; the failures."""
    if scheduler is not None:
        outcomes = on_cluster(make_plan, plan, scheduler)
    elif workers > 1:
        outcomes = in_local_processes(make_plan, plan, workers)
    else:
        outcomes = in_this_process(plan)
    progress = Progress(plan.in_order(), kind_of)
    for outcome in outcomes:
        failed = outcome is not None and bool(outcome.error)
        logger.log(logging.ERROR if failed else logging.INFO, "%s", progress.tell(outcome))
        if failed:
            yield outcome


@contextmanager
def _claimed(store: Path) -> Iterator[None]:
    """Reserve the store for this command: two would make the same tasks twice."""
    with locked(store / LOCK_FILE, PATIENCE) as ours:
        if not ours:
            raise ValueError(
                f"another command is at work in {store}; wait until it ends (several machines "
                "share one command: --scheduler)"
            )
        remove_unfinished(store)
        yield


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = own_options(
        MODULE,
        "Compute the grid of a comparison, each cell once, and write its report.",
        COMPARISON.keys,
        example="--config configs/digits_tables.py --dry_run",
    )
    add = parser.add_argument
    add(
        "--workers",
        type=int,
        help=f"processes on this machine; default: 1 on a GPU, else one a core, <= {MOST_WORKERS}",
    )
    add("--scheduler", metavar="ADDRESS", help="Dask scheduler that runs the tasks instead")
    add("--report_only", action="store_true", help="compute nothing; report the existing results")
    return parser.parse_known_args(list(argv[1:]))


def _default_workers(device: str) -> int:
    # Two processes with one thread each are faster than one process with two threads.
    on_cpu = torch.device(device).type == "cpu"
    return min(os.cpu_count() or 1, MOST_WORKERS) if on_cpu else 1


def main(argv: Sequence[str]) -> int:
    """Run the command; return the code of ``exit_code``, and 1 also where a task has failed."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    complete = True

    def work() -> None:
        nonlocal complete
        complete = compare(argv)

    code = exit_code(MODULE, work, failed=EXIT_FAILED)
    return code if code or complete else EXIT_FAILED


if __name__ == "__main__":
    keep_freed_memory()
    sys.exit(main(sys.argv))
