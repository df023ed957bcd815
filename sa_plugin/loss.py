r"""The sequence-aware (SA) loss of arXiv 2312.12431, for any noise network::

    L = L_simple + lambda L_sa
    L_simple = mean_B |e_t|^2,   L_sa = mean_B |(1/K) sum_{s in window} tau_s e_s|^2,
    e_s = f(x_s, s) - eps_s,     x_s = sqrt(cum_alpha_s) x_0 + sqrt(cum_beta_s) eps_s.

``SALoss.__call__`` is this text in code. The window shares L_simple's network call: SA-K makes K
calls, never K+1.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any

import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from sa_plugin._arrays import Numeric
from sa_plugin._checks import (
    check_choice,
    check_finite,
    check_images,
    check_non_negative,
    check_shape_of,
    check_steps,
    check_whole,
)
from sa_plugin._execution import without_graph
from sa_plugin._tensors import Coefficients, Levels, expand
from sa_plugin.calls import Answer, HostCall, MadeCall, PlainCall
from sa_plugin.noise import NOISES, draw
from sa_plugin.schedule import NoiseSchedule
from sa_plugin.tau import TauTable
from sa_plugin.window import BACKPROPS, WINDOWS, Window, check_anchor, down, draw_anchor

CHOICES = {"window": tuple(WINDOWS), "noise": tuple(NOISES), "backprop": BACKPROPS}
CHOICES |= {"reduction": ("sum", "mean"), "extra_precision": ("same", "bf16")}


@dataclass(frozen=True)
class SALossOutput:
    """What one evaluation of the loss gives.

    Attributes:
        total: scalar, ``simple + lam * sa``; differentiate this one.
        simple, sa: scalars, the batch means of the two terms (sa before lambda).
        n: int64 [B], the steps t of L_simple.
        simple_per_sample, sa_per_sample: [B], before the batch means.
    """

    total: Tensor
    simple: Tensor
    sa: Tensor
    n: Tensor
    simple_per_sample: Tensor
    sa_per_sample: Tensor


@dataclass(frozen=True)
class Asked:
    """What ``SALoss.around`` gives: the host's ``output``, for its own images alone, and the terms.

    ``terms()`` is for after the host's call: a checkpoint around that call would find more in it
    than in its repetition.
    """

    output: Any
    loss: SALoss
    window: Window
    eps: Tensor
    answers: list[Answer]

    def terms(self) -> tuple[Tensor, Tensor, Tensor]:
        """(L_simple, L_sa, what turns the host's own |e_t|^2 into the SA loss) per sample [B]."""
        e = _errors(self.answers, self.eps)
        simple, sa = self.loss._terms(self.window, e)
        added = self.loss.lam * sa
        if self.loss.reuse:
            added = added + (simple - self.loss._norm2(e[0]))
        return simple, sa, added


@dataclass(eq=False)
class SALoss:
    """L_simple + lambda L_sa; a callable without parameters of its own.

    Args:
        schedule: the forward process, steps 1..N.
        K: steps in a window, 1..N.
        lam: lambda >= 0; 0 is the plain loss with one network call.
        weighting: tau, see ``TauTable``: "uniform" (the published code), "theorem1", "relative" or
            an array [N+1].
        window: "down" (t, t-1, ..., t-K+1; the published code) or "paper" (anchors uniform on
            1-K..N, upward, tau zero outside 2..N; Theorem 2's constants hold for this one).
        noise: "independent" eps at each step, "shared" (one eps a window) or "chain" (the window's
            x_s lie on one forward chain).
        backprop: "all" differentiates every row. "one" differentiates the own row alone, at a
            position drawn uniformly, with the gradient scaled to stay unbiased; it costs one
            training step and K-1 forward passes.
        stack: evaluate a window's rows in one call of K*B inputs, or in series.
        reduction: "sum" or "mean" over an image's dimensions, for both terms.
        antithetic: draw steps in pairs t, N+1-t.
        stratified: draw one step from each of B equal parts of 1..N. Each is uniform by itself, and
            the batch's mean varies less.
        reuse: estimate L_simple from every row, not from the own row alone: unbiased, less
            variance, no further call. Only with "all": under "one" the other rows have no gradient.
        extra_precision: of the calls without a graph under ``backprop="one"``: "same", or "bf16" by
            autocast, whose rounding enters the gradient (docs/training.md).
        input_perturbation: gamma >= 0. The network gets every x_s made with eps_s + gamma xi_s and
            still predicts eps_s (arXiv 2301.11706). The xi_s are standard normal, one for each row,
            drawn after all else; 0 draws none. L_simple's minimiser is then the exact network for
            noise of variance (1 + gamma^2) cum_beta, divided by sqrt(1 + gamma^2). For Gaussian
            data of variance s, with a = cum_alpha and b = cum_beta, it is
            sqrt(b) x / (a s + (1 + gamma^2) b) in place of sqrt(b) x / (a s + b).

    Raises:
        ValueError: a bad argument, named with its value and what is allowed.
    """

    schedule: NoiseSchedule
    K: int = 2
    lam: float = 1.0
    weighting: str | ArrayLike = "uniform"
    window: str = "down"
    noise: str = "independent"
    backprop: str = "all"
    stack: bool = True
    reduction: str = "sum"
    _: KW_ONLY
    antithetic: bool = False
    stratified: bool = False
    reuse: bool = False
    extra_precision: str = "same"
    input_perturbation: float = 0.0

    def __post_init__(self) -> None:
        check_whole("K", self.K, 1, self.schedule.N)
        check_non_negative("lam", self.lam)
        check_non_negative("input_perturbation", self.input_perturbation)
        for name, allowed in CHOICES.items():
            check_choice(name, getattr(self, name), allowed)
        if self.antithetic and self.stratified:
            raise ValueError("antithetic and stratified exclude each other, got True for both")
        if self.reuse and self.backprop == "one":
            raise ValueError("reuse=True needs backprop='all', got 'one'")
        if self.extra_precision != "same" and self.backprop == "all":
            raise ValueError(f"extra_precision={self.extra_precision!r} needs backprop='one'")
        self.tau = TauTable(self.schedule, self.weighting)
        self._coefficients = Coefficients(self.schedule)
        self.K, self.lam = int(self.K), float(self.lam)
        cpu = torch.device("cpu")
        self._tau = {cpu: torch.from_numpy(self.tau.values.copy())}  # by device
        self._range_seen = False
        self._noise_seen: set[str] = set()

    def __call__(
        self,
        eps_model: Callable[..., Tensor],
        x0: Tensor,
        *,
        n: Tensor | None = None,
        noise: Tensor | None = None,
        anchor: Tensor | None = None,
        generator: torch.Generator | None = None,
        **model_kwargs: Any,
    ) -> SALossOutput:
        """Evaluate the loss; randomness that is not handed in is drawn.

        Args:
            eps_model: (x [M, C, H, W], n int64 [M] in 1..N, **model_kwargs) -> eps [M, C, H, W].
            x0: clean images [B, C, H, W] in [-1, 1].
            n: L_simple's steps t, integers [B] in 1..N.
            noise: [K, B, C, H, W], entry k for position k of the window (step t-k with the default
                window); [1, B, C, H, W] with ``noise="shared"`` or lambda zero.
            anchor: anchors of the windows [B]; see ``sa_plugin.window``.
            generator: source of all draws, else torch's global one. Steps are drawn on its device,
                by default the CPU, where planning them stalls no accelerator.
            **model_kwargs: handed to the network; tensors of length B follow their images.

        Raises:
            ValueError: wrong shapes or ranges, or a network that returns another shape.
        """
        self._range_seen = check_images(x0, self._range_seen, wait=n is None or noise is None)
        N, B = self.schedule.N, len(x0)
        n = self._steps(B, generator) if n is None else check_steps(n, B, N)  # t
        window = self._window(n, anchor, generator)  # steps s and weights tau_s / K, [K, B]
        eps = self._noises(window, x0, noise, generator)  # [K, B, C, H, W]
        x = self._noised(x0, window.steps, self._perturbed(eps, generator))
        call = PlainCall(eps_model, x[0], n.to(x0.device, non_blocking=True), model_kwargs)
        e = _errors(self._ask(call, x[1:], window.steps), eps)
        simple, sa = self._terms(window, e)
        total = simple.mean() + self.lam * sa.mean()
        return SALossOutput(total, simple.mean(), sa.mean(), n, simple, sa)

    def sa_term(
        self,
        eps_model: Callable[..., Tensor],
        x0: Tensor,
        n: Tensor,
        eps: Tensor,
        eps_pred: Tensor | None = None,
        *,
        anchor: Tensor | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        **model_kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """(L_simple, L_sa) per sample [B], for training loops that draw n and eps themselves.

        Args:
            eps: the noise of x_n, [B, C, H, W].
            eps_pred: the noise [B, C, H, W] that the loop's own call predicted at (x_n, n). Only
                the other rows are then evaluated here.
            noise: [K-1, B, C, H, W], the noises of the other positions, ascending.
            eps_model, x0, n, anchor, generator, model_kwargs: as for a call of the loss.
        """
        if eps_pred is not None and self.input_perturbation:
            raise ValueError("eps_pred must be None with input_perturbation, which changes x_n")
        n = check_steps(n, len(x0), self.schedule.N)
        time = n.to(x0.device, non_blocking=True)
        call = PlainCall(eps_model, self._noised(x0, time, eps), time, model_kwargs)
        if eps_pred is not None:
            call = MadeCall(eps_model, call.x, time, model_kwargs, eps_pred)
        asked = self.around(call, x0, n, eps, anchor=anchor, noise=noise, generator=generator)
        return asked.terms()[:2]

    def around(
        self,
        call: HostCall,
        x0: Tensor,
        n: Tensor,
        eps: Tensor,
        *,
        anchor: Tensor | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Asked:
        """Make a host's own network call, and those of the windows around its (x_n, n).

        With ``backprop="all"`` and ``stack`` the other rows ride behind the host's in its call.
        Else their calls come before it. Arguments as for ``sa_term``.
        """
        self._range_seen = check_images(x0, self._range_seen, wait=noise is None)
        window = self._window(check_steps(n, len(x0), self.schedule.N), anchor, generator)
        levels = call.levels
        eps = self._noises(window, x0, noise, generator, eps, levels)
        inputs = self._perturbed(eps, generator)
        others = self._noised(x0, window.steps[1:], inputs[1:], levels)
        if self.input_perturbation:
            own = self._noised(x0, window.steps[0], inputs[0], levels)
            call = replace(call, x=own.to(call.x.dtype))
        answers = self._ask(call, others, window.steps)
        return Asked(answers[0].first(), self, window, eps, answers)

    def _steps(self, batch: int, generator: torch.Generator | None) -> Tensor:
        """Steps [batch], each uniform on 1..N by itself, on the generator's device (none: CPU)."""
        N, device = self.schedule.N, None if generator is None else generator.device
        if self.stratified:  # of batch * N places, `batch` belong to a step and N to a part
            offsets = torch.randint(N, (batch,), generator=generator, device=device)
            places = torch.arange(batch, device=device) * N + offsets
            order = torch.randperm(batch, generator=generator, device=device)
            return (places // batch + 1)[order]
        count = (batch + 1) // 2 if self.antithetic else batch
        n = torch.randint(1, N + 1, (count,), generator=generator, device=device)
        return torch.cat([n, N + 1 - n])[:batch] if self.antithetic else n

    def _window(
        self, n: Tensor, anchor: Tensor | None, generator: torch.Generator | None
    ) -> Window:
        """The windows around steps n [B], on n's device."""
        N = self.schedule.N
        if n.device not in self._tau:
            self._tau[n.device] = self._tau[torch.device("cpu")].to(n.device)
        tau = self._tau[n.device]
        if self.lam == 0:  # the own row alone
            return down(torch.zeros_like(tau), 1, n, n, None)
        if anchor is None:
            anchor = draw_anchor(self.window, self.backprop, N, self.K, n, generator)
        else:
            check_anchor(self.window, self.backprop, self.K, n, anchor)
        j = None if self.backprop == "all" else (anchor - n).abs()
        window = WINDOWS[self.window](tau, self.K, n, anchor, j)
        return window.relative() if self.tau.relative else window

    def _noises(
        self,
        window: Window,
        x0: Tensor,
        noise: Tensor | None,
        generator: torch.Generator | None,
        own: Tensor | None = None,
        levels: Levels | None = None,
    ) -> Tensor:
        """eps [K, B, ...] of the rows; ``own`` is row 0's where it is known."""
        known = int(own is not None)
        count = (1 if self.noise == "shared" else len(window.steps)) - known
        if noise is None:
            draws = draw(count, x0, generator)
        else:
            draws = noise[:count] if self.lam == 0 else noise
            check_shape_of("noise", draws, (count, *x0.shape))
            if "noise" not in self._noise_seen:
                self._check_noise("noise", draws)
            if self.backprop == "one" and count + known > 1:  # from positions to rows
                index = window.positions[known:]
                index = expand(index - (index > window.positions[0]) * known, draws)
                draws = draws.gather(0, index.to(x0.device).expand_as(draws))
        if own is not None:
            if "eps" not in self._noise_seen:
                self._check_noise("eps", own)
            draws = torch.cat([own.detach()[None], draws])
        return NOISES[self.noise](draws, window, levels or self._coefficients)

    def _check_noise(self, name: str, noise: Tensor) -> None:
        """ValueError for noise that is not finite; called in the first evaluation alone."""
        check_finite(name, noise)
        self._noise_seen.add(name)

    def _perturbed(self, eps: Tensor, generator: torch.Generator | None) -> Tensor:
        """eps + gamma xi [K, B, ...], with which the network's inputs are made."""
        if not self.input_perturbation:
            return eps
        return eps + self.input_perturbation * draw(len(eps), eps[0], generator)

    def _noised(
        self, x0: Tensor, steps: Tensor, eps: Tensor, levels: Levels | None = None
    ) -> Tensor:
        """x_s = sqrt(cum_alpha_s) x_0 + sqrt(cum_beta_s) eps_s, in x_0's dtype."""
        a, b = (levels or self._coefficients)(steps, eps)
        return (a * x0 + b * eps).to(x0.dtype)

    def _ask(self, call: HostCall, others: Tensor, steps: Tensor) -> list[Answer]:
        """The network's answers for all rows, own first: which rows share a call, and when."""
        if self.backprop == "all" and self.stack and call.rides and len(others) > 0:
            return [call.together(others, steps)]
        # The other rows come first: without a graph they then need no memory beside the own one's.
        kind, size = others.device.type, max(len(others), 1) if self.stack else 1
        parts = zip(others.split(size), steps[1:].split(size), strict=True)
        with nullcontext() if self.backprop == "all" else without_graph(kind, self.extra_precision):
            answers = [call.others(*part) for part in parts if len(others) > 0]
        return [call.own(steps[0]), *answers]

    def _terms(self, window: Window, e: Tensor) -> tuple[Tensor, Tensor]:
        """(L_simple, L_sa) per sample [B] from the errors e [K, B, ...]."""

        def on(weights: Tensor) -> Tensor:
            return weights.to(e.device, e.dtype, non_blocking=True)

        simple = self._norm2(e[0])
        if self.reuse and window.shares is not None:
            simple = (on(window.shares) * self._norm2(e, 2)).sum(0)
        sa = self._norm2(window_gap(on(window.weights), e))
        if window.value_scale is not None:
            fixed = sa.detach()
            sa = on(window.value_scale) * fixed + window.gradient_scale * (sa - fixed)
        return simple, sa

    def _norm2(self, e: Tensor, batch: int = 1) -> Tensor:
        """|e|^2 over the dimensions behind the first ``batch``, by the loss's reduction."""
        squares = e.square().flatten(batch)
        return squares.sum(-1) if self.reduction == "sum" else squares.mean(-1)


def _errors(answers: list[Answer], eps: Tensor) -> Tensor:
    """e_s = f(x_s, s) - eps_s [K, B, ...], in at least float32."""
    eps = eps.float() if eps.dtype.itemsize < 4 else eps
    e, first = [], 0
    for a in answers:
        f = a.call.eps_of(a.output, a.x, a.steps.flatten()).unflatten(0, a.steps.shape)
        e.append(f - eps[first : first + len(f)])
        first += len(f)
    return torch.cat(e) if len(e) > 1 else e[0]


def window_gap(weights: Numeric, errors: Numeric) -> Numeric:
    """sum_s w_s e_s over a window, [B, ...], for arrays of any library.

    Args:
        weights: tau_s / K, [K, B]; zero for a step that does not count.
        errors: e_s, [K, B, ...].
    """
    return (weights.reshape((*weights.shape, *[1] * (errors.ndim - 2))) * errors).sum(0)


def sequence_aware_loss(
    model: Callable[..., Tensor],
    x0: Tensor,
    t: Tensor,
    e: Tensor,
    b: Tensor,
    num_consecutive_steps: int = 2,
    lamda: float = 1.0,
    *,
    noises: Tensor | None = None,
) -> Tensor:
    """Drop-in for the published code's loss of the same name: a scalar to differentiate.

    Args:
        model: (x [M, C, H, W], t float32 [M] counted from 0) -> eps [M, C, H, W].
        x0: clean images [B, C, H, W] in [-1, 1].
        t: steps [B] counted from 0.
        e: noise of step t [B, C, H, W].
        b: betas of the steps 1..T, length T.
        num_consecutive_steps: K.
        lamda: lambda; it may change from call to call.
        noises: noises of the steps t-1, ..., t-K+1, [K-1, B, C, H, W]; drawn if not given.

    Returns:
        mean_B |e_t|^2 + lamda mean_B |(1/K) sum_k e_{t-k}|^2, sums over an image's dimensions. The
        window's rows are evaluated in one call.

    Raises:
        ValueError: as ``SALoss``.
    """
    check_non_negative("lamda", lamda)
    loss = _loss_of(b, num_consecutive_steps if lamda else 1)
    if noises is not None:
        check_shape_of("noises", noises, (num_consecutive_steps - 1, *x0.shape))
        noises = noises[: loss.K - 1]
    n = torch.as_tensor(t) + 1
    simple, sa = loss.sa_term(lambda x, n: model(x, (n - 1).float()), x0, n, e, noise=noises)
    return simple.mean() + lamda * sa.mean()


# By the tensor of betas: what a training hands in at every step keeps its tables on the device.
_losses = WeakTensorKeyDictionary()


def _loss_of(b: Tensor, K: int) -> SALoss:
    version, loss = _losses.get(b, (None, None)) if isinstance(b, Tensor) else (None, None)
    if loss is None or (version, loss.K) != (b._version, K):
        betas = torch.as_tensor(b).detach().double().cpu().numpy()
        loss = SALoss(NoiseSchedule.from_betas(betas), K)
        if isinstance(b, Tensor):
            _losses[b] = b._version, loss
    return loss
