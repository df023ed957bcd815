"""attach() on original checkouts, by stand-ins with their calling habits, and on the ports.

The stand-ins are written from the public interfaces alone: NumPy index arrays, DataParallel around
the network, times rescaled or shifted, statistics of floats, criteria that may be modules.
"""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from sa_plugin.hook import attach, detach
from sa_plugin.hosts import AnalyticDPM
from sa_plugin.loss import SALoss
from sa_plugin.schedule import NoiseSchedule
from tests.toys import images
from third_party.analytic_dpm import criterions as analytic
from third_party.common.schedule import NamedSchedule
from third_party.common.wrapper import DTWrapper
from third_party.extended_analytic_dpm import criterions as extended

ROOT = Path(__file__).parents[1]
N = 100
PORT = NamedSchedule("linear", N)
SCHEDULE = NoiseSchedule.linear(N)
X0 = images(0, 200, 1, 2, 2)


class Network(nn.Module):
    """Trainable, of images and times, with one output or two halves; notes its times."""

    def __init__(self, outputs: int = 1) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.body = nn.Sequential(
                nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 4 * outputs)
            ).double()
        self.times: list[torch.Tensor] = []

    def forward(self, x, t):
        assert t.shape == (len(x),)
        self.times.append(t)
        out = self.body(torch.cat([x.flatten(1), t.double()[:, None] / 1000], 1))
        return out.reshape(len(x), -1, 2, 2)


# -- stand-ins for the originals


def per_image(values, x):
    return torch.from_numpy(values).to(x).reshape(-1, 1, 1, 1)


class OriginalSchedule:
    """NumPy tables; n is a NumPy array."""

    def __init__(self) -> None:
        self.betas = np.append(0.0, np.linspace(0.1 / N, 20 / N, N))
        self.cum_alphas = (1 - self.betas).cumprod()
        self.cum_betas = 1 - self.cum_alphas
        self.N = N

    def sample(self, x0):
        n = np.random.randint(1, self.N + 1, len(x0))  # noqa: NPY002 - as the hosts draw
        eps = torch.randn_like(x0)
        a, b = (per_image(table[n] ** 0.5, x0) for table in (self.cum_alphas, self.cum_betas))
        return n, eps, a * x0 + b * eps


class OriginalWrapper:
    """(xn, n) -> output or pair; n becomes a tensor inside."""

    def __init__(self, model, typ, rescale_timesteps=True, shift1=False) -> None:
        self.model, self.typ = model, typ
        self.rate, self.shift = (1000 / N if rescale_timesteps else 1), int(shift1)

    def __call__(self, xn, n):
        assert isinstance(n, np.ndarray)
        t = torch.from_numpy((n - self.shift) * self.rate).to(xn.device)
        out = self.model(xn, t)
        return out.chunk(2, 1) if "_" in self.typ else out


class Statistics:
    """What the original criteria share: a dictionary of floats, logged after each step."""

    def start(self, model) -> None:
        self.statistics = {}
        self.optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

    def update(self, data_loader) -> None:
        loss = self.objective(next(data_loader)).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.statistics["loss"] = loss.item()


class OriginalExtended(Statistics):
    def __init__(self, typ, model, **habits) -> None:
        self.schedule = OriginalSchedule()
        self.wrapper = OriginalWrapper(model, typ, **habits)
        self.start(model)

    def objective(self, v):
        n, eps, xn = self.schedule.sample(v)
        out = self.wrapper(xn, n)
        first = out[0] if "_" in self.wrapper.typ else out
        loss = (eps - first).square().flatten(1).sum(1)
        if self.wrapper.typ == "eps_eps2":
            loss = loss + (eps**2 - out[1]).square().flatten(1).sum(1)
        if self.wrapper.typ == "eps_epsc":
            loss = loss + ((eps - first).detach() ** 2 - out[1]).square().flatten(1).sum(1)
        self.statistics["objective"] = loss.mean().item()
        return loss


