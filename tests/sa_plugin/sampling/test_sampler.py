"""Sampler: the published code's results, which calls it makes, what it refuses."""

from typing import ClassVar

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sa_plugin._tensors import FirstBad
from sa_plugin.bounds.gap import gap_along_chain
from sa_plugin.bounds.likelihood import negative_elbo
from sa_plugin.bounds.pair_terms import pair_terms
from sa_plugin.sampling.batches import BlockNoise
from sa_plugin.sampling.gamma import estimate_gamma
from sa_plugin.sampling.sampler import Sampler, to_uint8
from sa_plugin.schedule import NoiseSchedule
from tests.gaussian import CorrelatedData, GaussianData
from tests.refusals import refuses
from tests.toys import normal, over, read_json, read_npz, schedule_of, toy_eps

LINEAR = NoiseSchedule.linear(100)
GOLDEN, ARRAYS = read_json("sampler"), read_npz("sampler")
DATA = GaussianData([0.3, -0.5, 0.8], [0.04, 0.3, 1.5], LINEAR)


class Operations(TorchDispatchMode):
    """Notes what torch does within its block."""

    def __init__(self):
        super().__init__()
        self.called = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.called.append(function)
        return function(*args, **(kwargs or {}))


class GoldenToy:
    """The reference numbers' network behind the time that their codebase hands it."""

    def __init__(self, case, N):
        self.typ, self.index_from = case["typ"], 0 if case.get("shift1") else 1
        self.scale = 1000 / N

    def __call__(self, x, n):
        t = (n - 1 + self.index_from).double() * self.scale
        eps, wave = toy_eps(x, t), torch.cos(x + 0.002 * over(t, x))
        second = {"eps_eps2": eps**2 + 0.3 + 0.2 * wave, "eps_epsc": 0.25 + 0.2 * wave}
        return (eps, second[self.typ]) if self.typ in second else eps


def golden_sampler(case, **options):
    """The sampler of a case of the reference numbers."""
    schedule = schedule_of(case["schedule"])
    optimal = {"eps_eps2": "sn", "eps_epsc": "npr", "eps": "analytic"}[case["typ"]]
    good = 1 - 0.9 * np.exp(-1000 * np.arange(schedule.N + 1) / schedule.N / 200)
    named = {"eta", "steps", "trajectory", "clip_x0", "clip_sigma_idx", "clip_pixel"}
    return Sampler(
        GoldenToy(case, schedule.N),
        schedule,
        forward=case["forward"],
        variance=optimal if case["var"] == "optimal" else case["var"],
        gamma=good if case.get("ms_eps") else None,
        **{name: case[name] for name in named & case.keys()},
        **options,
    )


@pytest.mark.parametrize("batch_size", [None, 3])
@pytest.mark.parametrize("i", range(len(GOLDEN)))
def test_equals_the_published_code(i, batch_size):
    noise = normal(1, GOLDEN[i]["steps"], 4, 2, 3, 3)
    x_init = torch.from_numpy(ARRAYS["x_init"])
    x0 = golden_sampler(GOLDEN[i]).sample(
        x_init.shape, x_init=x_init, noise=lambda k: noise[k], batch_size=batch_size
    )
    np.testing.assert_allclose(x0.numpy(), ARRAYS[f"x0_{i}"], rtol=1e-9)


@pytest.mark.parametrize("training", [True, False])
def test_network_gets_each_step_and_its_mode_stays(training):
    def note(network, inputs):
        x, n = inputs
        assert n.dtype == torch.int64
        assert n.shape == (len(x),)
        assert not torch.is_grad_enabled()
        seen.append((int(n[0]), network.training))

    model, seen = Typed(torch.float32).train(training), []
    model.register_forward_pre_hook(note)
    x = Sampler(model, LINEAR, steps=4).sample((2, 3))
    assert seen == [(t, training) for t in (100, 67, 34, 1)]
    assert model.training is training
    assert not x.requires_grad
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("options", "draws"),
    [({}, [0, 1, 2]), ({"forward": "ddim"}, []), ({"forward": "ddim", "eta": 0.5}, [0, 1, 2])],
)
def test_noise_is_asked_for_where_it_is_needed(options, draws):
    asked, sampler = [], Sampler(lambda x, n: 0.1 * x, LINEAR, steps=4, **options)
    sampler.sample((2, 3), noise=lambda k: asked.append(k) or torch.zeros(2, 3))
    assert asked == draws


