"""Command lines: help, configurations that fail, what is in the way, progress in a file."""

import io
import os
import runpy
import signal
import subprocess
import sys
from importlib import import_module

import pytest
from tqdm import tqdm

from adapters import compare
from adapters.experiment.config import read_command_line
from adapters.experiment.run import run
from adapters.hosts import ANALYTIC_DPM, NPR_DPM, OCM_DPM, SN_DPM
from sa_files import progress
from sa_plugin.sampling.batches import shown
from tests import ROOT
from tests.children import command_of
from tests.commands import one_line, words

HOSTS = (SN_DPM, NPR_DPM, OCM_DPM, ANALYTIC_DPM)
WITH_CONFIG = ("compare", "diagnose", "likelihood", "pictures_of", "predict", "sample")
FILES = ("convert", "evaluate", "summary")
MOST_LINES = 25  # of a help: a screen
BENCHMARKS = sorted(
    path.stem for path in (ROOT / "benchmarks").glob("*.py") if "__main__" in path.read_text()
)


def sn_dpm(workdir, *arguments):
    return run(SN_DPM, ["sn_dpm", *words("digits_sn_sa.py"), f"--workdir={workdir}", *arguments])


# ------------------------------------------------------------------------------------------ help


@pytest.mark.parametrize("asked", ["--help", "-h"])
@pytest.mark.parametrize("host", HOSTS, ids=lambda host: host.name)
def test_a_host_s_command_has_help(host, asked, capsys):
    assert run(host, ["x", asked]) == 0
    said = capsys.readouterr().out
    for word in ("--config FILE.py", "--config.KEY=VALUE", "--stage", "--dry_run", "--workdir"):
        assert word in said
    assert f"  python -m {host.module} --config configs/digits.py --dry_run\n" in said
    assert 15 <= len(said.splitlines()) <= MOST_LINES


@pytest.mark.parametrize("name", WITH_CONFIG)
def test_a_command_s_help_has_its_own_options_and_those_of_all(name, capsys):
    main = import_module(f"adapters.{name}").main
    assert main(["x", "--help"]) == 0
    said = capsys.readouterr().out
    for word in ("--help_keys", "--config FILE.py", "--dry_run", f"  python -m adapters.{name} "):
        assert word in said
    assert len(said.splitlines()) <= MOST_LINES
    assert main(["x", "--help_keys"]) == 0
    assert "sample.n_images = 50000: int, >= 1\n    images a cell" in capsys.readouterr().out


@pytest.mark.parametrize("name", FILES)
def test_a_command_on_files_has_help(name, capsys):
    words_of_it = ["--help"] if name in ("convert", "summary") else [name, "--help"]
    assert import_module(f"adapters.{name}").main(words_of_it) == 0
    said = capsys.readouterr().out
    assert f"usage: python -m adapters.{name} " in said
    assert len(said.splitlines()) <= MOST_LINES


