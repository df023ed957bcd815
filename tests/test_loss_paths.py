"""The loss by every path: rows masked or none, stacked or not, arguments, dtypes, grad modes.

Each of these fails for a small change of the code that the other files would let pass.
"""

import numpy as np
import pytest
import torch

from sa_plugin import noise as noises_of
from sa_plugin.loss import SALoss
from sa_plugin.schedule import NoiseSchedule
from sa_plugin.tau import TauTable
from tests.toys import ScaledToy, images, normal

SCHEDULE = NoiseSchedule.linear(30)
IMAGE = (2, 3, 3)


def by_hand(loss, model, x0, n, anchor, noise):
    """(L_simple, L_sa) [B] of "all", sample by sample, steps outside the range left out."""
    up, low = loss.window == "paper", 2 if loss.window == "paper" else 1
    simple, sa = [], []
    for b in range(len(x0)):

        def error(s, eps, b=b):
            a = SCHEDULE.cum_alphas[s]
            x = a**0.5 * x0[b] + (1 - a) ** 0.5 * eps
            return model(x[None], torch.tensor([s]))[0] - eps

        simple.append(error(int(n[b]), noise[0, b]).square().sum())
        gap = torch.zeros(IMAGE, dtype=torch.float64)
        for p in range(loss.K):
            s = int(anchor[b]) + (p if up else -p)
            if low <= s <= SCHEDULE.N:
                gap = gap + error(s, noise[p, b]) / loss.K
        sa.append(gap.square().sum())
    return torch.stack(simple), torch.stack(sa)


@pytest.mark.parametrize("stack", [True, False])
@pytest.mark.parametrize(
    ("window", "n", "anchor"),
    [
        ("down", [4, 11, 29, 30, 17], None),  # every row needed: the path of nearly every step
        ("paper", [4, 11, 20, 26, 17], None),
        ("paper", [1, 2, 29, 30, 17], None),  # row 0 has weight zero at n = 1
        ("paper", [9, 11, 1, 30, 17], [0, -1, -2, 0, 17]),  # windows that start below 1
    ],
)
def test_every_sample_equals_the_definition_in_every_window(window, n, anchor, stack):
    n = torch.tensor(n)
    anchor = n if anchor is None else torch.tensor(anchor)
    x0, noise = images(0, 5, *IMAGE), normal(1, 3, 5, *IMAGE)
    loss = SALoss(SCHEDULE, K=3, window=window, stack=stack)
    output = loss(ScaledToy(), x0, n=n, anchor=anchor, noise=noise)
    simple, sa = by_hand(loss, ScaledToy(), x0, n, anchor, noise)
    torch.testing.assert_close(output.simple_per_sample, simple)
    torch.testing.assert_close(output.sa_per_sample, sa)


@pytest.mark.parametrize("call", ["all", "one", "sa_term"])
@pytest.mark.parametrize("stack", [True, False])
@pytest.mark.parametrize("low", [1, 10], ids=["some masked", "none masked"])
def test_network_arguments_reach_every_call(call, stack, low):
    x0 = images(0, 5, *IMAGE)
    n = torch.arange(low, low + 10, 2)
    label_of = torch.zeros(31, dtype=torch.long)
    label_of[n], label_of[n - 1] = torch.arange(5), torch.arange(5)
    table = torch.randn(31)

    def model(x, steps, y, whole):
        assert torch.equal(y, label_of[steps])
        assert whole is table
        return x

    loss = SALoss(SCHEDULE, K=2, backprop="one" if call == "one" else "all", stack=stack)
    kwargs = {"y": torch.arange(5), "whole": table, "anchor": n}
    if call == "sa_term":
        loss.sa_term(model, x0, n, x0, x0, **kwargs)
    else:
        loss(model, x0, n=n, **kwargs)


