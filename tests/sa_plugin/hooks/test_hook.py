"""attach(): the SA term on a host's objective, without editing the host."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_flatten
from torch.utils.checkpoint import CheckpointError, checkpoint

from sa_plugin.hooks.hook import attach, detach
from sa_plugin.hooks.hosts import AnalyticDPM
from sa_plugin.loss import SALoss
from sa_plugin.schedule import NoiseSchedule
from tests.refusals import refuses
from tests.stand_ins import KINDS, PORT, original, port, seed
from tests.toys import Toy, images, over
from third_party.common.nets import Model4Pretrained, UNetModel4Pretrained
from third_party.common.schedule import NamedSchedule
from third_party.common.wrapper import DTWrapper
from third_party.extended_analytic_dpm.methods import build_criterion

SCHEDULE = NoiseSchedule.linear(100)
X0 = images(0, 32, 2, 3, 3)
ALL_KINDS = pytest.mark.parametrize("kind", KINDS)
STACK = pytest.mark.parametrize("stack", [True, False])
WAYS = pytest.mark.parametrize("options", [{}, {"stack": False}, {"backprop": "one"}], ids=str)


def toy(kind):
    return Toy(2 if "_" in kind else 1)


def objective(kind, loss=None, **habits):
    """Values, gradient and criterion of one evaluation, always from the same random states."""
    network = toy(kind)
    criterion = port(kind, network, **habits)
    if loss is not None:
        assert attach(criterion, loss) is criterion
    seed()
    values = criterion.objective(X0)
    values.mean().backward()
    return values.detach(), network.scale.grad.clone(), criterion, network


class Wrapper:
    """A function (x, n) -> output as a host's wrapper."""

    def __init__(self, function, typ="eps"):
        self.function, self.typ = function, typ

    def __call__(self, x, n, **named):
        return self.function(x, n, **named)


def shrink(x, n):
    """A network without parameters."""
    return 0.9 * x


class Criterion:
    """A host whose objective calls its network by ``call`` and compares the result with eps."""

    schedule = PORT

    def __init__(self, network, call=lambda wrapper, x, n: wrapper(x, n), typ="eps"):
        self.wrapper, self.call, self.statistics = Wrapper(network, typ), call, {}

    def objective(self, v, **named):
        n, eps, xn = self.schedule.sample(v)
        return (eps - self.call(self.wrapper, xn, n, **named)).square().flatten(1).sum(1)


@ALL_KINDS
@pytest.mark.parametrize("habits", [{}, {"shift1": True, "rescale_timesteps": False}], ids=str)
@pytest.mark.parametrize(
    "options",
    [
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
    ],
    ids=str,
)
def test_adds_lambda_times_the_sa_term(kind, options, habits):
    """The host's value and the SA term of a loss called by hand at the host's own n and eps."""
    plain, plain_gradient, *_ = objective(kind, **habits)
    loss = SALoss(SCHEDULE, K=3, lam=0.7, **options)
    values, gradient, criterion, network = objective(kind, loss, **habits)

    def eps_model(x, n):
        return network(x, n - 1 if habits else n * 10.0)[:, :2]

    # By hand: the host draws n by NumPy and eps by torch; what comes after is the plug-in's.
    network.scale.grad = None
    seed()
    n, eps, x = PORT.sample(X0)
    n = torch.as_tensor(n)
    own = eps_model(x, n)
    simple, sa = loss.sa_term(eps_model, X0, n, eps, own)
    added = 0.7 * sa
    if loss.reuse:  # the host's |e_n|^2 makes room for the estimate from all calls
        added = added + simple - (own - eps).square().sum((1, 2, 3))
    added.mean().backward()
    # eps is recovered from x_n: good to rounding over sqrt(cum_beta_1).
    torch.testing.assert_close(values, plain + added, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradient, plain_gradient + network.scale.grad, rtol=1e-9, atol=1e-9)
    assert torch.equal(gradient[1:], plain_gradient[1:])  # none for the second output's head
    torch.testing.assert_close(criterion.statistics["sa_loss"], sa.mean().detach())
    torch.testing.assert_close(criterion.statistics["simple_loss"], simple.mean().detach())


@pytest.mark.parametrize("kind", ["eps", "analytic"])
@WAYS
def test_input_perturbation_is_in_the_hosts_row_and_in_the_others(kind, options):
    """The loss called by hand at the host's own n and eps."""
    loss = SALoss(SCHEDULE, K=3, lam=0.7, input_perturbation=0.2, **options)
    values, gradient, _, network = objective(kind, loss)
    network.scale.grad = None
    seed()
    n, eps, _ = PORT.sample(X0)
    by_hand = loss.sa_term(lambda x, n: network(x, n * 10.0), X0, torch.as_tensor(n), eps)
    simple, sa = by_hand
    (simple + 0.7 * sa).mean().backward()
    torch.testing.assert_close(values, simple + 0.7 * sa, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradient, network.scale.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["eps", "analytic"])
