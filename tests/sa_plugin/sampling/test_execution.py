"""Channels innermost, autocast, compiled graphs, copies to the CPU: the same images."""

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from sa_plugin._execution import NetworkCall, module_of
from sa_plugin.sampling.sampler import Sampler
from sa_plugin.schedule import NoiseSchedule
from tests.refusals import refuses
from tests.sa_plugin.sampling.test_sampler import ARRAYS, GOLDEN, golden_sampler
from tests.toys import normal

LINEAR = NoiseSchedule.linear(100)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 3, 3, padding=1))


class Eps:
    """A network behind a wrapper, as the hosts' wrappers hold it."""

    def __init__(self) -> None:
        self.model = network()
        self.seen: list[torch.Tensor] = []

    def __call__(self, x, n):
        self.seen.append(x)
        return self.model(x)


def images(**options):
    eps = Eps()
    drawn = Sampler(eps, LINEAR, steps=5, **options).sample((4, 3, 6, 6))
    return drawn, eps


def check_golden_in_float32(i, **options):
    """A case of the float64 reference numbers, by the sampler in float32, to 1e-4."""
    noise = normal(1, GOLDEN[i]["steps"], 4, 2, 3, 3).float()
    x_init = torch.from_numpy(ARRAYS["x_init"]).float()
    sampler = golden_sampler(GOLDEN[i], **options)
    x0 = sampler.sample(x_init.shape, x_init=x_init, noise=lambda k: noise[k])
    assert x0.dtype == torch.float32
    np.testing.assert_allclose(x0.numpy(), ARRAYS[f"x0_{i}"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("i", range(len(GOLDEN)))
def test_golden_in_float32(i):
    check_golden_in_float32(i)


@pytest.mark.parametrize(
    "i", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, len(GOLDEN)))]
)
def test_compiled_golden_in_float32(i):
    torch.compiler.reset()  # many networks of one class: else some would silently run uncompiled
    counters.clear()
    check_golden_in_float32(i, compile=True)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_channels_last_reaches_network_and_weights():
    """The values stay."""
    plain, _ = images()
    drawn, eps = images(channels_last=True)
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in eps.seen)
    assert eps.model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert drawn.is_contiguous()
    torch.testing.assert_close(drawn, plain, rtol=1e-4, atol=1e-4)
    x = normal(0, 2, 3, 4, 4)
    assert torch.equal(NetworkCall(network(), channels_last=True).arrange(x), x)


def test_channels_last_leaves_vectors_alone():
    drawn = Sampler(lambda x, n: 0.1 * x, LINEAR, steps=3, channels_last=True).sample((4, 3))
    assert torch.equal(drawn, Sampler(lambda x, n: 0.1 * x, LINEAR, steps=3).sample((4, 3)))


def test_autocast_is_the_networks_alone():
    outputs = []

    class Noted(Eps):
        def __call__(self, x, n):
            assert x.dtype == torch.float32
            outputs.append(super().__call__(x, n))
            return outputs[-1]

    drawn = Sampler(Noted(), LINEAR, steps=5, autocast="bf16").sample((4, 3, 6, 6))
    assert {out.dtype for out in outputs} == {torch.bfloat16}
    assert drawn.dtype == torch.float32
    plain, _ = images()
    assert not torch.equal(drawn, plain)
    torch.testing.assert_close(drawn, plain, rtol=0, atol=0.1)


@refuses(("fp8", r"autocast must be one of \('bf16', 'fp16'\), got 'fp8'"))
def test_an_unknown_precision_is_refused(autocast):
    Sampler(Eps(), LINEAR, steps=5, autocast=autocast)


def test_module_of():
    module = network()
    assert module_of(module) is module
    assert module_of(module.forward) is module
    assert module_of(Eps()) is not None
    assert module_of(lambda x, n: x) is None


def test_stream_to_the_cpu():
    sampler = Sampler(Eps(), LINEAR, steps=3)
    there = torch.cat(list(sampler.stream(10, (3, 6, 6), batch_size=4)))
    here = list(sampler.stream(10, (3, 6, 6), batch_size=4, to_cpu=True))
    assert all(batch.device.type == "cpu" for batch in here)
    assert torch.equal(torch.cat(here), there)
