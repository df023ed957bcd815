"""SALoss: the published code's numbers, calls counted, equal ways of computing, refusals."""

import numpy as np
import pytest
import torch

from sa_plugin.loss import SALoss, _loss_of, _losses, sequence_aware_loss
from sa_plugin.schedule import NoiseSchedule
from tests.toys import ScaledToy, images, normal, read_json, read_npz, toy_eps
from third_party.common.schedule import NamedSchedule

LINEAR = NoiseSchedule.linear(1000)
OFFICIAL = read_json("sa_official")
OFFICIAL_X0 = torch.from_numpy(read_npz("sa_official")["x0"])


@pytest.mark.parametrize("stack", [True, False])
@pytest.mark.parametrize("case", OFFICIAL, ids=lambda c: f"SA-{c['K']}")
def test_equals_the_published_code(case, stack):
    model = ScaledToy(index_from=0)
    loss = SALoss(LINEAR, K=case["K"], lam=case["lam"], stack=stack)
    noise = normal(7, case["K"], *OFFICIAL_X0.shape)
    output = loss(model, OFFICIAL_X0, n=torch.tensor(case["t_index"]) + 1, noise=noise)
    output.total.backward()
    assert output.total.item() == pytest.approx(case["loss"], rel=1e-9)
    assert model.scale.grad.item() == pytest.approx(case["grad_scale"], rel=1e-9)


@pytest.mark.parametrize("case", OFFICIAL, ids=lambda c: f"SA-{c['K']}")
def test_drop_in_equals_the_published_code(case):
    model = ScaledToy()  # called with the 0-based t
    noise = normal(7, case["K"], *OFFICIAL_X0.shape)
    betas = torch.from_numpy(LINEAR.betas[1:].copy())
    t = torch.tensor(case["t_index"])
    total = sequence_aware_loss(
        model, OFFICIAL_X0, t, noise[0], betas, case["K"], case["lam"], noises=noise[1:]
    )
    total.backward()
    assert total.item() == pytest.approx(case["loss"], rel=1e-9)
    assert model.scale.grad.item() == pytest.approx(case["grad_scale"], rel=1e-9)


def test_drop_in_sees_betas_changed_in_place():
    x0, t = OFFICIAL_X0, torch.full((8,), 500)
    e, model = normal(1, *x0.shape), ScaledToy()
    betas = torch.from_numpy(LINEAR.betas[1:].copy())
    before = sequence_aware_loss(model, x0, t, e, betas, 1, 0.0)
    betas.mul_(0.5)
    after = sequence_aware_loss(model, x0, t, e, betas, 1, 0.0)
    fresh = sequence_aware_loss(model, x0, t, e, betas.clone(), 1, 0.0)
    assert after == fresh
    assert after != before


def brute_force(model, x0, n, noise, K, tau, reduction):
    """The terms of the "down" window, sample by sample, step by step, in the paper's symbols."""
    simple, sa = [], []
    for b in range(len(x0)):
        gap = torch.zeros_like(x0[b])
        for k in range(K):
            s = int(n[b]) - k
            if s < 1:
                continue
            a = LINEAR.cum_alphas[s]
            x = a**0.5 * x0[b] + (1 - a) ** 0.5 * noise[k, b]
            e = model(x[None], torch.tensor([s]))[0] - noise[k, b]
            if k == 0:
                simple.append(e.square().sum() if reduction == "sum" else e.square().mean())
            gap = gap + tau[s] * e / K
        sa.append(gap.square().sum() if reduction == "sum" else gap.square().mean())
    return torch.stack(simple), torch.stack(sa)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("K", [1, 2, 5])
