"""The engine: order, failures, killed processes, a Dask cluster; what it says on the way."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import distributed
import pytest

from adapters.comparison.engine import (
    Outcome,
    Progress,
    in_local_processes,
    in_this_process,
    on_cluster,
)
from tests import ROOT


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


@dataclass(frozen=True)
class Plan:
    """A base, cells that need it, and a cell that needs a cell; makes itself, as a PlanMaker."""

    folder: Path
    cells: int = 3
    seconds: float = 0.0

    def __call__(self):
        return self

    @property
    def store(self):
        return SimpleNamespace(folder=self.folder, device="cpu")

    def in_order(self):
        base = FileTask(self.folder, "base")
        first = FileTask(self.folder, "cell0", [base], self.seconds)
        others = (FileTask(self.folder, f"cell{i}", [base]) for i in range(1, self.cells))
        return [base, first, *others, FileTask(self.folder, "last", [first])]


def lines(folder):
    """What was run, in order."""
    path = folder / "log"
    return [line.split()[0] for line in path.read_text().splitlines()] if path.exists() else []


def pid_of(folder, name):
    """The process that runs a task; waits until one does."""
    while name not in lines(folder):
        time.sleep(0.01)
    found = dict(line.split() for line in (folder / "log").read_text().splitlines())
    return int(found[name])


@pytest.fixture(scope="module")
def scheduler():
    """A Dask cluster of two workers on this machine, in processes of their own."""
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=2, dashboard_address=":0", silence_logs=50
    ) as cluster:
        yield cluster.scheduler_address


SLOW = [pytest.param(way, marks=pytest.mark.slow) for way in ("processes", "cluster")]


@pytest.fixture(params=["here", *SLOW])
def outcomes(request):
    """Runs a plan in one of the ways; the outcomes without heartbeats."""
    if request.param == "cluster":
        address = request.getfixturevalue("scheduler")

    def run(plan):
        ways = {
            "here": lambda: in_this_process(plan),
            "processes": lambda: in_local_processes(plan, plan, 2),
            "cluster": lambda: on_cluster(plan, plan, address),
        }
        return [outcome for outcome in ways[request.param]() if outcome is not None]

    return run


def test_needs_come_first_and_nothing_is_made_twice(tmp_path, outcomes):
    plan = Plan(tmp_path)
    names = {task.name for task in plan.in_order()}
    done = outcomes(plan)
    assert {one.task for one in done if one.is_done} == names
    order = lines(tmp_path)
    assert sorted(order) == sorted(names)
    assert order[0] == "base"
    assert order.index("cell0") < order.index("last")
    assert outcomes(plan) == []
    assert len(lines(tmp_path)) == len(names)


def test_a_failure_leaves_out_what_rests_on_it_alone(tmp_path, outcomes):
    (tmp_path / "fail_cell0").touch()
    plan = Plan(tmp_path)
    found = {one.task: one for one in outcomes(plan)}
    assert found["cell0"].error == "RuntimeError: the disk is tired"
    assert "Traceback" in found["cell0"].log
    assert found["last"].is_left_out
    assert {name for name, one in found.items() if one.is_done} == {"base", "cell1", "cell2"}
    (tmp_path / "fail_cell0").unlink()
    assert [one.task for one in outcomes(plan) if one.is_done] == ["cell0", "last"]


@pytest.mark.slow
def test_a_killed_process_loses_its_task_alone(tmp_path):
    """The other process keeps its own, and the next command makes the lost one."""
    plan = Plan(tmp_path, cells=6, seconds=60)
    killer = Thread(target=lambda: os.kill(pid_of(tmp_path, "cell0"), signal.SIGKILL))
    killer.start()
    found = list(in_local_processes(plan, plan, 2))
    killer.join()
    failed = [one for one in found if one.error]
    assert [one.task for one in failed] == ["cell0"]
    assert "its process ended" in failed[0].error
    assert sum(one.is_done for one in found) == 6
    again = Plan(tmp_path, cells=6)
    assert [one.task for one in in_local_processes(again, again, 2)] == ["cell0", "last"]


def test_an_interrupt_while_tasks_are_at_work_ends_their_processes(tmp_path, monkeypatch):
    monkeypatch.setattr("adapters.comparison.engine.HEARTBEAT", 0.1)
    plan = Plan(tmp_path, seconds=60)
    found = in_local_processes(plan, plan, 2)
    while not lines(tmp_path).count("cell0"):
        next(found)
    worker = pid_of(tmp_path, "cell0")
    with pytest.raises(KeyboardInterrupt):
        found.throw(KeyboardInterrupt)
    assert not Path(f"/proc/{worker}").exists()


COMMAND = """
import sys
from pathlib import Path
from adapters.comparison.engine import in_local_processes
from tests.adapters.comparison.test_engine import Plan