@pytest.mark.parametrize("name", [*BENCHMARKS, "faults"])
def test_a_benchmark_has_help(name, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmark", "--help"])
    monkeypatch.delitem(sys.modules, f"benchmarks.{name}", raising=False)
    with pytest.raises(SystemExit) as end:
        runpy.run_module(f"benchmarks.{name}", run_name="__main__", alter_sys=True)
    assert not end.value.code
    said = capsys.readouterr().out
    assert "usage: " in said
    assert len(said.splitlines()) <= MOST_LINES


def test_help_does_not_wait_for_pytorch():
    script = (
        "import runpy, sys\nsys.argv = ['x', '--help']\ntry:\n"
        "    runpy.run_module('adapters.sn_dpm', run_name='__main__')\n"
        "finally:\n    print('torch' in sys.modules)"
    )
    done = subprocess.run(command_of("-c", script), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_when_nobody_reads_the_output_the_command_ends_without_a_word(unbuffered):
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        command_of("-m", "adapters.sn_dpm", "--help_keys"),
        cwd=ROOT,
        env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
        stdout=writing,
        stderr=subprocess.PIPE,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


# -------------------------------------------------------------------------------- configurations


FAILING = {
    "boom": ('def get_config():\n    raise RuntimeError("boom")\n', "{}:2: RuntimeError: boom"),
    "nested": ("def get_config():\n    return {}[1] + f()\n", "{}:2: 1"),
    "syntax": ("x = 1\ndef get_config(:\n", "{}:2: SyntaxError: invalid syntax"),
    "import": ("import no_such_module\n", "{}:1: ModuleNotFoundError: No module named"),
    "empty": ("x = 1\n", "{} has no function get_config: give --config a file of configs/"),
    "number": ("def get_config():\n    return 3\n", "must return a ConfigDict, got int"),
}


@pytest.mark.parametrize("kind", FAILING)
def test_a_configuration_that_fails_is_one_line_with_its_place(kind, tmp_path, capsys):
    file = tmp_path / "mine.py"
    code, said = FAILING[kind]
    file.write_text(code)
    assert run(SN_DPM, ["sn_dpm", f"--config={file}", "--config.seed=1"]) == 2
    one_line(capsys, said.format(file))


def test_a_file_that_is_not_python_is_one_line(capsys):
    assert run(SN_DPM, ["sn_dpm", "--config", "README.md"]) == 2
    one_line(capsys, "README.md:", "--config takes a Python file, such as configs/digits.py")


@pytest.mark.parametrize("more", [[], ["--config.sample.seed=1"]])
def test_the_other_kind_of_configuration_is_named_with_its_command(more, capsys):
    assert run(SN_DPM, ["sn_dpm", *words("digits_tables.py"), *more]) == 2
    one_line(capsys, "digits_tables.py is a comparison, which python -m adapters.compare takes")
    assert compare.main(["compare", *words("digits.py"), *more]) == 2
    one_line(
        capsys, "digits.py is an experiment, which python -m adapters.sn_dpm, npr_dpm, ocm_dpm or"
    )


@pytest.mark.parametrize(
    "changes",
    [
        ["--config.sample.steps=10", "--config.sample.steps=25"],
        ["--config.sample.steps", "10", "--config.sample.steps", "25"],
        ["--config.sample.steps=10,20", "--config.sa.K=3", "--config.sample.steps", "25"],
    ],
)
def test_of_a_key_given_twice_the_last_value_counts(changes):
    config = read_command_line(["x", *words("digits.py"), *changes], (), "x").config
    assert config.sample.steps == (25,)
    assert (3 if "--config.sa.K=3" in changes else 2) == config.sa.K


# ------------------------------------------------------------------------------ what is in the way


@pytest.mark.parametrize("plan", [[], ["--dry_run"]])
@pytest.mark.parametrize("below", ["", "run"])
def test_a_file_for_the_output_folder_is_refused_also_by_the_plan(tmp_path, below, plan, capsys):
    file = tmp_path / "notes.txt"
    file.write_text("dear")
    assert sn_dpm(file / below, *plan) == 2
    one_line(capsys, "--workdir must be a folder, got", f"{file} is a file")
    assert file.read_text() == "dear"


def _folder(path):
    path.mkdir()


def _link(path):
    path.symlink_to(path.with_name("elsewhere"))


@pytest.mark.parametrize("block", [_folder, _link])
def test_a_lock_that_cannot_be_one_is_refused(tmp_path, block, capsys):
    block(tmp_path / ".lock")
    assert sn_dpm(tmp_path) == 2
    one_line(capsys, f"{tmp_path / '.lock'} must be a plain file")
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


SHORT = words(
    "digits_sn_sa.py",
    base={"iterations": 2, "batch_size": 4, "log_every": 1, "ckpt_every": 2},
    network={"args": {"channel_mult": (1,), "model_channels": 8, "attention_resolutions": ()}},
)


@pytest.mark.parametrize(
    ("name", "block"),
    [("base/tensorboard", lambda path: path.write_text("")), ("base/ckpts/2.ckpt.tmp", _link)],
)
def test_what_is_in_the_way_of_an_output_is_no_passing_trouble(tmp_path, name, block, capsys):
    path = tmp_path / "run" / name
    line = ["sn_dpm", *SHORT, f"--workdir={tmp_path / 'run'}", "--stage=base"]
    assert run(SN_DPM, [*line, "--config.evaluate.splits=2", "--dry_run"]) == 0
    with pytest.MonkeyPatch.context() as patch:  # the folder as a run leaves it
        patch.setattr("adapters.experiment.run._run_all", lambda stages: None)
        assert run(SN_DPM, line) == 0
    path.parent.mkdir(parents=True)
    block(path)
    capsys.readouterr()
    assert run(SN_DPM, line) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"{path} cannot be used (" in said
    assert "move it away" in said
    assert "continues it" not in said


# ---------------------------------------------------------------------------------------- progress


def test_without_a_terminal_progress_is_lines_and_few(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    for _ in tqdm(range(20_000), **progress.bar_options()):
        pass
    said = sys.stderr.getvalue()
    assert "\r" not in said
    assert 1 <= said.count("\n") <= 2  # the beginning and the end, as half a minute has not passed
    assert "20000/20000" in said.splitlines()[-1]


def test_after_the_interval_there_is_another_line(monkeypatch):
    monkeypatch.setattr(progress, "INTERVAL", 0.0)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    for _ in tqdm(range(5), **progress.bar_options(), miniters=1):
        pass
    lines = sys.stderr.getvalue().splitlines()
    assert [line.split("|")[-1].split()[0] for line in lines[:6]] == [f"{i}/5" for i in range(6)]


def test_training_and_sampling_show_lines(tmp_path, capsys):
    line = ["sn_dpm", *SHORT, "--progress", f"--workdir={tmp_path / 'run'}", "--stage=base"]
    assert run(SN_DPM, line) == 0
    assert list(shown(range(3), 3, "img", progress=True)) == [0, 1, 2]
    said = capsys.readouterr().err
    assert "\r" not in said
    ends = [line.split("[")[0].split()[-1] for line in said.splitlines() if "|" in line]
    assert ends == ["0/2", "2/2", "0/3", "3/3"]


def test_in_a_terminal_it_is_a_bar_unless_two_processes_share_it(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    assert progress.bar_options() == {}
    with progress.named("B"):
        list(tqdm(range(3), **progress.bar_options()))
    assert progress.bar_options() == {}
    assert all(line.startswith("B: ") for line in terminal.getvalue().splitlines())
    assert "3/3" in terminal.getvalue()
