"""B and SA at the same time: equal bytes, a signal, and a B that fails or is killed."""

import os
import re
import signal
import subprocess
import time
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from adapters.experiment import run as experiment_run
from adapters.experiment.config import read_command_line
from adapters.experiment.run import run
from adapters.hosts import SN_DPM
from adapters.shell.processes import torch_threads
from tests.children import ROOT, command_of
from tests.commands import words

CHANGES = {
    "network": {"args": {"model_channels": 8, "channel_mult": (1,), "attention_resolutions": ()}},
    "base": {"iterations": 60, "batch_size": 4, "ckpt_every": 25, "log_every": 2, "ema": 0.5},
    "head": {"iterations": 2, "batch_size": 4, "ema": 0.5},
    "sample": {"n_images": 80, "steps": (2,), "processes": ("ddim", "sn_ddim")},
    "evaluate": {"features": ("pixels",)},
}
BOTH = words("digits_sn_sa.py", baseline=True, **CHANGES)
NAMES = ("sa", "sa_baseline")


def start(folder, *more):
    """The command with two threads, one for each run."""
    return subprocess.Popen(
        command_of("-m", "adapters.sn_dpm", *BOTH, *more, f"--workdir={folder / 'sa'}"),
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def results(folder):
    """The bytes of all networks, logs and metrics."""
    found = {}
    for name in NAMES:
        for path in (folder / name).rglob("*"):
            if path.suffix in (".pth", ".csv", ".npz") or path.name == "metrics.json":
                found[path.relative_to(folder)] = path.read_bytes()
    return found


@pytest.fixture(scope="module")
def one_after_the_other(tmp_path_factory):
    """Both runs in this process, with a thread."""
    folder = tmp_path_factory.mktemp("in_turn")
    with torch_threads(1):
        assert run(SN_DPM, ["sn_dpm", *BOTH, f"--workdir={folder / 'sa'}"]) == 0
    return results(folder)


@pytest.mark.slow
def test_both_at_the_same_time_leave_the_bytes_of_one_after_the_other(
    tmp_path, one_after_the_other
):
    command = start(tmp_path)
    said, logged = command.communicate(timeout=240)
    assert command.returncode == 0, logged[-3000:]
    assert results(tmp_path) == one_after_the_other
    assert "nothing is told apart from chance alone" in said
    titles = {line.split(":")[0] for line in logged.splitlines() if re.search("base: pred", line)}
    assert titles == {"B", "SA-2"}


@pytest.mark.slow
def test_a_signal_stops_both_and_both_continue_to_the_same_bytes(tmp_path, one_after_the_other):
    command = start(tmp_path)
    while not (tmp_path / "sa_baseline" / "base" / "log.csv").exists() and command.poll() is None:
        time.sleep(0.01)
    command.send_signal(signal.SIGTERM)
    _, logged = command.communicate(timeout=240)
    assert command.returncode == 128 + signal.SIGTERM, logged[-3000:]
    assert "B: adapters.sn_dpm: terminated: stopped after iteration " in logged
    lines = re.findall("^.*adapters.sn_dpm: terminated.*$", logged, re.MULTILINE)
    assert len(lines) == 2  # SA's is the last: it begins earlier, so it may be at any stage
    assert all(line.endswith("; the same command continues it") for line in lines)
    assert lines[-1].startswith("adapters.sn_dpm: ")
    command = start(tmp_path)
    _, logged = command.communicate(timeout=240)
    assert command.returncode == 0, logged[-3000:]
    assert results(tmp_path) == one_after_the_other


@pytest.mark.slow
def test_a_b_that_fails_is_told_in_one_line_and_sa_is_finished(tmp_path):
    with pytest.MonkeyPatch.context() as patch:  # the folders as a command leaves them
        patch.setattr("adapters.experiment.run._run_all", lambda runs: None)
        with torch_threads(1):
            assert run(SN_DPM, ["sn_dpm", *BOTH, f"--workdir={tmp_path / 'sa'}"]) == 0
    block = tmp_path / "sa_baseline" / "base" / "tensorboard"
    block.parent.mkdir()
    block.write_text("")
    command = start(tmp_path, "--stage=base")
    _, logged = command.communicate(timeout=240)
    told = [line for line in logged.splitlines() if "adapters.sn_dpm: " in line]
    assert command.returncode == 2, logged[-3000:]
    assert len(told) == 1
    assert told[0].startswith("B: adapters.sn_dpm: ")
    assert str(block) in told[0]
    assert (tmp_path / "sa" / "base" / "ckpts" / "60.ckpt").exists()


def test_a_process_that_is_killed_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("adapters.experiment.run._run_in_process", _killed)
    monkeypatch.setattr("adapters.experiment.run._run_all", lambda runs: None)
    with torch_threads(2):
        assert run(SN_DPM, ["sn_dpm", *BOTH, f"--workdir={tmp_path / 'sa'}"]) == 1
        assert torch.get_num_threads() == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("adapters.sn_dpm: the process of B ended")
    assert said.endswith("; the same command continues it")


def test_what_the_command_has_said_of_the_images_b_does_not_say_again(
    tmp_path, monkeypatch, caplog
):
    for i in range(2):
        Image.new("RGB", (8 + i, 8)).save(tmp_path / f"{i}.png")
    given = words("folder_sn_sa.py", data={"root": tmp_path}, **CHANGES)
    given.append(f"--workdir={tmp_path / 'run'}")
    line = read_command_line(["sn_dpm", *given], SN_DPM.stages, SN_DPM.module)
    monkeypatch.setattr(experiment_run, "_log_as", lambda prefix: None)  # leaves pytest's handler
    monkeypatch.setattr(experiment_run, "_run_all", lambda runs: experiment_run.logger.error("ran"))
    assert experiment_run._run_in_process(SN_DPM, line) == 0
    assert [record.getMessage() for record in caplog.records] == ["ran"]


def test_stages_of_two_runs_in_turn_are_told_apart(caplog):
    def of(title):
        stage = SimpleNamespace(name="base", plan=lambda: "4 steps", is_done=bool, run=lambda: None)
        return SimpleNamespace(title=title, chosen=[stage])

    caplog.set_level("INFO")
    experiment_run._run_all([of("B"), of("SA-2")])
    experiment_run._run_all([of("B")])
    said = [record.getMessage() for record in caplog.records]
    assert said == ["B: base: 4 steps", "SA-2: base: 4 steps", "base: 4 steps"]


def _killed(*_):
    os.kill(os.getpid(), signal.SIGKILL)
