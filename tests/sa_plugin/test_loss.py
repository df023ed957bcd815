"""SALoss: the published numbers, the definition, its draws, dtypes, transforms and refusals."""

import numpy as np
import pytest
import torch

from sa_plugin.loss import SALoss
from sa_plugin.schedule import NoiseSchedule
from tests.reference import sa_terms
from tests.refusals import refuses
from tests.toys import Toy, images, normal, over, read_json, read_npz, toy_eps
from third_party.common.schedule import NamedSchedule

LINEAR, SHORT = NoiseSchedule.linear(1000), NoiseSchedule.linear(30)
OFFICIAL = read_json("sa_official")
OFFICIAL_X0 = torch.from_numpy(read_npz("sa_official")["x0"])
IMAGE = (2, 3, 3)
CUSTOM = np.random.default_rng(0).uniform(0.5, 2, SHORT.N + 1)


@pytest.mark.parametrize("stack", [True, False])
@pytest.mark.parametrize("case", OFFICIAL, ids=lambda c: f"SA-{c['K']}")
def test_equals_the_published_code(case, stack):
    model, noise = Toy(), normal(7, case["K"], *OFFICIAL_X0.shape)
    loss = SALoss(LINEAR, K=case["K"], lam=case["lam"], stack=stack)
    n = torch.tensor(case["t_index"]) + 1
    output = loss(lambda x, n: model(x, n - 1), OFFICIAL_X0, n=n, noise=noise)
    output.total.backward()
    assert output.total.item() == pytest.approx(case["loss"], rel=1e-9)
    assert model.scale.grad.item() == pytest.approx(case["grad_scale"], rel=1e-9)


@pytest.mark.parametrize("way", ["stacked", "in series", "sa_term", "sa_term, eps_pred"])
@pytest.mark.parametrize("weighting", ["relative", CUSTOM], ids=["relative", "custom"])
@pytest.mark.parametrize(
    ("window", "n", "anchor"),
    [
        ("down", [5, 11, 29, 30, 17], None),  # every row counts, as in nearly every training step
        ("down", [1, 2, 3, 4, 30], None),
        ("paper", [4, 11, 20, 26, 17], None),
        ("paper", [1, 2, 29, 30, 17], None),
        ("paper", [9, 11, 1, 30, 17], [0, -1, -2, 0, 17]),  # windows that start below 1
    ],
)
def test_every_sample_equals_the_definition(window, n, anchor, weighting, way):
    """Terms, means and gradients."""
    n, x0 = torch.tensor(n), images(0, 5, *IMAGE)
    for K, reduction in ((1, "mean"), (2, "mean"), (3, "sum"), (5, "sum")):
        noise, model, other = normal(1, K, 5, *IMAGE), Toy(), Toy()
        r = n if anchor is None else torch.tensor(anchor).clamp(min=1 - K)
        options = {"reduction": reduction, "stack": way != "in series"}
        loss = SALoss(SHORT, K, 0.7, weighting, window, **options)
        if way.startswith("sa_term"):
            a = over(torch.tensor(SHORT.cum_alphas)[n], x0)
            known = model(a.sqrt() * x0 + (1 - a).sqrt() * noise[0], n) if "," in way else None
            given = {"anchor": r, "noise": noise[1:]}
            simple, sa = loss.sa_term(model, x0, n, noise[0], known, **given)
            total = simple.mean() + 0.7 * sa.mean()
        else:
            output = loss(model, x0, n=n, anchor=r, noise=noise)
            simple, sa, total = output.simple_per_sample, output.sa_per_sample, output.total
            torch.testing.assert_close([output.simple, output.sa], [simple.mean(), sa.mean()])
        given = {"tau": loss.tau.values, "relative": loss.tau.relative, "window": window}
        given |= {"r": r, "reduction": reduction}
        expected = sa_terms(other, x0, n, noise, SHORT.cum_alphas, **given)
        torch.testing.assert_close((simple, sa), expected)
        whole = expected[0].mean() + 0.7 * expected[1].mean()
        torch.testing.assert_close(total, whole)
        total.backward()
        whole.backward()
        torch.testing.assert_close(model.scale.grad, other.scale.grad)


