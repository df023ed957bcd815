r"""attach(): add the SA term to a host's objective without editing the host.

While the host's own ``objective(v)`` runs, its network call (x_n, time) is intercepted. The time
gives n, and x_0 = v gives eps = (x_n - sqrt(cum_alpha_n) x_0) / sqrt(cum_beta_n). ``SALoss.around``
makes the call and evaluates the window; ``objective`` returns ``host's value + lambda L_sa`` [B].
What differs from host to host is in ``sa_plugin.hooks.hosts``.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import repeat
from typing import Any

from torch import Tensor

from sa_plugin._checks import check_images, check_recovered, check_steps
from sa_plugin._tensors import Coefficients
from sa_plugin.hooks.hosts import HOSTS, CriterionCall, Host
from sa_plugin.hooks.interception import intercepted
from sa_plugin.loss import Asked, SALoss


def attach(criterion: Any, loss: SALoss, host: Host | None = None) -> Any:
    """Make ``criterion.objective`` return its own value plus lambda times the SA term.

    Args:
        criterion: the host's criterion. Only its attribute ``objective`` changes, in place.
        loss: the SA loss; its schedule must be the host's, its reduction the host's ("sum").
        host: the kind of criterion; by default the first of ``HOSTS`` whose attributes it has.

    Returns:
        The same criterion. Its ``statistics``, if it has any, gain ``simple_loss`` and ``sa_loss``
        (batch means, before lambda) at each call. ``detach`` undoes it.

    Raises:
        ValueError: a host that is not known, another schedule, a second attach, a frozen noise
            network, or ``reuse`` with a host whose loss is not that of eps. At the call: an
            objective that does not call its network exactly once with (x_n, time); an SA term
            without a gradient; with ``stack``, outputs that are not a row for every input. At the
            first call: steps outside 1..N, or recovered noise that is not standard normal.
    """
    if _hooked(criterion):
        raise ValueError("an SA loss is attached to this criterion already; detach() it first")
    host = _host_of(criterion, HOSTS if host is None else (host,))
    loss.schedule.check_same(host.betas(criterion))
    if loss.lam > 0 and host.is_frozen(criterion):
        raise ValueError(
            f"the noise network of this {type(criterion).__name__} is frozen, only a head is "
            "trained: the SA term would change nothing; attach to the noise network's own training"
        )
    if loss.reuse and host.predicts(criterion) != "eps":
        raise ValueError(
            "reuse takes a host whose own loss is the squared error of eps, got one whose network "
            f"predicts {host.predicts(criterion)!r}"
        )
    criterion.objective = _HookedObjective(criterion, loss, host)
    return criterion


def detach(criterion: Any) -> Any:
    """Give the criterion its own objective back; ValueError if nothing is attached."""
    hooked = _hooked(criterion)
    if hooked is None:
        raise ValueError(f"no SA loss is attached to this {type(criterion).__name__}")
    del criterion.objective
    vars(criterion).update(hooked.replaced)
    return criterion


def _hooked(criterion: Any) -> _HookedObjective | None:
    objective = getattr(criterion, "objective", None)
    return objective if isinstance(objective, _HookedObjective) else None


class _HookedObjective:
    """The callable that replaces ``criterion.objective``."""

    def __init__(self, criterion: Any, loss: SALoss, host: Host) -> None:
        self.criterion, self.loss, self.host = criterion, loss, host
        self._objective = criterion.objective
        # Empty where the objective is the class's own method.
        self.replaced = {k: f for k, f in vars(criterion).items() if k == "objective"}
        self._name = f"{type(criterion).__name__}.objective"
        self._coefficients = Coefficients(loss.schedule)
        self._known: tuple[Any, ...] = host, criterion, host.predicts(criterion), self._coefficients
        self._checked = False

    def __call__(self, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        asked: list[Asked] = []

        def around(network: Callable[..., Any], *inputs: Any, **named: Any) -> Any:
            if len(inputs) != 2:
                raise ValueError(
                    f"{self._name} called {self.host.network} with {len(inputs)} positional "
                    "arguments; the hook needs two, x_n and the time"
                )
            asked.append(self._ask(CriterionCall(network, *inputs, named, *self._known), v))
            return asked[-1].output

        with intercepted(self.criterion, self.host.network, around):
            value = self._objective(v, *args, **kwargs)
        if len(asked) != 1:
            raise ValueError(
                f"{self._name} must call its network once, got {len(asked)} calls (by "
                f"another name than {self.host.network} it is not seen)"
            )
        simple, sa, added = asked[0].terms()
        if value.requires_grad and self.loss.lam > 0 and not sa.requires_grad:
            raise ValueError(
                f"the SA term of {self._name} has no gradient: the noise network is frozen, or "
                "called without a graph, as a reentrant checkpoint does"
            )
        statistics = getattr(self.criterion, "statistics", None)
        if statistics is not None:  # floats where the host keeps floats, else 0-d tensors
            floats = any(map(isinstance, statistics.values(), repeat(float)))
            for name, term in (("simple_loss", simple), ("sa_loss", sa)):
                mean = term.detach().mean()
                statistics[name] = mean.item() if floats else mean
        return value + added if self.loss.lam > 0 or self.loss.reuse else value

    def _ask(self, call: CriterionCall, v: Tensor) -> Asked:
        """The host's call, made, with those of the windows around its steps."""
        n, checked = call.steps(), self._checked  # once, as it waits for the device
        if not checked:
            check_images(v, seen=True)
            name = f"the steps of {self._name} by {self.host}"
            check_steps(n, len(v), self.loss.schedule.N, name=name, wait=True)
        n = n.long()
        a, b = self._coefficients(n, v)
        eps = (call.x.detach() - a * v) / b
        if not checked:
            self._checked = check_recovered(eps, self._name, self.host)
        return self.loss.around(call, v, n, eps)


def _host_of(criterion: Any, hosts: tuple[Host, ...]) -> Host:
    """The first host of whose kind the criterion is."""
    for host in hosts:
        if not host.missing(criterion):
            return host
    lacking = " or ".join(repr(host.missing(criterion)[0]) for host in hosts)
    raise ValueError(f"{type(criterion).__name__} has no attribute {lacking} to hook")