def test_the_loop_never_leaves_the_device():
    """One value is read back a batch, the NaN flag at its end: no other .item() in the loop."""
    sampler = Sampler(lambda x, n: (0.1 * x, 0.2 + 0 * x), LINEAR, variance="npr", steps=20)
    with Operations() as operations:
        sampler.sample((8, 3), batch_size=4)
    assert operations.called.count(torch.ops.aten._local_scalar_dense.default) == 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dtype_follows_x_init(dtype):
    seen, x_init = [], normal(0, 2, 3).to(dtype)
    sampler = Sampler(lambda x, n: seen.append(x.dtype) or 0.1 * x.half(), LINEAR, steps=4)
    assert sampler.sample((2, 3), x_init=x_init).dtype == dtype  # half: as under autocast
    assert set(seen) == {dtype}
    assert sampler.sample((2, 3)).dtype == torch.float32


class Typed(torch.nn.Module):
    """A network whose products need its parameters' type, and which notes the types it gets."""

    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(0)
        self.register_parameter("number", torch.nn.Parameter(torch.tensor(1), requires_grad=False))
        self.layer = torch.nn.Linear(3, 3)
        self.seen = set()
        self.to(dtype)

    def forward(self, x, n):
        self.seen.add(x.dtype)
        return self.layer(x)

    def pair(self, x, n):
        eps = self(x, n)
        return eps, eps**2 + 0.5


