"""The fault campaign: that it runs, and that it would tell what was lost."""

import os
import random
import subprocess
import sys

import pytest

from benchmarks.faults.jobs import Job, all_jobs
from benchmarks.faults.kinds import KINDS, Case, room_for
from benchmarks.faults.report import Outcome, table
from tests import ROOT


def test_results_leave_out_what_no_configuration_decides(tmp_path):
    for name in ("a.pth", ".lock", "locks/x.lock", "reports/r.md", "base/tensorboard/events"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "cell.json").write_text('{"seconds": 1.5, "metrics": {"fid": 2}}')
    job = Job("job", lambda folder: None)
    assert job.results(tmp_path) == {"a.pth": b"a.pth", "cell.json": b'{"metrics": {"fid": 2}}'}
    with_report = Job("report", lambda folder: None, skipped=job.skipped - {"reports"})
    assert with_report.results(tmp_path).keys() - job.results(tmp_path) == {"reports/r.md"}
    assert room_for({"a": b"x", "b/c": b"x" * 4097}) == 4096 * (1 + 2)


class Ended:
    """A command that has ended."""

    def __init__(self, codes, said):
        self.wait = lambda: codes
        self.said = lambda: said


@pytest.mark.parametrize(
    ("codes", "said", "complaint"),
    [
        ([1], "no room", None),
        ([1], "no room\n    Traceback (most recent call last): quoted", None),
        (None, "no room", "hangs"),
        ([0], "no room", "exit codes [0]"),
        ([1, -11], "no room", "exit codes [1, -11]"),
        ([1], "something", "does not say 'no room'"),
        ([1], "no room\nTraceback (most recent call last):", "a traceback"),
    ],
)
def test_a_command_that_ends_otherwise_is_told(tmp_path, codes, said, complaint):
    case = Case(Job("job", lambda folder: None), tmp_path, random.Random(0), 1.0, 0)
    case.expect(Ended(codes, said), {1}, "no room")
    assert len(case.complaints) == (complaint is not None)
    assert not case.complaints or case.complaints[0].startswith(complaint)


def test_a_result_that_is_lost_is_one_that_a_run_makes_again(tmp_path):
    last = ("base/ckpts/10.ckpt/it.pth", "base/ckpts/10.ckpt/resume.pth")
    made = ("metrics.json", "00000000.png", "trainings/a/config.json", *last)
    replaced = tuple(f"replaced/a/head/ckpts/{it}.ckpt/it.pth" for it in (4, 8))
    kept = ("given.pth", "base/log.csv", "base/ckpts/9.ckpt/it.pth", "head/ckpts/4.ckpt/it.pth")
    kept += ("gamma/state.pth", *replaced)
    ended = Ended([0], "")
    ended.kill = lambda: True

    class Written(Case):
        def launch(self, prepare=None):
            for name in (*made, *kept[1:]):
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                (self.folder / name).write_text("{}")
            return ended

    found = set()
    for seed in range(30):
        folder = tmp_path / str(seed)
        folder.mkdir()
        (folder / "given.pth").write_text("{}")
        case = Written(Job("job", lambda folder: None), folder, random.Random(seed), 0.0, 0)
        assert next(KINDS["a result removed or emptied"](case))
        left = {name: content for name, content in case.job.results(folder).items() if content}
        found |= {*made, *kept} - left.keys()
        assert len(left) == len(made) + len(kept) - 1
        assert (folder / last[1]).exists()  # without it, the checkpoint is a whole one of the host
    assert found == set(made)


def test_each_kind_has_jobs_and_each_job_has_faults(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # importing the command sets it
    from benchmarks.faults.__main__ import ROUND

    assert ROUND.keys() == KINDS.keys()
    assert {name for names in ROUND.values() for name in names} == set(all_jobs(tmp_path))


def test_the_table_counts_what_came_in_time():
    def outcome(**values):
        there = {"kind": "SIGKILL", "job": "Gamma", "in_time": True, "equal": True}
        return Outcome(**({"refusals": 0, "ended": 0.1, "complaints": ()} | there | values))

    outcomes = [
        outcome(),
        outcome(in_time=False),
        outcome(equal=False, complaints=("differs",)),
        outcome(kind="disk full", refusals=1),
    ]
    assert table(outcomes).splitlines()[2:] == [
        "| SIGKILL | Gamma | 2 | 1 | 1 | 0 | 1 |",
        "| disk full | Gamma | 1 | 1 | 0 | 1 | 0 |",
        "| **all** |  | 3 | 2 | 1 | 1 | 1 |",
    ]
    assert [o.is_good for o in outcomes] == [True, True, False, True]


@pytest.mark.slow
def test_a_short_campaign_loses_nothing(tmp_path):
    command = [sys.executable, "-m", "benchmarks.faults", "--runs=12", "--seed=3"]
    # The campaign needs one thread and sets it itself.
    environment = os.environ | {"OMP_NUM_THREADS": "2", "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| **all** |  | 12 | 12 | 0 |" in done.stdout
