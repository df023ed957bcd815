"""adapters.predict: the closed form for the digits, against numbers found another way."""

import re

import numpy as np
import pytest

from adapters.predict import main
from sa_plugin.effect.chains import chain_variances
from sa_plugin.effect.gains import exact_gains
from sa_plugin.sampling.trajectory import choose_timesteps
from sa_plugin.schedule import NoiseSchedule
from third_party.common.datasets import get_dataset

FEW = ["--config.sample.processes=('ddpm_small','ddim')", "--config.sample.steps=(10,)"]


def predict(*arguments, config="configs/digits_sn_sa.py"):
    return main(["predict", "--config", config, *arguments])


def test_the_digits_baseline_is_that_of_the_chain(capsys):
    assert predict(*FEW) == 0
    text = capsys.readouterr().out
    images = next(get_dataset("digits").uint8_batches(2000)).numpy().reshape(1797, -1) / 127.5 - 1
    s = np.linalg.eigvalsh(np.cov(images.T))
    s = s[s > 1e-12]
    schedule = NoiseSchedule.linear(1000)
    visited = choose_timesteps(1000, 10, "linear")
    v = chain_variances(
        schedule, exact_gains(schedule, s), visited, forward="ddpm", variance="small"
    )
    numbers = next(line for line in text.splitlines() if "DDPM small" in line).split("|")
    assert float(numbers[3]) == pytest.approx(v.sum(), rel=5e-3)
    assert float(numbers[6]) == pytest.approx(((v**0.5 - s**0.5) ** 2).sum(), rel=5e-3)
    q, lam = float(numbers[9]), float(numbers[10])
    assert lam / (2 + lam) == pytest.approx(q, abs=6e-3)
    assert "SA-2, lambda 1: q = 0.333" in text


def test_other_images_and_a_picture(tmp_path, capsys):
    path = tmp_path / "images.npz"
    images = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 1), dtype=np.uint8)
    np.savez(path, images)
    assert predict(*FEW, f"--images={path}", f"--out={tmp_path / 'out'}") == 0
    assert re.search(r"64 images, variance", capsys.readouterr().out)
    assert (tmp_path / "out/prediction.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--images=nowhere"], "images must be a folder"),
        (["--config.sample.steps=(1001,)"], "steps"),
        (["--config.sa.lam=-1.0"], "lam"),
    ],
)
def test_bad_input_is_one_line(capsys, more, said):
    assert predict(*FEW, *more) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
