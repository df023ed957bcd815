r"""attach(): add the SA term to a host's objective without editing the host.

While the host's own ``objective(v)`` runs, its network call is observed (x_n, n, output). From
x_0 = v, x_n and n follows eps = (x_n - sqrt(cum_alpha_n) x_0) / sqrt(cum_beta_n); the SA term adds
the window's other K-1 calls, and ``objective`` returns ``host's value + lambda L_sa`` per sample.

What differs from host to host is in ``sa_plugin.hosts``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor, nn

from sa_plugin._tensors import DeviceTables, expand
from sa_plugin.hosts import HOSTS, Host
from sa_plugin.loss import SALoss
from sa_plugin.prediction import to_eps
from sa_plugin.schedule import NoiseSchedule

_MARK = "_sa_plugin_attached"


def attach(criterion: Any, loss: SALoss, host: Host | None = None) -> Any:
    """Make ``criterion.objective`` return its own value plus lambda times the SA term.

    Args:
        criterion: the host's criterion; see the module's docstring. Changed in place: only its
            attribute ``objective``.
        loss: the SA loss; its schedule must be the host's, its reduction the host's ("sum").
        host: the kind of criterion; by default the first of ``HOSTS`` whose attributes it has.

    Returns:
        The same criterion. Its ``statistics``, if it has any, gain ``simple_loss`` and ``sa_loss``
        (batch means, before lambda) at each call. ``detach`` undoes it.

    Raises:
        ValueError: a host that is not known, another schedule, a second attach, or ``reuse`` with a
            host whose loss is not that of eps. At the call: an
            objective that does not call its network exactly once with (x_n, t), or, looked at in
            the first call alone, noise recovered from x_n that cannot be standard normal.
    """
    if getattr(criterion, _MARK, None) is not None:
        raise ValueError("an SA loss is attached to this criterion already; detach() it first")
    host = _host_of(criterion, HOSTS if host is None else (host,))
    _check_schedule(host.betas(criterion), loss.schedule)
    if loss.reuse and host.predicts(criterion) != "eps":
        raise ValueError(
            "reuse takes a host whose own loss is the squared error of eps, got one whose network "
            f"predicts {host.predicts(criterion)!r}"
        )
    hooked = _HookedObjective(criterion, loss, host)
    criterion.objective = hooked
    setattr(criterion, _MARK, hooked)
    return criterion


def detach(criterion: Any) -> Any:
    """Give the criterion its own objective back; ValueError if nothing is attached."""
    if getattr(criterion, _MARK, None) is None:
        raise ValueError(f"no SA loss is attached to this {type(criterion).__name__}")
    hooked: _HookedObjective = getattr(criterion, _MARK)
    if hooked.replaced is None:
        del criterion.objective
    else:
        criterion.objective = hooked.replaced
    delattr(criterion, _MARK)
    return criterion


@dataclass(frozen=True)
class _Call:
    """One call of the host's network: its first two arguments, the named ones, its output."""

    x: Tensor
    time: Any
    kwargs: dict[str, Any]
    output: Any


class _Recorder:
    """Stands in for a host's callable during its objective: passes calls on and notes them."""

    def __init__(self, network: Callable[..., Any], note: Callable[..., None]) -> None:
        self._network = network
        self._note = note

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self._network(*args, **kwargs)
        self._note(self._network, args, kwargs, output)
        return output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._network, name)