class OriginalAnalytic(Statistics):
    """A plain object; or a module, with the network among its own, as ``OriginalModule``."""

    def __init__(self, model, rescale_timesteps=True, shift1=False) -> None:
        super().__init__()
        tables = OriginalSchedule()
        self.draw = tables.sample
        self.betas, self.cum_alphas, self.cum_betas = (
            tables.betas,
            tables.cum_alphas,
            tables.cum_betas,
        )
        self.eps_model = model
        self.rescale_timesteps = rescale_timesteps
        self.shift1 = shift1
        self.start(model)

    def objective(self, v):
        n, eps, xn = self.draw(v)
        t = torch.from_numpy(n - int(self.shift1)).to(v.device)
        t = t.double() * 1000 / N if self.rescale_timesteps else t
        loss = (eps - self.eps_model(xn, t)).square().flatten(1).sum(1)
        self.statistics["loss_simple"] = loss.mean().item()
        return loss


class OriginalModule(OriginalAnalytic, nn.Module):
    pass


# -- the same training through port and stand-in


def port(kind, model, rescale_timesteps=True, shift1=False):
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    states = {"model": model}, {"all": optimizer}, {}
    if kind == "analytic":
        return analytic.DDPMDSM(PORT.betas, rescale_timesteps, *states, shift1=shift1)
    wrapper = DTWrapper(model, kind, rescale_timesteps, shift1, N)
    if kind == "eps":
        return extended.DTDSM(PORT, wrapper, *states)
    criterion = extended.DTDSDM if kind == "eps_eps2" else extended.DTDSDMErr
    return criterion(PORT, 1.0, wrapper, *states)


def original(kind, model, **habits):
    if kind == "analytic":
        return OriginalAnalytic(model, **habits)
    return OriginalExtended(kind, model, **habits)


def train(criterion, iterations=50):
    """The losses of the iterations, and the statistics of the last."""
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    batches = (X0[i % 5 * 40 :][:40] for i in range(iterations))
    losses = []
    for _ in range(iterations):
        criterion.update(batches)
        losses.append(float(criterion.statistics["loss"]))
    return np.array(losses), criterion.statistics


KINDS = ["eps", "eps_eps2", "eps_epsc", "analytic"]
HABITS = [
    {},
    {"shift1": True},
    {"rescale_timesteps": False},
    {"rescale_timesteps": False, "shift1": True},
]


def outputs(kind):
    return 2 if "_" in kind else 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("habits", [HABITS[0], HABITS[-1]], ids=str)
def test_stand_in_and_port_learn_the_same(kind, habits):
    """50 iterations with SA-3; the stand-in has DataParallel around its network."""
    loss = SALoss(SCHEDULE, K=3, lam=0.5)
    bare = Network(outputs(kind))
    ported, ported_statistics = train(attach(port(kind, bare, **habits), loss))
    parallel = nn.DataParallel(Network(outputs(kind)))
    there, statistics = train(attach(original(kind, parallel, **habits), loss))
    np.testing.assert_allclose(there, ported, rtol=1e-6)
    assert ported[-5:].mean() < 0.8 * ported[:5].mean()
    for name in ("simple_loss", "sa_loss"):
        assert isinstance(statistics[name], float)
        assert statistics[name] == pytest.approx(float(ported_statistics[name]), rel=1e-6)
    plain, _ = train(port(kind, Network(outputs(kind)), **habits), 5)
    assert np.abs(ported[:5] / plain - 1).max() > 1e-2  # what is equal without the SA term


@pytest.mark.parametrize("kind", [OriginalAnalytic, OriginalModule])
@pytest.mark.parametrize("wrap", [lambda m: m, nn.DataParallel, lambda m: m.forward])
def test_ways_to_hold_the_network(kind, wrap):
    """As a module, in DataParallel, as a callable; by a plain object or registered in a module."""
    network = Network()
    held = wrap(network)
    if not isinstance(held, nn.Module):
        criterion = kind(network)
        del criterion.eps_model
        criterion.eps_model = held
    else:
        criterion = kind(held)
    losses, _ = train(attach(criterion, SALoss(SCHEDULE, K=2)), 5)
    expected, _ = train(attach(port("analytic", Network()), SALoss(SCHEDULE, K=2)), 5)
    np.testing.assert_allclose(losses, expected, rtol=1e-6)
    assert criterion.eps_model == held
    assert type(network) is Network
    if isinstance(criterion, nn.Module) and isinstance(held, nn.Module):
        assert "eps_model" in dict(criterion.named_children())
    detach(criterion)
    assert "objective" not in vars(criterion)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("K", [1, 2, 4])