def test_every_sample_equals_the_definition(K, reduction):
    rng = np.random.default_rng(0)
    tau = rng.uniform(0.5, 2, LINEAR.N + 1)
    x0, noise = images(3, 6, 2, 3, 3), normal(4, K, 6, 2, 3, 3)
    n = torch.tensor([1, 2, 3, 4, 700, 1000])
    loss = SALoss(LINEAR, K=K, lam=0.7, weighting=tau, reduction=reduction)
    output = loss(ScaledToy(), x0, n=n, noise=noise)
    simple, sa = brute_force(ScaledToy(), x0, n, noise, K, tau, reduction)
    torch.testing.assert_close(output.simple_per_sample, simple)
    torch.testing.assert_close(output.sa_per_sample, sa)
    torch.testing.assert_close(output.total, simple.mean() + 0.7 * sa.mean())
    torch.testing.assert_close(output.simple, simple.mean())
    torch.testing.assert_close(output.sa, sa.mean())


def test_relative_weights_are_taus_ratios_in_the_window():
    x0, noise = images(3, 3, 2, 3, 3), normal(4, 3, 3, 2, 3, 3)
    n = torch.tensor([3, 50, 1])
    tau = SALoss(LINEAR, weighting="theorem1").tau.values
    output = SALoss(LINEAR, K=3, weighting="relative")(ScaledToy(), x0, n=n, noise=noise)
    for b, largest in ((0, tau[1:4].max()), (1, tau[48:51].max())):
        _, sa = brute_force(
            ScaledToy(), x0[b : b + 1], n[b : b + 1], noise[:, b : b + 1], 3, tau / largest, "sum"
        )
        torch.testing.assert_close(output.sa_per_sample[b], sa[0])
    assert output.sa_per_sample[2] == 0  # tau_1 = 0 and nothing below


