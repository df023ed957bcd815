"""attach(): the SA term on a host's objective, without editing the host."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_flatten
from torch.utils.checkpoint import CheckpointError, checkpoint

from sa_plugin.hook import attach, detach
from sa_plugin.loss import SALoss
from sa_plugin.schedule import NoiseSchedule
from tests.toys import images, over, toy_eps
from third_party.common.schedule import NamedSchedule
from third_party.common.wrapper import DTWrapper
from third_party.extended_analytic_dpm.criterions import DTDSDM, DTDSM, DTDSDMErr

HOST = NamedSchedule("linear", 100)
SCHEDULE = NoiseSchedule.linear(100)
X0 = images(0, 32, 2, 3, 3)


class Network(torch.nn.Module):
    """A host's network: one output or two halves; notes the times it is called with."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor([1.1, 0.9], dtype=torch.float64))
        self.outputs = outputs
        self.times: list[torch.Tensor] = []

    def forward(self, x, t):
        self.times.append(t)
        eps = self.scale[0] * toy_eps(x, t)
        if self.outputs == 1:
            return eps
        return torch.cat([eps, self.scale[1] * (0.3 + 0.2 * torch.cos(x + 0.002 * over(t, x)))], 1)


def criterion_of(kind, network, **wrapper_options):
    typ = {DTDSM: "eps", DTDSDM: "eps_eps2", DTDSDMErr: "eps_epsc"}[kind]
    wrapper = DTWrapper(network, typ, N=HOST.N, **wrapper_options)
    states = (wrapper, {"model": network}, {}, {})
    return kind(HOST, *states) if kind is DTDSM else kind(HOST, 1.0, *states)


def seed():
    np.random.seed(0)  # noqa: NPY002 - the host draws its steps from the global state
    torch.manual_seed(0)


def objective(kind, loss=None, **wrapper_options):
    """Values, gradient and criterion of one evaluation, always from the same random states."""
    network = Network(1 if kind is DTDSM else 2)
    criterion = criterion_of(kind, network, **wrapper_options)
    if loss is not None:
        assert attach(criterion, loss) is criterion
    seed()
    values = criterion.objective(X0)
    values.mean().backward()
    return values.detach(), network.scale.grad.clone(), criterion, network


