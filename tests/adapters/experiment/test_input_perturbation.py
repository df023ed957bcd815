"""base.input_perturbation: either the host's criterion or the SA loss perturbs; a head does not."""

import pytest
from ml_collections import FrozenConfigDict

from adapters.experiment.experiment import Experiment
from adapters.experiment.stages import TrainStage
from adapters.hosts import ANALYTIC_DPM, SN_DPM
from configs import digits
from sa_plugin.hooks.hook import detach


def criterion(stage):
    """What the stage trains, and the gamma of its own schedule."""
    found = stage._criterion()
    return found, getattr(found, "schedule", found).input_perturbation


@pytest.mark.parametrize("lam", [0.0, 1.0])
@pytest.mark.parametrize("adapter", [SN_DPM, ANALYTIC_DPM], ids=lambda adapter: adapter.name)
def test_one_place_perturbs(adapter, lam, tmp_path):
    config = digits.get_config(adapter.name)
    config.sa.lam, config.base.input_perturbation = lam, 0.1
    experiment = Experiment(adapter, FrozenConfigDict(config), tmp_path)
    base = TrainStage(experiment, "base", experiment.base_method)
    found, own = criterion(base)
    assert own == (0.0 if lam else 0.1)
    if lam:
        assert found.objective.loss.input_perturbation == 0.1
        detach(found)
    assert not hasattr(found.objective, "loss")
    head = TrainStage(experiment, "head", adapter.pretrained or "", base)
    assert head._input_perturbation == 0.0