@pytest.mark.parametrize("window", ["down", "paper"])
@pytest.mark.parametrize("backprop", ["all", "one"])
@pytest.mark.parametrize("noise", ["independent", "shared", "chain"])
def test_stacked_and_in_series_agree(window, backprop, noise):
    schedule = NoiseSchedule.linear(30)
    x0 = images(5, 64, 2, 3, 3)
    results = []
    for stack in (True, False):
        model = ScaledToy()
        loss = SALoss(schedule, K=4, window=window, backprop=backprop, noise=noise, stack=stack)
        output = loss(model, x0, generator=torch.Generator().manual_seed(0))
        output.total.backward()
        results.append((output.total.detach(), output.sa.detach(), model.scale.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "options",
    [{"backprop": "all"}, {"backprop": "all", "reuse": True}, {"backprop": "one"}],
    ids=str,
)
def test_sa_k_makes_k_calls(options):
    x0, n = images(5, 4, 2, 3, 3), torch.tensor([10, 20, 30, 40])
    for K in (1, 2, 4):
        series, stacked = ScaledToy(), ScaledToy()
        SALoss(LINEAR, K=K, stack=False, **options)(series, x0, n=n)
        assert [len(steps) for steps in series.calls] == [4] * K
        SALoss(LINEAR, K=K, **options)(stacked, x0, n=n)
        assert sum(len(steps) for steps in stacked.calls) == 4 * K
        assert len(stacked.calls) == (1 if options["backprop"] == "all" else min(K, 2))


def test_lambda_zero_is_the_plain_loss_with_one_call():
    x0, n, noise = images(5, 4, 2, 3, 3), torch.tensor([1, 2, 30, 1000]), normal(6, 3, 4, 2, 3, 3)
    for options in ({}, {"backprop": "one"}, {"window": "paper"}, {"noise": "chain"}):
        model, reference = ScaledToy(), ScaledToy()
        loss = SALoss(LINEAR, K=3, lam=0, **options)
        output = loss(model, x0, n=n, noise=noise[:1] if options else noise)
        a = torch.tensor(LINEAR.cum_alphas)[n].reshape(-1, 1, 1, 1)
        e = reference(a.sqrt() * x0 + (1 - a).sqrt() * noise[0], n) - noise[0]
        torch.testing.assert_close(output.total, e.square().sum((1, 2, 3)).mean())
        assert output.sa == 0
        assert [steps.tolist() for steps in model.calls] == [n.tolist()]


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("batch", [1, 7, 8])
def test_drawn_steps_cover_their_range(antithetic, batch):
    schedule = NoiseSchedule.linear(25)
    loss = SALoss(schedule, lam=0, antithetic=antithetic)
    generator = torch.Generator().manual_seed(0)
    x0 = torch.zeros(batch, 1, 1, 1)
    drawn = [loss(lambda x, n: x, x0, generator=generator).n for _ in range(400)]
    assert all(len(n) == batch for n in drawn)
    assert set(torch.cat(drawn).tolist()) == set(range(1, 26))
    half = (batch + 1) // 2
    if antithetic and batch > 1:
        assert all(torch.equal(n[: batch - half], 26 - n[half:]) for n in drawn)


@pytest.mark.parametrize("side", ["loss", "port"])
@pytest.mark.parametrize("batch", [1, 4, 10, 16])
def test_stratified_steps_are_uniform_by_enumeration(side, batch, monkeypatch):
    """Over all offsets every step comes up equally often, and each draw has one from each part."""
    seen = []
    for offset in range(10):
        if side == "loss":
            monkeypatch.setattr(
                torch, "randint", lambda N, size, o=offset, **_: torch.full(size, o)
            )
            loss = SALoss(NoiseSchedule.cosine(10), lam=0, stratified=True)
            n = loss._steps(batch, None).numpy()
        else:
            monkeypatch.setattr(
                np.random, "randint", lambda N, size, dtype, o=offset: np.full(size, o)
            )
            n = NamedSchedule("cosine", 10, stratified=True).sample(torch.zeros(batch, 1))[0]
        assert n.dtype == np.int64
        part = np.arange(batch)
        low, high = part * 10 // batch + 1, ((part + 1) * 10 - 1) // batch + 1
        assert ((np.sort(n) >= low) & (np.sort(n) <= high)).all()
        seen.extend(n.tolist())
    assert np.bincount(seen, minlength=11).tolist() == [0] + [batch] * 10


def test_stratified_steps_are_shuffled():
    loss = SALoss(LINEAR, lam=0, stratified=True)
    n = loss(lambda x, n: x, torch.zeros(50, 1), generator=torch.Generator().manual_seed(0)).n
    assert n.tolist() != n.sort().values.tolist()


def test_one_generator_makes_it_reproducible():
    x0 = images(5, 4, 2, 3, 3)
    for noise in ("independent", "shared", "chain"):
        loss = SALoss(LINEAR, K=3, noise=noise, backprop="one")
        totals = [
            loss(ScaledToy(), x0, generator=torch.Generator().manual_seed(s)).total.item()
            for s in (1, 1, 2)
        ]
        assert totals[0] == totals[1] != totals[2]


def test_labels_follow_their_rows():
    seen = []

    def model(x, n, y, scale):
        seen.append((n, y, scale))
        return y.to(x.dtype).reshape(-1, 1, 1, 1) + 0 * x

    x0, y = images(5, 3, 2, 3, 3), torch.tensor([10, 20, 30])
    n = torch.tensor([1, 500, 900])
    SALoss(LINEAR, K=2)(model, x0, n=n, y=y, scale=2.0)
    ((steps, labels, scale),) = seen
    assert scale == 2.0
    assert steps.tolist() == [1, 500, 900, 1, 499, 899]
    assert labels.tolist() == [10, 20, 30, 10, 20, 30]


@pytest.mark.parametrize("precision", ["same", "bf16"])
def test_calls_without_a_graph_leave_no_weights_in_the_cache_of_autocast(precision):
    """PyTorch 2.6 caches weights as they are cast there, and the call with the graph took them."""
    conv, seen = torch.nn.Conv2d(2, 2, 3, padding=1), []

    def model(x, n):
        seen.append((torch.is_grad_enabled(), torch.is_autocast_cache_enabled()))
        return conv(x)

    loss = SALoss(LINEAR, K=2, backprop="one", extra_precision=precision)
    with torch.autocast("cpu", torch.bfloat16):
        total = loss(model, images(5, 4, 2, 3, 3).float()).total
        assert torch.is_autocast_cache_enabled()
    total.backward()
    assert seen == [(False, False), (True, True)]
    assert conv.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("around", [None, torch.float16])
def test_only_calls_without_a_graph_are_in_low_precision(around):
    """By what the convolution returns; an autocast around it holds for the call with the graph."""
    torch.manual_seed(0)
    conv, seen = torch.nn.Conv2d(2, 2, 3, padding=1), []

    def model(x, n):
        output = conv(x)
        seen.append((torch.is_grad_enabled(), output.dtype))
        return output

    x0, n = images(5, 4, 2, 3, 3).float(), torch.tensor([10, 20, 30, 40])
    noise = normal(6, 3, 4, 2, 3, 3).float()
    results = []
    for extra_precision in ("same", "bf16"):
        loss = SALoss(LINEAR, K=3, backprop="one", stack=False, extra_precision=extra_precision)
        conv.zero_grad()
        with torch.autocast("cpu", around, enabled=around is not None):
            output = loss(model, x0, n=n, noise=noise, anchor=n)
        output.total.backward()
        assert output.total.dtype == torch.float32
        results.append((output.sa_per_sample.detach(), conv.weight.grad.clone()))
    own = around or torch.float32
    assert seen[:3] == [(False, own), (False, own), (True, own)]
    assert seen[3:] == [(False, torch.bfloat16), (False, torch.bfloat16), (True, own)]
    assert not torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0], results[1], rtol=0.02, atol=0.02)


