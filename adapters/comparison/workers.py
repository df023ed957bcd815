"""Run tasks with any number of workers, on one machine or on several that share the store.

A worker takes the first task that is not done, whose needs are done, and whose lock is free. The
locks are the kernel's (``flock``), which frees them when their process ends for any reason. When a
task fails, its error is stored and the tasks that need it are skipped; all others run. The next
command tries the failed task again.
"""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from adapters.comparison.plan import Plan
from adapters.comparison.tasks import Task
from adapters.shell.command import keep_freed_memory
from adapters.shell.locks import locked
from adapters.shell.signals import caught
from sa_files.reading import UnreadableFile
from sa_files.stored import read_json
from sa_files.writing import write_atomically

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.5
LOCKS, FAILURES = "locks", "failed"


class Failures:
    """The tasks that failed, with their tracebacks, stored in files."""

    def __init__(self, folder: Path, run_id: str) -> None:
        self.folder = folder / FAILURES
        self.run_id = run_id

    def path(self, task: Task) -> Path:
        """The file of a task's failure."""
        return self.folder / f"{task.name.replace('/', '~')}.json"

    def error(self, task: Task, *, of_this_run: bool = False) -> str | None:
        """The last failure in one line; None if there is none."""
        noted = self._noted(task)
        if noted is None or (of_this_run and noted["run"] != self.run_id):
            return None
        return noted["error"]

    def log(self, task: Task) -> str:
        """The traceback of the last failure."""
        noted = self._noted(task)
        return "" if noted is None else noted["traceback"]

    def _noted(self, task: Task) -> dict[str, str] | None:
        """The stored failure; a damaged file counts for no run, so its task is tried again."""
        path = self.path(task)
        if not path.exists():
            return None
        keys = ("run", "error", "traceback")
        try:
            return read_json(path, "cannot be read", lambda noted: {k: str(noted[k]) for k in keys})
        except UnreadableFile as damaged:
            return {"run": "", "error": str(damaged), "traceback": ""}

    def note(self, task: Task, error: Exception) -> None:
        """Store a failure."""
        line = " ".join(f"{type(error).__name__}: {error}".split())
        noted = {"run": self.run_id, "error": line, "traceback": traceback.format_exc()}
        write_atomically(self.path(task), (json.dumps(noted, indent=2) + "\n").encode())

    def clear(self, task: Task) -> None:
        """Remove the stored failure, after a success."""
        self.path(task).unlink(missing_ok=True)


def work(
    tasks: Sequence[Task],
    folder: Path,
    run_id: str,
    *,
    goes_on: Callable[[], bool] = lambda: True,
) -> None:
    """Run the missing tasks, together with other workers, until none is left that can run.

    Args:
        run_id: names the command; a task that failed in another command is tried again.
        goes_on: called before each task; if it returns False, this worker stops.
    """
    failures = Failures(folder, run_id)
    done: set[str] = set()
    while goes_on():
        state = _one_pass(tasks, folder, failures, done)
        if state == "nothing left":
            return
        if state == "waiting":
            time.sleep(POLL_SECONDS)


def _one_pass(tasks: Sequence[Task], folder: Path, failures: Failures, done: set[str]) -> str:
    """Run the first task that can run; "ran", "waiting" (for other workers) or "nothing left"."""
    blocked: set[str] = set()
    waiting = False
    for task in tasks:
        if task.name in done or task.is_done():
            done.add(task.name)
            continue
        names = {need.name for need in task.needs}
        if names & blocked or failures.error(task, of_this_run=True) is not None:
            blocked.add(task.name)
            continue
        if not names <= done:
            waiting = True
            continue
        with locked(_lock_path(folder, task)) as ours:
            if ours:
                _run(task, failures, len(done), len(tasks))
                return "ran"
        waiting = True
    return "waiting" if waiting else "nothing left"


def _run(task: Task, failures: Failures, done: int, total: int) -> None:
    # Another worker may have finished or failed it before we got the lock.
    if task.is_done() or failures.error(task, of_this_run=True) is not None:
        return
    began = time.monotonic()
    try:
        task.run()
    except Exception as error:
        failures.note(task, error)
        logger.error("failed: %s: %s", task.name, failures.error(task))
        return
    failures.clear(task)
    logger.info("[%d/%d] %s: %.1f s", done + 1, total, task.name, time.monotonic() - began)


def _lock_path(folder: Path, task: Task) -> Path:
    return folder / LOCKS / f"{task.name.replace('/', '~')}.lock"


def work_together(make_plan: Callable[[], Plan], workers: int, run_id: str) -> None:
    """Do ``work`` in this process or, with more than one worker, in that many new processes."""
    if workers == 1:
        plan = make_plan()
        work(plan.in_order(), plan.store.folder, run_id)
        return
    context = multiprocessing.get_context("spawn")
    threads = max(1, (os.cpu_count() or 1) // workers)
    arguments = (make_plan, run_id, threads, os.getpid())
    processes = [context.Process(target=_child, args=arguments) for _ in range(workers)]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join()
    except KeyboardInterrupt:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()  # each saves what it can
        raise
    for process in processes:
        if process.exitcode:
            logger.error("a worker ended with exit code %d; the others went on", process.exitcode)


def _child(make_plan: Callable[[], Plan], run_id: str, threads: int, parent: int) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    torch.set_num_threads(threads)
    keep_freed_memory()
    # A worker whose command was killed finishes its task and stops.
    with contextlib.suppress(KeyboardInterrupt), caught():  # the command itself reports it
        plan = make_plan()
        tasks, folder = plan.in_order(), plan.store.folder
        work(tasks, folder, run_id, goes_on=lambda: os.getppid() == parent)
