"""The rows of the solvers: in experiments, in grids, and where they have no place."""

import re
import sys

import pytest
import torch

from adapters import compare, predict
from adapters.comparison.tasks import made_with
from adapters.experiment.config import read_command_line
from adapters.experiment.experiment import Experiment
from adapters.hosts import PROCESSES, SN_DPM

SOLVERS = [name for name, row in PROCESSES.items() if row.solver]
CONFIG = "--config=configs/digits_classes.py"
# diffusers' own: it mixes arrays and tensors in a way of which NumPy 2 warns.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")


def experiment(workdir, *words):
    words = ["x", CONFIG, f"--config.sample.processes={tuple(SOLVERS)!r}", *words]
    config = read_command_line([*words, "--config.sample.steps=(4,)"], (), "x").config
    return Experiment(SN_DPM, config, workdir, progress=False)


@pytest.mark.parametrize("process", SOLVERS)
def test_a_row_is_its_solver_with_the_experiments_options(process, tmp_path):
    images, y = [], torch.tensor([3, 7])
    for clip in (True, False):
        host = experiment(tmp_path, f"--config.sample.clip_x0={clip}")
        sampler = host.sampler(process, 4, host.network("pred_eps").eval(), "eps")
        assert (sampler.solver, len(sampler.timesteps)) == (PROCESSES[process].solver, 4)
        images.append(sampler.sample((2, 1, 8, 8), y=y))
    assert not torch.equal(*images)


def test_steps_are_calls_of_the_guided_network_and_bytes_belong_to_the_image(tmp_path):
    host, calls = experiment(tmp_path), []
    network = host.network("pred_eps").eval()

    def counting(function):
        def call(x, n, **labels):
            calls.append(int(n[0]))
            return function(x, n, **labels)

        call.model = network
        return call

    source = host.source("unipc", 4, network, "eps", call=counting)
    images = torch.cat(list(source.batches(0, 70)))
    assert calls == [n for n in source.sampler.timesteps[::-1] for _ in range(2)]  # two slices
    assert torch.equal(torch.cat(list(source.batches(64, 6))), images[64:])


def test_the_closed_form_leaves_them_out(capsys):
    rows = "--config.sample.processes=('ddim','unipc','ocm_ddpm','probes_ddim')"
    assert predict.main(["predict", "--config=configs/digits.py", rows]) == 0
    said = capsys.readouterr().out
    assert "| DDIM " in said
    assert not {"UniPC", "OCM", "Probes"} & set(re.split(r"\W", said))


def test_a_cell_says_the_diffusers_that_it_was_made_with():
    assert made_with("cpu", "unipc").keys() - made_with("cpu", "ddim").keys() == {"diffusers"}


def test_a_best_q_is_refused(tmp_path, capsys):
    best = "--config.samplings.shifted.q=0.0"
    assert grid(tmp_path, best) == 2
    said = capsys.readouterr().err
    assert "samplings.shifted.q must be > 0 for 'ddim_solver'" in said


def test_an_absent_diffusers_is_told_in_one_line(tmp_path, capsys, monkeypatch):
    for name in [name for name in sys.modules if "integrations.diffusers" in name]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert grid(tmp_path) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "diffusers is not installed; get it by: pip install 'sa-plugin[diffusers]'" in said


def grid(workdir, *words):
    config = "--config=configs/digits_solvers_tables.py"
    return compare.main(["compare", config, f"--workdir={workdir / 'run'}", *words, "--dry_run"])
