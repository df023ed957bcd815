"""Tasks by several workers: order, failures, locks."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from adapters.comparison.workers import Failures, work


class FileTask:
    """Adds a line to a log and makes a file; fails while a file FAIL_NAME is there."""

    evaluations = 1.0

    def __init__(self, folder: Path, name: str, needs=(), seconds: float = 0.0) -> None:
        self.folder = folder
        self.name = name
        self.needs = tuple(needs)
        self.seconds = seconds

    @property
    def path(self):
        return self.folder / self.name

    def is_done(self):
        return self.path.exists()

    def run(self):
        with (self.folder / "log").open("a") as log:
            log.write(f"{self.name} {os.getpid()}\n")
        time.sleep(self.seconds)
        if (self.folder / f"fail_{self.name}").exists():
            raise RuntimeError("the disk\nis tired")
        self.path.write_text("done")


def lines(folder):
    """What was run, in order."""
    path = folder / "log"
    return [line.split()[0] for line in path.read_text().splitlines()] if path.exists() else []


def test_needs_come_first_and_nothing_is_made_twice(tmp_path):
    base = FileTask(tmp_path, "base")
    head = FileTask(tmp_path, "head", [base])
    cell = FileTask(tmp_path, "cell", [base, head])
    work([cell, head, base], tmp_path, "run")
    assert lines(tmp_path) == ["base", "head", "cell"]
    work([cell, head, base], tmp_path, "run")
    assert len(lines(tmp_path)) == 3


def test_a_failure_leaves_out_what_rests_on_it_alone(tmp_path):
    bad, good = FileTask(tmp_path, "bad"), FileTask(tmp_path, "good")
    child = FileTask(tmp_path, "child", [bad])
    grandchild = FileTask(tmp_path, "grandchild", [child, good])
    (tmp_path / "fail_bad").touch()
    tasks = [bad, child, grandchild, good]
    work(tasks, tmp_path, "first")
    assert lines(tmp_path) == ["bad", "good"]
    assert Failures(tmp_path, "x").error(bad) == "RuntimeError: the disk is tired"
    assert "Traceback" in Failures(tmp_path, "x").path(bad).read_text()
    work(tasks, tmp_path, "first")  # the same command does not try again
    assert lines(tmp_path) == ["bad", "good"]
    (tmp_path / "fail_bad").unlink()
    work(tasks, tmp_path, "second")
    assert lines(tmp_path) == ["bad", "good", "bad", "child", "grandchild"]
    assert Failures(tmp_path, "x").error(bad) is None


def in_process(folder, names, run_id, seconds):
    base = FileTask(folder, "base", seconds=seconds)
    tasks = [base, *(FileTask(folder, name, [base], seconds) for name in names)]
    work(tasks, folder, run_id)


def start(folder, names, run_id="run", seconds=0.02):
    process = multiprocessing.get_context("fork").Process(
        target=in_process, args=(folder, names, run_id, seconds)
    )
    process.start()
    return process


# torch's threads make forking a warning on Python 3.12 and later; no tensor is touched in the child
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_two_workers_share_the_tasks_and_never_one(tmp_path):
    names = [f"cell{i}" for i in range(30)]
    workers = [start(tmp_path, names), start(tmp_path, names)]
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert sorted(lines(tmp_path)) == sorted(["base", *names])
    log = (tmp_path / "log").read_text().split()
    assert len(set(log[1::2])) == 2  # both had a part


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_the_task_of_a_killed_worker_is_free_at_once(tmp_path):
    first = start(tmp_path, ["cell"], seconds=60)
    while not lines(tmp_path):
        time.sleep(0.01)
    os.kill(first.pid, signal.SIGKILL)
    first.join(10)
    second = start(tmp_path, ["cell"], seconds=0)
    second.join(60)
    assert second.exitcode == 0
    assert lines(tmp_path) == ["base", "base", "cell"]


def test_a_worker_that_is_told_to_stop_does(tmp_path):
    answers = iter([True, False])
    tasks = [FileTask(tmp_path, "a"), FileTask(tmp_path, "b")]
    work(tasks, tmp_path, "run", goes_on=lambda: next(answers))
    assert lines(tmp_path) == ["a"]
