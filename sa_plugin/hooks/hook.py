r"""attach(): add the SA term to a host's objective without editing the host.

While the host's own ``objective(v)`` runs, its network call (x_n, time) is intercepted. The time
gives n, and x_0 = v gives eps = (x_n - sqrt(cum_alpha_n) x_0) / sqrt(cum_beta_n). ``SALoss.around``
makes the call and evaluates the window; ``objective`` returns ``host's value + lambda L_sa`` [B].
What differs from host to host is in ``sa_plugin.hooks.hosts``, and in
``sa_plugin.hooks.training_losses`` for improved- and guided-diffusion.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from sa_plugin._checks import check_images, check_recovered, check_steps
from sa_plugin._tensors import Coefficients
from sa_plugin.calls import HostCall
from sa_plugin.hooks.hosts import HOSTS, CriterionCall, Host, Owner
from sa_plugin.hooks.interception import Around, intercepted, standing_in
from sa_plugin.hooks.training_losses import (
    GuidedDiffusion,
    TrainingCall,
    network_times,
    previous_tables,
)
from sa_plugin.loss import Asked, SALoss

CONTINUOUS = "codes of continuous times take attach(..., host=sa_plugin.hooks.hosts.VPSDE())"


def attach(criterion: Any, loss: SALoss, host: Owner | None = None) -> Any:
    """Make ``criterion.objective`` return its own value plus lambda times the SA term.

    Args:
        criterion: the host's criterion, or the diffusion object of improved- or guided-diffusion,
            whose ``training_losses`` takes the place of ``objective``. Only this attribute changes,
            in place.
        loss: the SA loss; its schedule must be the host's, its reduction the host's ("sum", or
            "mean" for ``training_losses``).
        host: the kind of criterion; by default the first known one whose attributes it has.

    Returns:
        The same criterion. Its ``statistics``, if it has any, gain ``simple_loss`` and ``sa_loss``
        (batch means, before lambda) at each call; the terms of ``training_losses`` gain ``sa_loss``
        [B]. ``detach`` undoes it.

    Raises:
        ValueError: a host that is not known, another schedule, a second attach, a frozen noise
            network, a host that perturbs its inputs itself, or ``reuse`` or ``input_perturbation``
            with a host whose loss is not that of eps alone. At the call: an objective that does not
            call its network exactly once with (x_n, time); an SA term without a gradient; with
            ``stack``, outputs that are not a row for every input. At the first call: steps outside
            1..N, times between steps, or recovered noise that is not standard normal.
    """
    if _hooked(criterion):
        raise ValueError("an SA loss is attached to this criterion already; detach() it first")
    host = _host_of(criterion, (*HOSTS, GuidedDiffusion()) if host is None else (host,))
    host.check(criterion, loss)
    setattr(criterion, host.objective, _HOOKED[type(host).objective](criterion, loss, host))
    return criterion


def detach(criterion: Any) -> Any:
    """Give the criterion its own objective back; ValueError if nothing is attached."""
    hooked = _hooked(criterion)
    if hooked is None:
        raise ValueError(f"no SA loss is attached to this {type(criterion).__name__}")
    delattr(criterion, hooked.host.objective)
    vars(criterion).update(hooked.replaced)
    return criterion


def _hooked(criterion: Any) -> _Hooked | None:
    names = {host.objective for host in (*HOSTS, GuidedDiffusion())}
    found = (getattr(criterion, name, None) for name in names)
    return next((one for one in found if isinstance(one, _Hooked)), None)


class _Hooked:
    """What replaces an objective: the parts of its call."""

    network: str  # its name, for errors

    def __init__(self, criterion: Any, loss: SALoss, host: Any) -> None:
        self.criterion, self.loss, self.host = criterion, loss, host
        self._objective = getattr(criterion, host.objective)
        # Empty where the objective is the class's own method.
        self.replaced = {k: f for k, f in vars(criterion).items() if k == host.objective}
        self._name = f"{type(criterion).__name__}.{host.objective}"
        self._coefficients = Coefficients(loss.schedule)
        self._checked = False

    def _evaluate(
        self, v: Tensor, run: Callable[[Around], Tensor], call_of: Callable[..., HostCall]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(the host's value, L_simple, L_sa, what is added to the value), [B].

        Args:
            run: the host's objective, with another callable around its network.
            call_of: (network, x_n, time, named arguments) -> the host's call.
        """
        asked: list[Asked] = []

        def around(network: Callable[..., Any], *inputs: Any, **named: Any) -> Any:
            if len(inputs) != 2:
                raise ValueError(
                    f"{self._name} called {self.network} with {len(inputs)} positional "
                    "arguments; the hook needs two, x_n and the time"
                )
            asked.append(self._ask(call_of(network, *inputs, named), v))
            return asked[-1].output

        value = run(around)
        if len(asked) != 1:
            raise ValueError(
                f"{self._name} must call its network once, got {len(asked)} calls (by "
                f"another name than {self.network} it is not seen)"
            )
        simple, sa, added = asked[0].terms()
        if value.requires_grad and self.loss.lam > 0 and not sa.requires_grad:
            raise ValueError(
                f"the SA term of {self._name} has no gradient: the noise network is frozen, or "
                "called without a graph, as a reentrant checkpoint does"
            )
        return value, simple, sa, added

    def _ask(self, call: Any, v: Tensor) -> Asked:
        """The host's call, made, with those of the windows around its steps."""
        n, checked = call.steps(), self._checked  # once, as it waits for the device
        if not checked:
            self._check(call, n, v)
        n = n.long()
        a, b = (call.levels or self._coefficients)(n, v)
        eps = (call.x.detach() - a * v) / b
        if not checked:
            cause = f"{self._name} changes its images before it adds noise"
            cause = f"times are not made from n by {self.host}, or {cause}"
            self._checked = check_recovered(eps, cause)
        return self.loss.around(call, v, n, eps)

    def _check(self, call: Any, n: Tensor, v: Tensor) -> None:
        """ValueError unless n are steps, and the call's times are those of these steps."""
        check_images(v, seen=True)
        name = f"the steps of {self._name} by {self.host}"
        if n.is_floating_point():
            raise ValueError(f"{name} must be integers, got {n.dtype}; {CONTINUOUS}")
        times, own = (torch.as_tensor(t).cpu() for t in (call.time_of(n.long()), call.time))
        if own.is_floating_point():
            eps = max(torch.finfo(kind).eps for kind in (own.dtype, torch.float32))
            far = (times.double() - own.double()).abs() > 4 * eps * own.double().abs().max()
            if far.any():
                raise ValueError(
                    f"the time {own[far][0]:.6g} of {self._name} belongs to no step: times are not "
                    f"made from n by {self.host}; {CONTINUOUS}"
                )
        check_steps(n, len(v), self.loss.schedule.N, name=name, wait=True)