@pytest.mark.parametrize(
    "options", [{}, {"backprop": "one"}, {"window": "paper"}, {"noise": "chain"}, {"reuse": True}]
)
def test_lambda_zero_is_the_plain_loss_with_one_call(options):
    """The noises of the other steps are not needed, but may be given."""
    x0, n, noise = images(5, 4, *IMAGE), torch.tensor([1, 2, 9, 30]), normal(6, 3, 4, *IMAGE)
    expected, _ = sa_terms(Toy(), x0, n, noise[:1], SHORT.cum_alphas)
    loss = SALoss(SHORT, K=3, lam=0, **options)
    for rows in (1, 3):
        model = Toy()
        output = loss(model, x0, n=n, noise=noise[:rows])
        torch.testing.assert_close(output.simple_per_sample, expected)
        torch.testing.assert_close(output.total, expected.mean())
        assert output.sa == 0
        assert [steps.tolist() for steps in model.times] == [n.tolist()]
        simple, sa = loss.sa_term(Toy(), x0, n, noise[0], noise=noise[1:rows])
        torch.testing.assert_close(simple, expected)
        assert not sa.any()


# -- draws


def seeded(number):
    return torch.Generator().manual_seed(number)


def drawn(loss, batch, seed=0, times=1):
    generator, x0 = torch.Generator().manual_seed(seed), torch.zeros(batch, 1)
    return [loss(lambda x, n: x, x0, generator=generator).n for _ in range(times)]


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("batch", [1, 7, 8])
def test_drawn_steps_cover_their_range(antithetic, batch):
    loss = SALoss(NoiseSchedule.linear(25), lam=0, antithetic=antithetic)
    steps = drawn(loss, batch, times=400)
    assert all(len(n) == batch for n in steps)
    assert set(torch.cat(steps).tolist()) == set(range(1, 26))
    half = (batch + 1) // 2
    if antithetic and batch > 1:
        assert all(torch.equal(n[: batch - half], 26 - n[half:]) for n in steps)


@pytest.mark.parametrize("side", ["loss", "port"])
@pytest.mark.parametrize("batch", [1, 4, 10, 16])
def test_stratified_steps_are_uniform_by_enumeration(side, batch, monkeypatch):
    """Over all offsets every step comes up equally often, and each draw has one from each part."""
    seen, of_part = [], np.arange(batch) * 10
    for offset in range(10):
        if side == "loss":
            monkeypatch.setattr(
                torch, "randint", lambda N, size, o=offset, **_: torch.full(size, o)
            )
            loss = SALoss(NoiseSchedule.cosine(10), lam=0, stratified=True)
            n = loss._steps(batch, None).numpy()
        else:
            monkeypatch.setattr(
                np.random, "randint", lambda N, size, o=offset, **_: np.full(size, o)
            )
            n = NamedSchedule("cosine", 10, stratified=True).sample(torch.zeros(batch, 1))[0]
        assert n.dtype == np.int64
        low, high = of_part // batch + 1, (of_part + 9) // batch + 1
        assert ((np.sort(n) >= low) & (np.sort(n) <= high)).all()
        seen.extend(n.tolist())
    assert np.bincount(seen, minlength=11).tolist() == [0] + [batch] * 10


def test_stratified_steps_are_shuffled():
    (n,) = drawn(SALoss(LINEAR, lam=0, stratified=True), 50)
    assert n.tolist() != n.sort().values.tolist()


@pytest.mark.parametrize("noise", ["independent", "shared", "chain"])
def test_one_generator_makes_it_reproducible(noise):
    loss, x0 = SALoss(LINEAR, K=3, noise=noise, backprop="one"), images(5, 4, *IMAGE)
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 1, 2)]
    totals = [loss(Toy(), x0, generator=generator).total.item() for generator in generators]
    assert totals[0] == totals[1] != totals[2]


