"""attach() on criteria as original checkouts have them, by stand-ins, and on their ports.

The stand-ins count steps in NumPy, keep floats as statistics, and rescale or shift times; their
networks may be in DataParallel, and they may be modules themselves.
"""

import numpy as np
import pytest
import torch
from torch import nn

from sa_plugin.hooks.hook import attach, detach
from sa_plugin.hooks.hosts import VPSDE, AnalyticDPM
from sa_plugin.loss import SALoss
from sa_plugin.schedule import NoiseSchedule
from tests.code_blocks import ROOT, blocks, run
from tests.refusals import refuses
from tests.stand_ins import (
    KINDS,
    PORT,
    OriginalAnalytic,
    OriginalContinuous,
    OriginalModule,
    original,
    port,
    seed,
)
from tests.toys import Toy, images
from third_party.analytic_dpm import criterions as analytic
from third_party.common.schedule import NamedSchedule

SCHEDULE = NoiseSchedule.linear(PORT.N)
X0 = images(0, 200, 1, 2, 2)
SHIFTED = {"rescale_timesteps": False, "shift1": True}
ALL_HABITS = pytest.mark.parametrize(
    "habits", [{}, {"shift1": True}, {"rescale_timesteps": False}, SHIFTED], ids=str
)


def untrained(kind="eps"):
    return Toy(2 if "_" in kind else 1, scale=3.0)


def train(criterion, iterations=50):
    """The losses of the iterations, and the statistics of the last."""
    seed(1)
    batches = (X0[i % 5 * 40 :][:40] for i in range(iterations))
    losses = []
    for _ in range(iterations):
        criterion.update(batches)
        losses.append(float(criterion.statistics["loss"]))
    return np.array(losses), criterion.statistics


def evaluate(criterion, v=X0):
    seed(1)
    return criterion.objective(v)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("habits", [{}, SHIFTED], ids=str)
def test_stand_in_and_port_learn_the_same(kind, habits):
    """50 iterations with SA-3; the stand-in has DataParallel around its network."""
    loss = SALoss(SCHEDULE, K=3, lam=0.5)
    ported, ported_statistics = train(attach(port(kind, untrained(kind), **habits), loss))
    parallel = nn.DataParallel(untrained(kind))
    there, statistics = train(attach(original(kind, parallel, **habits), loss))
    np.testing.assert_allclose(there, ported, rtol=1e-6)
    assert [len(t) for t in parallel.module.times] == [3 * 40] * 50
    assert ported[-5:].mean() < 0.8 * ported[:5].mean()
    for name in ("simple_loss", "sa_loss"):
        assert isinstance(statistics[name], float)
        assert statistics[name] == pytest.approx(float(ported_statistics[name]), rel=1e-6)
    plain, _ = train(port(kind, untrained(kind), **habits), 5)
    assert np.abs(ported[:5] / plain - 1).max() > 1e-2  # what is equal without the SA term


@pytest.mark.parametrize("kind", [OriginalAnalytic, OriginalModule])
@pytest.mark.parametrize("wrap", [lambda m: m, nn.DataParallel, lambda m: m.forward])
def test_ways_to_hold_the_network(kind, wrap):
    """As a module, in DataParallel, as a callable; by a plain object or registered in a module."""
    network = untrained()
    held = wrap(network)
    criterion = kind(network)
    del criterion.eps_model
    criterion.eps_model = held
    losses, _ = train(attach(criterion, SALoss(SCHEDULE, K=2)), 5)
    expected, _ = train(attach(port("analytic", untrained()), SALoss(SCHEDULE, K=2)), 5)
    np.testing.assert_allclose(losses, expected, rtol=1e-6)
    assert criterion.eps_model == held
    assert type(network) is Toy
    if isinstance(criterion, nn.Module) and isinstance(held, nn.Module):
        assert "eps_model" in dict(criterion.named_children())
    detach(criterion)
    assert "objective" not in vars(criterion)


@pytest.mark.parametrize("make", [port, original])
@ALL_HABITS
def test_the_added_calls_are_at_the_steps_before(make, habits):
    network = untrained()
    criterion = attach(make("analytic", network, **habits), SALoss(SCHEDULE, K=2, stack=False))
    train(criterion, 1)
    before, own = network.times
    rescaled = habits.get("rescale_timesteps", True)
    assert own.dtype == before.dtype == (torch.float64 if rescaled else torch.int64)
    rate = 10 if rescaled else 1
    first = rate * (1 - int(habits.get("shift1", False)))
    # Before the first step there is none: the first again, without weight.
    torch.testing.assert_close(before, (own - rate).clamp(min=first))


