"""Film strips and variance curves: against the sampler and closed forms; the command."""

import re
import shutil
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from adapters import pictures_of
from adapters.pictures.strips import film_strip, plot_variances, reverse_variances, save_film_strip
from sa_plugin.formulas import covariance_weight_ddpm
from sa_plugin.sampling.sampler import Sampler, to_uint8
from sa_plugin.schedule import NoiseSchedule
from tests.adapters.test_adapters import command
from tests.gaussian import GaussianData
from tests.toys import toy_eps

SCHEDULE = NoiseSchedule.linear(100)
SHAPE = (2, 1, 4, 4)


@pytest.mark.parametrize(
    ("steps", "columns", "shown"),
    [
        (10, 6, [100, 78, 56, 34, 12, 0]),
        (3, 10, [100, 50, 1, 0]),
        (1, 2, [1, 0]),
        (10, 2, [100, 0]),
    ],
)
def test_a_strip_shows_the_samplers_own_chain(steps, columns, shown):
    trajectory = [1] if steps == 1 else "linear"
    sampler = Sampler(toy_eps, SCHEDULE, steps=steps, trajectory=trajectory)
    strip = film_strip(sampler, SHAPE, columns=columns, seed=3)
    assert len(strip.timesteps) == len(shown) == len(strip.x) == len(strip.x0)
    assert strip.timesteps == pytest.approx(shown, abs=1)  # linear's rounding is the sampler's
    by_t = {step.t: step for step in sampler.iterate(SHAPE, seed=3)}
    for t, x, x0 in zip(strip.timesteps[:-1], strip.x, strip.x0, strict=False):
        assert torch.equal(x, to_uint8(by_t[t].x_t))
        assert torch.equal(x0, to_uint8(by_t[t].x0))
    end = to_uint8(sampler.sample(SHAPE, seed=3))
    assert torch.equal(strip.x[-1], end)
    assert torch.equal(strip.x0[-1], end)


def test_a_strips_picture_has_a_row_an_image(tmp_path):
    strip = film_strip(Sampler(toy_eps, SCHEDULE, steps=10), SHAPE, columns=5)
    save_film_strip(tmp_path / "strip.png", strip, heading="toy")
    with Image.open(tmp_path / "strip.png") as picture:
        width, height = picture.size
    cell = 64 + 16  # an enlarged pixel is 16 wide
    assert 5 * cell <= width < 6 * cell
    assert 2 * 2 * cell <= height  # x_t and x_0 of two images
    with pytest.raises(ValueError, match="columns must be at least 2, got 1"):
        film_strip(Sampler(toy_eps, SCHEDULE, steps=10), SHAPE, columns=1)


@pytest.mark.parametrize("variance", ["small", "analytic", "npr", "sn", "ocm", "probes"])
def test_variances_of_gaussian_data_are_the_exact_ones(variance):
    data = GaussianData(torch.zeros(1, 2, 2), torch.full((1, 2, 2), 0.2), SCHEDULE)
    timesteps = [1, 20, 60, 100]
    found = reverse_variances(
        data.network({"npr": "npr", "ocm": "npr", "sn": "sn"}.get(variance, "eps")),
        SCHEDULE,
        data.draw(500),
        timesteps,
        variance=variance,
        gamma=data.gamma,
        clip_x0=False,
    )
    assert list(found) == timesteps[1:]
    for s, t in pairwise(timesteps):
        exact = float(data.reverse_variance(s, t).mean())
        if variance == "small":
            exact = float(SCHEDULE.tilde_beta(s, t))
        assert found[t] == pytest.approx(exact, rel=1e-9)
    with pytest.raises(ValueError, match="timesteps must be at least two"):
        reverse_variances(data.network(), SCHEDULE, data.draw(2), [5], variance="small")


