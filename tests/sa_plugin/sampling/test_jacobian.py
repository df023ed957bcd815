"""Cov[x_0 | x_t] from a derivative: against the exact covariance of Gaussians and a mixture."""

import pytest
import torch
from torch import nn

from sa_plugin.sampling.jacobian import (
    WAYS,
    Remainder,
    covariance_times,
    lanczos_root,
    probed_diagonal,
    root_times,
)
from sa_plugin.schedule import NoiseSchedule
from tests.gaussian import CorrelatedData, GaussianData, Mixture
from tests.refusals import refuses
from tests.toys import normal

SCHEDULE = NoiseSchedule.linear(100)
D, B = 12, 5
DATA = CorrelatedData(D, SCHEDULE)
STEPS = torch.tensor([1, 5, 20, 60, 100])
X, V = normal(1, B, D), normal(2, B, D)


def close(found, known, rtol):
    torch.testing.assert_close(found, known, rtol=rtol, atol=rtol * float(known.abs().max()))


def exact(v):
    """Cov[x_0 | x_n] v by the matrices."""
    return torch.stack([DATA.covariance(int(n)) @ row for n, row in zip(STEPS, v, strict=True)])


@pytest.mark.parametrize("way", ["auto", "jvp", "vjp"])
def test_a_product_with_the_covariance_of_a_correlated_gaussian(way):
    close(covariance_times(DATA.eps, SCHEDULE, X, STEPS, V, way=way), exact(V), 1e-9)


def test_a_difference_is_exact_but_for_rounding_where_the_network_is_linear():
    """I - sqrt(b) J nearly vanishes at high noise, and b/a is large there."""
    close(covariance_times(DATA.eps, SCHEDULE, X, STEPS, V, way="difference"), exact(V), 1e-5)


@pytest.mark.parametrize("predicts", ["x0", "v"])
def test_every_kind_of_output_gives_the_same(predicts):
    data = GaussianData([0.3, -0.5, 0.8], [0.04, 0.3, 1.5], SCHEDULE)
    x, v = normal(1, 3, 3), normal(2, 3, 3)
    n = torch.tensor([2, 30, 90])
    found = covariance_times(data.network(predicts), SCHEDULE, x, n, v, predicts=predicts)
    close(found, data.covariance(n) * v, 1e-12)


@pytest.mark.parametrize("probes", [1, 4])
def test_probes_are_unbiased_with_the_predicted_variance(probes):
    """Var of entry i: sum_{j != i} Cov_ij^2 / probes."""
    count, n = 20_000, 40
    x = X[:1].expand(count, D)
    steps = torch.full((count,), n)
    generator = torch.Generator().manual_seed(3)
    found = probed_diagonal(DATA.eps, SCHEDULE, x, steps, probes=probes, generator=generator)
    cov = DATA.covariance(n)
    variance = (cov**2).sum(1) - cov.diagonal() ** 2
    variance = variance / probes
    error = (variance / count).sqrt()
    assert ((found.mean.mean(0) - cov.diagonal()).abs() < 4 * error).all()
    torch.testing.assert_close(found.mean.var(0), variance, rtol=0.1, atol=0)
    if probes == 1:
        assert found.standard_error.isnan().all()
    else:
        squares = (found.standard_error**2).mean(0)
        torch.testing.assert_close(squares, variance, rtol=0.1, atol=0)


def test_one_probe_is_exact_for_a_diagonal_covariance():
    data = GaussianData([0.3, -0.5, 0.8], [0.04, 0.3, 1.5], SCHEDULE)
    n = torch.tensor([2, 30, 90])
    found = probed_diagonal(data.eps, SCHEDULE, normal(1, 3, 3), n, probes=1)
    close(found.mean, data.covariance(n), 1e-12)


def root(matrix):
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values.sqrt()) @ vectors.T


