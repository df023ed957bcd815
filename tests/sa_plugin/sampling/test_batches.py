"""An image depends on its seed and number, not on the batch or the run it is drawn in."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sa_plugin.sampling.batches import BLOCK, BlockNoise
from sa_plugin.sampling.sampler import Sampler, to_uint8
from sa_plugin.sampling.variance import VARIANCES
from sa_plugin.schedule import NoiseSchedule
from tests.toys import over

LINEAR = NoiseSchedule.linear(100)


def single(x, n):
    """A network of exactly rounded operations: the same bits for an image in any batch."""
    eps = 0.3 * x + 0.001 * over(n, x) * x.clamp(-1, 1)
    return eps, (0.02 * x * x + 0.005).clamp(0, 0.06)


def sampler_of(**options):
    options = {"variance": "npr", "trajectory": [1, 20, 50], "clip_sigma_idx": 1, **options}
    return Sampler(single, LINEAR, **options)


def draw(count, first=0, batch_size=None, seed=0, x_init=None, **options):
    given = {"first": first, "batch_size": batch_size, "seed": seed, "x_init": x_init}
    return sampler_of(**options).sample((count, 2, 3, 3), **given)


WHOLE = draw(150)


@given(st.integers(1, 200), st.integers(0, 149), st.integers(1, 150))
@settings(max_examples=40, deadline=None)
def test_any_batch_size_and_any_start_give_the_same_bytes(batch_size, first, count):
    count = min(count, 150 - first)
    part = draw(count, first=first, batch_size=batch_size)
    assert torch.equal(part, WHOLE[first : first + count])


@pytest.mark.parametrize(
    ("variance", "avg_cov"),
    [(v, average) for v in VARIANCES for average in (False, True) if v != "lanczos" or not average],
)
def test_batches_with_every_variance(variance, avg_cov):
    options = {"variance": variance, "avg_cov": avg_cov, "gamma": np.full(101, 0.7)}
    whole = draw(70, **options)
    for batch_size in (1, 9, 64):
        parts = draw(70, batch_size=batch_size, **options)
        torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-6)
        if variance != "iddpm":  # its power may differ in the last bit between vector lanes
            assert torch.equal(parts, whole)


def test_average_covariance_is_one_number_an_image():
    one = draw(5, avg_cov=True)
    assert not torch.equal(one, draw(5))
    assert torch.equal(one[3:4], draw(1, avg_cov=True, first=3))


def test_a_given_start_keeps_the_steps_noise():
    start = BlockNoise(0, 0, (5, 2, 3, 3), torch.float32, torch.device("cpu")).draw()
    assert torch.equal(draw(5, x_init=start), WHOLE[:5])
    assert torch.equal(draw(5, x_init=start, batch_size=2), WHOLE[:5])


def test_seeds_blocks_and_images_differ():
    assert torch.equal(draw(150), WHOLE)
    assert not torch.isclose(draw(150, seed=1), WHOLE).any(dim=(1, 2, 3)).all()
    images = torch.cat([WHOLE, draw(150, seed=1), draw(150, seed=2**40)]).flatten(1)
    assert len(images.unique(dim=0)) == 450
    assert not torch.equal(draw(1, seed=2**32), draw(1, seed=0))


def test_block_noise_is_standard_normal_and_independent():
    count = 40 * BLOCK
    noise = BlockNoise(5, 0, (count, 50), torch.float64, torch.device("cpu"))
    first, second = noise.draw(), noise.draw()
    for values in (first, second):
        assert abs(float(values.mean())) < 5 / values.numel() ** 0.5
        assert float(values.var()) == pytest.approx(1, abs=5 * (2 / values.numel()) ** 0.5)
    blocks = first.reshape(40, -1)
    off = torch.corrcoef(blocks) - torch.eye(40, dtype=torch.float64)
    assert off.abs().max() < 5.5 / blocks.shape[1] ** 0.5
    assert abs(float((first * second).mean())) < 5 / first.numel() ** 0.5


def test_labels_follow_their_images():
    labels = torch.linspace(0, 1, 10)
    sampler = Sampler(lambda x, n, y, scale: scale * over(y, x) * x, LINEAR, steps=3)
    whole = sampler.sample((10, 4), y=labels, scale=0.3)
    assert torch.equal(sampler.sample((10, 4), batch_size=3, y=labels, scale=0.3), whole)
    chunks = torch.cat(list(sampler.stream(10, (4,), batch_size=4, y=labels, scale=0.3)))
    assert torch.equal(chunks, to_uint8(whole))


def test_stream():
    sampler = sampler_of()
    batches = list(sampler.stream(150, (2, 3, 3), batch_size=40))
    assert [len(b) for b in batches] == [40, 40, 40, 30]
    assert all(b.dtype == torch.uint8 for b in batches)
    assert torch.equal(torch.cat(batches), to_uint8(WHOLE))
    rest = torch.cat(list(sampler.stream(50, (2, 3, 3), batch_size=7, first=100)))
    assert torch.equal(rest, to_uint8(WHOLE)[100:])


def test_to_uint8():
    x = torch.tensor([-3.0, -1.0, -0.999, 0.0, 1 / 255, 0.999, 1.0, 7.0])
    assert to_uint8(x).tolist() == [0, 0, 0, 128, 128, 255, 255, 255]
    pixels = torch.arange(256)
    assert torch.equal(to_uint8(pixels / 127.5 - 1), pixels.to(torch.uint8))


def test_iterate_is_the_chain_of_sample():
    steps = list(sampler_of().iterate((5, 2, 3, 3)))
    assert [(step.t, step.s) for step in steps] == [(50, 20), (20, 1), (1, 0)]
    for before, after in itertools.pairwise(steps):
        assert after.x_t is before.x_s
    assert torch.equal(steps[-1].x_s, WHOLE[:5])
    torch.testing.assert_close(steps[0].eps, single(steps[0].x_t, torch.full((5,), 50))[0])


def test_progress_is_shown_on_request(capsys):
    sampler = Sampler(lambda x, n: 0.1 * x, LINEAR, steps=4)
    sampler.sample((2, 3))
    assert capsys.readouterr().err == ""
    sampler.sample((2, 3), progress=True)
    assert "4/4" in capsys.readouterr().err
    list(sampler.stream(5, (3,), batch_size=2, progress=True))
    assert "3/3" in capsys.readouterr().err
