"""The main job on real digits, shortened: does it learn?"""

import json

import pytest

from adapters.experiment.run import run
from adapters.hosts import SN_DPM


@pytest.mark.slow
@pytest.mark.parametrize("lam", [0, 1])
def test_samples_come_close_to_the_digits(lam, tmp_path):
    """Pixel distances of noise are near 40, of one half of the digits to the other near 0.3."""
    arguments = [
        "--config=configs/digits_sn_sa.py",
        f"--config.sa.lam={lam}",
        "--config.base.iterations=600",
        "--config.base.ema=0.99",  # a longer average would still hold the initial weights
        "--config.head.iterations=150",
        "--config.head.ema=0.98",
        "--config.sample.n_images=500",
        "--config.sample.steps=(25,)",
        "--config.sample.processes=('ddpm_small','sn_ddpm','ddim','sn_ddim')",
        f"--workdir={tmp_path / 'run'}",
        "--device=cpu",
        "--noprogress",
    ]
    assert run(SN_DPM, ["sn_dpm", *arguments]) == 0
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    for process, cells in metrics.items():
        assert cells["25"]["frechet_pixels"] < 2.5, process
        assert cells["25"]["frechet_digit_classifier"] < 6.0, process
        assert cells["25"]["is_digit_classifier"] > 7.0, process