KINDS = [DTDSM, DTDSDM, DTDSDMErr]
OPTIONS = [
    {},
    {"backprop": "one"},
    {"window": "paper"},
    {"window": "paper", "backprop": "one"},
    {"noise": "shared"},
    {"noise": "chain", "backprop": "one"},
    {"stack": False},
    {"weighting": "relative"},
    {"reuse": True},
    {"reuse": True, "window": "paper"},
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("wrapper", [{}, {"shift1": True, "rescale_timesteps": False}], ids=str)
def test_adds_lambda_times_the_sa_term(kind, options, wrapper):
    """The host's value and the SA term of a loss called by hand at the host's own n and eps."""
    plain, plain_gradient, *_ = objective(kind, **wrapper)
    loss = SALoss(SCHEDULE, K=3, lam=0.7, **options)
    values, gradient, criterion, network = objective(kind, loss, **wrapper)

    # By hand: the host draws n by NumPy and eps by torch; what comes after is the plugin's.
    network.scale.grad = None
    seed()
    n_host, eps, x = HOST.sample(X0)
    shift = int(wrapper.get("shift1", False))
    rate = 1.0 if wrapper else 1000 / HOST.N

    def eps_model(x, n):
        return network.scale[0] * toy_eps(x, (n - shift) * rate)

    n = torch.as_tensor(n_host)
    own = eps_model(x, n)
    simple, sa = loss.sa_term(eps_model, X0, n, eps, own)
    added = 0.7 * sa
    if loss.reuse:  # the host's |e_n|^2 makes room for the estimate from all calls
        added = added + simple - (own - eps).square().sum((1, 2, 3))
    added.mean().backward()
    # eps is recovered from x_n: good to rounding over sqrt(cum_beta_1).
    torch.testing.assert_close(values, plain + added, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradient, plain_gradient + network.scale.grad, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(criterion.statistics["sa_loss"], sa.mean().detach())
    torch.testing.assert_close(criterion.statistics["simple_loss"], simple.mean().detach())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backprop", ["all", "one"])
@pytest.mark.parametrize("K", [1, 2, 4])
def test_sa_k_makes_k_calls(kind, backprop, K):
    loss = SALoss(SCHEDULE, K=K, backprop=backprop, stack=False)
    seed()
    *_, network = objective(kind, loss)
    assert len(network.times) == K
    stacked = SALoss(SCHEDULE, K=K, backprop=backprop)
    *_, network = objective(kind, stacked)
    assert len(network.times) == (1 if backprop == "all" else min(K, 2))
    assert sum(len(t) for t in network.times) <= K * len(X0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("K", [2, 4])
def test_other_rows_stand_behind_the_hosts_own(kind, K):
    """In one call, whose first rows are the host's; it gets back those alone."""
    network = Network(1 if kind is DTDSM else 2)
    criterion = criterion_of(kind, network)
    attach(criterion, SALoss(SCHEDULE, K=K))
    seed()
    n, _, x = HOST.sample(X0)
    inputs, outputs = [], []
    network.register_forward_hook(lambda _, given, out: inputs.append(given))
    own = criterion.wrapper

    class Watching(type(own)):
        def __call__(self, x, n):
            outputs.append(own(x, n))
            return outputs[-1]

    criterion.wrapper = Watching(network, own.typ, N=HOST.N)
    seed()
    criterion.objective(X0)
    ((stacked, times),) = inputs
    assert torch.equal(stacked[: len(X0)], x)
    assert torch.equal(times[: len(X0)], own._times(x, n))
    others = torch.tensor(n).repeat(K - 1) - torch.arange(1, K).repeat_interleave(len(X0))
    expected = others.clamp(min=1) * 10.0
    torch.testing.assert_close(times[len(X0) :], expected.to(times))
    assert {type(o) for o in outputs} == ({torch.Tensor} if kind is DTDSM else {tuple})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("K", [2, 4])
@pytest.mark.parametrize("stack", [True, False])
def test_calls_without_a_graph_come_before_the_one_with(kind, K, stack):
    """Made after it, they would need room beside its graph."""
    network, graphs = Network(1 if kind is DTDSM else 2), []
    network.register_forward_hook(lambda *_: graphs.append(torch.is_grad_enabled()))
    loss = SALoss(SCHEDULE, K=K, backprop="one", stack=stack)
    criterion = attach(criterion_of(kind, network), loss)
    criterion.objective(X0)
    assert graphs == [False] * (1 if stack else K - 1) + [True]


class Listing:
    """A host's wrapper with an output of many kinds."""

    typ = "eps"

    def __init__(self, output):
        self.output = output

    def __call__(self, x, n):
        return self.output(x)


class Pair(NamedTuple):
    """Outputs by name."""

    eps: torch.Tensor
    more: object


def nested(x):
    return [0.9 * x, {"features": (x[:, 0], None)}, "said"]


@pytest.mark.parametrize("stack", [True, False])
@pytest.mark.parametrize("output", [nested, lambda x: Pair(0.9 * x, [x[:, 0]])])
def test_the_host_gets_its_own_rows_of_every_output(output, stack):
    class Criterion(DTDSM):
        def objective(self, v):
            n, eps, xn = self.schedule.sample(v)
            got.append((xn, self.wrapper(xn, n)))
            return (eps - got[-1][1][0]).square().flatten(1).sum(1)

    got, states = [], ({"model": Network(1)}, {}, {})
    criterion = Criterion(HOST, Listing(output), *states)
    with torch.no_grad():
        attach(criterion, SALoss(SCHEDULE, stack=stack)).objective(X0)
    ((xn, outputs),) = got
    assert type(outputs) is type(output(xn))
    got, expected = (tree_flatten(one) for one in (outputs, output(xn)))
    assert got[1] == expected[1]  # the same containers
    for one, other in zip(got[0], expected[0], strict=True):
        assert torch.equal(one, other) if isinstance(other, torch.Tensor) else one == other


@pytest.mark.parametrize(
    "output",
    [lambda x: x[:3], lambda x: x.sum(), lambda x: (x, x.sum()), lambda x: (x, {"a": [x[:3]]})],
)
def test_outputs_that_cannot_be_divided_are_refused(output):
    """A mean over the batch, among others, would be one over the window's rows as well."""
    criterion = DTDSM(HOST, Listing(output), {"model": Network(1)}, {}, {})
    attach(criterion, SALoss(SCHEDULE))
    with pytest.raises(ValueError, match=r"a row for each of its 6\d inputs, got .*stack=False"):
        criterion.objective(X0)


@pytest.mark.parametrize("options", [{}, {"stack": False}, {"backprop": "one"}], ids=str)
def test_a_host_that_casts_its_images_gets_all_cast(options):
    seen = []

    class Casting(DTDSM):
        def objective(self, v):
            n, eps, xn = self.schedule.sample(v)
            return (eps - self.wrapper(xn.bfloat16(), n)).square().flatten(1).sum(1)

    criterion = Casting(
        HOST, Listing(lambda x: seen.append(x.dtype) or x), {"m": Network(1)}, {}, {}
    )
    with torch.no_grad():
        values = attach(criterion, SALoss(SCHEDULE, **options)).objective(X0)
    assert set(seen) == {torch.bfloat16}
    assert values.dtype == torch.float64


# -- hosts that checkpoint the call itself


def checkpointed(kind, reentrant, **options):
    """Its gradient where the host's whole call is made again in the backward pass."""
    network = Network(1)
    criterion = criterion_of(DTDSM, network)
    if kind == "module":
        inner, criterion.wrapper = criterion.wrapper, torch.nn.Module()
        criterion.wrapper.model, criterion.wrapper.typ = network, "eps"
        criterion.wrapper.forward = lambda x, n: inner(x, n)

    def objective(v):
        n, eps, xn = HOST.sample(v)
        xn.requires_grad_()
        out = checkpoint(criterion.wrapper, xn, n, use_reentrant=reentrant)
        return (eps - out).square().flatten(1).sum(1)

    criterion.objective = objective
    attach(criterion, SALoss(SCHEDULE, **options))
    seed()
    criterion.objective(X0).mean().backward()
    return network.scale.grad


@pytest.mark.parametrize("kind", ["module", "callable"])
@pytest.mark.parametrize("options", [{"backprop": "one"}, {"K": 1}, {"lam": 0}], ids=str)
def test_a_checkpoint_around_the_call_has_the_same_gradient(kind, options):
    expected = objective(DTDSM, SALoss(SCHEDULE, **options))[1]
    torch.testing.assert_close(checkpointed(kind, reentrant=False, **options), expected)


@pytest.mark.parametrize("kind", ["module", "callable"])
def test_a_checkpoint_that_cannot_be_served_is_refused(kind):
    """Without a graph the term would have no gradient; stacked rows are not there the next time."""
    with pytest.raises(ValueError, match="no gradient: .*without a graph, as a reentrant checkpoint"):
        checkpointed(kind, reentrant=True)
    with pytest.raises(CheckpointError):
        checkpointed(kind, reentrant=False)


def test_an_objective_within_itself_is_refused():
    criterion = criterion_of(DTDSM, Network(1))
    own = criterion.objective
    criterion.objective = lambda v: own(v) if len(v) < 20 else criterion.objective(v[:8])
    attach(criterion, SALoss(SCHEDULE))
    with pytest.raises(ValueError, match="wrapper is intercepted already"):
        criterion.objective(X0)


TIMES = {
    "int32 array": lambda n: n.astype(np.int32),
    "int64 array": lambda n: n,
    "int32 tensor": lambda n: torch.tensor(n, dtype=torch.int32),
    "int64 tensor": torch.tensor,
    "list": lambda n: n.tolist(),
}


@pytest.mark.parametrize("kind", TIMES)
@pytest.mark.parametrize("stack", [True, False])
def test_times_are_of_the_hosts_type(kind, stack):
    """Also where rows of the window stand behind them; a list becomes what torch makes of it."""
    seen = []

    class Criterion(DTDSM):
        def objective(self, v):
            n, eps, xn = self.schedule.sample(v)
            return (eps - self.wrapper(xn, TIMES[kind](n))).square().flatten(1).sum(1)

    class Noting(DTWrapper):
        def __call__(self, xn, n):
            seen.append(n)
            return super().__call__(xn, n)

    criterion = Criterion(HOST, Noting(Network(1), "eps", N=HOST.N), {"model": Network(1)}, {}, {})
    attach(criterion, SALoss(SCHEDULE, stack=stack)).objective(X0)
    assert len(seen) == (1 if stack else 2)
    expected = TIMES[kind](np.array([1]))
    for n in seen if kind != "list" else ():
        assert type(n) is type(expected)
        assert n.dtype == expected.dtype


@pytest.mark.parametrize("kind", KINDS)
def test_lambda_zero_leaves_the_host_alone(kind):
    plain, plain_gradient, *_ = objective(kind)
    values, gradient, criterion, network = objective(kind, SALoss(SCHEDULE, K=3, lam=0))
    assert torch.equal(values, plain)
    assert torch.equal(gradient, plain_gradient)
    assert len(network.times) == 1
    assert criterion.statistics["sa_loss"] == 0


@pytest.mark.parametrize("options", [{}, {"backprop": "one"}], ids=str)
def test_a_frozen_trunk_is_refused(options):
    """Its SA term would change nothing; without a graph nothing is trained, and it is served."""
    network = Network(2)
    criterion = attach(criterion_of(DTDSDM, network), SALoss(SCHEDULE, **options))
    network.scale.requires_grad_(False)
    with pytest.raises(ValueError, match=r"SA term of DTDSDM.objective has no gradient: .*frozen"):
        criterion.objective(X0)
    with torch.no_grad():
        assert criterion.objective(X0).isfinite().all()


def test_head_parameters_get_no_gradient_from_the_sa_term():
    _, plain, *_ = objective(DTDSDM)
    _, gradient, *_ = objective(DTDSDM, SALoss(SCHEDULE, lam=0.7))
    assert gradient[1] == plain[1]
    assert gradient[0] != plain[0]


def test_hosts_that_keep_floats_get_floats():
    criterion = criterion_of(DTDSM, Network(1))
    own = criterion.objective

    def with_floats(v):
        values = own(v)
        criterion.statistics["dsm"] = values.mean().item()
        return values

    criterion.objective = with_floats
    attach(criterion, SALoss(SCHEDULE))
    criterion.objective(X0)
    assert isinstance(criterion.statistics["sa_loss"], float)


def test_x0_networks_are_understood():
    """A host that predicts x_0: eps follows from it, at the host's call and at the added ones."""

    class X0Criterion:
        schedule = HOST

        def __init__(self):
            self.statistics = {}
            self.wrapper = DTWrapper(lambda x, t: torch.tanh(x), "x0", N=HOST.N)

        def objective(self, v):
            n, _, x = HOST.sample(v)
            return (self.wrapper(x, n) - v).square().flatten(1).sum(1)

    criterion = attach(X0Criterion(), SALoss(SCHEDULE, K=2))
    seed()
    with torch.no_grad():
        criterion.objective(X0)
    seed()
    n, eps, x = HOST.sample(X0)

    def eps_model(x, n):
        a = torch.tensor(SCHEDULE.cum_alphas)[n].reshape(-1, 1, 1, 1)
        return (x - a.sqrt() * torch.tanh(x)) / (1 - a).sqrt()

    n = torch.as_tensor(n)
    _, sa = SALoss(SCHEDULE, K=2).sa_term(eps_model, X0, n, eps, eps_model(x, n))
    torch.testing.assert_close(criterion.statistics["sa_loss"], sa.mean(), rtol=1e-6, atol=1e-9)
    with pytest.raises(ValueError, match=r"reuse takes a host .* predicts 'x0'"):
        attach(X0Criterion(), SALoss(SCHEDULE, K=2, reuse=True))


def test_steps_that_a_host_counts_in_numpy_never_go_to_the_device():
    """Asking an accelerator for them would stall it at each call."""

    class Criterion(DTDSM):
        def objective(self, v):
            n = np.array([3])
            seen.append(self.wrapper(v, n))
            return v.flatten(1).sum(1)

    class OnMeta:
        typ = "eps"

        def __call__(self, x, n):
            assert isinstance(n, np.ndarray)
            return x

    seen = []
    v = torch.zeros(1, 2, 3, 3, device="meta", requires_grad=True)
    criterion = Criterion(HOST, OnMeta(), {"model": Network(1)}, {}, {})
    attach(criterion, SALoss(SCHEDULE)).objective(v)
    assert seen[0].device.type == "meta"


def test_detach_gives_the_objective_back():
    criterion = criterion_of(DTDSM, Network(1))
    attach(criterion, SALoss(SCHEDULE))
    detach(criterion)
    seed()
    values = criterion.objective(X0)
    assert torch.equal(values.detach(), objective(DTDSM)[0])
    with pytest.raises(ValueError, match="no SA loss is attached"):
        detach(criterion)
    attach(criterion, SALoss(SCHEDULE))  # and again


def test_detach_gives_back_an_objective_that_was_replaced_before():
    criterion = criterion_of(DTDSM, Network(1))
    replaced = criterion.objective = lambda v: v
    detach(attach(criterion, SALoss(SCHEDULE)))
    assert criterion.objective is replaced


def test_a_failing_objective_leaves_the_wrapper_in_place():
    criterion = criterion_of(DTDSM, Network(1))
    wrapper = criterion.wrapper
    attach(criterion, SALoss(SCHEDULE))
    with pytest.raises(AttributeError):
        criterion.objective(None)
    assert criterion.wrapper is wrapper


def test_refusals():
    criterion = criterion_of(DTDSM, Network(1))
    with pytest.raises(ValueError, match=r"schedule has N = 50, the host's N = 100"):
        attach(criterion, SALoss(NoiseSchedule.linear(50)))
    with pytest.raises(ValueError, match=r"beta = 0.0006\d+ at step n = 1, the host's 0.001; Noise"):
        attach(criterion, SALoss(NoiseSchedule.cosine(100)))
    with pytest.raises(ValueError, match="object has no attribute 'wrapper'"):
        attach(object(), SALoss(SCHEDULE))
    attach(criterion, SALoss(SCHEDULE))
    with pytest.raises(ValueError, match="attached to this criterion already"):
        attach(criterion, SALoss(SCHEDULE))


def test_objectives_with_two_calls_are_refused():
    criterion = criterion_of(DTDSM, Network(1))
    own = criterion.objective
    criterion.objective = lambda v: own(v) + own(v)
    attach(criterion, SALoss(SCHEDULE))
    with pytest.raises(ValueError, match="must call its network once, got 2 calls"):
        criterion.objective(X0)


class Conditional(torch.nn.Module):
    """A labelled network; its wrapper hands it the labels and gives both outputs in a list."""

    def forward(self, x, t, y):
        return (1.1 + over(y, x)) * toy_eps(x, t)


class Labelled:
    """A host's wrapper for it: a named argument, an attribute of its own, a list of outputs."""

    typ = "eps"

    def __init__(self) -> None:
        self.model = Conditional()
        self.seen = []

    def __call__(self, x, n, *, y):
        self.seen.append(y)
        return [self.model(x, torch.as_tensor(n), y), None]


class LabelledCriterion:
    """A host whose objective takes labels and reads an attribute of its wrapper meanwhile."""

    def __init__(self) -> None:
        self.schedule = HOST
        self.wrapper = Labelled()

    def objective(self, v, y):
        n, eps, xn = self.schedule.sample(v)
        assert self.wrapper.typ == "eps"
        return (eps - self.wrapper(xn, n, y=y)[0]).square().flatten(1).sum(1)


def test_named_arguments_follow_and_lists_are_outputs():
    labels = torch.linspace(0, 1, len(X0), dtype=torch.float64)
    loss = SALoss(SCHEDULE, K=3, lam=0.5)
    plain, hooked = LabelledCriterion(), attach(LabelledCriterion(), loss)
    seed()
    without = plain.objective(X0, labels)
    seed()
    with torch.no_grad():
        values = hooked.objective(X0, labels)
    (seen,) = hooked.wrapper.seen
    assert torch.equal(seen[: len(X0)], labels)
    assert set(seen[len(X0) :].tolist()) <= set(labels.tolist())
    seed()
    n, eps, xn = HOST.sample(X0)
    network = hooked.wrapper.model
    _, sa = loss.sa_term(
        lambda x, n, y: network(x, n, y),
        X0,
        torch.from_numpy(n),
        eps,
        network(xn, torch.from_numpy(n), labels),
        y=labels,
    )
    assert torch.allclose(values, without + 0.5 * sa, rtol=1e-9)


@pytest.mark.parametrize(("change", "accepted"), [(1e-7, True), (1e-5, False)])
def test_the_schedules_must_agree_to_single_precision(change, accepted):
    betas = HOST.betas[1:].copy()
    betas[40] *= 1 + change
    loss = SALoss(NoiseSchedule.from_betas(betas))
    if accepted:
        attach(criterion_of(DTDSM, Network(1)), loss)
        return
    with pytest.raises(ValueError, match="at step n = 41, the host's"):
        attach(criterion_of(DTDSM, Network(1)), loss)
