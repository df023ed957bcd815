"""The main job on real digits, shortened: does it learn?"""

import json

import pytest

from adapters.experiment.run import run
from adapters.hosts import SN_DPM
from tests.commands import words


@pytest.mark.slow
@pytest.mark.parametrize("lam", [0, 1])
def test_samples_come_close_to_the_digits(lam, tmp_path):
    """Pixel distances of noise are near 40, of one half of the digits to the other near 0.3."""
    processes = ("ddpm_small", "sn_ddpm", "ddim", "sn_ddim")
    arguments = words(
        "digits_sn_sa.py",
        sa={"lam": lam},
        base={"iterations": 600, "ema": 0.99},  # a longer one would still hold the initial weights
        head={"iterations": 150, "ema": 0.98},
        sample={"n_images": 500, "steps": (25,), "processes": processes},
    )
    assert run(SN_DPM, ["sn_dpm", *arguments, f"--workdir={tmp_path / 'run'}"]) == 0
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    for process, cells in metrics.items():
        assert cells["25"]["frechet_pixels"] < 2.5, process
        assert cells["25"]["frechet_digit_classifier"] < 6.0, process
        assert cells["25"]["is_digit_classifier"] > 7.0, process