@pytest.mark.parametrize("backprop", ["all", "one"])
def test_sa_k_makes_k_calls(kind, K, backprop):
    network = Network(outputs(kind))
    loss = SALoss(SCHEDULE, K=K, backprop=backprop, stack=False)
    criterion = attach(original(kind, nn.DataParallel(network)), loss)
    train(criterion, 3)
    assert len(network.times) == 3 * K
    network.times.clear()
    criterion = original(kind, nn.DataParallel(network))
    train(attach(criterion, SALoss(SCHEDULE, K=K, lam=0)), 3)
    assert len(network.times) == 3


@pytest.mark.parametrize("make", [port, original])
@pytest.mark.parametrize("habits", HABITS, ids=str)
def test_the_added_calls_are_at_the_steps_before(make, habits):
    network = Network()
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


def evaluate(criterion, v=X0):
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    return criterion.objective(v)


def test_a_description_says_what_the_attributes_do_not():
    loss = SALoss(SCHEDULE, K=2)
    expected = evaluate(attach(port("analytic", Network(), shift1=True), loss))
    host = AnalyticDPM(rescale_timesteps=True, shift1=True)
    criterion = Undescribed(Network(), 10.0, 1)
    torch.testing.assert_close(evaluate(attach(criterion, loss, host)), expected)
    assert not hasattr(criterion, "statistics")
    criterion = attach(Undescribed(Network(), 10.0, 1), loss)
    with pytest.raises(ValueError, match="Undescribed has no attribute 'rescale_timesteps'"):
        evaluate(criterion)


@pytest.mark.parametrize("shift", [0, 1])
def test_a_wrong_description_is_noticed_by_the_range_of_the_steps(shift):
    """Steps 0 or N + 1, which a batch of 2,000 images lacks once in five hundred million."""
    host = AnalyticDPM(rescale_timesteps=True, shift1=not shift)
    criterion = attach(Undescribed(Network(), 10.0, shift), SALoss(SCHEDULE), host)
    found = r"0\.\.\d+" if shift else r"\d+\.\.101"
    said = rf"the steps of Undescribed.objective by AnalyticDPM.* must lie in 1\.\.100, got {found}"
    for _ in range(2):
        with pytest.raises(ValueError, match=said):
            evaluate(criterion, X0.repeat(10, 1, 1, 1))


def test_a_wrong_description_is_noticed_by_the_noise():
    host = AnalyticDPM(rescale_timesteps=True, shift1=True)  # n / 10 + 1
    criterion = attach(Undescribed(Network(), 1.0, 1), SALoss(SCHEDULE), host)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"mean square \S+, not 1: times are not made"):
            evaluate(criterion)


def test_an_objective_that_changes_its_images_is_noticed():
    class Scaling(OriginalAnalytic):
        def objective(self, v):
            return super().objective(v * 2 - 1)

    criterion = attach(Scaling(Network()), SALoss(SCHEDULE))
    with pytest.raises(ValueError, match="Scaling.objective changes its images before it adds noise"):
        evaluate(criterion)


def test_named_arguments_follow_their_images():
    """Labels that the objective hands to its network reach the added calls, row by row."""
    labels = torch.arange(len(X0))
    seen = []

    class Labelled(Network):
        def forward(self, x, t, y):
            seen.append((x, t, y))
            return super().forward(x, t)

    class WithLabels(OriginalAnalytic):
        def objective(self, v):
            n, eps, xn = self.draw(v)
            t = torch.from_numpy(n).to(v.device) * 10
            return (eps - self.eps_model(xn, t, y=labels)).square().flatten(1).sum(1)

    evaluate(attach(WithLabels(Labelled()), SALoss(SCHEDULE, K=3)))
    ((_, times, rows),) = seen
    count = len(X0)
    assert torch.equal(rows[:count], labels)
    own, times, rows = times[:count], times[count:], rows[count:]
    assert torch.equal(rows, labels.repeat(2))
    before = torch.arange(1, 3).repeat_interleave(count) * 10
    assert torch.equal(times, (own.repeat(2) - before).clamp(min=10))


# -- the documentation

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs/hooking.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("kind", ["eps", "analytic"])
def test_the_documented_lines_work(kind):
    lines = BLOCKS[kind == "analytic"]
    assert len([line for line in lines.splitlines() if line]) == 3
    criterion = original(kind, Network())
    exec(lines, {"criterion": criterion})
    losses, statistics = train(criterion, 2)
    assert np.isfinite(losses).all()
    assert statistics["sa_loss"] > 0