if __name__ == "__main__":
    plan = Plan(Path(sys.argv[1]), seconds=60)
    list(in_local_processes(plan, plan, 2))
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_processes_end_with_their_command(tmp_path, number):
    script = tmp_path / "command.py"
    script.write_text(COMMAND)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = subprocess.Popen(
        [sys.executable, script, tmp_path], env=environment, stderr=subprocess.DEVNULL
    )
    worker = pid_of(tmp_path, "cell0")
    command.send_signal(number)
    command.wait(30)
    for _ in range(1000):
        if not Path(f"/proc/{worker}").exists():
            break
        time.sleep(0.01)
    assert not Path(f"/proc/{worker}").exists()


@pytest.mark.slow
def test_dask_gives_the_task_of_a_killed_worker_to_another(tmp_path, scheduler):
    plan = Plan(tmp_path, seconds=5)
    killer = Thread(target=lambda: os.kill(pid_of(tmp_path, "cell0"), signal.SIGKILL))
    killer.start()
    found = list(on_cluster(plan, plan, scheduler))
    killer.join()
    assert all(one.is_done for one in found if one is not None)
    assert lines(tmp_path).count("cell0") == 2
    assert all(lines(tmp_path).count(name) == 1 for name in ("base", "cell1", "cell2", "last"))


@pytest.mark.slow
def test_after_a_killed_scheduler_another_goes_on_from_the_store(tmp_path):
    plan = Plan(tmp_path, seconds=60)
    port_file = tmp_path / "scheduler.json"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    quiet = {"env": environment, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    start = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--port=0", "--no-dashboard"]
    process = subprocess.Popen([*start, f"--scheduler-file={port_file}"], **quiet)
    while not port_file.exists():
        time.sleep(0.05)
    with distributed.Client(scheduler_file=str(port_file), set_as_default=False) as client:
        address = client.scheduler.address
    join = [sys.executable, "-m", "distributed.cli.dask_worker", address, "--nthreads=1"]
    worker = subprocess.Popen([*join, "--no-nanny", "--no-dashboard"], **quiet)
    try:
        killer = Thread(target=lambda: (pid_of(tmp_path, "cell0"), process.kill()))
        killer.start()
        with pytest.raises(ConnectionError, match="has stopped"):
            list(on_cluster(plan, plan, address))
        killer.join()
    finally:
        for one in (process, worker):
            one.kill()
            one.wait()
    assert (tmp_path / "base").exists()
    again = Plan(tmp_path)
    assert {one.task for one in in_this_process(again)} >= {"cell0", "last"}
    assert all(task.is_done() for task in again.in_order())
    assert lines(tmp_path).count("base") == 1


def test_an_absent_scheduler_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("adapters.comparison.engine.CONNECT", 0.2)
    plan = Plan(tmp_path)
    with pytest.raises(ConnectionError, match=r"no Dask scheduler answers at tcp://127\.0\.0\.1:9"):
        list(on_cluster(plan, plan, "tcp://127.0.0.1:9"))


def test_progress_counts_up_and_what_is_left_never_grows(tmp_path):
    plan = Plan(tmp_path, cells=4)
    now = [0.0]
    progress = Progress(plan.in_order(), lambda task: "any", clock=lambda: now[0])
    assert progress.tell(None) == "[0/6] at work; 0:00:00 elapsed"
    now[0] = 10
    said = progress.tell(Outcome("base", 10))
    assert said == "[1/6] base: 10.0 s; 0:00:10 elapsed, about 0:00:50 left"
    now[0] = 40
    assert progress.tell(None) == "[1/6] at work; 0:00:40 elapsed, more than 0:00:50 left"
    now[0] = 42
    assert progress.tell(Outcome("cell1", 32)).endswith("0:00:42 elapsed, more than 0:00:50 left")
    assert (
        progress.tell(Outcome("cell0", error="ValueError: no")) == "failed: cell0: ValueError: no"
    )
    assert progress.tell(Outcome("last", is_left_out=True)).startswith("left out: last")
    said = progress.tell(Outcome("cell2", 3))
    assert said == "[3/6] cell2: 3.0 s; 0:00:42 elapsed, about 0:00:14 left"


def test_the_rest_is_told_from_the_times_of_each_kind_once_all_are_measured(tmp_path):
    """Two workers: a training of 20 seconds, cells of 4; another worker had done cell2."""
    plan, now = Plan(tmp_path, cells=5), [20.0]
    kind_of = lambda task: task.name[:4]  # noqa: E731
    tasks = [task for task in plan.in_order() if task.name != "last"]
    progress = Progress(tasks, kind_of, clock=lambda: now[0])
    now[0] += 20
    assert progress.tell(Outcome("base", 20)) == "[1/6] base: 20.0 s; 0:00:20 elapsed"
    now[0] += 2
    progress.tell(Outcome("cell0", 4))
    progress.tell(Outcome("cell1", 4))
    said = progress.tell(Outcome("cell2", 0))
    assert said == "[4/6] cell2: 0.0 s; 0:00:22 elapsed, about 0:00:06 left"  # 8 x 22 / 28