@contextmanager
def _recorded(criterion: Any, name: str) -> Iterator[list[_Call]]:
    """The calls that the criterion's attribute ``name`` gets meanwhile.

    A module is watched by a forward hook: a criterion that is a module itself refuses anything else
    in its place, and a host may look at its type (DataParallel) or call it by another way.
    """
    calls: list[_Call] = []

    def note(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if len(args) != 2:
            raise ValueError(
                f"{type(criterion).__name__}.objective called {name} with {len(args)} positional "
                "arguments; the hook needs two, x_n and the time"
            )
        calls.append(_Call(args[0], args[1], kwargs, output))

    network = getattr(criterion, name)
    if isinstance(network, nn.Module):
        handle = network.register_forward_hook(note, with_kwargs=True)
        try:
            yield calls
        finally:
            handle.remove()
        return
    setattr(criterion, name, _Recorder(network, note))
    try:
        yield calls
    finally:
        setattr(criterion, name, network)


class _HookedObjective:
    """The callable that replaces ``criterion.objective``."""

    def __init__(self, criterion: Any, loss: SALoss, host: Host) -> None:
        self._criterion = criterion
        self._host = host
        self._objective = criterion.objective
        self.replaced = vars(criterion).get("objective")  # None: the class's own method
        self._loss = loss
        self._checked = False
        schedule = loss.schedule
        self._tables = DeviceTables(signal=schedule.cum_alphas**0.5, sigma=schedule.cum_betas**0.5)

    def __call__(self, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        value, call = self._observe(v, *args, **kwargs)
        n = self._host.steps(self._criterion, call.time, self._loss.schedule.N)
        self._check_steps(n)
        a, b = self._coefficients(n, v)
        eps = (call.x.detach() - a * v) / b
        self._check_noise(eps)
        own = self._eps_of(call.output, call.x, a, b)
        simple, sa = self._loss.sa_term(self._eps_model(call.time), v, n, eps, own, **call.kwargs)
        self._note(simple_loss=simple.detach().mean(), sa_loss=sa.detach().mean())
        if self._loss.lam == 0:
            return value
        if self._loss.reuse:  # both terms of the difference have the same mean
            value = value + (simple - self._loss.squares(own - eps))
        return value + self._loss.lam * sa

    def _observe(self, v: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, _Call]:
        with _recorded(self._criterion, self._host.network) as calls:
            value = self._objective(v, *args, **kwargs)
        if len(calls) != 1:
            raise ValueError(
                f"{type(self._criterion).__name__}.objective called its network "
                f"{len(calls)} times; the hook needs exactly one call"
            )
        return value, calls[0]

    def _eps_model(self, host_time: Any) -> Callable[..., Tensor]:
        """The host's network as a plain eps network; n handed over in the host's own way."""
        criterion, host, N = self._criterion, self._host, self._loss.schedule.N
        network = getattr(criterion, host.network)

        def eps_model(x: Tensor, n: Tensor, **kwargs: Any) -> Tensor:
            output = network(x, host.times(criterion, n, N, host_time), **kwargs)
            return self._eps_of(output, x, *self._coefficients(n, x))

        # A host that counts its steps in NumPy gets them from the plan: asking a device for them
        # would stall it.
        eps_model.steps_as_planned = not isinstance(host_time, Tensor)  # type: ignore[attr-defined]
        return eps_model

    def _eps_of(self, output: Any, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        first = output[0] if isinstance(output, tuple | list) else output
        return to_eps(first, x, a, b, self._host.predicts(self._criterion))

    def _coefficients(self, n: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(cum_alpha_n) and sqrt(cum_beta_n), to broadcast over x."""
        n = n.to(x.device, non_blocking=True)
        a, b = (expand(self._tables.get(name, x)[n], x) for name in ("signal", "sigma"))
        return a, b

    def _check_steps(self, n: Tensor) -> None:
        if self._checked or n.numel() == 0:
            return
        low, high, N = n.min().item(), n.max().item(), self._loss.schedule.N
        if low < 1 or high > N:
            raise ValueError(
                f"the times that {type(self._criterion).__name__} called its network with are "
                f"steps {low}..{high} by {self._host}; they must lie in 1..{N}"
            )

    def _check_noise(self, eps: Tensor) -> None:
        """Once, as it waits for the device: ten standard errors around a mean square of 1."""
        if self._checked or eps.numel() == 0:
            return
        square = eps.float().square().mean().item()
        if not abs(square - 1) < 0.05 + 10 * math.sqrt(2 / eps.numel()):
            raise ValueError(
                f"the noise recovered from the network's input has mean square {square:.4g}, not "
                f"1: times are not made from n as {self._host} has it, or the objective of "
                f"{type(self._criterion).__name__} changes its images before it adds noise"
            )
        self._checked = True

    def _note(self, **means: Tensor) -> None:
        """Statistics in the host's own type: floats where it keeps floats, else 0-d tensors."""
        statistics = getattr(self._criterion, "statistics", None)
        if statistics is None:
            return
        floats = any(isinstance(value, float) for value in statistics.values())
        statistics.update({k: m.item() if floats else m for k, m in means.items()})


def _host_of(criterion: Any, hosts: tuple[Host, ...]) -> Host:
    """The first host of whose kind the criterion is."""
    for host in hosts:
        if not host.missing(criterion):
            return host
    lacking = " or ".join(repr(host.missing(criterion)[0]) for host in hosts)
    raise ValueError(f"{type(criterion).__name__} has no attribute {lacking} to hook")


def _check_schedule(host: ArrayLike, ours: NoiseSchedule) -> None:
    betas = np.asarray(host, dtype=np.float64)
    if betas.shape != ours.betas.shape or not np.allclose(betas, ours.betas, rtol=1e-6, atol=0):
        raise ValueError(
            f"the loss's schedule (N = {ours.N}) is not the host's (N = {len(betas) - 1}); build "
            "it by NoiseSchedule.from_betas(host's betas[1:])"
        )
