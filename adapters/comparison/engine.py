"""Run the tasks of a plan: in this process, in some local processes, or on a Dask cluster.

Each way yields the outcome of a task as it ends, and None from time to time. A task that fails
leaves out only the tasks that need it; the next command tries it again. All that a task needs and
makes is in the store: every way gives the same results, and a stop loses only what is at work.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from typing import Any

import torch

from adapters.comparison.plan import Plan
from adapters.comparison.tasks import Task
from adapters.shell.processes import Pool, ended, new_pool
from adapters.shell.signals import caught

logger = logging.getLogger(__name__)

HEARTBEAT = 30.0  # seconds between two signs of life
CONNECT = 10.0  # seconds until a scheduler counts as absent
POLL = 0.05  # seconds between two looks at the scheduler's answers
MakePlan = Callable[[], Plan]


@dataclass(frozen=True)
class Outcome:
    """How a task ended: ``error`` in one line and ``log``, its traceback, or neither.

    ``is_left_out``: it was not tried, because a task that it needs has no result.
    """

    task: str
    seconds: float = 0.0
    error: str = ""
    log: str = ""
    is_left_out: bool = False

    @property
    def is_done(self) -> bool:
        """Whether the task's result is in the store."""
        return not self.error and not self.is_left_out


def perform(task: Task) -> Outcome:
    """Run a task in this process."""
    began = time.monotonic()
    try:
        task.run()
    except Exception as error:
        return _failed(task.name, error, time.monotonic() - began)
    return Outcome(task.name, time.monotonic() - began)


def _failed(name: str, error: BaseException, seconds: float = 0.0) -> Outcome:
    line = " ".join(f"{type(error).__name__}: {error}".split())
    return Outcome(name, seconds, line, "".join(traceback.format_exception(error)))