def test_the_documented_description_works():
    criterion = Undescribed(Network(), 1, 1)
    exec(BLOCKS[2], {"criterion": criterion, "attach": attach, "loss": SALoss(SCHEDULE)})
    assert evaluate(criterion).isfinite().all()


# -- refusals


def test_calls_that_cannot_be_read_are_refused():
    class Keyword(OriginalAnalytic):
        def objective(self, v):
            return self.eps_model(v, t=v[:, 0, 0, 0]).flatten(1).sum(1)

    class Never(OriginalAnalytic):
        def objective(self, v):
            return v

    class Twice(OriginalAnalytic):
        def objective(self, v):
            return super().objective(v) + super().objective(v)

    for kind, said in (
        (Keyword, "called eps_model with 1 positional arguments"),
        (Never, "must call its network once, got 0 calls"),
        (Twice, "must call its network once, got 2 calls"),
    ):
        network = Network()
        with pytest.raises(ValueError, match=f"{kind.__name__}.objective {said}"):
            attach(kind(network), SALoss(SCHEDULE)).objective(X0)
        assert type(network) is Network


def test_unknown_criteria_are_refused():
    class Other:
        eps_model = None

    with pytest.raises(ValueError, match="Other has no attribute 'wrapper' or 'betas' to hook"):
        attach(Other(), SALoss(SCHEDULE))
    with pytest.raises(ValueError, match="Other has no attribute 'betas' to hook"):
        attach(Other(), SALoss(SCHEDULE), AnalyticDPM())
    criterion = OriginalAnalytic(Network())
    with pytest.raises(ValueError, match="at step n = 1, the host's"):
        attach(criterion, SALoss(NoiseSchedule.cosine(N)))
    assert "objective" not in vars(criterion)


# -- the port of Analytic-DPM


def test_port_has_the_hosts_attributes():
    criterion = port("analytic", Network())
    np.testing.assert_allclose(criterion.betas, SCHEDULE.betas, rtol=1e-12)
    np.testing.assert_allclose(criterion.cum_alphas, SCHEDULE.cum_alphas, rtol=1e-12)
    np.testing.assert_allclose(criterion.cum_betas, SCHEDULE.cum_betas, rtol=1e-9)
    assert criterion.betas[0] == 0
    assert criterion.eps_model is criterion.models["model"]
    losses, statistics = train(port("analytic", Network()), 3)
    assert losses[-1] == float(statistics["dsm"])


@pytest.mark.parametrize("habits", HABITS, ids=str)
def test_port_learns_like_the_other_port(habits):
    """DDPMDSM and DTDSM are one objective: the same losses to the last bit."""
    one, _ = train(port("analytic", Network(), **habits), 10)
    other, _ = train(port("eps", Network(), **habits), 10)
    assert np.array_equal(one, other)


def test_port_refuses_bad_input():
    network = Network()
    with pytest.raises(ValueError, match=r"models=\['a', 'b'\]: must hold exactly one network"):
        analytic.DDPMDSM(PORT.betas, True, {"a": network, "b": network}, {}, {})
    with pytest.raises(ValueError, match=r"betas\[0\]"):
        analytic.DDPMDSM(PORT.betas[1:], True, {"a": network}, {}, {})
    with pytest.raises(ValueError, match="lr=0"):
        analytic.build_criterion(PORT, network, lr=0)


def test_built_criterion_has_the_hosts_optimiser():
    criterion = analytic.build_criterion(
        PORT, Network(), lr=0.5, grad_clip=2.0, rescale_timesteps=False, shift1=True
    )
    assert isinstance(criterion, analytic.DDPMDSM)
    (optimizer,) = criterion.optimizers.values()
    assert isinstance(optimizer, torch.optim.Adam)
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {
        id(p) for p in criterion.eps_model.parameters()
    }
    assert criterion.grad_clip == 2.0
    assert not criterion._schedule.stratified
    drawn = NamedSchedule("linear", 1000, stratified=True)
    assert analytic.build_criterion(drawn, Network())._schedule.stratified
    assert (criterion.rescale_timesteps, criterion.shift1) == (False, True)
