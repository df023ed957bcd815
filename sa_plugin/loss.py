r"""The sequence-aware (SA) loss of arXiv 2312.12431, for any noise network::

    L = L_simple + lambda L_sa
    L_simple = mean_B |e_t|^2,   L_sa = mean_B |(1/K) sum_{s in window} tau_s e_s|^2,
    e_s = f(x_s, s) - eps_s,     x_s = sqrt(cum_alpha_s) x_0 + sqrt(cum_beta_s) eps_s.

L_simple shares its network call with the window: SA-K costs K calls, never K+1.
"""

from __future__ import annotations

import warnings
import weakref
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from sa_plugin import noise as noises_of
from sa_plugin._calls import EpsModel, Rows, errors
from sa_plugin._checks import check_choice, check_non_negative, check_whole
from sa_plugin._tensors import DeviceTables, expand
from sa_plugin.schedule import NoiseSchedule
from sa_plugin.steps import draw_steps
from sa_plugin.tau import TauTable
from sa_plugin.window import BACKPROPS, WINDOWS, WindowPlan, WindowPlanner, check_anchor, window_gap

REDUCTIONS = ("sum", "mean")
EXTRA_PRECISIONS = ("same", "bf16")
FAR_OUTSIDE = 1.5  # |x_0| beyond this is taken for data that was not scaled to [-1, 1]


@dataclass(frozen=True)
class Window:
    """The windows of a batch: their plan, and the network inputs of their rows.

    Row 0 is L_simple's own step; the rest are the others, in the order of evaluation.
    """

    plan: WindowPlan
    rows: Rows


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


