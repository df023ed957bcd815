"""SIGINT and SIGTERM: exit codes, what is saved, and that the rest of the run is the same."""

import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from adapters.experiment.run import run
from adapters.hosts import SN_DPM
from adapters.shell import signals
from adapters.shell.command import exit_code
from adapters.shell.processes import torch_threads
from sa_plugin.sampling.gamma import estimate_gamma
from sa_plugin.schedule import NoiseSchedule
from tests.children import ROOT, finish, start
from tests.commands import words
from tests.third_party.test_host_training import Files, everything, make_trainer
from third_party.common import checkpoints, distributed
from third_party.common.data import BatchStream
from third_party.common.training import TrainingStopped
from third_party.common.window import Window


def send(number):
    """A signal for this process, and the moment in which Python hears of it."""
    os.kill(os.getpid(), number)
    time.sleep(0.01)


# -- commands


@pytest.mark.parametrize(
    ("number", "code", "said"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "term")]
)
def test_a_signal_stops_a_command_with_its_code_and_one_line(capsys, number, code, said):
    assert exit_code("module", lambda: send(number)) == code
    error = capsys.readouterr().err
    assert error.startswith(f"module: {said}")
    assert error.endswith("; the same command continues it\n")
    assert error.count("\n") == 1


def test_the_line_is_written_in_one_piece(monkeypatch):
    """Or the lines of torchrun's processes, which do not buffer, could run into each other."""
    written = []
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(write=written.append, flush=lambda: None))
    exit_code("module", lambda: send(signal.SIGTERM))
    assert written == ["module: terminated; the same command continues it\n"]


def test_handlers_are_there_while_a_command_works_alone():
    before = [signal.getsignal(number) for number in signals.STOPPING]
    seen = []
    exit_code("module", lambda: seen.extend(map(signal.getsignal, signals.STOPPING)))
    assert [signal.getsignal(number) for number in signals.STOPPING] == before
    assert seen[0] == seen[1] != signal.SIG_DFL


