r"""attach(): add the SA term to a host's objective without editing the host.

While the host's own ``objective(v)`` runs, its network call is observed (x_n, n, output). From
x_0 = v, x_n and n follows eps = (x_n - sqrt(cum_alpha_n) x_0) / sqrt(cum_beta_n); the SA term adds
the window's other K-1 calls, and ``objective`` returns ``host's value + lambda L_sa`` per sample.

Hosts known here (duck-typed, never imported):

* Extended-Analytic-DPM (NPR-DPM, SN-DPM) and its port: ``criterion.wrapper(x_n, n)``, n in 1..N,
  ``wrapper.typ`` saying what the network predicts (a pair where it contains an underscore), and
  ``criterion.schedule``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sa_plugin._tensors import DeviceTables, expand
from sa_plugin.loss import SALoss
from sa_plugin.prediction import to_eps
from sa_plugin.schedule import NoiseSchedule

_MARK = "_sa_plugin_attached"


def attach(criterion: Any, loss: SALoss) -> Any:
    """Make ``criterion.objective`` return its own value plus lambda times the SA term.

    Args:
        criterion: the host's criterion; see the module's docstring. Changed in place: only its
            attribute ``objective``.
        loss: the SA loss; its schedule must be the host's, its reduction the host's ("sum").

    Returns:
        The same criterion. Its ``statistics`` gain ``simple_loss`` and ``sa_loss`` (batch means,
        before lambda) at each call. ``detach`` undoes it.

    Raises:
        ValueError: a host that is not known, another schedule, or a second attach. At the call: an
            objective that does not call its network exactly once.
    """
    if getattr(criterion, _MARK, None) is not None:
        raise ValueError("an SA loss is attached to this criterion already; detach() it first")
    for name in ("wrapper", "schedule", "objective"):
        if not hasattr(criterion, name):
            raise ValueError(f"{type(criterion).__name__} has no attribute {name!r} to hook")
    _check_schedule(criterion.schedule, loss.schedule)
    hooked = _HookedObjective(criterion, loss)
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
    x: Tensor
    n: Any
    output: Any


class _Recorder:
    """Stands in for the host's wrapper during its objective: passes calls on and notes them."""

    def __init__(self, wrapper: Any) -> None:
        self._wrapper = wrapper
        self.calls: list[_Call] = []

    def __call__(self, x: Tensor, n: Any, *args: Any, **kwargs: Any) -> Any:
        output = self._wrapper(x, n, *args, **kwargs)
        self.calls.append(_Call(x, n, output))
        return output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapper, name)


class _HookedObjective:
    """The callable that replaces ``criterion.objective``."""

    def __init__(self, criterion: Any, loss: SALoss) -> None:
        self._criterion = criterion
        self._objective = criterion.objective
        self.replaced = vars(criterion).get("objective")  # None: the class's own method
        self._loss = loss
        schedule = loss.schedule
        self._tables = DeviceTables(signal=schedule.cum_alphas**0.5, sigma=schedule.cum_betas**0.5)

    def __call__(self, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        value, call = self._observe(v, *args, **kwargs)
        n = torch.as_tensor(call.n)
        a, b = (
            expand(self._tables.get(name, v)[n.to(v.device)], v) for name in ("signal", "sigma")
        )
        eps = (call.x.detach() - a * v) / b
        simple, sa = self._loss.sa_term(
            self._eps_model(call.n), v, n, eps, self._eps_of(call.output, call.x, a, b)
        )
        self._note(simple_loss=simple.detach().mean(), sa_loss=sa.detach().mean())
        return value + self._loss.lam * sa if self._loss.lam > 0 else value

    def _observe(self, v: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, _Call]:
        criterion = self._criterion
        wrapper = criterion.wrapper
        recorder = _Recorder(wrapper)
        criterion.wrapper = recorder
        try:
            value = self._objective(v, *args, **kwargs)
        finally:
            criterion.wrapper = wrapper
        if len(recorder.calls) != 1:
            raise ValueError(
                f"{type(criterion).__name__}.objective called its network "
                f"{len(recorder.calls)} times; the hook needs exactly one call"
            )
        return value, recorder.calls[0]

    def _eps_model(self, host_n: Any) -> Any:
        """The host's wrapper as a plain eps network; n handed over in the type the host uses."""
        wrapper = self._criterion.wrapper
        as_numpy = isinstance(host_n, np.ndarray)

        def eps_model(x: Tensor, n: Tensor) -> Tensor:
            output = wrapper(x, n.cpu().numpy() if as_numpy else n)
            a, b = (expand(self._tables.get(name, x)[n], x) for name in ("signal", "sigma"))
            return self._eps_of(output, x, a, b)

        return eps_model

    def _eps_of(self, output: Any, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        first = output[0] if isinstance(output, tuple | list) else output
        predicts = str(self._criterion.wrapper.typ).split("_")[0]
        return to_eps(first, x, a, b, predicts)

    def _note(self, **means: Tensor) -> None:
        """Statistics in the host's own type: floats where it keeps floats, else 0-d tensors."""
        statistics = self._criterion.statistics
        floats = any(isinstance(value, float) for value in statistics.values())
        statistics.update({k: m.item() if floats else m for k, m in means.items()})


def _check_schedule(host: Any, ours: NoiseSchedule) -> None:
    betas = np.asarray(host.betas, dtype=np.float64)
    if betas.shape != ours.betas.shape or not np.allclose(betas, ours.betas, rtol=1e-6, atol=0):
        raise ValueError(
            f"the loss's schedule (N = {ours.N}) is not the host's (N = {len(betas) - 1}); build "
            "it by NoiseSchedule.from_betas(host.betas[1:])"
        )
