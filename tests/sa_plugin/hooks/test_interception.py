"""intercepted(): every call of what an owner holds is met, and nothing stays behind."""

import copy
import functools
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from sa_plugin.hooks.interception import intercepted


class Owner:
    """Holds a callable; ``kind`` says whether it is a module itself."""

    def __init__(self, held):
        super().__init__()
        self.held = held


class OwningModule(Owner, nn.Module):
    pass


class Squares(nn.Module):
    """PyTorch compiles none of its own layers by themselves."""

    def forward(self, x):
        return x.square()


def linear():
    torch.manual_seed(0)
    return nn.Linear(2, 2)


def scripted():
    return torch.jit.trace(linear(), torch.zeros(1, 2))


def optimised():
    return torch.compile(linear(), backend="eager")


def parametrised():
    return torch.nn.utils.parametrizations.weight_norm(linear())


MODULES = [linear, lambda: nn.DataParallel(linear()), parametrised, optimised]
MODULES += [pytest.param(scripted, marks=pytest.mark.filterwarnings("ignore:.*jit"))]
X = torch.ones(3, 2)
OWNERS = pytest.mark.parametrize("kind", [Owner, OwningModule])
BOTH = pytest.mark.parametrize("held", [linear(), abs])


def plus_ten(called, x):
    return called(x) + 10


@OWNERS
@pytest.mark.parametrize("make", MODULES)
def test_a_module_has_a_stand_in_and_stays_registered(kind, make):
    module = make()
    own, expected, names = type(module), module(X), list(module.state_dict())
    owner = kind(module)
    children = dict(owner.named_modules()) if kind is OwningModule else {}

    def around(called, x, *, more):
        assert called is module
        return called(x) + called(x) + more  # these two calls are not intercepted

    with intercepted(owner, "held", around):
        assert isinstance(owner.held, own)  # a host may look at its kind
        assert list(owner.held.state_dict()) == names
        owner.held.eval()
        owner.held.noted = "by the host"
        torch.testing.assert_close(owner.held(X, more=1.0), 2 * expected + 1)
        if children:
            assert dict(owner.named_modules()) == children
    assert owner.held is module
    assert "held" not in vars(owner) or kind is Owner
    assert (module.training, module.noted) == (False, "by the host")
    torch.testing.assert_close(owner.held(X), expected)


@dataclass
class Doubled:
    """A callable that cannot be hashed."""

    factor: float = 2.0

    def __call__(self, x):
        return self.factor * x


@OWNERS
@pytest.mark.parametrize(
    "held", [linear().forward, functools.partial(torch.add, 1), abs, Doubled()]
)
def test_another_callable_has_a_stand_in(kind, held):
    owner = kind(held)
    with intercepted(owner, "held", plus_ten):
        assert torch.equal(owner.held(X), held(X) + 10)
        assert owner.held.__call__ != held.__call__
        names = [name for name in dir(held) if not name.startswith("__")]
        assert all(getattr(owner.held, name) == getattr(held, name) for name in names)
        stand_in = owner.held
    assert owner.held == held
    assert torch.equal(stand_in(X), held(X))  # who kept it calls the callable


@BOTH
def test_a_second_interception_is_refused(held):
    owner = Owner(held)
    with (
        intercepted(owner, "held", plus_ten),
        pytest.raises(ValueError, match="held is intercepted already"),
        intercepted(owner, "held", plus_ten),
    ):
        pass
    assert owner.held is held


@BOTH
def test_failures_leave_nothing_behind(held):
    owner, own = Owner(held), type(held)

    def around(called, x):
        raise RuntimeError("within")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="within"), intercepted(owner, "held", around):
            owner.held(X)
    assert owner.held is held
    assert type(held) is own
    assert torch.equal(owner.held(X), held(X))


def test_a_network_compiled_in_place_has_one_graph():
    """The block and what it does are no part of it: guards see the same module in each step."""
    module, graphs, seen = Squares(), [], []
    module.compile(backend=lambda graph, _: graphs.append(graph) or graph.forward)
    owner = Owner(module)
    for i in range(3):
        with intercepted(owner, "held", lambda called, x, i=i: seen.append(i) or called(x)):
            owner.held(X)
        module(X)
    assert seen == [0, 1, 2]
    assert len(graphs) == 1


class Described:
    """Keeps what it holds behind a property."""

    def __init__(self, held):
        self._own = held

    held = property(lambda self: self._own, lambda self, held: setattr(self, "_own", held))


@BOTH
def test_a_property_is_intercepted_too(held):
    owner = Described(held)
    with intercepted(owner, "held", plus_ten):
        assert torch.equal(owner.held(X), held(X) + 10)
    assert owner.held is held


@OWNERS
def test_what_the_host_assigns_meanwhile_stays(kind):
    owner, other = kind(linear()), linear()
    with intercepted(owner, "held", plus_ten):
        owner.held = other
    assert owner.held is other


def test_a_stand_in_is_used_as_what_it_stands_for():
    module = nn.Sequential(linear(), linear())
    owner = Owner(module)
    with intercepted(owner, "held", plus_ten):
        assert owner.held[0] is module[0]
        assert len(owner.held) == 2
        assert owner.held in {module}
        copied = copy.deepcopy(owner.held)
        assert torch.equal(owner.held(X), copied(X) + 10)
    assert type(copied) is nn.Sequential
