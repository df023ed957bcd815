r"""attach(): add the SA term to a host's objective without editing the host.

While the host's own ``objective(v)`` runs, its network call is intercepted (x_n, n). From x_0 = v,
x_n and n follows eps = (x_n - sqrt(cum_alpha_n) x_0) / sqrt(cum_beta_n); the window's other K-1
rows are evaluated within the host's own call or before it, and ``objective`` returns ``host's value
+ lambda L_sa`` per sample.

What differs from host to host is in ``sa_plugin.hosts``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from sa_plugin._calls import Batch, EpsModel
from sa_plugin._interception import intercepted
from sa_plugin._tensors import DeviceTables, expand
from sa_plugin.hosts import HOSTS, Host
from sa_plugin.loss import SALoss, Window
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
            host whose loss is not that of eps. At the call: an objective that does not call its
            network exactly once with (x_n, t), or without a graph, as a reentrant checkpoint does;
            with ``stack`` outputs that are not a row for every input; or, looked at in the first
            call alone, noise recovered from x_n that cannot be standard normal.
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
    """The host's call of its network, with the windows around its steps.

    Attributes:
        x, output: what the host called it with and got, [B, ...].
        n, eps: the steps [B] and noises [B, ...] of x.
        window: the windows.
        others: gives e of their other rows [K-1, B, ...].
    """

    x: Tensor
    output: Any
    n: Tensor
    eps: Tensor
    window: Window
    others: Callable[[], Tensor]


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
        calls: list[_Call] = []
        with_graph = torch.is_grad_enabled()

        def around(network: Callable[..., Any], *inputs: Any, **named: Any) -> Any:
            self._check_call(inputs, len(calls), with_graph)
            call = self._call(network, v, inputs[0], inputs[1], named)
            calls.append(call)
            return call.output

        with intercepted(self._criterion, self._host.network, around):
            value = self._objective(v, *args, **kwargs)
        if not calls:
            raise ValueError(f"{self._name} never called its network; the hook needs one call")
        return self._with_term(value, calls[0])

    def _with_term(self, value: Tensor, call: _Call) -> Tensor:
        """The objective [B] from the host's own."""
        own = self._eps_of(call.output, call.x, *self._coefficients(call.n, call.x)) - call.eps
        simple, sa = self._loss.terms(call.window, own, call.others())
        self._note(simple_loss=simple.detach().mean(), sa_loss=sa.detach().mean())
        if self._loss.lam == 0:
            return value
        if self._loss.reuse:  # both terms of the difference have the same mean
            value = value + (simple - self._loss.squares(own))
        return value + self._loss.lam * sa

    @property
    def _name(self) -> str:
        return f"{type(self._criterion).__name__}.objective"

    def _check_call(self, inputs: tuple[Any, ...], made: int, with_graph: bool) -> None:
        if made:
            raise ValueError(
                f"{self._name} called its network more than once; the hook needs exactly one call"
            )
        if len(inputs) != 2:
            raise ValueError(
                f"{self._name} called {self._host.network} with {len(inputs)} positional "
                "arguments; the hook needs two, x_n and the time"
            )
        if with_graph and not torch.is_grad_enabled():
            raise ValueError(
                f"{self._name} called its network without a graph, as a reentrant checkpoint does: "
                "the SA term would have no gradient; checkpoint within the network instead"
            )

    def _call(
        self, network: Callable[..., Any], v: Tensor, x: Tensor, time: Any, named: dict[str, Any]
    ) -> _Call:
        """The host's call, made, with the other rows behind its own or before it."""
        n = self._host.steps(self._criterion, time, self._loss.schedule.N)
        self._check_steps(n)
        a, b = self._coefficients(n, v)
        eps = (x.detach() - a * v) / b
        self._check_noise(eps)
        window = self._loss.prepare(v, n, eps)
        if self._loss.in_one_call:
            output, others = self._stacked(network, window, x, time, named)
        else:  # before the host's own call, whose graph needs the memory
            errors = self._loss.other_errors(self._eps_model(network, x, time), window, named)
            output, others = network(x, time, **named), lambda: errors
        return _Call(x, output, n, eps, window, others)

    def _stacked(
        self,
        network: Callable[..., Any],
        window: Window,
        x: Tensor,
        time: Any,
        named: dict[str, Any],
    ) -> tuple[Any, Callable[[], Tensor]]:
        """The host's call with the other rows behind its own: what it asked for, and their e."""
        others = window.rows[1:]
        batch = Batch.of(others)
        if len(batch) == 0:
            return network(x, time, **named), lambda: torch.zeros_like(others.eps)
        times = self._host.times(self._criterion, batch.steps, self._loss.schedule.N, time)
        output = network(
            torch.cat([x, batch.x.to(x.dtype)]),
            _joined(time, times),
            **batch.kwargs_behind(named),
        )
        own, behind = batch.split(output)

        def errors() -> Tensor:
            coefficients = self._coefficients(batch.steps, batch.x)
            return batch.errors(self._eps_of(behind, batch.x, *coefficients))

        return own, errors

    def _eps_model(self, network: Callable[..., Any], host_x: Tensor, host_time: Any) -> EpsModel:
        """The host's network as a plain eps network; x and n handed over in the host's own way."""

        def eps_model(x: Tensor, n: Tensor, **kwargs: Any) -> Tensor:
            time = self._host.times(self._criterion, n, self._loss.schedule.N, host_time)
            output = network(x.to(host_x.dtype), time, **kwargs)
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
        if self._checked or eps.numel() == 0 or eps.is_meta:
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


def _joined(time: Any, times: Any) -> Any:
    """The host's times with others behind them, in its own type."""
    if isinstance(time, Tensor):
        return torch.cat([time, times])
    return np.concatenate([time, np.asarray(times)])


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