# -- dtypes and transforms


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int16])
def test_any_integers_are_steps(dtype):
    x0, n, noise = images(0, 2, *IMAGE), torch.tensor([1, 30]), normal(0, 3, 2, *IMAGE)
    loss = SALoss(SHORT, K=3)
    output = loss(Toy(), x0, n=n.to(dtype), noise=noise)
    assert output.n.dtype == torch.int64
    assert output.total == loss(Toy(), x0, n=n, noise=noise).total


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_images_are_noised_in_single(dtype):
    x0, noise = images(0, 64, *IMAGE).to(dtype), normal(1, 1, 64, *IMAGE).to(dtype)
    n, seen = torch.full((64,), 7), []
    SALoss(SHORT, lam=0)(lambda x, s: seen.append(x) or x, x0, n=n, noise=noise)
    a = torch.tensor(SHORT.cum_alphas[7])
    expected = a.sqrt().float() * x0.float() + (1 - a).sqrt().float() * noise[0].float()
    assert seen[0].dtype == dtype
    torch.testing.assert_close(seen[0], expected.to(dtype), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("error", "side"), [(300, 16), (1, 256)])
def test_half_precision_networks_are_reduced_in_single(error, side):
    """float16 holds up to 65,504: less than 300 squared, less than the sum of many ones."""
    x0 = torch.zeros(2, 3, side, side, dtype=torch.float16)
    noise, n = torch.zeros(2, *x0.shape, dtype=torch.float16), torch.tensor([500, 600])
    output = SALoss(LINEAR)(lambda x, n: torch.full_like(x, error), x0, n=n, noise=noise)
    assert output.total.dtype == output.simple.dtype == torch.float32
    assert output.simple.item() == output.sa.item() == 3 * side**2 * error**2


def test_one_loss_serves_two_dtypes_and_two_devices():
    x0, n, noise = images(0, 4, *IMAGE), torch.tensor([1, 5, 9, 30]), normal(1, 2, 4, *IMAGE)
    used, fresh = SALoss(SHORT), SALoss(SHORT)(Toy(), x0, n=n, noise=noise).total
    used(lambda x, s: x, x0.float(), n=n)
    assert used(Toy(), x0, n=n, noise=noise).total == fresh
    meta = {"n": n.to("meta"), "noise": noise.to("meta")}
    assert used(lambda x, n: x, x0.to("meta"), **meta).total.is_meta
    assert used(Toy(), x0, n=n, noise=noise).total == fresh


TRANSFORMED = pytest.mark.parametrize(
    "options", [{}, {"reuse": True}, {"backprop": "one"}], ids=str
)


@TRANSFORMED
def test_a_compiled_step_gives_the_same(options):
    """One graph without breaks, so without looking at values: fullgraph would refuse."""
    x0, noise = images(0, 8, *IMAGE), normal(1, 2, 8, *IMAGE)
    n = torch.tensor([1, 2, 3, 10, 20, 28, 29, 30])
    anchor = n + torch.tensor([0, 1] * 4) if "backprop" in options else n
    loss, results = SALoss(SHORT, K=2, **options), []
    for compiled in (False, True):
        scale = torch.tensor(1.1, dtype=torch.float64, requires_grad=True)

        def total(x0, n, noise, anchor, scale=scale):
            network = lambda x, s: scale * toy_eps(x, s)  # noqa: E731
            return loss(network, x0, n=n, noise=noise, anchor=anchor).total

        step = torch.compile(total, backend="eager", fullgraph=True) if compiled else total
        value = step(x0, n, noise, anchor)
        value.backward()
        results.append((value.detach(), scale.grad))
    torch.testing.assert_close(results[0], results[1])


@TRANSFORMED
def test_gradients_per_sample_by_torch_func(options):
    """No check looks at a value where n and noise are handed in: vmap would refuse it."""
    x0, noise = images(5, 4, *IMAGE), normal(6, 2, 4, *IMAGE)
    n, loss = torch.tensor([1, 2, 500, 1000]), SALoss(LINEAR, K=2, **options)

    def total(scale, x0, n, noise):
        given = {"n": n[None], "noise": noise[:, None], "anchor": n[None]}
        return loss(lambda x, n: scale * toy_eps(x, n), x0[None], **given).total

    scale = torch.tensor(1.1, dtype=torch.float64)
    per_sample = torch.func.vmap(torch.func.grad(total), (None, 0, 0, 1))(scale, x0, n, noise)
    model = Toy()
    loss(model, x0, n=n, noise=noise, anchor=n).total.backward()
    torch.testing.assert_close(per_sample.mean(), model.scale.grad[0])