def test_sa_term_shares_one_eps():
    x0, n = images(0, 4, *IMAGE), torch.tensor([5, 9, 20, 30])
    eps, seen = normal(1, 4, *IMAGE).requires_grad_(), []
    loss = SALoss(SCHEDULE, K=3, noise="shared")
    loss.sa_term(lambda x, s: seen.append((x, s)) or x, x0, n, eps, eps)
    ((x, steps),) = seen
    assert not x.requires_grad
    a = torch.tensor(SCHEDULE.cum_alphas)[steps].reshape(-1, 1, 1, 1)
    expected = a.sqrt() * x0.repeat(2, 1, 1, 1) + (1 - a).sqrt() * eps.repeat(2, 1, 1, 1)
    torch.testing.assert_close(x, expected)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("options", [{}, {"stack": False}, {"backprop": "one"}], ids=str)
def test_every_step_makes_equal_calls(options, device):
    """Also where steps lie below 1: a network in several processes would wait for ever otherwise."""
    x0, seen = torch.zeros(2, *IMAGE, device=device), []
    loss = SALoss(SCHEDULE, K=3, **options)
    for n in (torch.tensor([1, 1]), torch.tensor([1, 9]), torch.tensor([9, 9])):
        loss(lambda x, steps: seen.append(len(x)) or x, x0, n=n, anchor=n)
    expected = {"{}": [6], "{'stack': False}": [2, 2, 2], "{'backprop': 'one'}": [4, 2]}
    assert seen == 3 * expected[str(options)]


def test_no_graph_where_none_is_wanted():
    x0, n = images(0, 2, *IMAGE), torch.tensor([5, 9])

    def model(x, steps):
        assert not torch.is_grad_enabled()
        return x

    with torch.no_grad():
        SALoss(SCHEDULE).sa_term(model, x0, n, x0, x0)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int16])
def test_any_integers_are_steps(dtype):
    x0, n = images(0, 2, *IMAGE), torch.tensor([1, 30])
    noise = normal(0, 3, 2, *IMAGE)
    loss = SALoss(SCHEDULE, K=3)
    output = loss(ScaledToy(), x0, n=n.to(dtype), noise=noise)
    assert output.n.dtype == torch.int64
    assert output.total == loss(ScaledToy(), x0, n=n, noise=noise).total


