r"""What the SA loss does to a network, done to any noise network while sampling: no training.

With a = cum_alpha_n, b = cum_beta_n, the data's mean mu and its variance s along a direction, the
SA loss of strength q moves the exact noise network of Gaussian data from sqrt(b) (x - sqrt(a) mu) /
(a s + b) to sqrt(b) (x - sqrt(a) mu) / ((1 + q) a s + b): the exact network of data with the
variance (1 + q) s. It is derived in docs/why_sa_works.md. The two wrappers do the same:

- ``SpectralShrinkage`` multiplies eps by 1 / (1 + q a s / (a s + b)) along each direction: epsilon
  scaling (arXiv 2308.15321) by step and by direction. Exact for Gaussian data.
- ``ShiftedNoise`` asks the network at another step and for a scaled image. It is the exact network
  of the data inflated about mu by sqrt(1 + q), for data and networks of any kind.

``EpsilonScaling`` is their neighbour in the literature (arXiv 2308.15321): eps times a number for
each step, a constant, ``linear_factors`` or what ``NormMatching`` finds.

A wrapper takes (x [B, C, H, W], n int64 [B] in 1..N, ...) like the network that it wraps, and
returns what that network returns: eps, or the pair (eps, second output).

The second output of a pair belongs to the covariance of x_0 given x_t, and a corrected eps would
falsify it: SN's covariance is a multiple of second - eps^2. With ``second="own"`` the mean takes
the corrected eps, and the covariance stays what the network's own answer at (x, n) makes of it: for
"eps2" (SN) the second output becomes second + corrected eps^2 - own eps^2, and for "epsc" (NPR, and
any other that stands alone) it does not change. ``ShiftedNoise`` needs a second call for it. The
variance "analytic" takes Gamma, of the network without a wrapper. "heuristic" has no second output:
it takes the corrected eps. "probes" and "lanczos" differentiate the network that they are given,
the corrected one: under ``ShiftedNoise`` their covariance is that of the inflated data.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from sa_plugin._checks import check_choice, check_steps, real_array, table_by_step
from sa_plugin._execution import module_of
from sa_plugin._tensors import DeviceTables, expand
from sa_plugin.effect.chains import best_strength
from sa_plugin.effect.spectrum import Spectrum
from sa_plugin.schedule import FloatArray, NoiseSchedule

SECONDS = ("own", "shifted")
SECOND_IS = ("eps2", "epsc", "ocm")


class _Correction(ABC):
    """What all have in common: checks, and the second output.

    A subclass sets ``_acts``, False for one that changes nothing.
    """

    _acts = True

    def __init__(
        self,
        model: Callable[..., Any],
        schedule: NoiseSchedule,
        second: str,
        second_is: str | None,
    ) -> None:
        if not isinstance(schedule, NoiseSchedule):
            raise ValueError(f"schedule must be a NoiseSchedule, got {type(schedule).__name__}")
        check_choice("second", second, SECONDS)
        if second_is is not None:
            check_choice("second_is", second_is, SECOND_IS)
        self.model = module_of(model) or model
        self.schedule = schedule
        self._network = model
        self._keeps_own = second == "own"
        self._second_is = second_is

    def __call__(self, x: Tensor, n: Tensor, **kwargs: Any) -> Any:
        """Corrected eps [B, C, H, W], or the pair (eps, second output).

        Args:
            x: x_n [B, C, H, W].
            n: steps [B] in 1..N, which may differ.
            kwargs: go to every call of the network.

        Raises:
            ValueError: steps outside 1..N, images of another shape, a pair where none was
                announced or the other way round.
        """
        n = check_steps(n, len(x), self.schedule.N).to(x.device, non_blocking=True)
        self._check(x)
        if not self._acts:
            return self._network(x, n, **kwargs)
        return self._corrected(x, n, kwargs)

    @abstractmethod
    def _check(self, x: Tensor) -> None: ...

    @abstractmethod
    def _corrected(self, x: Tensor, n: Tensor, kwargs: dict[str, Any]) -> Any: ...

    def _split(self, output: Any, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(eps, second); ValueError unless a pair is returned just where it was announced.

        Within autocast eps has half the precision of x. It gets x's: a factor near 1 would be
        rounded away.
        """
        is_pair = isinstance(output, tuple | list)
        if is_pair and (len(output) != 2 or (self._second_is is None and self._keeps_own)):
            raise ValueError(
                f"the network returned {len(output)} outputs; for (eps, second output) say which "
                f"by second_is, one of {SECOND_IS}"
            )
        if not is_pair and self._second_is is not None:
            raise ValueError(
                f"second_is={self._second_is!r} needs a network that returns the pair (eps, "
                f"second output), got {type(output).__name__}"
            )
        eps, second = (output[0], output[1]) if is_pair else (output, None)
        return eps.to(torch.promote_types(eps.dtype, x.dtype)), second

    def _answer(self, eps: Tensor, own: Tensor, second: Tensor | None) -> Any:
        """Corrected eps; beside it a second output, if any, which may keep the own covariance."""
        if second is None:
            return eps
        if not self._keeps_own or self._second_is != "eps2":
            return eps, second
        # At least float32: half precision would lose the difference that the covariance is.
        dtype = torch.promote_types(torch.promote_types(eps.dtype, second.dtype), torch.float32)
        own, second = own.to(dtype), second.to(dtype)
        return eps, (second - own * own) + eps.to(dtype) ** 2