def test_a_signal_that_is_ignored_stays_so(capsys):
    """As SIGINT is for what a shell script starts in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert exit_code("module", lambda: send(signal.SIGINT)) == 0
    finally:
        signal.signal(signal.SIGINT, before)


def test_where_it_is_held_a_signal_only_asks(capsys):
    heard = []

    def work():
        with signals.held() as stop:
            heard.append(stop())
            send(signal.SIGTERM)
            send(signal.SIGTERM)
            heard.append(stop())
        heard.append("never")

    assert exit_code("module", work) == 143
    assert heard == [False, True]


def test_a_second_ctrl_c_does_not_wait_but_torchrun_s_copy_of_the_first_does(monkeypatch, capsys):
    now = 100.0
    monkeypatch.setattr(signals.time, "monotonic", lambda: now)
    came = []

    def work():
        nonlocal now
        with signals.held():
            send(signal.SIGINT)
            now += 1
            send(signal.SIGINT)
            came.append("the copy waits")
            now += 2
            send(signal.SIGINT)
            came.append("the second waits")

    assert exit_code("module", work) == 130
    assert came == ["the copy waits"]


def test_a_signal_has_its_default_effect_while_a_process_waits_for_another():
    def work():
        with distributed._ended_by_signals():
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        send(signal.SIGTERM)

    assert exit_code("module", work) == 143


# -- training


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    trainer = make_trainer(folder)
    trainer.run()
    return everything(trainer), files(folder)


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("stops", "workers"),
    [((1,), None), ((4,), None), ((5, 6, 7), None), ((8, 12), None), ((13,), None), ((6,), 1)],
)
def test_a_stopped_training_repeats_no_step_and_leaves_the_same_files(
    tmp_path, unbroken, stops, workers
):
    steps = 0
    for stop in (*stops, 99):
        trainer = make_trainer(tmp_path, workers=workers)
        data, update = trainer.data, trainer.criterion.update
        trainer.stop = lambda data=data, stop=stop: data.position >= stop

        def counted(data, update=update):
            nonlocal steps
            steps += 1
            update(data)

        trainer.criterion.update = counted
        if stop < 13:
            with pytest.raises(TrainingStopped, match=rf"iteration {stop}, .*{stop}\.ckpt") as told:
                trainer.run()
            assert told.value.path.is_dir()
        else:
            trainer.run()
    assert steps == 13
    assert (everything(trainer), files(tmp_path)) == unbroken


def test_what_is_logged_does_not_depend_on_the_stops():
    """Not in the last bit, which the checkpoints hold."""
    losses = np.random.default_rng(0).random(40).tolist()
    states = []
    for stops in ((), (1, 2, 7, 30), range(40)):
        window = Window()
        for i, loss in enumerate(losses):
            window.add(i + 1, {"loss": loss})
            if i in stops:
                window.read("loss")
        window.read("loss")
        states.append(window.state_dict())
    assert states[0] == states[1] == states[2]


def test_what_is_half_written_or_half_removed_goes(tmp_path, unbroken, monkeypatch):
    trainer = make_trainer(tmp_path)
    trainer.stop = lambda: trainer.data.position == 5
    with pytest.raises(TrainingStopped):
        trainer.run()
    (tmp_path / "ckpts" / "7.ckpt.tmp" / "models_states").mkdir(parents=True)
    (tmp_path / "ckpts" / "3.ckpt.tmp").mkdir()
    make_trainer(tmp_path).run()
    assert files(tmp_path) == unbroken[1]
    assert not list((tmp_path / "ckpts").glob("*.tmp"))


def test_a_checkpoint_that_is_kept_is_not_interim(tmp_path):
    """The last one of a shorter run lies between two regular ones of a longer one, and stays."""
    make_trainer(tmp_path, n_iters=7).run()
    make_trainer(tmp_path).run()
    assert list(checkpoints.checkpoint_paths(tmp_path / "ckpts")) == [13, 12, 8, 7, 4]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_loader_s_process_outlives_a_signal_to_all(number):
    before = multiprocessing.active_children()
    stream = BatchStream(Files(), 5, 3, workers=1)
    with torch_threads(2):  # then PyTorch starts threads in the process, too, and before its init
        next(stream)
    (worker,) = (child for child in multiprocessing.active_children() if child not in before)
    subprocess.run(["kill", f"-{int(number)}", str(worker.pid)], check=True)
    for _ in range(20):  # more than it has read ahead
        next(stream)
    assert worker.is_alive()
    worker.terminate()  # as this process does with those that are left at its end
    worker.join(60)
    assert not worker.is_alive()


def test_two_processes_stop_after_the_same_step_and_hear_of_an_end():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    both = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.agreeing_processes"],
            cwd=ROOT,
            env=os.environ | shared | {"RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=120)[0] for process in both]
    assert said[0] == "stops at 6\nanother process of the run has stopped\n"
    assert said[1] == "stops at 6\n"


# -- Gamma


def test_a_stopped_estimate_of_gamma_repeats_no_step(tmp_path):
    schedule = NoiseSchedule.cosine(10)
    images = torch.randn(6, 1, 4, 4, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    calls = 0

    def model(x, n):
        nonlocal calls
        calls += 1
        return x * n.reshape(-1, 1, 1, 1) / 10

    def estimate(stop=lambda: False):
        batches = images.split(3)
        return estimate_gamma(model, schedule, batches, checkpoint=tmp_path / "state", stop=stop)

    for so_many in (4, 13, 20):
        with pytest.raises(KeyboardInterrupt, match=r"stopped at step n = \d+ of Gamma in .*state"):
            estimate(lambda so_many=so_many: calls >= so_many)
    continued = estimate()
    assert calls == 20
    unbroken = estimate_gamma(model, schedule, images.split(3))
    assert np.array_equal(continued.values, unbroken.values)
    assert np.array_equal(continued.stderr, unbroken.stderr)


# -- whole commands

TINY = words(
    "digits_sn_sa.py",
    network={"args": {"model_channels": 8, "channel_mult": (1,), "attention_resolutions": ()}},
    base={"batch_size": 4, "log_every": 3, "keep": 0, "ckpt_every": 4},
)
TINY.append("--stage=base")


def test_a_training_command_saves_and_says_where(tmp_path, monkeypatch, capsys):
    from third_party.common.criterion_base import Criterion

    words = ["sn_dpm", *TINY, "--config.base.iterations=9"]
    assert run(SN_DPM, [*words, f"--workdir={tmp_path / 'unbroken'}"]) == 0
    update = Criterion.update

    def signalled(criterion, data):
        update(criterion, data)
        if data.position == 6:
            send(signal.SIGTERM)

    monkeypatch.setattr(Criterion, "update", signalled)
    capsys.readouterr()
    assert run(SN_DPM, [*words, f"--workdir={tmp_path / 'told'}"]) == 143
    said = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(
        r"adapters\.sn_dpm: terminated: stopped after iteration 6, which is saved in "
        r".*/base/ckpts/6\.ckpt; the same command continues it",
        said,
    )
    monkeypatch.undo()
    assert run(SN_DPM, [*words, f"--workdir={tmp_path / 'told'}"]) == 0
    left = [files(tmp_path / name / "base" / "ckpts") for name in ("unbroken", "told")]
    assert left[0] == left[1]
    logs = [(tmp_path / name / "base" / "log.csv").read_text() for name in ("unbroken", "told")]
    assert logs[0] == logs[1]


@pytest.mark.slow
def test_a_signal_to_torchrun_stops_both_and_the_run_continues_to_the_same_bytes(tmp_path):
    """torchrun passes it on to its processes, and ends with a code of its own."""
    words = [*TINY, "--config.base.iterations=120", "--config.base.ckpt_every=50"]

    def start_two(name):
        return start("-m", "adapters.sn_dpm", *words, f"--workdir={tmp_path / name}", processes=2)

    finish(start_two("unbroken"))
    told = start_two("told")
    while not (tmp_path / "told" / "base" / "log.csv").exists():
        time.sleep(0.01)
    told.send_signal(signal.SIGTERM)
    _, said = told.communicate(timeout=60)
    lines = [line for line in said.splitlines() if line.startswith("adapters.sn_dpm: terminated")]
    assert len(lines) == 2, said[-3000:]
    assert len(set(re.findall(r"after iteration \d+", said))) == 1
    assert told.returncode == 1
    (interim,) = (tmp_path / "told").rglob("interim")
    assert interim.parent.name != "50.ckpt"
    finish(start_two("told"))
    left = [files(tmp_path / name / "base" / "ckpts") for name in ("unbroken", "told")]
    assert left[0] == left[1]