# -- input perturbation


@pytest.mark.parametrize(
    "options",
    [
        {"K": 1, "lam": 0},
        {},
        {"window": "paper", "stack": False},
        {"backprop": "one"},
        {"reuse": True},
    ],
    ids=str,
)
def test_input_perturbation_is_the_loss_at_a_higher_noise_level(options):
    """Exact where eps = xi / gamma: the sum is then eps's multiple, as in any other noise."""
    gamma, a, b = 0.4, SHORT.cum_alphas, SHORT.cum_betas
    c, power = (1 + gamma**2) ** -0.5, a + (1 + gamma**2) * b
    noisier = NoiseSchedule.from_alphas_cumprod((a / power)[1:])
    n, x0 = torch.tensor([3, 9, 30]), images(5, 3, *IMAGE)
    options = {"K": 3, "lam": 0.7, **options}
    xi = torch.randn(options["K"], *x0.shape, generator=seeded(7), dtype=x0.dtype)
    given = {"n": n, "anchor": n}
    model, other = Toy(), Toy()
    loss = SALoss(SHORT, **options, input_perturbation=gamma)
    found = loss(model, x0, noise=xi / gamma, generator=seeded(7), **given)
    own, *others = xi / gamma
    more = {"noise": torch.stack(others) if others else None, "generator": seeded(7)}
    of_loop = loss.sa_term(Toy(), x0, n, own, anchor=n, **more)

    def scaled(x, n):
        return other(over(torch.from_numpy(power**0.5)[n], x) * x, n) / c

    plain = SALoss(noisier, **options)(scaled, x0, noise=xi / gamma / c, **given)
    close = {"rtol": 1e-11, "atol": 1e-11}
    wanted = c**2 * plain.simple_per_sample, c**2 * plain.sa_per_sample
    torch.testing.assert_close((found.simple_per_sample, found.sa_per_sample), wanted, **close)
    torch.testing.assert_close(of_loop, wanted, **close)
    torch.testing.assert_close(found.total, c**2 * plain.total, **close)
    found.total.backward()
    (c**2 * plain.total).backward()
    torch.testing.assert_close(model.scale.grad, other.scale.grad, **close)


def test_input_perturbation_is_drawn_last_and_in_every_row():
    x0, seen, gamma = images(0, 5, *IMAGE), [], 0.3
    for input_perturbation in (0.0, gamma):
        generator = seeded(0)
        loss = SALoss(SHORT, K=3, backprop="one", input_perturbation=input_perturbation)
        calls = []
        loss(lambda x, n: calls.append((x, n)) or x, x0, generator=generator)  # noqa: B023
        if not seen:
            xi = torch.randn(3, *x0.shape, generator=generator, dtype=x0.dtype)
        rows, own = calls
        seen.append([torch.cat(parts) for parts in zip(own, rows, strict=True)])
    (plain, steps), (perturbed, again) = seen
    assert torch.equal(steps, again)
    b = over(torch.tensor(SHORT.cum_betas)[steps], plain)
    torch.testing.assert_close(perturbed - plain, gamma * b.sqrt() * xi.flatten(0, 1))


# -- refusals and warnings


@refuses(
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
    ({"input_perturbation": -0.1}, r"input_perturbation must be a finite number >= 0, got -0\.1"),
    ({"weighting": "tau"}, r"weighting must be one of .*'theorem1'.*got 'tau'"),
)
def test_bad_options_are_refused(options):
    SALoss(LINEAR, **options)


def bad_images(said):
    return f"x0 must hold at least 1 floating-point images.*, got {said}"