def test_lanczos_with_all_steps_is_the_exact_root_and_with_few_comes_near():
    known = torch.stack(
        [root(DATA.covariance(int(n))) @ row for n, row in zip(STEPS, V, strict=True)]
    )
    close(lanczos_root(DATA.eps, SCHEDULE, X, STEPS, V, steps=D), known, 1e-8)
    errors = [
        float((lanczos_root(DATA.eps, SCHEDULE, X, STEPS, V, steps=k) - known).norm())
        for k in (1, 3, 6, 9)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < 0.3 * errors[0]


def test_lanczos_stops_where_no_direction_is_left():
    """As many steps as there are different eigenvalues give the exact root; more change nothing."""
    values = torch.tensor([4.0, 4.0, 4.0, 0.25, 0.25, 9.0], dtype=torch.float64)
    z = normal(4, 3, 6)
    z[1, 3:] = 0  # one direction suffices
    z[2] = 0
    for steps in (3, 5, 50):
        found = root_times(lambda v: values * v, z, steps, lambda found: found)
        close(found, values.sqrt() * z, 1e-12)


def test_negative_eigenvalues_count_as_zero():
    values = torch.tensor([4.0, -1.0, 0.25, 9.0], dtype=torch.float64)
    z = normal(4, 3, 4)
    found = root_times(lambda v: values * v, z, 4, lambda found: found + 1)
    close(found, (values.clamp_min(0) + 1).sqrt() * z, 1e-12)


def test_an_image_that_is_not_finite_spoils_no_other():
    """The third product is not; LAPACK takes no such matrix."""
    values = torch.tensor([4.0, 4.0, 0.25, 0.25, 9.0], dtype=torch.float64)
    z, spoils = normal(4, 2, 5), iter([1, 1, torch.nan])

    def times(v):
        return values * v * torch.tensor([[next(spoils)], [1]])

    found = root_times(times, z, 3, lambda found: found)
    assert found[0].isnan().all()
    close(found[1], values.sqrt() * z[1], 1e-12)


def test_the_covariance_of_a_mixture_depends_on_x():
    data = Mixture(normal(5, 3, 4), 0.02 + 0.1 * normal(6, 3, 4) ** 2, SCHEDULE)
    x = normal(7, 6, 4)
    n = torch.tensor([10, 30, 50, 50, 70, 90])
    cov = data.covariance(x, n)
    v = normal(8, 6, 4)
    found = covariance_times(data, SCHEDULE, x, n, v)
    close(found, torch.einsum("bij,bj->bi", cov, v), 1e-9)
    known = torch.stack([root(matrix) @ row for matrix, row in zip(cov, v, strict=True)])
    close(lanczos_root(data, SCHEDULE, x, n, v, steps=4), known, 1e-8)
    generator = torch.Generator().manual_seed(0)
    found = probed_diagonal(data, SCHEDULE, x, n, probes=400, generator=generator)
    assert ((found.mean - cov.diagonal(dim1=1, dim2=2)).abs() < 5 * found.standard_error).all()


class NoForward(torch.autograd.Function):
    """x^2 with a rule for the backward mode alone."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad


def by_numpy(x, n):
    return torch.from_numpy(x.detach().numpy() ** 2)


@pytest.mark.parametrize(
    ("network", "way"),
    [
        (lambda x, n: x**2, "vjp"),
        (lambda x, n: NoForward.apply(x), "vjp"),
        (by_numpy, "difference"),
        (torch.no_grad()(lambda x, n: x**2), "jvp"),
    ],
)
def test_it_takes_the_first_way_that_has_rules_and_says_which(network, way):
    matrix = Remainder(network, SCHEDULE, X, STEPS)
    found = matrix.times(V)
    assert matrix.way == way
    b = torch.from_numpy(SCHEDULE.cum_betas[STEPS])[:, None].sqrt()
    close(found, V - b * 2 * X * V, 1e-8)
    close(matrix.output, X**2, 1e-15)


@pytest.mark.parametrize("predicts", ["eps", "v"])
@pytest.mark.parametrize("way", ["vjp", "jvp"])
def test_inference_mode_takes_no_way_away(predicts, way):
    network = small_network(torch.float64)

    def product(y):
        options = {"way": way, "predicts": predicts, "y": y + 1}
        return covariance_times(network, SCHEDULE, 1 * X, 1 * STEPS, 1 * V, **options)

    known = product(torch.arange(B))
    with torch.inference_mode():
        assert torch.equal(product(torch.arange(B)), known)


def small_network(dtype):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(D, 32), nn.SiLU(), nn.Linear(32, D)).to(dtype).eval()
    embedding = nn.Embedding(101 + 10, D, dtype=dtype)
    return lambda x, n, y: (layers(x + embedding(n) + embedding(101 + y)), x)


def test_networks_with_lookups_labels_and_a_second_output():
    y = torch.tensor([0, 3, 9, 9, 1])
    network = small_network(torch.float64)
    n = STEPS
    found = [covariance_times(network, SCHEDULE, X, n, V, way=way, y=y) for way in WAYS]
    jacobian = torch.autograd.functional.jacobian(lambda x: network(x, n, y)[0].sum(0), X)
    a, b = (torch.from_numpy(t[n])[:, None] for t in (SCHEDULE.cum_alphas, SCHEDULE.cum_betas))
    by_hand = {
        "jvp": torch.einsum("ibj,bj->bi", jacobian, V),
        "vjp": torch.einsum("jbi,bj->bi", jacobian, V),
    }
    by_hand["difference"] = by_hand["jvp"]
    for way, one in zip(WAYS, found, strict=True):
        close(one, b / a * (V - b.sqrt() * by_hand[way]), 1e-8)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("way", WAYS)
def test_lower_precisions(dtype, rtol, way):
    module = nn.Sequential(nn.Linear(D, 32), nn.SiLU(), nn.Linear(32, D))
    x, v, n = X[3:].float(), V[3:].float(), STEPS[3:]
    exact_way = "vjp" if way == "vjp" else "jvp"
    known = covariance_times(lambda x, n: module(x), SCHEDULE, x, n, v, way=exact_way)
    low = nn.Sequential(nn.Linear(D, 32), nn.SiLU(), nn.Linear(32, D))
    low.load_state_dict(module.state_dict())
    low.to(dtype)

    class Cast(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = low

        def forward(self, x, n):
            return self.inner(x.to(dtype))

    found = covariance_times(Cast(), SCHEDULE, x, n, v, way=way)
    assert found.dtype == torch.float32
    close(found, known, rtol)


def attention(x, n):
    tokens = x.reshape(-1, 1, 3, 4)
    return nn.functional.scaled_dot_product_attention(tokens, tokens, tokens).reshape(x.shape)


def distances(x, n):
    return torch.cdist(x[:, :, None], x[:, None, :1]).squeeze(2)


class Ours(nn.Module):
    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, x, n):
        return self.part(x)


@refuses(
    ({"way": "backward"}, "way must be one of"),
    ({"predicts": "noise"}, "predicts must be one of"),
    ({"n": torch.tensor([0, 1, 2, 3, 4])}, "n must lie in 1..100"),
    ({"x": X.long()}, "x must be floating point"),
    ({"v": V[:, :3]}, "v must have shape"),
    ({"model": Ours(nn.BatchNorm1d(D))}, "BatchNorm1d 'part' is in training mode"),
    ({"model": Ours(nn.Dropout(0.1))}, "Dropout 'part' is in training mode"),
    ({"model": Ours(nn.MultiheadAttention(D, 2, 0.1))}, "Attention 'part' is in training mode"),
    ({"model": lambda x, n: NoForward.apply(x), "way": "jvp"}, "way 'jvp': .*jvp function"),
    (
        {"model": distances, "way": "jvp"},
        r"way 'jvp': .*_cdist_forward that does not support it .*yet\.$",
    ),
    ({"model": by_numpy, "way": "vjp"}, "way 'vjp': .* does not depend on x"),
    ({"model": lambda x, n: x[:, :3]}, "shape"),
)
def test_what_cannot_be_is_refused(bad):
    given = {"model": DATA.eps, "x": X, "n": STEPS, "v": V} | bad
    model, x, n, v = (given.pop(name) for name in ("model", "x", "n", "v"))
    covariance_times(model, SCHEDULE, x, n, v, **given)


@refuses(({"probes": 0}, "probes must be"), ({"probes": 1.5}, "probes must be"))
def test_probes_are_whole_and_positive(bad):
    probed_diagonal(DATA.eps, SCHEDULE, X, STEPS, **bad)


@refuses(({"steps": 0}, "steps must be"), ({"steps": True}, "steps must be"))
def test_steps_are_whole_and_positive(bad):
    lanczos_root(DATA.eps, SCHEDULE, X, STEPS, V, **bad)


def test_attention_has_both_rules():
    network, symmetric = attention, Remainder(attention, SCHEDULE, X, STEPS, way="jvp")
    by_difference = covariance_times(network, SCHEDULE, X, STEPS, V, way="difference")
    close(covariance_times(network, SCHEDULE, X, STEPS, V, way="jvp"), by_difference, 1e-6)
    u = normal(9, B, D)
    transposed = Remainder(network, SCHEDULE, X, STEPS, way="vjp").times(u)
    close((symmetric.times(V) * u).sum(), (transposed * V).sum(), 1e-12)