class Queue:
    """The tasks without a result, each given out once, when its needs have theirs."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.waiting = {task.name: task for task in tasks if not task.is_done()}
        self._done = {task.name for task in tasks} - set(self.waiting)

    def take(self) -> Task | None:
        """The first task that can run; None if there is none now."""
        for name, task in self.waiting.items():
            if all(need.name in self._done for need in task.needs):
                return self.waiting.pop(name)
        return None

    def ended(self, outcome: Outcome) -> list[Outcome]:
        """Note an outcome; return it with those of the tasks that are now left out."""
        if outcome.is_done:
            self._done.add(outcome.task)
            return [outcome]
        out, lost = [outcome], {outcome.task}
        for name, task in list(self.waiting.items()):  # in order: needs come before
            if any(need.name in lost for need in task.needs):
                del self.waiting[name]
                lost.add(name)
                out.append(Outcome(name, is_left_out=True))
        return out


# ------------------------------------------------------------------------------ on this machine


def in_this_process(plan: Plan) -> Iterator[Outcome]:
    """The tasks one after another."""
    queue = Queue(plan.in_order())
    while (task := queue.take()) is not None:
        yield from queue.ended(perform(task))


def in_local_processes(make_plan: MakePlan, plan: Plan, workers: int) -> Iterator[Outcome | None]:
    """The tasks in ``workers`` new processes; one that dies loses its task alone.

    Each process has a pool of its own: the death of a process breaks its pool.
    """
    queue, threads = Queue(plan.in_order()), max(1, (os.cpu_count() or 1) // workers)
    count = min(workers, len(queue.waiting))
    idle = [new_pool(threads, _prepare, make_plan) for _ in range(count)]
    at_work: dict[Future[Outcome], tuple[Pool, str]] = {}
    with ended(lambda: [*idle, *(pool for pool, _ in at_work.values())], lambda: not at_work):
        while True:
            while idle and (task := queue.take()) is not None:
                pool = idle.pop()
                at_work[pool.submit(_in_worker, task.name)] = pool, task.name
            if not at_work:
                return
            done, _ = wait(at_work, timeout=HEARTBEAT, return_when=FIRST_COMPLETED)
            if not done:
                yield None
            for future in done:
                pool, name = at_work.pop(future)
                try:
                    outcome = future.result()
                except BrokenProcessPool:
                    outcome = Outcome(name, error="its process ended, killed or out of memory")
                    pool = new_pool(threads, _prepare, make_plan)
                idle.append(pool)
                yield from queue.ended(outcome)


_TASKS: dict[str, Task] = {}  # of a worker


def _prepare(make_plan: MakePlan) -> None:
    _TASKS.update({task.name: task for task in make_plan().in_order()})


def _in_worker(name: str) -> Outcome:
    try:
        with caught():
            return perform(_TASKS[name])
    except KeyboardInterrupt:
        return Outcome(name, error="interrupted")


# --------------------------------------------------------------------------------- on a cluster


def on_cluster(make_plan: MakePlan, plan: Plan, address: str) -> Iterator[Outcome | None]:
    """The tasks as a graph on the Dask scheduler at ``address``.

    A task is keyed by its name, which ends in a digest of what decides its numbers. Dask gives the
    task of a worker that died to another one. Workers see the same folders under the same paths and
    were started in a checkout of this version; where the plan asks for a GPU, they offer
    ``--resources GPU=1``. Each worker process runs one task at a time.

    Raises:
        ConnectionError: there is no scheduler, or it has stopped.
        ValueError: the extra "cluster" is not installed.
    """
    try:
        from distributed import Client, as_completed
        from distributed.client import FutureCancelledError
    except ModuleNotFoundError as error:
        raise ValueError("--scheduler needs: pip install 'sa-plugin[cluster]'") from error
    try:
        client = Client(address, timeout=CONNECT, set_as_default=False)
    except (OSError, ValueError) as error:
        raise ConnectionError(f"no Dask scheduler answers at {address}: {error}") from error
    logging.getLogger("distributed").setLevel(logging.CRITICAL)  # what matters is raised below
    stopped = ConnectionError(f"the Dask scheduler at {address} has stopped")
    try:
        graph = _submitted(client, make_plan, plan)
        left = {future.key: name for name, future in graph.items()}
        ended, spoke = as_completed(graph.values(), loop=client.loop), time.monotonic()
        while left:
            batch = ended.next_batch(block=False)
            for future in batch:
                if future.status == "cancelled":
                    raise stopped
                name, error = left.pop(future.key), future.exception()
                yield future.result() if error is None else _failed(name, error)
            if client.status in ("closing", "closed"):
                raise stopped
            if batch:
                spoke = time.monotonic()
            elif time.monotonic() - spoke < HEARTBEAT:
                time.sleep(POLL)
            else:
                spoke = time.monotonic()
                yield None
    except (OSError, FutureCancelledError) as error:
        raise stopped from error
    finally:
        with contextlib.suppress(OSError):  # it waits for a scheduler that may be gone
            client.close(timeout=1.0)


def _submitted(client: Any, make_plan: MakePlan, plan: Plan) -> dict[str, Any]:
    """The futures of all tasks without a result, by name; each waits for those it needs."""
    on_gpu = torch.device(plan.store.device).type == "cuda"
    graph: dict[str, Any] = {}
    for task in plan.in_order():
        if not task.is_done():
            graph[task.name] = client.submit(
                _on_worker,
                make_plan,
                task.name,
                [graph[need.name] for need in task.needs if need.name in graph],
                key=f"sa:{plan.store.folder}:{task.name}",
                resources={"GPU": 1} if on_gpu else None,
                priority=-len(graph),  # the plan's order
            )
    return graph


_ONE_AT_A_TIME = threading.Lock()  # tasks seed torch's global generator


def _on_worker(make_plan: MakePlan, name: str, needs: Sequence[Outcome]) -> Outcome:
    if not all(need.is_done for need in needs):
        return Outcome(name, is_left_out=True)
    with _ONE_AT_A_TIME:
        task = _tasks_of(make_plan)[name]
        return Outcome(name) if task.is_done() else perform(task)


@lru_cache(maxsize=1)
def _tasks_of(make_plan: MakePlan) -> dict[str, Task]:
    return {task.name: task for task in make_plan().in_order()}


# ------------------------------------------------------------------------------------- progress


class Progress:
    """Says what ended, how far the plan is, and how long the rest may take.

    The rest is estimated from the seconds that a network evaluation took in tasks of each kind, of
    ``kind_of``: one in a training takes longer than one in sampling. Nothing is said before every
    kind that is left was measured. What is shown as left never grows: if the estimate does, the
    last one stands with "more than".
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        kind_of: Callable[[Task], str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._left = {task.name: task for task in tasks if not task.is_done()}
        self._total, self._count = len(tasks), len(tasks) - len(self._left)
        self._kind_of = kind_of
        self._seconds: dict[str, float] = defaultdict(float)  # by kind, of tasks that are done
        self._evaluations: dict[str, float] = defaultdict(float)
        self._clock, self._began = clock, clock()
        self._shown = float("inf")  # seconds left, as last shown

    def tell(self, outcome: Outcome | None) -> str:
        """One line; None is a heartbeat."""
        if outcome is None:
            return f"[{self._count}/{self._total}] at work; {self._times()}"
        task = self._left.pop(outcome.task)
        if outcome.is_left_out:
            return f"left out: {outcome.task}: a task that it needs has failed"
        if outcome.error:
            return f"failed: {outcome.task}: {outcome.error}"
        self._count += 1
        if outcome.seconds:  # 0: another worker had done it
            self._seconds[self._kind_of(task)] += outcome.seconds
            self._evaluations[self._kind_of(task)] += task.evaluations
        done = f"[{self._count}/{self._total}] {outcome.task}: {outcome.seconds:.1f} s"
        return f"{done}; {self._times()}"

    def _times(self) -> str:
        elapsed = self._clock() - self._began
        text, work = f"{_clock_time(elapsed)} elapsed", self._work_left()
        if work is None:
            return text
        left = elapsed * work / sum(self._seconds.values())  # workers share it as they did so far
        grew, self._shown = left > self._shown, min(left, self._shown)
        return f"{text}, {'more than' if grew else 'about'} {_clock_time(self._shown)} left"

    def _work_left(self) -> float | None:
        """Seconds of one worker; None before every kind that is left was measured."""
        seconds = 0.0
        for task in self._left.values():
            kind = self._kind_of(task)
            if not (self._seconds[kind] and self._evaluations[kind]):
                return None
            seconds += task.evaluations * self._seconds[kind] / self._evaluations[kind]
        return seconds if any(self._seconds.values()) else None


def _clock_time(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