HALF = [torch.bfloat16, torch.float16]
TYPES = [*HALF, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("variance", ["small", "sn"])
def test_network_gets_x_in_its_parameters_type(dtype, variance):
    network = Typed(dtype)
    model = network.pair if variance == "sn" else network
    sampler = Sampler(model, LINEAR, steps=4, variance=variance)
    chain = torch.float64 if dtype == torch.float64 else torch.float32
    steps = list(sampler.iterate((2, 3)))
    assert {part.dtype for s in steps for part in (s.x_t, s.x_s, s.x0, s.eps)} == {chain}
    images = sampler.sample((2, 3))
    assert torch.equal(images, steps[-1].x_s)

    def by_hand(x, n):
        outputs = model(x.to(dtype), n)
        return tuple(o.to(chain) for o in outputs) if variance == "sn" else outputs.to(chain)

    x_init = BlockNoise(0, 0, (2, 3), chain, torch.device("cpu")).draw()
    expected = Sampler(by_hand, LINEAR, steps=4, variance=variance).sample((2, 3), x_init=x_init)
    assert torch.equal(images, expected)
    assert network.seen == {dtype}


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("given", TYPES)
def test_x_init_decides_the_chains_type_whatever_the_networks(dtype, given):
    network = Typed(dtype)
    images = Sampler(network, LINEAR, steps=4).sample((2, 3), x_init=normal(0, 2, 3).to(given))
    assert images.dtype == given
    assert network.seen == {dtype}


@pytest.mark.parametrize("dtype", TYPES)
def test_stream_of_a_network_of_any_type(dtype):
    network = Typed(dtype)
    sampler = Sampler(network, LINEAR, steps=4)
    images = torch.cat(list(sampler.stream(5, (3,), batch_size=2, to_cpu=True)))
    assert torch.equal(images, to_uint8(sampler.sample((5, 3), batch_size=2)))
    assert network.seen == {dtype}


@pytest.mark.parametrize("around", [False, True], ids=["option", "context"])
@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
def test_autocast_decides_the_networks_type_alone(dtype, around):
    network = Typed(dtype)
    sampler = Sampler(network, LINEAR, steps=4, autocast=None if around else "bf16")
    with torch.autocast("cpu", torch.bfloat16, enabled=around):
        images = sampler.sample((2, 3))
    assert images.dtype == torch.float32
    assert network.seen == {torch.float32}


@pytest.mark.parametrize("dtype", TYPES)
def test_measurements_call_a_network_of_any_type(dtype):
    """Their images decide the type of x_n, as ``x_init`` does."""
    network, schedule = Typed(dtype), NoiseSchedule.cosine(5)
    x0 = 20 * torch.arange(12.0).reshape(4, 3) / 127.5 - 1

    def by_hand(x, n):
        assert x.dtype == torch.float32
        return network(x.to(dtype), n).float()

    for measure in (
        lambda model: estimate_gamma(model, schedule, [x0]).values,
        lambda model: negative_elbo(model, schedule, x0, steps=5).terms.numpy(),
        lambda model: gap_along_chain(model, schedule, x0, start=5).total,
        lambda model: pair_terms(model, schedule, x0),
    ):
        np.testing.assert_array_equal(measure(network), measure(by_hand))
    assert network.seen == {dtype}


def test_where_samples_are_drawn():
    model = torch.nn.Linear(3, 3, device="meta")
    assert Sampler(model, LINEAR, steps=4).device.type == "meta"
    assert Sampler(model.forward, LINEAR, steps=4).device.type == "meta"
    assert Sampler(model, LINEAR, steps=4, device="cpu").device.type == "cpu"
    assert Sampler(torch.nn.Identity(), LINEAR, steps=4).device.type == "cpu"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", [0, 1])
def test_a_network_that_breaks_is_named_by_its_first_bad_step(bad, where):
    def model(x, n):
        outputs = [0.1 * x, 0.5 + 0 * x]
        if n[0] in (34, 1):
            outputs[where][0, 0] = bad
        return tuple(outputs)

    with pytest.raises(ValueError, match="not finite, first at step n = 34"):
        Sampler(model, LINEAR, variance="npr", steps=4).sample((2, 3))


@refuses(
    ({"forward": "sde"}, "forward must be one of .*'ddpm'"),
    ({"variance": "optimal"}, "variance must be one of .*'analytic'.*'optimal'"),
    ({"trajectory": "cubic"}, "trajectory must be one of .*'quad_ddim'.*'cubic'"),
    ({"predicts": "score"}, "predicts must be one of .*'score'"),
    ({"forward": "ddim", "variance": "big"}, "'big' is defined for forward 'ddpm' only"),
    ({"forward": "ddim", "eta": 1.5}, "eta .*1.5"),
    ({"eta": 0.5}, "eta belongs to forward 'ddim'"),
    ({"variance": "analytic"}, "'analytic' needs gamma"),
    ({"variance": "analytic", "gamma": np.ones(100)}, r"gamma must have shape \(101,\)"),
    ({"gamma": np.full(101, np.nan)}, r"gamma\[1\] = nan"),
    ({"trajectory": "dp_seg"}, "'dp_seg' needs gamma"),
    ({"steps": 101}, r"steps must be a whole number in 1\.\.100, got 101"),
    ({"steps": 0}, "steps must be"),
    ({"steps": None}, "steps must be"),
    ({"trajectory": [1, 2]}, "2 entries, but steps = 5"),
    ({"clip_sigma_idx": 6}, r"clip_sigma_idx must be a whole number in 0\.\.5, got 6"),
    ({"clip_sigma_idx": -1}, "clip_sigma_idx must be"),
    ({"clip_pixel": -1}, "clip_pixel must be .*-1"),
)
def test_bad_options_are_refused(options):
    Sampler(DATA.eps, LINEAR, **{"steps": 5, **options})


@refuses(
    ({"shape": ()}, "shape"),
    ({"shape": (2, 0)}, "shape.*got 0"),
    ({"batch_size": 0}, "batch_size must be .*got 0"),
    ({"seed": -1}, "seed must be .*got -1"),
    ({"first": -1}, "first must be .*got -1"),
    ({"x_init": torch.zeros(3, 3)}, r"x_init must be .*\(2, 3\).*\(3, 3\)"),
    ({"x_init": torch.zeros(2, 3, dtype=torch.int64)}, "x_init must be floating point"),
    ({"noise": lambda k: torch.zeros(1, 3)}, r"noise\(k\) must have shape \(2, 3\)"),
)
def test_bad_calls_of_sample_are_refused(arguments):
    Sampler(DATA.eps, LINEAR, steps=3).sample(**{"shape": (2, 3), **arguments})


@refuses(
    ({"n_images": 0}, "must be a whole number"),
    ({"batch_size": 0}, "must be a whole number"),
    ({"seed": -1}, "must be a whole number"),
    ({"first": -1}, "must be a whole number"),
    ({"image_shape": (0,)}, "must be a whole number"),
)
def test_stream_refuses_before_the_first_image(arguments):
    given = {"n_images": 4, "image_shape": (3,), "batch_size": 2, **arguments}
    Sampler(DATA.eps, LINEAR, steps=3).stream(**given)


@refuses(
    (("npr", lambda x, n: x), "'npr' needs a network that returns the pair .*Tensor"),
    (("sn", lambda x, n: (x, x, x)), "'sn' needs a network that returns the pair"),
    (("iddpm", lambda x, n: x), "'iddpm' needs a network that returns the pair"),
    (("small", lambda x, n: x[:, :2]), r"input's shape \(2, 3\), got \(2, 2\)"),
    (("small", lambda x, n: (x[:1], x)), r"input's shape \(2, 3\), got \(1, 3\)"),
    (("npr", lambda x, n: (x, x.sum())), r"input's shape \(2, 3\), got \(\)"),
    (("small", lambda x, n: None), "got NoneType"),
    (("small", lambda x, n: [x]), "got list"),
)
def test_a_network_that_does_not_fit_is_refused(case):
    variance, model = case
    Sampler(model, LINEAR, variance=variance, steps=3).sample((2, 3))


def test_a_pair_is_welcome_where_its_second_is_unused():
    pair = Sampler(lambda x, n: (0.1 * x, None), LINEAR, steps=3).sample((2, 3))
    assert torch.equal(pair, Sampler(lambda x, n: 0.1 * x, LINEAR, steps=3).sample((2, 3)))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_value_anywhere_is_seen(dtype, bad):
    for size in (1, 7, 16, 33, 100):
        for place in range(size):
            watch, output = FirstBad(), torch.zeros(size, dtype=dtype)
            watch.note(9, output, None)
            watch.refuse()
            output[place] = bad
            watch.note(8, torch.zeros(2), output)
            watch.note(7, output)
            with pytest.raises(ValueError, match="not finite, first at step n = 8"):
                watch.refuse()


def test_a_step_costs_few_operations():
    """Beside the network's call; a count, since times are noise. Each one is a launch on a GPU."""

    def operations(steps, **options):
        sampler = Sampler(lambda x, n: x, LINEAR, steps=steps, **options)
        sampler.sample((64, 3))
        with Operations() as operations:
            sampler.sample((64, 3))
        return len(operations.called)

    for options, most in (({"forward": "ddim"}, 9), ({}, 14), ({"variance": "big"}, 14)):
        assert operations(20, **options) - operations(10, **options) <= 10 * most


def test_a_gamma_that_no_trained_network_has_is_warned_of():
    gamma = np.linspace(0, 1.5, 101)
    with pytest.warns(UserWarning, match=r"gamma\[100\] = 1\.5: .* at most about 1"):
        Sampler(DATA.eps, LINEAR, variance="analytic", gamma=gamma, steps=5)
    near = gamma / 1.4  # an estimate's error
    Sampler(DATA.eps, LINEAR, variance="analytic", gamma=near, steps=5)


def test_noise_that_is_not_finite_is_named_and_not_the_network():
    def noise(k):
        return torch.full((2, 1, 2, 2), torch.nan if k == 1 else 0.5)

    with pytest.raises(ValueError, match=r"noise\(1\) must be finite"):
        Sampler(lambda x, n: 0.1 * x, LINEAR, steps=4).sample((2, 1, 2, 2), noise=noise)


def test_complex_outputs_are_refused():
    with pytest.raises(ValueError, match=r"real tensors of .*got torch\.complex64"):
        Sampler(lambda x, n: x + 0j, LINEAR, steps=4).sample((2, 1, 2, 2))


@pytest.mark.parametrize("variance", ["small", "sn"])
@pytest.mark.parametrize(("forward", "clip_x0"), [("ddpm", True), ("ddim", True), ("ddim", False)])
def test_a_step_from_t_to_itself(variance, forward, clip_x0):
    """Of "quad_ddim_host": it adds no noise, and moves an image only by DDIM's clipped x_0."""
    options = {"variance": variance, "forward": forward, "clip_x0": clip_x0}
    options |= {"steps": 30, "trajectory": "quad_ddim_host"}
    sampler = Sampler(lambda x, n: (toy_eps(x, n), x**2), LINEAR, **options)
    same = [step for step in sampler.iterate((4, 1, 3, 3), seed=1) if step.s == step.t]
    assert [step.t for step in same] == [1, 1, 1]
    for step in same:
        a, b = (float(table[step.t] ** 0.5) for table in (LINEAR.cum_alphas, LINEAR.cum_betas))
        x0 = (step.x_t - b * toy_eps(step.x_t, torch.tensor([step.t]))) / a
        kept = x0.clamp(-1, 1) if clip_x0 and forward == "ddim" else x0
        expected = step.x_t + a * (kept - x0)
        torch.testing.assert_close(step.x_s, expected, rtol=1e-5, atol=1e-5)


@refuses(
    (lambda path: Sampler(toy_eps, LINEAR, variance="iddpm", **path), "must not repeat steps"),
    (
        lambda path: negative_elbo(toy_eps, LINEAR, torch.ones(1, 1, 2, 2), **path),
        "trajectory must not repeat steps here, got 'quad_ddim_host'",
    ),
)
def test_repeated_steps_are_refused_where_they_have_no_value(make):
    make({"steps": 30, "trajectory": "quad_ddim_host"})


CORRELATED = CorrelatedData(12, LINEAR)


def covariance_of(samples):
    return torch.cov(samples.double().T)


@pytest.mark.parametrize("steps", [5, 10])
@pytest.mark.parametrize("forward", ["ddpm", "ddim"])
def test_lanczos_gives_samples_the_covariance_that_no_diagonal_gives(steps, forward):
    """Each DDPM step is exact. The last one adds no noise: Cov[x_0 | x_1] is missing at the end."""
    count = 20_000
    known = CORRELATED.sigma - CORRELATED.covariance(1)
    error = (known.diagonal()[:, None] * known.diagonal() + known**2).sqrt() / count**0.5
    options = {"forward": forward, "steps": steps, "clip_x0": False, "way": "vjp"}
    full = Sampler(CORRELATED.eps, LINEAR, variance="lanczos", lanczos_steps=12, **options)
    shape = (count, 12)
    # x_N of the data, so that the chain's start is exact, too
    start = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    a, b = float(LINEAR.cum_alphas[-1]), float(LINEAR.cum_betas[-1])
    spread = torch.linalg.cholesky(a * CORRELATED.sigma + b * torch.eye(12, dtype=torch.float64))
    x_init = a**0.5 * CORRELATED.mu + start @ spread.T
    off = (covariance_of(full.sample(shape, x_init=x_init)) - known) / error
    assert off.abs().max() < 5

    def with_diagonal(x, n):
        diagonal = CORRELATED.covariance(int(n[0])).diagonal()
        level = LINEAR.cum_alphas[n[0]] / LINEAR.cum_betas[n[0]]
        return CORRELATED.eps(x, n), (level * diagonal).expand_as(x)

    exact_diagonal = Sampler(with_diagonal, LINEAR, variance="ocm", **options)
    off = (covariance_of(exact_diagonal.sample(shape, x_init=x_init)) - known) / error
    assert off.abs().max() > 20


@pytest.mark.parametrize("variance", ["probes", "lanczos"])
class TestFromTheDerivative:
    OPTIONS: ClassVar = {"steps": 6, "forward": "ddim", "probes": 3}

    def test_images_do_not_depend_on_their_batch(self, variance):
        sampler = Sampler(CORRELATED.eps, LINEAR, variance=variance, **self.OPTIONS)
        whole = sampler.sample((70, 12), seed=5)
        parts = sampler.sample((70, 12), seed=5, batch_size=16)
        rest = sampler.sample((6, 12), seed=5, first=64)
        torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(rest, whole[64:], rtol=1e-5, atol=1e-6)

    def test_a_diagonal_covariance_is_sampled_as_by_its_exact_diagonal(self, variance):
        """One sign is exact there, and three steps of Lanczos are for three eigenvalues."""
        options = {"steps": 6, "clip_x0": False, "clip_sigma_idx": 2, "clip_pixel": 3}
        x_init = normal(1, 40, 3)
        known = Sampler(DATA.network("npr"), LINEAR, variance="npr", **options)
        found = Sampler(DATA.eps, LINEAR, variance=variance, **options)
        expected = known.sample((40, 3), x_init=x_init)
        torch.testing.assert_close(found.sample((40, 3), x_init=x_init), expected)

    def test_every_output_and_way_gives_the_same(self, variance):
        x_init = normal(1, 40, 3)
        expected, *others = (
            Sampler(
                DATA.network(kind), LINEAR, variance=variance, steps=6, predicts=kind, way=way
            ).sample((40, 3), x_init=x_init)
            for kind, way in [("eps", "vjp"), ("x0", "vjp"), ("v", "jvp"), ("eps", "difference")]
        )
        for other in others:
            torch.testing.assert_close(other, expected, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_dtype_follows_x_init(self, variance, dtype):
        sampler = Sampler(lambda x, n: 0.1 * x, LINEAR, variance=variance, **self.OPTIONS)
        chain = sampler.iterate((2, 3), x_init=normal(0, 2, 3).to(dtype))
        assert {step.x_s.dtype for step in chain} == {dtype}

    def test_calls_without_noise_need_no_derivative(self, variance):
        calls = []

        def network(x, n):
            calls.append((int(n[0]), x.requires_grad))
            return DATA.eps(x, n)

        Sampler(network, LINEAR, variance=variance, trajectory=[3, 50, 100]).sample((2, 3))
        assert calls == [(100, True), (50, True), (3, False)]


def test_a_difference_is_as_wide_as_the_samplers_autocast_is_coarse():
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(12, 64), torch.nn.Tanh(), torch.nn.Linear(64, 12))
    network.forward = lambda x, n: network[2](network[1](network[0](x)))
    options = {"steps": 3, "variance": "probes", "clip_x0": False}

    def images(**more):
        return Sampler(network, LINEAR, **options, **more).sample((8, 12))

    exact = images(way="jvp", autocast="bf16")
    off = (images(way="difference", autocast="bf16") - exact).norm() / exact.norm()
    assert off < 0.01


@refuses(
    ({"variance": "probes", "probes": 0}, "probes must be"),
    ({"variance": "lanczos", "lanczos_steps": 0}, "lanczos_steps must be"),
    ({"variance": "lanczos", "way": "forward"}, "way must be one of"),
    ({"variance": "lanczos", "avg_cov": True}, "avg_cov must be False for variance 'lanczos'"),
    ({"variance": "probes", "model": torch.nn.BatchNorm2d(3)}, "in training mode"),
    ({"variance": "ocm"}, "'ocm' needs a network that returns the pair"),
)
def test_derivatives_that_cannot_be_are_refused(bad):
    model = bad.pop("model", DATA.eps)
    Sampler(model, LINEAR, steps=5, **bad).sample((2, 3))