@refuses(
    ({"n": torch.tensor([0, 1])}, r"n must lie in 1\.\.1000, got 0\.\.1.*t \+ 1"),
    ({"n": torch.tensor([1, 1001])}, r"n must lie in 1\.\.1000, got 1\.\.1001"),
    ({"n": torch.tensor([1.0, 2.0])}, r"n must be integers of shape \(2,\), got torch.float32"),
    ({"n": torch.tensor([True, True])}, r"n must be integers of shape \(2,\), got torch.bool"),
    ({"n": torch.tensor([1])}, r"n must be integers of shape \(2,\).*\(1,\)"),
    ({"eps_model": lambda x, n: x + 0j}, r"real tensors of .*got torch.complex128"),
    ({"noise": torch.full((2, 2, *IMAGE), torch.nan)}, "noise must be finite"),
    ({"noise": torch.full((2, 2, *IMAGE), torch.inf)}, "noise must be finite"),
    ({"noise": torch.zeros(1, 2, *IMAGE)}, r"noise must have shape \(2, 2, 2, 3, 3\)"),
    ({"eps_model": lambda x, n: x[:, :1]}, r"input's shape .*got \(4, 1, 3, 3\).*EpsModel"),
    ({"eps_model": lambda x, n: (x, x)}, r"must return real tensors of .*got tuple; .*EpsModel"),
    ({"x0": torch.zeros(2, 3, 4, 4, dtype=torch.uint8)}, bad_images("torch.uint8")),
    ({"x0": [0.5]}, bad_images("list")),
    ({"x0": torch.zeros(3)}, bad_images(r"torch.float32 \(3,\)")),
    ({"x0": torch.zeros(0, 1, 8, 8)}, bad_images(r"torch.float32 \(0, 1, 8, 8\)")),
    ({"x0": torch.zeros(2, 0)}, bad_images(r"torch.float32 \(2, 0\)")),
)
def test_bad_calls_are_refused(changed):
    given = {"eps_model": Toy(), "x0": images(0, 2, *IMAGE)} | changed
    SALoss(LINEAR)(**given)


@refuses(*[(n, "n must") for n in ([0, 1], [1, 1001], [1.0, 2.0], [1])])
def test_bad_steps_of_a_loop_are_refused(n):
    x0 = images(0, 2, *IMAGE)
    SALoss(LINEAR).sa_term(Toy(), x0, torch.tensor(n), x0)


@refuses((0.1, "eps_pred must be None with input_perturbation"))
def test_a_prediction_at_another_input_is_refused(gamma):
    x0 = images(0, 2, *IMAGE)
    SALoss(LINEAR, input_perturbation=gamma).sa_term(Toy(), x0, torch.tensor([3, 4]), x0, x0)


@refuses((torch.nan, "eps must be finite"))
def test_a_loops_noise_that_is_not_finite_is_refused(value):
    x0 = images(0, 2, *IMAGE)
    SALoss(LINEAR).sa_term(Toy(), x0, torch.tensor([3, 4]), x0 * value)


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
    loss, x0, n = SALoss(LINEAR), x0.reshape(4, *IMAGE), torch.tensor([1, 2, 3, 4])

    def evaluate():
        loss(Toy(), x0) if call == "loss" else loss.sa_term(Toy(), x0, n, 0 * images(0, 4, *IMAGE))

    with pytest.warns(UserWarning, match=rf"x0 ranges over {said}; .*\[-1, 1\]"):
        evaluate()
    evaluate()  # warnings are errors here: a second one would fail


def test_images_that_may_be_scaled_are_not_warned_of():
    """And a batch without a finite number tells nothing."""
    for x0 in (images(0, 4, *IMAGE), torch.ones(4, 2), torch.zeros(4, 2)):
        SALoss(LINEAR)(Toy(), x0)
    loss = SALoss(LINEAR)
    loss(Toy(), torch.full((2, 3), torch.nan))
    with pytest.warns(UserWarning, match="x0 ranges over"):
        loss(Toy(), torch.linspace(0, 1, 6).reshape(2, 3))


def test_any_whole_number_is_a_K():
    loss = SALoss(LINEAR, K=np.int8(2), lam=np.float32(0.5), window="paper")
    assert (type(loss.K), type(loss.lam)) == (int, float)
    assert loss(Toy(), images(0, 2, *IMAGE)).total.isfinite()
