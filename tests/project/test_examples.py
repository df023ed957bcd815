"""The examples run; that of JAX is compared with SALoss in test_formulas.py."""

from diffusers import DDPMPipeline

from examples import diffusers_unconditional
from sa_plugin.integrations.diffusers import OptimalVarianceScheduler


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
