"""intercepted(): every call of what an owner holds is met, and nothing stays behind."""

import copy
import functools
import pickle
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

from sa_plugin._interception import intercepted


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


@pytest.mark.parametrize("kind", [Owner, OwningModule])
@pytest.mark.parametrize("make", MODULES)
def test_a_module_stays_where_and_what_it_is(kind, make):
    module, kinds = make(), []
    own, expected, names = type(module), module(X), list(module.state_dict())
    owner = kind(module)

    def around(called, x, *, more):
        assert called is module
        kinds.append(type(called))
        return called(x) + called(x) + more  # these two are not met

    with intercepted(owner, "held", around):
        assert owner.held is module
        assert isinstance(module, own)
        assert list(module.state_dict()) == names
        for call in (owner.held, module):  # by the attribute, or another way to the same
            torch.testing.assert_close(call(X, more=1.0), 2 * expected + 1)
    assert kinds == [own, own]
    assert type(module) is own
    torch.testing.assert_close(module(X), expected)


@dataclass
class Doubled:
    """A callable that cannot be hashed."""

    factor: float = 2.0

    def __call__(self, x):
        return self.factor * x


CALLABLES = [linear().forward, functools.partial(torch.add, 1), abs, Doubled()]


@pytest.mark.parametrize("kind", [Owner, OwningModule])
@pytest.mark.parametrize("held", CALLABLES)
def test_another_callable_has_a_stand_in(kind, held):
    owner = kind(held)
    with intercepted(owner, "held", lambda called, x: called(x) + 10):
        assert torch.equal(owner.held(X), held(X) + 10)
        assert owner.held.__call__ != held.__call__
        names = [name for name in dir(held) if not name.startswith("__")]
        assert all(getattr(owner.held, name) == getattr(held, name) for name in names)
        stand_in = owner.held
    assert owner.held == held
    assert torch.equal(stand_in(X), held(X))  # who kept it calls the callable


def test_a_second_interception_is_refused():
    for held in (linear(), abs):
        owner = Owner(held)
        with (
            intercepted(owner, "held", lambda called, x: called(x)),
            pytest.raises(ValueError, match="held is intercepted already"),
            intercepted(owner, "held", lambda called, x: called(x)),
        ):
            pass
        assert owner.held is held


def test_a_copy_made_meanwhile_has_no_part_in_it():
    module = linear()
    owner = Owner(module)
    with intercepted(owner, "held", lambda called, x: called(x) + 1):
        copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module))]
        assert torch.equal(module(X), copies[0](X) + 1)
    for one in copies:
        assert type(one) is nn.Linear
        assert torch.equal(one(X), module(X))


def test_classes_that_count_their_subclasses_do_not_hear_of_it():
    class Counting(nn.Linear):
        names: ClassVar[list[str]] = []

        def __init_subclass__(cls, *, key):
            Counting.names.append(key)

    class Own(Counting, key="own"):
        pass

    owner = Owner(Own(2, 2))
    with intercepted(owner, "held", lambda called, x: called(x) + 1):
        owner.held(X)
    assert Counting.names == ["own"]


@pytest.mark.parametrize("held", [linear(), abs])
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
    module, graphs = Squares(), []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    module.compile(backend=backend)
    owner, seen = Owner(module), []
    for i in range(3):

        def around(called, x, i=i):
            seen.append(i)
            return called(x)

        with intercepted(owner, "held", around):
            owner.held(X)
        module(X)
    assert seen == [0, 1, 2]
    assert len(graphs) == 1
