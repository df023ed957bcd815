"""The network calls of a window: which rows share one, how many, with what, in which precision."""

import pytest
import torch

from sa_plugin.loss import SALoss
from sa_plugin.schedule import NoiseSchedule
from tests.toys import Toy, images, normal

SCHEDULE = NoiseSchedule.linear(30)
IMAGE = (2, 3, 3)
STEPS = torch.tensor([5, 9, 20, 30])


@pytest.mark.parametrize("window", ["down", "paper"])
@pytest.mark.parametrize("backprop", ["all", "one"])
@pytest.mark.parametrize("noise", ["independent", "shared", "chain"])
def test_stacked_and_in_series_agree(window, backprop, noise):
    results = []
    for stack in (True, False):
        model, generator = Toy(), torch.Generator().manual_seed(0)
        options = {"window": window, "backprop": backprop, "noise": noise, "stack": stack}
        output = SALoss(SCHEDULE, K=4, **options)(model, images(5, 64, *IMAGE), generator=generator)
        output.total.backward()
        results.append((output.total.detach(), output.sa.detach(), model.scale.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=0)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("stack", [True, False])
@pytest.mark.parametrize("options", [{}, {"reuse": True}, {"backprop": "one"}], ids=str)
@pytest.mark.parametrize("K", [1, 2, 4])
def test_sa_k_makes_k_calls(K, options, stack, device):
    """Also where steps lie below 1: else a network in several processes would wait for ever."""
    B, seen = 2, []
    series = [B] * K
    stacked = [(K - 1) * B, B][-K:] if "backprop" in options else [K * B]
    loss, x0 = SALoss(SCHEDULE, K, stack=stack, **options), torch.zeros(B, *IMAGE, device=device)
    for n in (torch.tensor([1, 1]), torch.tensor([1, 9]), torch.tensor([9, 9])):
        loss(lambda x, s: seen.append((len(x), len(s))) or x, x0, n=n, anchor=n)
    assert seen == [(size, size) for size in (stacked if stack else series)] * 3


@pytest.mark.parametrize("call", ["all", "one", "sa_term"])
@pytest.mark.parametrize("stack", [True, False])
@pytest.mark.parametrize("low", [1, 10], ids=["some masked", "none masked"])
def test_network_arguments_follow_their_images(call, stack, low):
    """Tensors and arrays of the batch's length, also within dictionaries and lists."""
    x0, rows, n = images(0, 5, *IMAGE), torch.arange(5), torch.arange(low, low + 10, 2)
    row_of, seen = torch.zeros(31, dtype=torch.long), []
    row_of[n], row_of[n - 1] = rows, rows
    given = {"y": rows, "size": (64, 64), "scale": 2.0, "whole": torch.arange(31)}
    given |= {"added": {"y": rows, "name": "of all"}, "some": [rows.numpy(), torch.arange(3)]}

    def model(x, steps, **found):
        seen.append(steps)
        for follows in (found["y"], found["added"]["y"], found["some"][0]):
            assert follows.tolist() == row_of[steps].tolist()
        assert found["some"][1].tolist() == [0, 1, 2]
        assert (found["added"]["name"], found["size"], found["scale"]) == ("of all", (64, 64), 2.0)
        assert found["whole"] is given["whole"]
        return x

    loss = SALoss(SCHEDULE, K=2, backprop="one" if call == "one" else "all", stack=stack)
    if call == "sa_term":
        loss.sa_term(model, x0, n, x0, x0, anchor=n, **given)
    else:
        loss(model, x0, n=n, anchor=n, **given)
    others, own = (n - 1).clamp(min=1), n if call != "sa_term" else n[:0]
    expected = [own, others] if call == "all" and stack else [others, own]
    assert torch.equal(torch.cat(seen), torch.cat(expected))


# -- graphs and precision


def test_no_graph_where_none_is_wanted():
    x0, graphs = images(0, 4, *IMAGE), []
    model = lambda x, n: graphs.append(torch.is_grad_enabled()) or x  # noqa: E731
    with torch.no_grad():
        SALoss(SCHEDULE).sa_term(model, x0, STEPS, x0, x0)
    assert graphs == [False]


@pytest.mark.parametrize("precision", ["same", "bf16"])
def test_calls_without_a_graph_leave_no_weights_in_the_cache_of_autocast(precision):
    """PyTorch 2.6 caches weights as they are cast there, and the call with the graph took them."""
    conv, seen = torch.nn.Conv2d(2, 2, 3, padding=1), []

    def model(x, n):
        seen.append((torch.is_grad_enabled(), torch.is_autocast_cache_enabled()))
        return conv(x)

    loss = SALoss(SCHEDULE, K=2, backprop="one", extra_precision=precision)
    with torch.autocast("cpu", torch.bfloat16):
        total = loss(model, images(5, 4, *IMAGE).float()).total
        assert torch.is_autocast_cache_enabled()
    total.backward()
    assert seen == [(False, False), (True, True)]
    assert conv.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("around", [None, torch.float16])
def test_only_calls_without_a_graph_are_in_low_precision(around):
    """By what the convolution returns; an autocast around it holds for the call with the graph."""
    torch.manual_seed(0)
    conv, own, results = torch.nn.Conv2d(2, 2, 3, padding=1), around or torch.float32, []

    def model(x, n):
        output = conv(x)
        seen.append((torch.is_grad_enabled(), output.dtype))
        return output

    x0, noise = images(5, 4, *IMAGE).float(), normal(6, 3, 4, *IMAGE).float()
    for precision, extra in (("same", own), ("bf16", torch.bfloat16)):
        seen = []
        loss = SALoss(SCHEDULE, 3, backprop="one", stack=False, extra_precision=precision)
        conv.zero_grad()
        with torch.autocast("cpu", around, enabled=around is not None):
            output = loss(model, x0, n=STEPS, noise=noise, anchor=STEPS)
        output.total.backward()
        assert output.total.dtype == torch.float32
        assert seen == [(False, extra), (False, extra), (True, own)]
        results.append((output.sa_per_sample.detach(), conv.weight.grad.clone()))
    assert not torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0], results[1], rtol=0.02, atol=0.02)