class _HookedObjective(_Hooked):
    """The callable that replaces ``criterion.objective``."""

    def __init__(self, criterion: Any, loss: SALoss, host: Host) -> None:
        super().__init__(criterion, loss, host)
        self.network = host.network
        self._known: tuple[Any, ...] = host, criterion, host.predicts(criterion), self._coefficients

    def __call__(self, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        def run(around: Around) -> Tensor:
            with intercepted(self.criterion, self.host.network, around):
                value: Tensor = self._objective(v, *args, **kwargs)
            return value

        def call_of(*call: Any) -> CriterionCall:
            return self.host.call(*call, *self._known)

        value, simple, sa, added = self._evaluate(v, run, call_of)
        statistics = getattr(self.criterion, "statistics", None)
        if statistics is not None:  # floats where the host keeps floats, else 0-d tensors
            floats = any(map(isinstance, statistics.values(), repeat(float)))
            for name, term in (("simple_loss", simple), ("sa_loss", sa)):
                mean = term.detach().mean()
                statistics[name] = mean.item() if floats else mean
        return value + added if self.loss.lam > 0 or self.loss.reuse else value


class _HookedTrainingLosses(_Hooked):
    """The callable that replaces ``diffusion.training_losses``; the network is its argument."""

    network = "its model"

    def __init__(self, diffusion: Any, loss: SALoss, host: GuidedDiffusion) -> None:
        super().__init__(diffusion, loss, host)
        self._predicts = host.predicts(diffusion)
        self._previous = previous_tables(loss.schedule)
        self._model: Callable[..., Any] | None = None  # the one that the times were asked for

    def __call__(
        self,
        model: Callable[..., Any],
        x_start: Tensor,
        t: Tensor,
        model_kwargs: dict[str, Any] | None = None,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        if model is not self._model:
            self._times = network_times(self._objective, model, x_start, self.loss.schedule.N)
            self._model = model
        known: tuple[Any, ...] = t + 1, self._times, self._predicts, self._coefficients
        known = *known, self._previous
        terms: dict[str, Tensor] = {}

        def run(around: Around) -> Tensor:
            with standing_in(model, around) as stand_in:
                terms.update(self._objective(stand_in, x_start, t, model_kwargs, noise))
            return terms["loss"]

        def call_of(*call: Any) -> TrainingCall:
            return TrainingCall(*call, *known)

        value, _, sa, added = self._evaluate(x_start, run, call_of)
        return terms | {"loss": value + added, "sa_loss": sa.detach()}


_HOOKED: dict[str, type[_Hooked]] = {
    Owner.objective: _HookedObjective,
    GuidedDiffusion.objective: _HookedTrainingLosses,
}


def _host_of(criterion: Any, hosts: tuple[Owner, ...]) -> Owner:
    """The first host of whose kind the criterion is."""
    for host in hosts:
        if not host.missing(criterion):
            return host
    names = dict.fromkeys(host.missing(criterion)[0] for host in hosts)
    lacking = " or ".join(map(repr, names))
    hint = f"; {CONTINUOUS}" if hasattr(criterion, "objective") else ""
    raise ValueError(f"{type(criterion).__name__} has no attribute {lacking} to hook{hint}")