class SpectralShrinkage(_Correction):
    """eps times 1 / (1 + q a s / (a s + b)), by step and by direction of a spectrum.

    The factors do not depend on x. They act on eps as it is: the network's eps of the image
    sqrt(a) mu, zero for Gaussian data, is taken as zero. Epsilon scaling: arXiv 2308.15321; these
    factors: derived in docs/why_sa_works.md. With q = 0 the result is the network's, bit for bit.

    Args:
        model: network (x, n, ...) -> eps or (eps, second output).
        schedule: the forward process, of N steps.
        spectrum: of the data that the network was trained on; its ``variances`` are s.
        q: strength >= 0, a number or a table [N+1] by step (entry 0 is not used). "best": the
            ``best_strength`` of the spectrum for a chain.
        second: "own": the covariance stays the network's own. "shifted": the second output is
            returned as it is, beside the corrected eps. Neither costs a call.
        second_is: what the network's second output is, "eps2" (SN) or "epsc" (NPR, or another that
            stands alone); None for a network that returns eps alone.
        chain: with q="best", what the chain is: ``steps``, ``forward``, ``eta``, ``variance``,
            ``trajectory``, ``avg_cov``, as for ``best_strength``.

    Attributes:
        model: the module behind the network, or the network.
        q: float64 [N+1].

    Raises:
        ValueError: q negative, not finite or of another length; an unknown option.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        schedule: NoiseSchedule,
        spectrum: Spectrum,
        q: float | ArrayLike | Literal["best"],
        *,
        second: str = "own",
        second_is: str | None = None,
        **chain: Any,
    ) -> None:
        super().__init__(model, schedule, second, second_is)
        if not isinstance(spectrum, Spectrum):
            raise ValueError(f"spectrum must be a Spectrum, got {type(spectrum).__name__}")
        self.spectrum = spectrum
        self.q = _strengths(q, schedule, spectrum, second, chain)
        self._acts = bool(self.q.any())
        # 1 - factor = share s / (s + level): what is taken away, exactly 0 at q = 0.
        level = schedule.cum_betas / schedule.cum_alphas / (1 + self.q)
        level[0] = 1.0  # of no step
        self._tables = DeviceTables(
            share=self.q / (1 + self.q), level=level, variances=spectrum.variances
        )

    def _check(self, x: Tensor) -> None:
        self.spectrum.check(x)

    def _corrected(self, x: Tensor, n: Tensor, kwargs: dict[str, Any]) -> Any:
        own, second = self._split(self._network(x, n, **kwargs), x)
        eps = own - self.spectrum.apply(own, self._removed(n, own))
        return self._answer(eps, own, second)

    def _removed(self, n: Tensor, like: Tensor) -> Tensor:
        """1 - factor, [B, D]."""
        share, level = (self._tables.get(name, like)[n, None] for name in ("share", "level"))
        s = self._tables.get("variances", like)
        return s / (s + level) * share


class ShiftedNoise(_Correction):
    """The network of the data inflated about their mean by sqrt(1 + q): another step, one call.

        f_q(x, n) = f((x + (sqrt(1 + q) - 1) sqrt(a) mu) / sqrt(1 + q a), n'),
        SNR(n') = (1 + q) SNR(n), SNR = a / b

    It holds for data and networks of any kind: the input has the marginal that step n' was trained
    on if x_n is of the inflated data. Derived in docs/why_sa_works.md. With q = 0 the result is the
    network's, bit for bit.

    The requested SNR lies between two steps. By default the nearest whole step n' in log SNR is
    asked, and the q that it stands for, ``reached[n]`` = SNR(n') / SNR(n) - 1, takes q's place in
    the input, too. So the input's marginal is exact and q is approximate: log(1 + reached) and
    log(1 + q) differ by at most half of the distance in log SNR of neighbouring steps. In early
    steps, where neighbours are far apart (about 2 / n), that may be no shift at all.
    With ``fractional`` the network is asked at n' itself and ``reached`` is q.
    Both stop at step 1: an SNR beyond it, cleaner than the schedule has, is asked at step 1, with
    the q that this stands for. Step 1 itself is therefore never corrected.

    Args:
        model: network (x, n, ...) -> eps or (eps, second output).
        schedule: the forward process, of N steps.
        q: strength >= 0, a number or a table [N+1] by step (entry 0 is not used). "best": the
            ``best_strength`` of the spectrum for a chain.
        mean: mu, in units of x_0: a number, an image [C, H, W], or a ``Spectrum``, whose mean it is
            (for q="best").
        fractional: the network takes steps between whole numbers, [B] in float64 for a float64 x
            and else in float32: log SNR is linear between neighbouring steps.
        second: "own": the covariance comes from a second call, f(x, n), which is made wherever
            ``second_is`` is given. "shifted": both outputs come from the corrected call, and the
            covariance is that of the inflated data.
        second_is, chain: as for ``SpectralShrinkage``.

    Attributes:
        model: the module behind the network, or the network.
        q: float64 [N+1], as requested.
        reached: float64 [N+1], the q that each step gets; entry 0 is 0.
        steps: [N+1], the steps n' that the network is asked at; entry 0 is 0.

    Raises:
        ValueError: q negative, not finite or of another length; a mean that is not finite or of
            another shape than the images; an unknown option.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        schedule: NoiseSchedule,
        q: float | ArrayLike | Literal["best"],
        mean: float | Tensor | ArrayLike | Spectrum = 0.0,
        *,
        fractional: bool = False,
        second: str = "own",
        second_is: str | None = None,
        **chain: Any,
    ) -> None:
        super().__init__(model, schedule, second, second_is)
        self.q = _strengths(q, schedule, mean, second, chain)
        mu = _mean_of(mean.mean if isinstance(mean, Spectrum) else mean)
        self.steps, self.reached = _shift(schedule, self.q, fractional)
        self._acts = bool(self.reached.any())
        self._mean_shape = mu.shape
        self._moves = bool(mu.any())
        scale = (1 + self.reached * schedule.cum_alphas) ** -0.5
        offset = (np.sqrt(1 + self.reached) - 1) * np.sqrt(schedule.cum_alphas) * scale
        self._tables = DeviceTables(scale=scale, offset=offset, mean=mu, steps=self.steps)
        self._whole = None if fractional else torch.from_numpy(self.steps.copy())

    def _check(self, x: Tensor) -> None:
        if self._mean_shape and tuple(x.shape[1:]) != self._mean_shape:
            raise ValueError(
                f"mean must have the images' shape {tuple(x.shape[1:])}, got {self._mean_shape}"
            )

    def _corrected(self, x: Tensor, n: Tensor, kwargs: dict[str, Any]) -> Any:
        output = self._network(self._input(x, n), self._steps_of(n, x), **kwargs)
        eps, second = self._split(output, x)
        if second is None or not self._keeps_own:
            return output
        own, own_second = self._split(self._network(x, n, **kwargs), x)
        return self._answer(eps, own, second if own_second is None else own_second)

    def _input(self, x: Tensor, n: Tensor) -> Tensor:
        """(x + (sqrt(1 + q) - 1) sqrt(a) mu) / sqrt(1 + q a), in x's dtype."""
        moved = x * expand(self._tables.get("scale", x)[n], x)
        if self._moves:
            offset = expand(self._tables.get("offset", x)[n], x)
            moved = moved + offset * self._tables.get("mean", x)
        return moved.to(x.dtype)

    def _steps_of(self, n: Tensor, x: Tensor) -> Tensor:
        if self._whole is None:
            return self._tables.get("steps", x)[n]
        self._whole = self._whole.to(n.device)  # moved once
        return self._whole[n]


class EpsilonScaling(_Correction):
    """eps times a number for each step: epsilon scaling, arXiv 2308.15321.

    Args:
        model: network (x, n, ...) -> eps or (eps, second output).
        schedule: the forward process, of N steps.
        factors: > 0, a number or a table [N+1] by step (entry 0 is not used). That paper divides
            eps by its lambda_t: 1 / lambda_t.
        second, second_is: as for ``SpectralShrinkage``.

    Attributes:
        model: the module behind the network, or the network.
        factors: float64 [N+1].

    Raises:
        ValueError: a factor that is not > 0 and finite, or a table of another length.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        schedule: NoiseSchedule,
        factors: float | ArrayLike,
        *,
        second: str = "own",
        second_is: str | None = None,
    ) -> None:
        super().__init__(model, schedule, second, second_is)
        self.factors = table_by_step("factors", factors, schedule.N, number=True, least="> 0")
        self._tables = DeviceTables(factors=self.factors)

    def _check(self, x: Tensor) -> None:
        pass

    def _corrected(self, x: Tensor, n: Tensor, kwargs: dict[str, Any]) -> Any:
        own, second = self._split(self._network(x, n, **kwargs), x)
        eps = (own * expand(self._factors(own, n, kwargs), own)).to(own.dtype)
        return self._answer(eps, own, second)

    def _factors(self, own: Tensor, n: Tensor, kwargs: dict[str, Any]) -> Tensor:
        return self._tables.get("factors", own)[n]


def linear_factors(schedule: NoiseSchedule, k: float, c_0: float) -> FloatArray:
    """Factors 1 / (k n + c_0) of the steps n, [N+1]: the linear schedule of arXiv 2308.15321."""
    return np.append(1.0, 1 / (k * np.arange(1, schedule.N + 1) + c_0))


class NormMatching(EpsilonScaling):
    """Finds factors for ``EpsilonScaling`` while a chain is sampled with it.

    On a chain eps is longer than at training, exposure bias (arXiv 2308.15321, section 4). At each
    step the factor is the root mean square of eps on noised images over that on the chain, which
    the steps before have corrected. Sample one batch with this network; ``factors`` are then right
    for chains of the same steps and process::

        fit = NormMatching(network, schedule, images)
        Sampler(fit, schedule, steps=10).sample((500, 1, 8, 8), seed=1)
        scaled = EpsilonScaling(network, schedule, fit.factors)

    Args:
        model, schedule, second, second_is: as for ``EpsilonScaling``.
        images: x_0 [M, C, H, W], as in training.
        seed: of their noise.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        schedule: NoiseSchedule,
        images: Tensor,
        *,
        seed: int = 0,
        second: str = "own",
        second_is: str | None = None,
    ) -> None:
        super().__init__(model, schedule, 1.0, second=second, second_is=second_is)
        self._images = images
        self._generator = torch.Generator().manual_seed(seed)

    def _factors(self, own: Tensor, n: Tensor, kwargs: dict[str, Any]) -> Tensor:
        t = int(n[0])
        if not bool((n == t).all()):
            raise ValueError("all images must be at one step while factors are found")
        x0 = self._images.to(own)
        noise = torch.randn(x0.shape, generator=self._generator, dtype=torch.float64).to(own)
        steps = n[:1].expand(len(x0))
        a, b = self.schedule.cum_alphas[t], self.schedule.cum_betas[t]
        x = float(a**0.5) * x0 + float(b**0.5) * noise
        eps, _ = self._split(self._network(x, steps, **kwargs), x)
        self.factors[t] = (eps.square().mean() / own.square().mean()).sqrt().item()
        return torch.full_like(n, self.factors[t], dtype=torch.float64)


def _strengths(
    q: float | ArrayLike | Literal["best"],
    schedule: NoiseSchedule,
    spectrum: Any,
    second: str,
    chain: dict[str, Any],
) -> FloatArray:
    """q as a table [N+1] by step; entry 0 is 0.

    Raises:
        ValueError: another shape, a q that is negative or not finite; "best" without a spectrum, or
            options of a chain without "best".
    """
    if isinstance(q, str):
        check_choice("q", q, ("best",))
        if not isinstance(spectrum, Spectrum):
            raise ValueError(
                f"q='best' needs the data's Spectrum in place of the mean, got "
                f"{type(spectrum).__name__}"
            )
        variances = spectrum.variances[spectrum.variances > 0]
        rests_on = "exact" if second == "own" else "own"
        q = best_strength(schedule, variances, **{"rests_on": rests_on, **chain})
    elif chain:
        raise ValueError(f"{', '.join(chain)} belong to q='best', got q={q!r}")
    return table_by_step("q", q, schedule.N, number=True)


def _shift(
    schedule: NoiseSchedule, q: FloatArray, fractional: bool
) -> tuple[NDArray[Any], FloatArray]:
    """The steps n' (int64, or float64 if fractional) and the q that they stand for, [N+1]."""
    n, q = np.arange(1, schedule.N + 1), q[1:]
    log_snr = np.log(schedule.cum_alphas[1:]) - np.log(schedule.cum_betas[1:])
    # np.interp needs rising values: minus log SNR. It stops at the ends, 1 and N.
    steps = np.interp(-(log_snr + np.log1p(q)), -log_snr, n)
    steps = np.where(q > 0, steps, n)
    if fractional:
        reached = np.minimum(q, np.expm1(log_snr[0] - log_snr))
    else:
        steps = np.rint(steps).astype(np.int64)
        reached = np.expm1(log_snr[steps - 1] - log_snr)
    reached = np.where(steps == n, 0.0, np.maximum(reached, 0))
    return np.append(steps[:1] * 0, steps), np.append(0.0, reached)


def _mean_of(mean: float | Tensor | ArrayLike) -> FloatArray:
    """A number [] or an image [C, H, W] in float64, or ValueError."""
    values = real_array("mean", mean)
    if values.ndim not in (0, 3) or not np.isfinite(values).all():
        raise ValueError(f"mean must be a number or [C, H, W], and finite, got {values.shape}")
    return values
