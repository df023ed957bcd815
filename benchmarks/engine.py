"""What the engine adds to a task: python -m benchmarks.engine

1,000 tasks that only write a small file, in this process, in two processes, and on two Dask workers
of this machine (extra "cluster"), each way ``--rounds`` times in turn. A line for each way: the
median and the spread of the milliseconds a task, without the time to start the processes.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from adapters.comparison.engine import in_local_processes, in_this_process, on_cluster


@dataclass(frozen=True)
class SmallTask:
    """Writes its own name."""

    folder: Path
    name: str
    needs: tuple[SmallTask, ...] = ()
    evaluations: float = 1.0

    def is_done(self) -> bool:
        """Whether the file is there."""
        return (self.folder / self.name).exists()

    def run(self) -> None:
        """Write the file."""
        (self.folder / self.name).write_text(self.name)


@dataclass(frozen=True)
class Tasks:
    """A first task, and ``count`` that need it; makes itself, as a plan maker does."""

    folder: Path
    count: int

    def __call__(self) -> Tasks:
        return self

    @property
    def store(self) -> SimpleNamespace:
        """What the engine asks of a store."""
        return SimpleNamespace(folder=self.folder, device="cpu")

    def in_order(self) -> list[SmallTask]:
        """The first task, then the others."""
        first = SmallTask(self.folder, "first")
        return [first, *(SmallTask(self.folder, str(i), (first,)) for i in range(self.count))]


def milliseconds(outcomes: Iterable[object], count: int) -> float:
    """The time of a task, from the end of the first one, when every way is under way."""
    began = None
    for outcome in outcomes:
        if outcome is not None and began is None:
            began = time.perf_counter()
    return 1000 * (time.perf_counter() - began) / count


def main() -> None:
    """Measure, and print a line for each way."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine", description=__doc__)
    parser.add_argument("--tasks", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    from distributed import LocalCluster

    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster:
        ways: dict[str, Callable[[Tasks], Iterable[object]]] = {
            "this process": in_this_process,
            "two processes": lambda plan: in_local_processes(plan, plan, 2),
            "two Dask workers": lambda plan: on_cluster(plan, plan, cluster.scheduler_address),
        }
        found: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(args.rounds):
            for name, way in ways.items():
                with tempfile.TemporaryDirectory() as folder:
                    plan = Tasks(Path(folder), args.tasks)
                    found[name].append(milliseconds(way(plan), args.tasks))
    for name, values in found.items():
        middle, low, high = statistics.median(values), min(values), max(values)
        print(f"{name:<18} {middle:7.2f} ms a task ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
