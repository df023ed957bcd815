"""Compute the grid of a comparison, each cell once, and write its report.

    python -m adapters.compare --config configs/digits_tables.py
    python -m adapters.compare --config configs/table1_cifar10.py --dry_run

The same command continues an interrupted grid. A larger grid reuses the results that exist. Several
machines may run the command on one shared folder (``--workdir``) at the same time.
"""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import sys
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from ml_collections import FrozenConfigDict

from adapters.comparison.cost import plan_text
from adapters.comparison.grid import COMPARISON, Grid
from adapters.comparison.plan import Plan
from adapters.comparison.report import write_report
from adapters.comparison.store import Store
from adapters.comparison.workers import work_together
from adapters.experiment.config import read_command_line
from adapters.shell.allocator import keep_freed_memory
from adapters.shell.command import EXIT_FAILED, OwnOptions, exit_code

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
    workers = _default_workers(line.device) if args.workers is None else args.workers
    if workers < 1:
        raise ValueError(f"--workers must be >= 1, got {workers}")
    make_plan = PlanMaker(line.config, line.workdir, line.device, line.progress and workers == 1)
    plan = make_plan()
    if line.dry_run:
        print(plan_text(plan))
        return True
    _ = plan.store.dataset  # raises for a missing dataset before anything is written
    if not args.report_only:
        work_together(make_plan, workers, run_id=uuid.uuid4().hex)
    path = write_report(plan, f"python -m {MODULE} {shlex.join(argv[1:])}")
    print(path.read_text().split("## Pictures")[0])
    print(path.with_suffix(".html"))
    missing = [task for task in plan.in_order() if not task.is_done()]
    if missing:
        print(f"{MODULE}: {len(missing)} tasks are not done; see {path}", file=sys.stderr)
    return not missing


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = OwnOptions(
        MODULE, description="Compute a grid and write its report. Other options: as the adapters'."
    )
    parser.add_argument(
        "--workers",
        type=int,
        help=f"processes on this machine; default: 1 on a GPU, else one a core, <= {MOST_WORKERS}",
    )
    parser.add_argument(
        "--report_only", action="store_true", help="compute nothing; report the existing results"
    )
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