def test_half_precision_networks_are_reduced_in_single():
    """Squares of a big error overflow float16; the reduction must not."""
    x0 = torch.zeros(2, 3, 16, 16, dtype=torch.float16)
    output = SALoss(LINEAR)(lambda x, n: 300 + 0 * x, x0, n=torch.tensor([500, 600]))
    assert output.total.dtype == torch.float32
    assert torch.isfinite(output.total)
    assert output.simple.item() == pytest.approx(3 * 256 * 300**2, rel=1e-2)


def test_gradients_reach_the_network_through_every_call():
    """d total / d scale by finite differences, all options that differentiate all calls."""
    schedule = NoiseSchedule.linear(30)
    x0 = images(5, 16, 2, 3, 3)
    for window in ("down", "paper"):
        loss = SALoss(schedule, K=3, window=window, lam=0.5)

        def total(scale, loss=loss):
            model = ScaledToy(scale)
            return model, loss(model, x0, generator=torch.Generator().manual_seed(0)).total

        model, value = total(1.1)
        value.backward()
        difference = (total(1.1 + 1e-5)[1] - total(1.1 - 1e-5)[1]).item() / 2e-5
        assert model.scale.grad.item() == pytest.approx(difference, rel=1e-7)


# -- refusals


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"K": 0}, r"K must be a whole number in 1\.\.1000, got 0"),
        ({"K": 1001}, r"K must be .*got 1001"),
        ({"K": 2.0}, r"K must be .*got 2\.0"),
        ({"K": True}, r"K must be .*got True"),
        ({"lam": -0.1}, r"lam must be a finite number >= 0, got -0\.1"),
        ({"lam": float("nan")}, r"lam .*got nan"),
        ({"lam": float("inf")}, r"lam .*got inf"),
        ({"lam": "1"}, r"lam .*got '1'"),
        ({"window": "up"}, r"window must be one of \('down', 'paper'\), got 'up'"),
        ({"noise": "same"}, r"noise must be one of .*'chain'.*got 'same'"),
        ({"backprop": "none"}, r"backprop must be one of \('all', 'one'\), got 'none'"),
        ({"antithetic": True, "stratified": True}, "antithetic and stratified exclude each other"),
        ({"reuse": True, "backprop": "one"}, r"reuse=True needs backprop='all', got .*'one'"),
        ({"extra_precision": "fp8"}, r"extra_precision must be one of \('same', 'bf16'\), got"),
        ({"extra_precision": "bf16"}, r"extra_precision='bf16' needs backprop='one'"),
        ({"reduction": "none"}, r"reduction must be one of \('sum', 'mean'\), got 'none'"),
        ({"weighting": "tau"}, r"weighting must be one of .*'theorem1'.*got 'tau'"),
    ],
)
def test_bad_options_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        SALoss(LINEAR, **options)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"n": torch.tensor([0, 1])}, r"n must lie in 1\.\.1000, got 0\.\.1.*t \+ 1"),
        ({"n": torch.tensor([1, 1001])}, r"n must lie in 1\.\.1000, got 1\.\.1001"),
        ({"n": torch.tensor([1.0, 2.0])}, r"n must be integers of shape \(2,\), got torch.float32"),
        ({"n": torch.tensor([1])}, r"n must be integers of shape \(2,\).*\(1,\)"),
        ({"noise": torch.zeros(1, 2, 2, 3, 3)}, r"noise must have shape \(2, 2, 2, 3, 3\)"),
        ({"n": torch.tensor([5, 6]), "anchor": torch.tensor([5, 7])}, r"anchor must be n itself \(K = 2\), got 7"),
        ({"n": torch.tensor([5, 6]), "anchor": torch.tensor([5])}, "anchor must have n's shape"),
    ],
)
def test_bad_calls_are_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        SALoss(LINEAR)(ScaledToy(), images(0, 2, 2, 3, 3), **arguments)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (lambda x, n: x[:, :1], r"input's shape .*got \(4, 1, 3, 3\).*EpsModel"),
        (lambda x, n: (x, x), r"must return eps, a tensor of .*got tuple; .*EpsModel"),
    ],
)
def test_networks_of_another_shape_are_refused(model, said):
    with pytest.raises(ValueError, match=said):
        SALoss(LINEAR)(model, images(0, 2, 2, 3, 3), n=torch.tensor([5, 6]))