class SALoss:
    """L_simple + lambda L_sa; a callable without parameters of its own.

    Args:
        schedule: the forward process, steps 1..N.
        K: steps in a window, 1..N.
        lam: lambda >= 0; 0 is the plain loss with one network call.
        weighting: tau, see ``TauTable``: "uniform" (the published code), "theorem1", "relative" or
            an array [N+1].
        window: "down" (t, t-1, ..., t-K+1; the published code) or "paper" (starts uniform on
            1-K..N, upward, tau zero outside 2..N; Theorem 2's constants hold for this one).
        noise: "independent" eps at each step, "shared" (one eps a window) or "chain" (the window's
            x_s lie on one forward chain).
        backprop: "all" differentiates every call; "one" differentiates L_simple's call alone, at a
            position drawn uniformly, with the gradient scaled to stay unbiased: the price of one
            training step and K-1 forward passes.
        stack: evaluate a window's calls as one batch of up to K*B rows, or in series.
        reduction: "sum" or "mean" over an image's dimensions, for both terms.
        antithetic: draw steps in pairs t, N+1-t.
        stratified: draw one step from each of B equal parts of 1..N; each is uniform by itself, the
            batch's mean varies less.
        reuse: estimate L_simple from every call of the window, not from the one at t alone:
            unbiased, less variance, no further call. For ``backprop="all"``: under "one" the other
            calls have no gradient.
        extra_precision: of the calls without a graph under ``backprop="one"``: "same", or "bf16" by
            autocast, whose rounding enters the gradient (docs/training.md).

    Raises:
        ValueError: a bad argument, named with its value and what is allowed.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        K: int = 2,
        lam: float = 1.0,
        weighting: str | ArrayLike = "uniform",
        window: str = "down",
        noise: str = "independent",
        backprop: str = "all",
        stack: bool = True,
        reduction: str = "sum",
        *,
        antithetic: bool = False,
        stratified: bool = False,
        reuse: bool = False,
        extra_precision: str = "same",
    ) -> None:
        check_whole("K", K, 1, schedule.N)
        check_non_negative("lam", lam)
        check_choice("window", window, WINDOWS)
        check_choice("noise", noise, noises_of.NOISES)
        check_choice("backprop", backprop, BACKPROPS)
        check_choice("reduction", reduction, REDUCTIONS)
        check_choice("extra_precision", extra_precision, EXTRA_PRECISIONS)
        if antithetic and stratified:
            raise ValueError("antithetic and stratified exclude each other, got True for both")
        if reuse and backprop != "all":
            raise ValueError(f"reuse=True needs backprop='all', got backprop={backprop!r}")
        if extra_precision != "same" and backprop != "one":
            raise ValueError(
                f"extra_precision={extra_precision!r} needs backprop='one', got {backprop!r}: with "
                "'all' every call is differentiated"
            )
        self.schedule = schedule
        self.K = int(K)
        self.lam = float(lam)
        self.noise = noise
        self.backprop = backprop
        self.stack = bool(stack)
        self.reduction = reduction
        self.antithetic = bool(antithetic)
        self.stratified = bool(stratified)
        self.reuse = bool(reuse)
        self.extra_precision = extra_precision
        self.tau = TauTable(schedule, weighting)
        self._planner = WindowPlanner(self.tau, self.K, window, backprop, self.reuse)
        self._tables = DeviceTables(
            signal=schedule.cum_alphas**0.5,
            sigma=schedule.cum_betas**0.5,
            correlation=noises_of.neighbour_correlation(schedule),
        )
        self._range_checked = False

    def __call__(
        self,
        eps_model: EpsModel,
        x0: Tensor,
        *,
        n: Tensor | None = None,
        noise: Tensor | None = None,
        anchor: Tensor | None = None,
        generator: torch.Generator | None = None,
        **model_kwargs: Any,
    ) -> SALossOutput:
        """Evaluate the loss; whatever randomness is not handed in is drawn.

        Args:
            eps_model: (x [M, C, H, W], n int64 [M] in 1..N, **model_kwargs) -> eps [M, C, H, W].
            x0: clean images [B, C, H, W] in [-1, 1].
            n: L_simple's steps t, integers [B] in 1..N.
            noise: [K, B, C, H, W], entry k for position k of the window (step t-k with the default
                window); [1, B, C, H, W] with ``noise="shared"`` or lambda zero.
            anchor: first steps of the windows [B]; see ``sa_plugin.window``.
            generator: source of all draws, else torch's global one. Steps are drawn on its device,
                by default the CPU, where planning them stalls no accelerator.
            **model_kwargs: handed to the network; tensors of length B follow their rows.

        Raises:
            ValueError: wrong shapes or ranges, or a network that returns another shape.
        """
        self._check_images(x0)
        if n is None:
            kinds = {"antithetic": self.antithetic, "stratified": self.stratified}
            n = draw_steps(self.schedule.N, len(x0), generator, **kinds)
        else:
            n = self._check_steps(n, x0)
        plan = self._plan(n, anchor, generator)
        window = self._noised(plan, x0, self._draws(plan, x0, noise, generator))
        simple, sa = self._evaluate(eps_model, window, model_kwargs)
        total = simple.mean() + self.lam * sa.mean()
        return SALossOutput(total, simple.mean(), sa.mean(), n, simple, sa)

    def sa_term(
        self,
        eps_model: EpsModel,
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

        Where such a loop has made L_simple's call already it hands in ``eps_pred`` [B, C, H, W],
        what the network said of eps [B, C, H, W] at (x_n, n), and the window's other K-1 calls are
        added. Without it all K are made here: as one batch, or under ``backprop="one"`` first those
        without a graph, which then need no memory beside it. ``noise`` [K-1, B, C, H, W] holds the
        draws of the other positions, ascending.
        """
        window = self.prepare(x0, n, eps, anchor=anchor, noise=noise, generator=generator)
        if eps_pred is None:
            return self._evaluate(eps_model, window, model_kwargs)
        others = self.other_errors(eps_model, window, model_kwargs)
        return self.terms(window, eps_pred - eps, others)

    def prepare(
        self,
        x0: Tensor,
        n: Tensor,
        eps: Tensor,
        *,
        anchor: Tensor | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Window:
        """The windows around steps n [B] with noise eps; arguments as for ``sa_term``.

        With ``other_errors`` and ``terms`` the parts of ``sa_term``, for who has L_simple's call
        made in between, or the others' rows within it.
        """
        self._check_images(x0)
        n = self._check_steps(n, x0)
        plan = self._plan(n, anchor, generator)
        rest = noises_of.draws_needed(self.noise, len(plan.steps)) - 1
        if noise is None:
            noise = noises_of.draw(rest, x0, generator)
        elif self.lam == 0:
            noise = noise[:rest]  # of a full window, of which nothing is needed
        self._check_noise(noise, rest, x0)
        return self._noised(plan, x0, torch.cat([eps.detach()[None], noise]))

    @property
    def in_one_call(self) -> bool:
        """Whether the window's other rows belong into L_simple's own call, with its graph."""
        return self.backprop == "all" and self.stack

    def other_errors(
        self, eps_model: EpsModel, window: Window, model_kwargs: dict[str, Any]
    ) -> Tensor:
        """e of the rows beside L_simple's, [K-1, B, C, H, W]; without a graph where "one"."""
        rows = window.rows[1:]
        if len(rows) == 0:
            return rows.eps
        if self.backprop == "all":
            return errors(eps_model, rows, model_kwargs, self.stack)
        with torch.no_grad(), self._extra_autocast(rows.x.device):
            return errors(eps_model, rows, model_kwargs, self.stack)

    def terms(self, window: Window, own: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
        """(L_simple, L_sa) per sample [B] from e of L_simple's row and of the others."""
        plan = window.plan
        return self._simple(plan, own, others), self._combine(plan, own, others)

    def _evaluate(
        self, eps_model: EpsModel, window: Window, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """``terms`` by all calls of the window."""
        if self.backprop == "all":
            all_errors = errors(eps_model, window.rows, kwargs, self.stack)
            return self.terms(window, all_errors[0], all_errors[1:])
        # First those without a graph: they need no memory beside it then.
        others = self.other_errors(eps_model, window, kwargs)
        own = errors(eps_model, window.rows[:1], kwargs, self.stack)[0]
        return self.terms(window, own, others)

    def _plan(
        self, n: Tensor, anchor: Tensor | None, generator: torch.Generator | None
    ) -> WindowPlan:
        if self.lam == 0:
            return self._planner.plain(n)
        if anchor is not None and not torch.compiler.is_compiling():
            check_anchor(anchor, n, self._planner)
        return self._planner.plan(n, anchor, generator)

    def _draws(
        self,
        plan: WindowPlan,
        x0: Tensor,
        noise: Tensor | None,
        generator: torch.Generator | None,
    ) -> Tensor:
        count = noises_of.draws_needed(self.noise, len(plan.steps))
        if noise is None:
            return noises_of.draw(count, x0, generator)
        if self.lam == 0:
            noise = noise[:1]  # position 0 of a full window, or just that
        self._check_noise(noise, count, x0)
        return noises_of.rows_from_positions(self.noise, noise, plan)

    def _noised(self, plan: WindowPlan, x0: Tensor, draws: Tensor) -> Window:
        eps = noises_of.complete(self.noise, draws, plan, self._tables.get("correlation", x0))
        steps = plan.steps.to(x0.device, non_blocking=True)
        signal, sigma = (self._tables.get(name, x0)[steps] for name in ("signal", "sigma"))
        x = expand(signal, eps) * x0 + expand(sigma, eps) * eps
        return Window(plan, Rows(x.to(x0.dtype), eps, plan.steps, plan.needed))

    def _extra_autocast(self, device: torch.device) -> AbstractContextManager[None]:
        kind = device.type
        if self.extra_precision == "bf16":
            dtype = torch.bfloat16
        elif device.type != "meta" and torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        else:
            return nullcontext()
        # Without its cache of cast weights: what is cast here may have no graph (PyTorch 2.6), or,
        # by an autocast around this one, another precision.
        return torch.autocast(kind, dtype, cache_enabled=False)

    def _simple(self, plan: WindowPlan, own: Tensor, others: Tensor) -> Tensor:
        """L_simple per sample [B], from the own call or from all of the window."""
        if not self.reuse or len(others) == 0:
            return self.squares(own)
        squares = torch.stack([self.squares(error) for error in (own, *others)])
        shares = plan.simple_weights.to(squares.device, squares.dtype, non_blocking=True)
        return (shares * squares).sum(0)

    def _combine(self, plan: WindowPlan, own: Tensor, others: Tensor) -> Tensor:
        """L_sa per sample [B]: the value of one scale, the gradient of another (see window.py)."""
        if self.lam == 0:
            return torch.zeros(len(own), device=own.device, dtype=own.dtype)
        weights = (plan.weights / self.K).to(own.device, own.dtype, non_blocking=True)
        term = self.squares(window_gap(weights, own, others))
        if self.backprop == "all":
            return term
        value_scale = plan.value_scale.to(term.device, term.dtype, non_blocking=True)
        gradient_scale = plan.gradient_scale.to(term.device, term.dtype, non_blocking=True)
        return value_scale * term.detach() + gradient_scale * (term - term.detach())

    def squares(self, error: Tensor) -> Tensor:
        """|e|^2 of each sample [B], by the loss's reduction, in at least float32."""
        squares = error.float().square() if error.dtype.itemsize < 4 else error.square()
        squares = squares.flatten(1)
        return squares.sum(1) if self.reduction == "sum" else squares.mean(1)

    def _check_images(self, x0: Tensor) -> None:
        if x0.ndim < 2 or not x0.is_floating_point():
            raise ValueError(
                f"x0 must be floating-point images [B, C, H, W], got {x0.dtype} {tuple(x0.shape)}"
            )
        if self._range_checked or torch.compiler.is_compiling():
            return
        if x0.numel() == 0 or x0.is_meta:  # no values to look at
            return
        self._range_checked = True  # once: the check stalls an accelerator
        low, high = x0.detach().aminmax()
        if max(-low.item(), high.item()) > FAR_OUTSIDE:
            warnings.warn(
                f"x0 ranges over [{low.item():.4g}, {high.item():.4g}]; the loss and the sampler "
                "expect images scaled to [-1, 1]",
                stacklevel=3,
            )

    def _check_steps(self, n: Tensor, x0: Tensor) -> Tensor:
        n = torch.as_tensor(n)
        if n.shape != x0.shape[:1] or n.is_floating_point() or n.dtype == torch.bool:
            raise ValueError(
                f"n must be integers of shape ({len(x0)},), got {n.dtype} {tuple(n.shape)}"
            )
        # Steps on an accelerator are taken at their word: looking at them would stall it.
        can_look = n.device.type == "cpu" and len(n) > 0 and not torch.compiler.is_compiling()
        if can_look and not (n.min() >= 1 and n.max() <= self.schedule.N):
            raise ValueError(
                f"n must lie in 1..{self.schedule.N}, got {n.min().item()}..{n.max().item()}; "
                "codes that count from 0 pass t + 1"
            )
        return n.long()

    def _check_noise(self, noise: Tensor, count: int, x0: Tensor) -> None:
        if noise.shape != (count, *x0.shape):
            raise ValueError(
                f"noise must have shape {(count, *x0.shape)}, got {tuple(noise.shape)}"
            )


def sequence_aware_loss(
    model: EpsModel,
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
        model: (x [M, C, H, W], t [M] counted from 0) -> eps [M, C, H, W].
        x0: clean images [B, C, H, W] in [-1, 1].
        t: steps [B] counted from 0.
        e: noise of step t [B, C, H, W].
        b: betas of the steps 1..T, length T.
        num_consecutive_steps: K.
        lamda: lambda.
        noises: noises of the steps t-1, ..., t-K+1, [K-1, B, C, H, W]; drawn if not given.

    Returns:
        mean_B |e_t|^2 + lamda mean_B |(1/K) sum_k e_{t-k}|^2, sums over an image's dimensions. The
        window's calls are stacked into one.
    """
    loss = _loss_for(b, num_consecutive_steps, lamda)
    rest = loss.K - 1 if loss.lam > 0 else 0
    if noises is None:
        noises = noises_of.draw(rest, x0, None)
    n = torch.as_tensor(t) + 1
    draws = torch.cat([e[None], noises[:rest]])
    return loss(lambda x, n: model(x, n - 1), x0, n=n, noise=draws).total


# One training run hands in one tensor of betas: its loss (tables on the device) is kept.
_kept_losses: dict[tuple[int, float], tuple[weakref.ref[Tensor], int, SALoss]] = {}


def _loss_for(b: Tensor, K: int, lam: float) -> SALoss:
    kept = _kept_losses.get((K, lam))
    if kept is not None:
        reference, version, loss = kept
        if reference() is b and version == b._version:
            return loss
    betas = torch.as_tensor(b).detach().double().cpu().numpy()
    loss = SALoss(NoiseSchedule.from_betas(betas), K=K, lam=lam)
    if isinstance(b, Tensor):
        _kept_losses[(K, lam)] = (weakref.ref(b), b._version, loss)
    return loss