def test_variances_are_drawn_relative_to_the_first(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(
        "adapters.pictures.strips.plot_metric", lambda path, table, **o: drawn.update(table)
    )
    plot_variances(tmp_path / "a.png", {"small": {2: 1.0, 9: 4.0}, "big": {2: 3.0, 9: 6.0}})
    assert drawn == {"small": {2: 1, 9: 1}, "big": {2: 3, 9: 1.5}}
    with pytest.raises(ValueError, match="at least one method"):
        plot_variances(tmp_path / "a.png", {})


def test_probes_are_the_mean_of_as_many_as_asked_for():
    mixed = torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 4
    x0 = torch.rand(3, 1, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def network(x, n):
        return (x.flatten(1) @ mixed).reshape(x.shape)

    given = {"variance": "probes", "clip_x0": False}
    one, many = (
        reverse_variances(network, SCHEDULE, x0, [1, 50], probes=probes, **given)[50]
        for probes in (1, 1000)
    )
    s, t = 1, 50
    b = SCHEDULE.cum_betas[t]
    cov = b / SCHEDULE.cum_alphas[t] * (1 - b**0.5 * float(mixed.diagonal().mean()))
    weight = covariance_weight_ddpm(SCHEDULE.cum_alphas[s], b, SCHEDULE.skip_beta(s, t))
    exact = SCHEDULE.tilde_beta(s, t) + weight * cov
    assert many == pytest.approx(exact, rel=0.01)
    assert abs(one - exact) > 3 * abs(many - exact)


def test_the_command_shows_the_derivatives_variance(trained, tmp_path, monkeypatch):
    workdir, drawn = shutil.copytree(trained["sn"], tmp_path / "run"), {}
    monkeypatch.setattr(
        pictures_of, "plot_variances", lambda path, curves, **o: drawn.update(curves)
    )
    own = ["--images=1", "--columns=2", "--variance_images=8", "--probes=2"]
    assert pictures_of.main(command("sn", f"--workdir={workdir}", *own)) == 0
    assert list(drawn) == ["DDPM small", "DDPM big", "SN-DDPM", "Probes-DDPM"]
    probed, small = (drawn[name] for name in ("Probes-DDPM", "DDPM small"))
    assert probed.keys() == small.keys()
    assert all(probed[n] > small[n] for n in small)
    assert not list((workdir / "pictures").glob("strip_probes*"))


@pytest.mark.parametrize("method", ["analytic", "sn"])
def test_the_command_draws_every_process(method, trained, tmp_path):
    workdir = shutil.copytree(trained[method], tmp_path / "run")
    own = ["--images=2", "--columns=3", "--variance_images=8"]
    assert pictures_of.main(command(method, f"--workdir={workdir}", *own)) == 0
    rows = ["ddpm_small", "ddpm_big", f"{method}_ddpm", "ddim", f"{method}_ddim"]
    names = {*(f"strip_{row}_6.png" for row in rows), "variances_6.png"}
    assert {path.name for path in (workdir / "pictures").iterdir()} == names
    for name in names:
        with Image.open(workdir / "pictures" / name) as picture:
            assert np.asarray(picture.convert("L")).std() > 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--images=0"], "--images must be >= 1, got 0"),
        (["--columns=1"], "--columns must be >= 2, got 1"),
        (["--probes=-1"], "--probes must be >= 0, got -1"),
        (["--steps=101"], r"steps must be a whole number in 1\.\.100, got 101"),
        (["--steps=x"], "--steps: invalid int value: 'x'"),
        (["--config.seed=7"], "seed is 0 there, 7 here"),
        (["--workdir=/nonexistent/run"], "holds no run: run python -m adapters.sn_dpm first"),
    ],
    ids=str,
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, said, trained, capsys):
    workdir = trained["sn"]
    assert pictures_of.main(command("sn", f"--workdir={workdir}", *arguments)) == 2
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert err.startswith("adapters.pictures_of: ")
    assert re.search(said, err)
    assert not (workdir / "pictures").exists()