@pytest.mark.parametrize("x0", [torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(3)])
def test_images_of_another_kind_are_refused(x0):
    with pytest.raises(ValueError, match="x0 must be floating-point images"):
        SALoss(LINEAR)(ScaledToy(), x0)


@pytest.mark.parametrize(
    ("x0", "said"),
    [
        (torch.linspace(0, 255, 72), r"\[0, 255\]"),
        (torch.linspace(0, 1, 72), r"\[0, 1\]"),  # ToTensor alone
        (torch.cat([torch.tensor([torch.nan, torch.inf]), torch.linspace(0, 1, 70)]), r"\[0, 1\]"),
        (torch.linspace(-2, 0, 72), r"\[-2, 0\]"),
    ],
    ids=["255", "1", "NaN", "-2"],
)
@pytest.mark.parametrize("call", ["loss", "sa_term"])
def test_images_outside_their_range_are_warned_of_once(x0, said, call):
    loss, x0 = SALoss(LINEAR), x0.reshape(4, 2, 3, 3)

    def evaluate():
        if call == "loss":
            loss(lambda x, n: x, x0)
        else:
            loss.sa_term(lambda x, n: x, x0, torch.tensor([1, 2, 3, 4]), x0)

    with pytest.warns(UserWarning, match=rf"x0 ranges over {said}; .*\[-1, 1\]"):
        evaluate()
    evaluate()  # warnings are errors here: a second one would fail


def test_images_that_may_be_scaled_are_not_warned_of():
    for x0 in (images(0, 4, 2, 3, 3), torch.ones(4, 2), torch.zeros(4, 2)):
        SALoss(LINEAR)(lambda x, n: x, x0)