def test_masks_are_no_steps():
    with pytest.raises(ValueError, match="n must be integers"):
        SALoss(SCHEDULE)(ScaledToy(), images(0, 2, *IMAGE), n=torch.tensor([True, True]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_images_are_noised_in_single(dtype):
    x0, noise = images(0, 64, *IMAGE).to(dtype), normal(1, 1, 64, *IMAGE).to(dtype)
    n, seen = torch.full((64,), 7), []
    SALoss(SCHEDULE, lam=0)(lambda x, s: seen.append(x) or x, x0, n=n, noise=noise)
    a = torch.tensor(SCHEDULE.cum_alphas[7])
    expected = a.sqrt().float() * x0.float() + (1 - a).sqrt().float() * noise[0].float()
    assert seen[0].dtype == dtype
    torch.testing.assert_close(seen[0], expected.to(dtype), rtol=1e-6, atol=1e-6)


def test_one_loss_serves_two_dtypes():
    x0, n, noise = images(0, 4, *IMAGE), torch.tensor([1, 5, 9, 30]), normal(1, 2, 4, *IMAGE)
    used = SALoss(SCHEDULE)
    used(lambda x, s: x, x0.float(), n=n)
    total = used(ScaledToy(), x0, n=n, noise=noise).total
    assert total == SALoss(SCHEDULE)(ScaledToy(), x0, n=n, noise=noise).total


def test_noise_is_drawn_in_the_images_dtype():
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert noises_of.draw(2, torch.zeros(3, 4, dtype=dtype), None).dtype == dtype


def test_a_paper_window_at_one_is_not_drawn_for_another_step():
    with pytest.raises(ValueError, match=r"n, or in 1-K\.\.0"):
        SALoss(SCHEDULE, window="paper")(
            ScaledToy(), images(0, 1, *IMAGE), n=torch.tensor([3]), anchor=torch.tensor([1])
        )


def test_small_skip_betas_keep_their_digits():
    schedule = NoiseSchedule.from_betas([1e-12, 3e-12])
    np.testing.assert_allclose(schedule.skip_beta(1, 2), 3e-12, rtol=1e-12)


def test_a_schedule_keeps_its_own_betas():
    betas = np.array([0.0, 0.1, 0.2])
    schedule = NoiseSchedule(betas)
    betas[1] = 0.5
    assert schedule.betas[1] == 0.1


def test_steps_between_and_first_betas_are_refused():
    with pytest.raises(ValueError, match="steps must be integers"):
        SCHEDULE.skip_alpha(0.0, 1.0)
    with pytest.raises(ValueError, match="use from_betas"):
        NoiseSchedule([0.1, 0.2])


def test_weights_cannot_be_written():
    with pytest.raises(ValueError, match="read-only"):
        TauTable(SCHEDULE).values[3] = 1.0


@pytest.mark.parametrize(
    "options", [{}, {"reuse": True}, {"backprop": "one"}], ids=["all", "reuse", "one"]
)
def test_a_compiled_step_gives_the_same(options):
    """One graph without breaks, so without looking at values: fullgraph would refuse."""
    x0 = images(0, 8, *IMAGE)
    n = torch.tensor([1, 2, 3, 10, 20, 28, 29, 30])
    anchor = n + torch.tensor([0, 1, 0, 1, 0, 1, 0, 1]) if "backprop" in options else n
    noise = normal(1, 2, 8, *IMAGE)
    loss = SALoss(SCHEDULE, K=2, **options)
    results = []
    for compiled in (False, True):
        model = torch.nn.Conv2d(2, 2, 3, padding=1, dtype=torch.float64)
        torch.nn.init.constant_(model.weight, 0.01)
        torch.nn.init.zeros_(model.bias)

        def total(x0, n, noise, anchor, model=model):
            return loss(lambda x, s: model(x), x0, n=n, noise=noise, anchor=anchor).total

        step = torch.compile(total, backend="eager", fullgraph=True) if compiled else total
        value = step(x0, n, noise, anchor)
        value.backward()
        results.append((value.detach(), model.weight.grad))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("low", [1, 9])
def test_arguments_within_dictionaries_and_lists_follow_their_rows(low):
    x0, noise = images(0, 4, *IMAGE), normal(1, 2, 4, *IMAGE)
    n, rows = torch.tensor([low, 11, 20, 30]), torch.arange(4)
    seen = []

    def model(x, steps, **given):
        seen.append((steps, given))
        return ScaledToy()(x, steps)

    given = {
        "added": {"rows": rows, "name": "of all"},
        "some": [rows.numpy(), torch.arange(3)],
        "size": (64, 64),
    }
    SALoss(SCHEDULE, K=2)(model, x0, n=n, noise=noise, **given)
    ((steps, found),) = seen
    own = found["added"]["rows"]
    position = torch.arange(8) // 4
    assert torch.equal(steps, (n[own] - position).clamp(min=1))
    assert found["some"][0].tolist() == own.tolist()
    assert found["some"][1].tolist() == [0, 1, 2]
    assert (found["added"]["name"], found["size"]) == ("of all", (64, 64))


def test_without_lambda_the_other_steps_noises_are_not_needed_but_may_be_given():
    x0, n = images(0, 4, *IMAGE), torch.tensor([3, 11, 20, 30])
    eps, own = normal(1, 4, *IMAGE), normal(2, 4, *IMAGE)
    loss = SALoss(SCHEDULE, K=3, lam=0)
    simple, sa = loss.sa_term(ScaledToy(), x0, n, eps, own, noise=normal(3, 2, 4, *IMAGE))
    torch.testing.assert_close(simple, (own - eps).square().flatten(1).sum(1))
    assert not sa.any()