def test_input_perturbation_without_an_sa_term_is_the_ports_own(kind):
    own = NamedSchedule("linear", 100, input_perturbation=0.2)
    wanted = objective(kind, schedule=own)
    found = objective(kind, SALoss(SCHEDULE, lam=0, input_perturbation=0.2))
    for a, b, plain in zip(found[:2], wanted[:2], objective(kind)[:2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        assert not torch.allclose(a, plain)
    with pytest.raises(ValueError, match=r"own input_perturbation must be 0, got 0\.2"):
        attach(port(kind, Toy(), schedule=own), SALoss(SCHEDULE))


@ALL_KINDS
@pytest.mark.parametrize("backprop", ["all", "one"])
@STACK
@pytest.mark.parametrize("K", [1, 2, 4])
def test_sa_k_makes_k_calls_and_the_host_s_is_one_of_them(kind, backprop, stack, K):
    """Calls without a graph come first: made later, they would need room beside the graph.

    In one call for all, the host's own rows are the first.
    """
    network, calls = toy(kind), []
    network.register_forward_hook(
        lambda _, inputs, __: calls.append((*inputs, torch.is_grad_enabled()))
    )
    criterion = attach(port(kind, network), SALoss(SCHEDULE, K, backprop=backprop, stack=stack))
    seed()
    criterion.objective(X0)
    B, graph = len(X0), backprop == "all"
    stacked = [(K * B, True)] if graph else [((K - 1) * B, False), (B, True)][-K:]
    expected = stacked if stack else [(B, graph)] * (K - 1) + [(B, True)]
    assert [(len(x), with_graph) for x, _, with_graph in calls] == expected
    if stack and graph:
        seed()
        n, _, x = PORT.sample(X0)
        ((inputs, times, _),) = calls
        assert torch.equal(inputs[:B], x)
        steps = (torch.tensor(n) - torch.arange(K)[:, None]).clamp(min=1).flatten()
        assert times.tolist() == (steps * 10.0).tolist()


class Pair(NamedTuple):
    """Outputs by name."""

    eps: torch.Tensor
    more: object


def nested(x):
    return [0.9 * x, {"features": (x[:, 0], None)}, "said"]


@STACK
@pytest.mark.parametrize("output", [nested, lambda x: Pair(0.9 * x, [x[:, 0]])])
def test_the_host_gets_its_own_rows_of_every_output(output, stack):
    def call(wrapper, x, n):
        got.extend([x, wrapper(x, n)])
        return got[1][0]

    got, criterion = [], Criterion(lambda x, n: output(x), call)
    with torch.no_grad():
        attach(criterion, SALoss(SCHEDULE, stack=stack)).objective(X0)
    x, outputs = got
    assert type(outputs) is type(output(x))
    found, expected = (tree_flatten(one) for one in (outputs, output(x)))
    assert found[1] == expected[1]  # the same containers
    for one, other in zip(found[0], expected[0], strict=True):
        assert torch.equal(one, other) if isinstance(other, torch.Tensor) else one == other


@pytest.mark.parametrize(
    "output",
    [lambda x: x[:3], lambda x: x.sum(), lambda x: (x, x.sum()), lambda x: (x, {"a": [x[:3]]})],
)
def test_outputs_that_cannot_be_divided_are_refused(output):
    """A mean over the batch, among others, would be one over the window's rows as well."""
    criterion = attach(Criterion(lambda x, n: output(x)), SALoss(SCHEDULE))
    with pytest.raises(ValueError, match=r"a row for each of its 64 inputs, got .*stack=False"):
        criterion.objective(X0)


@WAYS
def test_a_host_that_casts_its_images_gets_all_cast(options):
    seen = []
    criterion = Criterion(
        lambda x, n: seen.append(x.dtype) or x, lambda wrapper, x, n: wrapper(x.bfloat16(), n)
    )
    with torch.no_grad():
        values = attach(criterion, SALoss(SCHEDULE, **options)).objective(X0)
    assert set(seen) == {torch.bfloat16}
    assert values.dtype == torch.float64


TIMES = {
    "int16 tensor": lambda n: torch.tensor(n, dtype=torch.int16),
    "int32 array": lambda n: n.astype(np.int32),
    "int64 array": lambda n: n,
    "int32 tensor": lambda n: torch.tensor(n, dtype=torch.int32),
    "int64 tensor": torch.tensor,
    "list": lambda n: n.tolist(),
}


@pytest.mark.parametrize("kind", TIMES)
@STACK
def test_times_are_of_the_hosts_type(kind, stack):
    """Also where rows of the window stand behind them; a list becomes what torch makes of it."""
    seen, network = [], Toy()
    criterion = Criterion(
        lambda x, n: seen.append(n) or network(x, torch.as_tensor(n)),
        lambda wrapper, x, n: wrapper(x, TIMES[kind](n)),
    )
    assert attach(criterion, SALoss(SCHEDULE, stack=stack)).objective(X0).isfinite().all()
    assert len(seen) == (1 if stack else 2)
    expected = TIMES[kind](np.array([1]))
    for n in seen if kind != "list" else ():
        assert type(n) is type(expected)
        assert n.dtype == expected.dtype


def test_named_arguments_follow_and_lists_are_outputs():
    """The objective takes labels, and reads an attribute of its wrapper meanwhile."""

    def call(wrapper, x, n, y):
        assert wrapper.typ == "eps"
        return wrapper(x, n, y=y)[0]

    def network(x, n, y):
        seen.append(y)
        return [model(x, torch.as_tensor(n), y), None]

    model, seen, labels = Toy(), [], torch.linspace(0, 1, len(X0), dtype=torch.float64)
    loss, criterion = SALoss(SCHEDULE, K=3, lam=0.5), Criterion(network, call)
    seed()
    plain = criterion.objective(X0, y=labels)
    seed()
    values = attach(criterion, loss).objective(X0, y=labels)
    assert torch.equal(seen[-1], labels.repeat(3))
    seed()
    n, eps, _ = PORT.sample(X0)
    _, sa = loss.sa_term(model, X0, torch.from_numpy(n), eps, y=labels)
    torch.testing.assert_close(values, plain + 0.5 * sa, rtol=1e-9, atol=1e-9)


def test_x0_networks_are_understood():
    """A host that predicts x_0: eps follows from it, at the host's call and at the added ones."""
    criterion, loss = Criterion(lambda x, n: torch.tanh(x), typ="x0"), SALoss(SCHEDULE, K=2)
    seed()
    with torch.no_grad():
        attach(criterion, loss).objective(X0)
    seed()
    n, eps, _ = PORT.sample(X0)

    def eps_model(x, n):
        a = over(torch.tensor(SCHEDULE.cum_alphas)[n], x)
        return (x - a.sqrt() * torch.tanh(x)) / (1 - a).sqrt()

    _, sa = loss.sa_term(eps_model, X0, torch.as_tensor(n), eps)
    torch.testing.assert_close(criterion.statistics["sa_loss"], sa.mean(), rtol=1e-6, atol=1e-9)
    with pytest.raises(ValueError, match=r"reuse takes a host .* predicts 'x0'"):
        attach(Criterion(torch.tanh, typ="x0"), SALoss(SCHEDULE, K=2, reuse=True))


def test_steps_that_a_host_counts_in_numpy_never_go_to_the_device():
    """Asking an accelerator for them would stall it at each call."""

    class OnMeta(Criterion):
        def objective(self, v):
            seen.append(self.wrapper(v, np.array([3])))
            return v.flatten(1).sum(1)

    def network(x, n):
        assert isinstance(n, np.ndarray)
        return x

    seen, v = [], torch.zeros(1, 2, 3, 3, device="meta", requires_grad=True)
    attach(OnMeta(network), SALoss(SCHEDULE)).objective(v)
    assert seen[0].device.type == "meta"


@ALL_KINDS
def test_lambda_zero_leaves_the_host_alone(kind):
    plain, plain_gradient, *_ = objective(kind)
    values, gradient, criterion, network = objective(kind, SALoss(SCHEDULE, K=3, lam=0))
    assert torch.equal(values, plain)
    assert torch.equal(gradient, plain_gradient)
    assert len(network.times) == 1
    assert criterion.statistics["sa_loss"] == 0


@pytest.mark.parametrize("method", ["pred_eps_eps2_pretrained", "pred_eps_epsc_pretrained"])
@pytest.mark.parametrize("mode", ["simple", "complex"])
@pytest.mark.parametrize("name", ["iddpm", "ddpm"])
def test_a_frozen_trunk_is_refused(name, mode, method):
    """Its SA term would change nothing, and its output has a graph all the same: the head's."""
    options = {"in_channels": 3, "num_res_blocks": 1, "mode": mode}
    if name == "iddpm":
        options |= {"model_channels": 32, "channel_mult": (1,), "out_channels": 3}
        network = UNetModel4Pretrained(attention_resolutions=(), **options)
    else:
        options |= {"ch": 32, "ch_mult": (1,), "out_ch": 3, "attn_resolutions": ()}
        network = Model4Pretrained(resolution=8, **options)
    criterion = build_criterion(method, PORT, network, trunk=network.state_dict())
    with pytest.raises(ValueError, match=r"this DTDSDM.* is frozen, only a head is trained"):
        attach(criterion, SALoss(SCHEDULE))
    attach(criterion, SALoss(SCHEDULE, lam=0))


@pytest.mark.parametrize("options", [{}, {"backprop": "one"}], ids=str)
def test_a_term_without_a_gradient_is_refused_where_the_host_has_one(options):
    """Where nothing is trained, there is nothing to refuse."""
    weight = torch.ones(1, requires_grad=True)
    criterion = Criterion(shrink, lambda wrapper, x, n: wrapper(x, n) * weight)
    attach(criterion, SALoss(SCHEDULE, **options))
    with pytest.raises(ValueError, match=r"SA term of Criterion.objective has no gradient: .*froz"):
        criterion.objective(X0)
    weight.requires_grad_(False)
    assert criterion.objective(X0).isfinite().all()


# -- hosts that do as they like with their network and what it returns


class Several(tuple):
    """A container that only its author knows."""


@STACK
@pytest.mark.parametrize("batch", [1, 4])
def test_containers_of_other_classes_are_divided_too(stack, batch):
    got = []
    criterion = Criterion(
        lambda x, n: Several([0.9 * x, x[:, 0]]),
        lambda wrapper, x, n: got.append(wrapper(x, n)) or got[-1][0],
    )
    attach(criterion, SALoss(SCHEDULE, stack=stack)).objective(X0[:batch])
    assert type(got[0]) is Several
    assert [len(one) for one in got[0]] == [batch, batch]


@WAYS
def test_a_host_may_change_its_output_in_place(options):
    totals = []
    for change in (lambda o: o, lambda o: o.mul_(1.0).add_(3.0).sub_(3.0), torch.zero_):
        criterion = Criterion(shrink, lambda w, x, n, change=change: change(w(x, n)))
        seed()
        attach(criterion, SALoss(SCHEDULE, **options)).objective(X0)
        totals.append(criterion.statistics["sa_loss"])
    assert totals[0] == totals[1] == totals[2]


def test_times_between_steps_are_refused():
    """As continuous-time codes have them; cut to whole numbers they would be other steps."""
    criterion = Criterion(shrink, lambda wrapper, x, n: wrapper(x, torch.tensor(n) * 0.999))
    with pytest.raises(ValueError, match=r"the steps of Criterion.objective .* must be integers"):
        attach(criterion, SALoss(SCHEDULE)).objective(X0)


# -- hosts that checkpoint the call itself


class ModuleWrapper(torch.nn.Module):
    def __init__(self, wrapper):
        super().__init__()
        self.inner, self.typ = wrapper, wrapper.typ

    def forward(self, x, n):
        return self.inner(x, n)


def checkpointed(kind, reentrant, **options):
    """Its gradient where the host's whole call is made again in the backward pass."""

    def call(wrapper, x, n):
        return checkpoint(wrapper, x.requires_grad_(), n, use_reentrant=reentrant)

    network = Toy()
    criterion = Criterion(None, call)
    criterion.wrapper = DTWrapper(network, "eps", N=PORT.N)
    if kind == "module":
        criterion.wrapper = ModuleWrapper(criterion.wrapper)
    attach(criterion, SALoss(SCHEDULE, **options))
    seed()
    criterion.objective(X0).mean().backward()
    return network.scale.grad


@pytest.mark.parametrize("kind", ["module", "callable"])
@pytest.mark.parametrize("options", [{"backprop": "one"}, {"K": 1}, {"lam": 0}], ids=str)
def test_a_checkpoint_around_the_call_has_the_same_gradient(kind, options):
    expected = objective("eps", SALoss(SCHEDULE, **options))[1]
    torch.testing.assert_close(checkpointed(kind, reentrant=False, **options), expected)


@pytest.mark.parametrize("kind", ["module", "callable"])
def test_a_checkpoint_that_cannot_be_served_is_refused(kind):
    """Without a graph the term would have no gradient; stacked rows are not there the next time."""
    with pytest.raises(ValueError, match=r"no gradient: .* graph, as a reentrant checkpoint"):
        checkpointed(kind, reentrant=True)
    with pytest.raises(CheckpointError):
        checkpointed(kind, reentrant=False)


# -- detach


def test_detach_gives_the_objective_back():
    """Also one that was replaced before."""
    criterion = port("eps", Toy())
    detach(attach(criterion, SALoss(SCHEDULE)))
    assert "objective" not in vars(criterion)
    seed()
    assert torch.equal(criterion.objective(X0).detach(), objective("eps")[0])
    with pytest.raises(ValueError, match="no SA loss is attached"):
        detach(criterion)
    replaced = criterion.objective = lambda v: v
    detach(attach(criterion, SALoss(SCHEDULE)))  # and again
    assert criterion.objective is replaced


# -- refusals


@refuses(
    ("eps_eps2", "input_perturbation must be 0 for a network that predicts 'eps_eps2', .* got 0.1"),
    ("eps_epsc", "input_perturbation must be 0 for a network that predicts 'eps_epsc'"),
)
def test_second_outputs_are_not_perturbed(kind):
    attach(port(kind, toy(kind)), SALoss(SCHEDULE, input_perturbation=0.1))


@refuses(
    ({"reuse": True}, "reuse takes a host .* predicts 'x0'"),
    ({"input_perturbation": 0.1}, "input_perturbation takes a host .* predicts 'x0'"),
)
def test_options_that_need_a_loss_of_eps_are_refused(options):
    attach(Criterion(shrink, typ="x0"), SALoss(SCHEDULE, **options))


@pytest.mark.parametrize("make", [port, original])
@ALL_KINDS
def test_other_schedules_and_second_attaches_are_refused(make, kind):
    criterion = make(kind, toy(kind))
    with pytest.raises(ValueError, match=r"schedule has N = 50, the host's N = 100"):
        attach(criterion, SALoss(NoiseSchedule.linear(50)))
    with pytest.raises(ValueError, match=r"0.0006\d+ at step n = 1, the host's 0.001; Noise"):
        attach(criterion, SALoss(NoiseSchedule.cosine(100)))
    assert "objective" not in vars(criterion)
    attach(criterion, SALoss(SCHEDULE))
    with pytest.raises(ValueError, match="attached to this criterion already"):
        attach(criterion, SALoss(SCHEDULE))


def test_the_schedules_must_agree_to_single_precision():
    def attach_with(change):
        betas = PORT.betas[1:].copy()
        betas[40] *= 1 + change
        attach(port("eps", Toy()), SALoss(NoiseSchedule.from_betas(betas)))

    attach_with(1e-7)
    with pytest.raises(ValueError, match="at step n = 41, the host's"):
        attach_with(1e-5)


class Other:
    eps_model = None


@refuses(
    ((object(),), "object has no attribute 'wrapper'"),
    ((Other(),), "Other has no attribute 'wrapper' or 'betas' or 'training_losses' to hook"),
    ((Other(), AnalyticDPM()), "Other has no attribute 'betas' to hook"),
)
def test_unknown_criteria_are_refused(given):
    criterion, *host = given
    attach(criterion, SALoss(SCHEDULE), *host)


@ALL_KINDS
def test_objectives_that_do_not_call_their_network_once_are_refused(kind):
    criterion = original(kind, toy(kind))
    name = "eps_model" if kind == "analytic" else "wrapper"
    own, held = criterion.objective, getattr(criterion, name)
    for changed, said in (
        (lambda v: v, "must call its network once, got 0 calls"),
        (lambda v: own(v) + own(v), "must call its network once, got 2 calls"),
        (lambda v: getattr(criterion, name)(v, t=v), f"called {name} with 1 positional arguments"),
    ):
        criterion.objective = changed
        with pytest.raises(ValueError, match=rf"{type(criterion).__name__}.objective {said}"):
            attach(criterion, SALoss(SCHEDULE)).objective(X0)
        assert getattr(criterion, name) is held
        detach(criterion)


def test_an_objective_within_itself_and_an_empty_batch_are_refused():
    criterion = port("eps", Toy())
    own = criterion.objective
    criterion.objective = lambda v: own(v) if len(v) < 20 else criterion.objective(v[:8])
    attach(criterion, SALoss(SCHEDULE))
    with pytest.raises(ValueError, match="wrapper is intercepted already"):
        criterion.objective(X0)
    with pytest.raises(ValueError, match="at least 1"):
        attach(port("eps", Toy()), SALoss(SCHEDULE)).objective(X0[:0])