def test_a_batch_without_a_finite_number_tells_nothing():
    loss = SALoss(LINEAR)
    loss(lambda x, n: x, torch.full((2, 3), torch.nan))
    with pytest.warns(UserWarning, match="x0 ranges over"):
        loss(lambda x, n: x, torch.linspace(0, 1, 6).reshape(2, 3))


@pytest.mark.parametrize("shape", [(0, 1, 8, 8), (2, 0)])
def test_an_empty_batch_is_refused(shape):
    with pytest.raises(ValueError, match="at least one, got torch.float32"):
        SALoss(LINEAR)(ScaledToy(), torch.zeros(shape))


@pytest.mark.parametrize("options", [{}, {"backprop": "one"}, {"reuse": True}], ids=str)
def test_gradients_per_sample_by_torch_func(options):
    """No check looks at a value where n and noise are handed in: vmap would refuse it."""
    loss = SALoss(LINEAR, K=2, **options)
    x0, noise = images(5, 4, 2, 3, 3), normal(6, 2, 4, 2, 3, 3)
    n = torch.tensor([1, 2, 500, 1000])

    def total(scale, x0, n, noise):
        given = {"n": n[None], "noise": noise[:, None], "anchor": n[None]}
        return loss(lambda x, n: scale * toy_eps(x, n), x0[None], **given).total

    scale = torch.tensor(1.1, dtype=torch.float64)
    per_sample = torch.func.vmap(torch.func.grad(total), (None, 0, 0, 1))(scale, x0, n, noise)
    model = ScaledToy()
    loss(model, x0, n=n, noise=noise, anchor=n).total.backward()
    torch.testing.assert_close(per_sample.mean(), model.scale.grad)


@pytest.mark.parametrize("lamda", [1.0, 0.0])
def test_drop_in_refuses_noises_of_another_number(lamda):
    x0, t, betas = OFFICIAL_X0, torch.arange(len(OFFICIAL_X0)), torch.linspace(1e-4, 0.02, 50)
    for rows in (0, 2):
        with pytest.raises(ValueError, match=r"noises must have shape \(1, 8"):
            noises = normal(7, rows, *x0.shape)
            sequence_aware_loss(ScaledToy(), x0, t, x0, betas, 2, lamda, noises=noises)


def test_drop_in_serves_a_warm_up_of_lambda_with_one_loss():
    x0, t, betas = OFFICIAL_X0, torch.arange(len(OFFICIAL_X0)), torch.linspace(1e-4, 0.02, 50)
    e, noises = normal(1, *x0.shape), normal(2, 1, *x0.shape)
    seen = {id(_loss_of(betas, 2))}
    values = []
    for lamda in (0.25, 0.5, 1.0):
        values.append(sequence_aware_loss(ScaledToy(), x0, t, e, betas, 2, lamda, noises=noises))
        seen.add(id(_loss_of(betas, 2)))
    assert len(seen) == 1
    torch.testing.assert_close(values[2] - values[1], 2 * (values[1] - values[0]))


def test_drop_in_keeps_no_loss_of_betas_that_are_gone():
    before = len(_losses)
    for _ in range(3):
        betas = torch.linspace(1e-4, 0.02, 50)
        assert _loss_of(betas, 2) is _loss_of(betas, 2)
        assert _loss_of(betas, 3).K == 3
        assert len(_losses) == before + 1
    other = torch.linspace(1e-4, 0.03, 50)  # of the same version
    assert _loss_of(other, 3).schedule.betas[50] == pytest.approx(0.03)
    assert _loss_of(betas, 3).schedule.betas[50] == pytest.approx(0.02)


def test_drop_in_hands_the_network_floats_as_the_published_code_does():
    seen = []
    betas = torch.linspace(1e-4, 0.02, 50)
    x0, t = OFFICIAL_X0, torch.arange(len(OFFICIAL_X0))
    sequence_aware_loss(lambda x, t: seen.append(t) or x, x0, t, x0, betas)
    assert seen[0].dtype == torch.float32
    assert seen[0].tolist() == [*range(8), 0, *range(7)]
