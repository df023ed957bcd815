"""The examples run; that of JAX is compared with SALoss in test_formulas.py."""

import pytest
import torch
from diffusers import DDPMPipeline

from examples import diffusers_unconditional
from sa_plugin.integrations.diffusers import OptimalVarianceScheduler
from tests.children import finish, start

# "--multi_gpu" starts the processes; "--cpu" would start one.
LAUNCH = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2"]
LAUNCH += ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]


def test_diffusers_loop_trains_saves_and_samples(tmp_path, capsys):
    sizes = ["--iterations=2", "--batch_size=4", "--channels=8", "--train_timesteps=20"]
    sizes += ["--gamma_images=2", "--inference_steps=3", "--images=8"]
    diffusers_unconditional.main([f"--output_dir={tmp_path}", *sizes])
    assert "iteration 2: loss" in capsys.readouterr().out
    for variance in ("small", "analytic"):
        assert (tmp_path / f"{variance}.png").stat().st_size > 0
        scheduler = DDPMPipeline.from_pretrained(tmp_path / variance).scheduler
        assert isinstance(scheduler, OptimalVarianceScheduler)
        assert scheduler.config.variance == variance


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_two_processes_share_weights_and_nothing_that_is_drawn(launcher, tmp_path):
    module = ["-m", "tests.example_draws", str(tmp_path)]
    finish(start(*module, processes=2) if launcher == "torchrun" else start(*LAUNCH, *module))
    one, two = (torch.load(tmp_path / f"{rank}.pt", map_location="cpu") for rank in range(2))
    assert all(torch.equal(*pair) for pair in zip(one["weights"], two["weights"], strict=True))
    for name in ("images", "noise", "timesteps"):
        assert not torch.equal(one[name], two[name]), name
