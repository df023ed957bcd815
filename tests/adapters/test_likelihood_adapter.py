"""python -m adapters.likelihood: its numbers, what it leaves, what it refuses."""

import json
import re
import shutil

import numpy as np
import pytest
import torch

from adapters import likelihood
from adapters.experiment import config
from adapters.experiment.run import stages_of
from adapters.shell.locks import locked
from sa_plugin.bounds.likelihood import negative_elbo
from sa_plugin.sampling.gamma import Gamma
from tests.adapters.test_adapters import command, experiment
from third_party.common.data import to_unit_range

OWN = ["--n_images=30", "--batch_size=20", "--steps=3,6"]
BITS = 64 * np.log(2)


def run(method, workdir, *arguments):
    """The exit code of the command on a method's shrunk digits."""
    return likelihood.main(command(method, f"--workdir={workdir}", *OWN, *arguments))


@pytest.fixture
def workdir(trained, tmp_path):
    """A run of Analytic-DPM that a test may change."""
    return shutil.copytree(trained["analytic"], tmp_path / "run")


def test_the_numbers_are_those_of_negative_elbo(workdir, capsys):
    assert run("analytic", workdir) == 0
    host = experiment("analytic", workdir)
    model = host.wrapper(*stages_of(host)["base"].average())
    gamma = Gamma.load(workdir / "gamma/gamma.npz")
    x0 = to_unit_range(next(host.dataset.uint8_batches(30)))
    result = json.loads((workdir / "likelihood.json").read_text())
    out = capsys.readouterr().out
    assert list(result["cells"]) == ["small", "big", "analytic"]
    for variance, cells in result["cells"].items():
        assert list(cells) == ["3", "6"]
        for steps, cell in cells.items():
            bound = negative_elbo(
                model, host.schedule, x0, variance=variance, steps=int(steps), gamma=gamma
            )
            with np.load(workdir / cell["terms"]) as arrays:
                np.testing.assert_allclose(arrays["terms"], bound.terms.numpy(), rtol=1e-3)
                total = arrays["terms"].sum(0) / BITS
            assert cell["bits_per_dim"] == pytest.approx(total.mean(), rel=1e-12)
            assert cell["stderr"] == pytest.approx(total.std(ddof=1) / 30**0.5, rel=1e-12)
            assert f"{cell['bits_per_dim']:.3f} ± {cell['stderr']:.3f}" in out
    assert "30 train images" in out


def test_sn_takes_its_head(trained, tmp_path):
    workdir = shutil.copytree(trained["sn"], tmp_path / "run")
    assert run("sn", workdir, "--variances=sn,small") == 0
    result = json.loads((workdir / "likelihood.json").read_text())
    assert list(result["cells"]) == ["sn", "small"]


def test_stored_cells_are_skipped_and_others_added(workdir, monkeypatch, capsys):
    assert run("analytic", workdir, "--variances=small") == 0
    before = (workdir / "likelihood/small_3.npz").stat().st_mtime_ns
    assert run("analytic", workdir, "--dry_run", "--variances=small,big") == 0
    assert "2 cells of 30 images of 'train', 270 network evaluations" in capsys.readouterr().out
    assert run("analytic", workdir, "--variances=small,big") == 0
    assert (workdir / "likelihood/small_3.npz").stat().st_mtime_ns == before
    monkeypatch.setattr(likelihood, "negative_elbo", None)
    assert run("analytic", workdir, "--variances=big") == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("| big") for line in lines) == 2


def test_an_interruption_keeps_what_is_stored(workdir, monkeypatch, capsys):
    real = likelihood.negative_elbo

    def broken(*args, variance, **options):
        if variance == "big":
            raise KeyboardInterrupt
        return real(*args, variance=variance, **options)

    monkeypatch.setattr(likelihood, "negative_elbo", broken)
    assert run("analytic", workdir) == 130
    assert "the same command continues it" in capsys.readouterr().err
    assert list(json.loads((workdir / "likelihood.json").read_text())["cells"]) == ["small"]


def test_another_split_is_asked_of_the_dataset(workdir, monkeypatch):
    asked = {}

    def dataset(data, **options):
        asked.update(options, name=data.name)
        return experiment("analytic", workdir).dataset

    monkeypatch.setattr(likelihood, "load_dataset", dataset)
    assert run("analytic", workdir, "--split=test", "--variances=small", "--steps=3") == 0
    assert asked == {"name": "digits", "split": "test"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--variances=small,npr"], "--variances must be some of small,big,analytic .*'npr'"),
        (["--steps=3,many"], "--steps: must be whole numbers >= 1, got 3,many"),
        (["--steps=101"], r"steps must be a whole number in 1\.\.100, got 101"),
        (["--n_images=1"], "--n_images must be >= 2, got 1"),
        (["--n_images=x"], "--n_images: invalid int value: 'x'"),
        (["--batch_size=0"], "--batch_size must be >= 1, got 0"),
        (["--noise_seed=-1"], "--noise_seed must be >= 0, got -1"),
        (["--split=val"], "split=.val.: must be one of .all., .train., .test."),
        (["--images=5"], "[Uu]nknown command line flag 'images'"),
        (["--config.sample.processes=('ddim',)"], "sample.processes must name rows of one host"),
        (["--config.seed=7"], "seed is 0 there, 7 here"),
        (["--config.base.iterations=7"], "holds a run of another configuration"),
    ],
    ids=str,
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, said, workdir, capsys):
    assert run("analytic", workdir, *arguments) == 2
    err = capsys.readouterr().err.strip()
    assert err.splitlines()[-1].startswith("adapters.likelihood: ")
    assert re.search(said, err)
    assert not (workdir / "likelihood.json").exists()


def test_a_folder_without_a_run_is_left_alone(tmp_path, capsys):
    assert run("analytic", tmp_path / "none") == 2
    assert "holds no run: run python -m adapters.analytic_dpm first" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_a_folder_where_another_run_is_at_work_is_refused(workdir, monkeypatch, capsys):
    monkeypatch.setattr(config, "PATIENCE", 0.1)
    with locked(workdir / config.LOCK_FILE) as ours:
        assert ours
        assert run("analytic", workdir, "--dry_run") == 0
        assert run("analytic", workdir, "--variances=small", "--steps=3") == 2
        assert "another run is at work in" in capsys.readouterr().err
        assert not (workdir / "likelihood.json").exists()
    assert run("analytic", workdir, "--variances=small", "--steps=3") == 0


def test_an_unfinished_run_says_what_is_missing(workdir, capsys):
    shutil.rmtree(workdir / "gamma")
    assert run("analytic", workdir) == 2
    assert "the result of stage 'gamma' is needed first" in capsys.readouterr().err
    shutil.rmtree(workdir / "base")
    assert run("analytic", workdir) == 2
    assert "is needed first" in capsys.readouterr().err


def test_results_of_other_settings_are_not_mixed(workdir, capsys):
    assert run("analytic", workdir, "--variances=small", "--steps=3") == 0
    assert run("analytic", workdir, "--noise_seed=1") == 2
    assert "results of another seed (0 there, 1 here)" in capsys.readouterr().err
    (workdir / "likelihood.json").write_text("{")
    assert run("analytic", workdir) == 2
    assert "cannot be read; remove it" in capsys.readouterr().err
    assert torch.is_grad_enabled()