@pytest.mark.parametrize("N", [30, 77, 1000, 4000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shift1", [False, True])
def test_steps_and_times_are_each_others_inverse(N, dtype, shift1):
    host, n = AnalyticDPM(rescale_timesteps=True, shift1=shift1), torch.arange(1, N + 1)
    times = host.times(None, n, N, torch.zeros(1, dtype=dtype))
    assert times.dtype == dtype
    np.testing.assert_allclose(times.numpy(), (n.numpy() - shift1) * 1000 / N, rtol=1e-6)
    assert torch.equal(host.steps(None, times, N), n)
    array = host.times(None, n, N, np.zeros(1))
    assert isinstance(array, np.ndarray)
    assert torch.equal(host.steps(None, array, N), n)


# -- a host that has to be described


class Undescribed(OriginalAnalytic):
    """Keeps neither statistics nor its habits as attributes."""

    def __init__(self, model, rate, shift) -> None:
        super().__init__(model)
        del self.rescale_timesteps, self.shift1, self.statistics
        self.rate, self.shift = rate, shift

    def objective(self, v):
        n, eps, xn = self.draw(v)
        t = torch.from_numpy((n - self.shift) * self.rate).to(v.device)
        return (eps - self.eps_model(xn, t)).square().flatten(1).sum(1)


def test_a_description_says_what_the_attributes_do_not():
    loss = SALoss(SCHEDULE, K=2)
    expected = evaluate(attach(port("analytic", untrained(), shift1=True), loss))
    host = AnalyticDPM(rescale_timesteps=True, shift1=True)
    criterion = Undescribed(untrained(), 10.0, 1)
    torch.testing.assert_close(evaluate(attach(criterion, loss, host)), expected)
    assert not hasattr(criterion, "statistics")
    criterion = attach(Undescribed(untrained(), 10.0, 1), loss)
    with pytest.raises(ValueError, match="Undescribed has no attribute 'rescale_timesteps'"):
        evaluate(criterion)


@pytest.mark.parametrize("shift", [0, 1])
def test_a_wrong_description_is_noticed_by_the_range_of_the_steps(shift):
    """Steps 0 or N + 1, which a batch of 2,000 images lacks once in five hundred million."""
    host = AnalyticDPM(rescale_timesteps=True, shift1=not shift)
    criterion = attach(Undescribed(untrained(), 10.0, shift), SALoss(SCHEDULE), host)
    found = r"0\.\.\d+" if shift else r"\d+\.\.101"
    said = rf"the steps of Undescribed.objective by AnalyticDPM.* must lie in 1\.\.100, got {found}"
    for _ in range(2):
        with pytest.raises(ValueError, match=said):
            evaluate(criterion, X0.repeat(10, 1, 1, 1))


def test_a_wrong_description_is_noticed_by_the_noise():
    host = AnalyticDPM(rescale_timesteps=True, shift1=True)  # n / 10 + 1
    criterion = attach(Undescribed(untrained(), 1.0, 1), SALoss(SCHEDULE), host)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"no step: times are not made from n by Analyti"):
            evaluate(criterion)


def test_an_objective_that_changes_its_images_is_noticed():
    class Scaling(OriginalAnalytic):
        def objective(self, v):
            return super().objective(v * 2 - 1)

    criterion = attach(Scaling(untrained()), SALoss(SCHEDULE))
    with pytest.raises(ValueError, match=r"Scaling\.objective changes its images before it adds"):
        evaluate(criterion)


# -- the documentation

BLOCKS = blocks(ROOT / "docs/hooking.md")


@pytest.mark.parametrize("kind", ["eps", "analytic"])
def test_the_documented_lines_work(kind):
    block = BLOCKS[kind == "analytic"]
    assert len(block.changed_lines) == 3
    criterion = original(kind, untrained())
    run(block, {"criterion": criterion})
    losses, statistics = train(criterion, 2)
    assert np.isfinite(losses).all()
    assert statistics["sa_loss"] > 0


def test_the_documented_description_works():
    criterion = Undescribed(untrained(), 1, 1)
    run(BLOCKS[2], {"criterion": criterion, "attach": attach, "loss": SALoss(SCHEDULE)})
    assert evaluate(criterion).isfinite().all()


# -- the port of Analytic-DPM


def test_port_has_the_hosts_attributes():
    criterion = port("analytic", untrained())
    np.testing.assert_allclose(criterion.betas, SCHEDULE.betas, rtol=1e-12)
    np.testing.assert_allclose(criterion.cum_alphas, SCHEDULE.cum_alphas, rtol=1e-12)
    np.testing.assert_allclose(criterion.cum_betas, SCHEDULE.cum_betas, rtol=1e-9)
    assert criterion.betas[0] == 0
    assert criterion.eps_model is criterion.models["model"]
    losses, statistics = train(port("analytic", untrained()), 3)
    assert losses[-1] == float(statistics["dsm"])


@ALL_HABITS
def test_port_learns_like_the_other_port(habits):
    """DDPMDSM and DTDSM are one objective: the same losses to the last bit."""
    losses = [train(port(kind, untrained(), **habits), 10)[0] for kind in ("analytic", "eps")]
    assert np.array_equal(*losses)


@refuses(
    (
        lambda network: analytic.DDPMDSM(PORT.betas, True, {"a": network, "b": network}, {}, {}),
        r"models=\['a', 'b'\]: must hold exactly one network",
    ),
    (lambda net: analytic.DDPMDSM(PORT.betas[1:], True, {"a": net}, {}, {}), r"betas\[0\]"),
    (lambda network: analytic.build_criterion(PORT, network, lr=0), "lr=0"),
)
def test_port_refuses_bad_input(make):
    make(untrained())


def test_built_criterion_has_the_hosts_optimiser():
    criterion = analytic.build_criterion(PORT, untrained(), lr=0.5, grad_clip=2.0, **SHIFTED)
    assert isinstance(criterion, analytic.DDPMDSM)
    (optimizer,) = criterion.optimizers.values()
    assert isinstance(optimizer, torch.optim.Adam)
    (group,) = optimizer.param_groups
    assert group["lr"] == 0.5
    assert set(map(id, group["params"])) == set(map(id, criterion.eps_model.parameters()))
    assert criterion.grad_clip == 2.0
    assert not criterion._schedule.stratified
    drawn = NamedSchedule("linear", 1000, stratified=True)
    assert analytic.build_criterion(drawn, untrained())._schedule.stratified
    assert (criterion.rescale_timesteps, criterion.shift1) == (False, True)


# -- continuous times


@pytest.mark.parametrize("numpy", [False, True])
@pytest.mark.parametrize("host", [VPSDE(50), VPSDE(50, network="eps_model", scale=999)])
@pytest.mark.parametrize("options", [{}, {"stack": False}], ids=str)
def test_continuous_times_have_neighbours_one_step_of_the_grid_apart(host, numpy, options):
    """Value and gradient with rows at u and u - 1/50; the second is left out where u < 1.5/50."""
    network = untrained()
    criterion = OriginalContinuous(network, host.network, numpy)
    attach(criterion, SALoss(NoiseSchedule.vpsde(50), K=2, lam=0.7, **options), host)
    values = evaluate(criterion)
    (slope,) = torch.autograd.grad(values.sum(), network.scale)

    seed(1)
    u, eps = criterion.draw(X0)
    noises, errors = [eps, torch.randn_like(X0)], []
    for at, noise in zip((u, np.maximum(u - 1 / 50, 1e-9)), noises, strict=True):
        x = criterion.noised(X0, at, noise)
        errors.append(network(x, torch.from_numpy(999 * at)) - noise)
    counts = torch.from_numpy(u >= 1.5 / 50).reshape(-1, 1, 1, 1)
    assert counts.sum() < len(u)
    gap = (errors[0] + counts * errors[1]) / 2
    expected = (errors[0] ** 2 + 0.7 * gap**2).sum((1, 2, 3))
    torch.testing.assert_close(values, expected, rtol=1e-6, atol=1e-6)
    (expected,) = torch.autograd.grad(expected.sum(), network.scale)
    torch.testing.assert_close(slope, expected, rtol=1e-6, atol=1e-6)


def test_neighbours_in_double_precision():
    u = torch.tensor([0.35, 0.999], dtype=torch.float64)
    before = VPSDE(1000).times(None, torch.tensor([349, 998]), 1000, u)
    torch.testing.assert_close(before, u - 0.001, rtol=1e-15, atol=0)


@pytest.mark.parametrize("noise", ["shared", "chain"])
@pytest.mark.parametrize("backprop", ["all", "one"])
def test_continuous_times_on_the_grid_are_those_of_steps(noise, backprop):
    """There the term is that of the discrete host, with every option."""
    loss = SALoss(NoiseSchedule.vpsde(50), K=3, noise=noise, backprop=backprop)

    class OnGrid(OriginalContinuous):
        def draw(self, v):
            return np.random.randint(1, 51, len(v)) / 50, torch.randn_like(v)  # noqa: NPY002

    criterion = attach(OnGrid(untrained()), loss, VPSDE(50))
    evaluate(criterion)
    u, eps = (seed(1), criterion.draw(X0))[1]
    n = torch.from_numpy((u * 50).round().astype(int))
    _, sa = loss.sa_term(lambda x, n: criterion.model(x, 999 * n / 50), X0, n, eps)
    assert criterion.statistics["sa_loss"] == pytest.approx(sa.mean().item(), rel=1e-6)


@refuses(
    (("wrapper", None, {}), "has no attribute 'schedule' or .*continuous times take .*VPSDE"),
    (
        ("eps_model", AnalyticDPM(True), {"betas": VPSDE(100).betas(None)}),
        "time .* no step: .*take .*VPSDE",
    ),
    (("wrapper", VPSDE(50), {}), "the schedule has N = 100, the host's N = 50"),
)
def test_continuous_times_are_refused_where_they_are_not_served(case):
    """Rounded to steps they would pass for a discrete host's: x_n differs by half a step."""
    network, host, attributes = case
    criterion = OriginalContinuous(untrained(), network)
    vars(criterion).update(attributes)
    attach(criterion, SALoss(NoiseSchedule.vpsde(100)), host)
    evaluate(criterion)
