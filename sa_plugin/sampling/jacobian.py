r"""Cov[x_0 | x_t] from the derivative of the noise network: no second output, no training.

With a = cum_alpha_n, b = cum_beta_n and J = d eps / d x_n at x_n (arXiv 2406.10808, Theorem 1)::

    Cov[x_0 | x_n] = b/a (I - sqrt(b) J)

It holds for the exact network, whose J is symmetric. The matrix is never formed: everything here
needs only its products with vectors, one derivative of the network each.

- ``covariance_times``: the product with one vector.
- ``probed_diagonal``: the diagonal, estimated from products with random signs.
- ``Probed``: the network with this estimate as its second output.
- ``lanczos_root``: the product of the square root with a vector, by a few steps of Lanczos.

A product comes from "vjp" (backward mode: J^T v; the graph of one call serves all vectors and takes
the memory of a training step), "jvp" (forward mode: J v, without a graph), or "difference" (two
calls around x_n). "auto" is the first of these that the network has rules for.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._pytree import tree_map_only

from sa_plugin._checks import check_choice, check_output, check_shape_of, check_steps, check_whole
from sa_plugin._execution import NetworkCall, module_of
from sa_plugin._tensors import Coefficients
from sa_plugin.prediction import PREDICTS, to_eps
from sa_plugin.sampling.reverse import ReverseCoefficients
from sa_plugin.schedule import NoiseSchedule

WAYS = ("vjp", "jvp", "difference")
MOST = 10_000  # derivatives at one x_n


def check_derived(variance: str, probes: int, lanczos_steps: int, avg_cov: bool) -> None:
    """ValueError unless the options of "probes" and "lanczos" are possible."""
    check_whole("probes", probes, 1, MOST)
    check_whole("lanczos_steps", lanczos_steps, 1, MOST)
    if variance == "lanczos" and avg_cov:
        raise ValueError("avg_cov must be False for variance 'lanczos': it has no diagonal")


class Remainder:
    """The matrix R = I - sqrt(b) J of one batch at x_n; Cov[x_0 | x_n] = b/a R for each image.

    Args:
        model: network (x [B, ...], n int64 [B], ...) -> eps, or a tuple whose first entry it is.
        schedule: the forward process, of N steps.
        x: x_n [B, ...], floating point. The network gets it in its own dtype.
        n: steps [B] in 1..N, which may differ.
        way: "auto", "vjp", "jvp" or "difference".
        predicts: what the network's first output is: "eps", "x0" or "v".
        kwargs: go to every call of the network.

    Attributes:
        way: how the products are made; "auto" until the first one.

    Raises:
        ValueError: unusable arguments; batch norm or dropout in training mode, which make an
            image's derivative a matter of the batch or of chance.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        schedule: NoiseSchedule,
        x: Tensor,
        n: Tensor,
        *,
        way: str = "auto",
        predicts: str = "eps",
        **kwargs: Any,
    ) -> None:
        check_choice("way", way, ("auto", *WAYS))
        check_choice("predicts", predicts, PREDICTS)
        if not x.is_floating_point():
            raise ValueError(f"x must be floating point, got {x.dtype}")
        check_derivable(model)
        self.way = way
        with torch.inference_mode(False):
            self._model, self._kwargs = model, tree_map_only(Tensor, _usable, kwargs)
            self._x = _usable(x).detach()
            self._n = _usable(check_steps(n, len(x), schedule.N).to(x.device))
            self._a, self._b = Coefficients(schedule)(self._n, self._x)
        self._predicts = predicts
        self._output: Tensor | None = None
        self._graph: tuple[Tensor, Tensor] | None = None

    @property
    def output(self) -> Tensor:
        """The network's first output at x_n, [B, ...]; derivatives find it on their way."""
        if self._output is None:
            with torch.no_grad():
                self._output = self._first(self._x)
        return self._output

    def times(self, v: Tensor) -> Tensor:
        """R v, or R^T v by "vjp", for one vector an image: [B, ...] to [B, ...].

        Raises:
            ValueError: v has another shape than x; the network has no rule for the ``way``.
        """
        check_shape_of("v", v, self._x.shape)
        v = v.to(self._x)
        product = self._with_rules(v) if self.way == "auto" else self._product(self.way, v)
        return v - self._b * product

    def diagonal(self, signs: Iterable[Tensor]) -> Tensor:
        """The mean of r * (R r) over ``signs``, r [B, ...] of +1 and -1: an estimate of diag R."""
        return torch.stack([r * self.times(r) for r in signs]).mean(0)

    def _with_rules(self, v: Tensor) -> Tensor:
        for way in WAYS[:-1]:
            with suppress(_NoRule):
                product = self._product(way, v)
                self.way = way
                return product
        self.way = WAYS[-1]
        return self._product(self.way, v)

    def _product(self, way: str, v: Tensor) -> Tensor:
        made = {"jvp": self._forward, "vjp": self._backward, "difference": self._difference}[way]
        with torch.inference_mode(False):
            return made(_usable(v))

    def _first(self, x: Tensor) -> Tensor:
        output = self._model(x, self._n, **self._kwargs)
        first = output[0] if isinstance(output, tuple | list) else output
        check_output(first, x)
        return first.to(x.dtype)

    def _eps(self, first: Tensor, x: Tensor) -> Tensor:
        return to_eps(first, x, self._a, self._b, self._predicts)

    def _forward(self, v: Tensor) -> Tensor:
        _load_forward_mode()
        # Of the attention kernels only the plain one has rules for the forward mode.
        with (
            _rules("jvp"),
            torch.no_grad(),
            sdpa_kernel(SDPBackend.MATH),
            forward_ad.dual_level(),
        ):
            x = forward_ad.make_dual(self._x, v)
            first = self._first(x)
            self._output, tangent = forward_ad.unpack_dual(first)
            if tangent is None:
                raise RuntimeError(_APART)
            return forward_ad.unpack_dual(self._eps(first, x)).tangent

    def _backward(self, v: Tensor) -> Tensor:
        with _rules("vjp"), torch.enable_grad():
            if self._graph is None:
                x = self._x.clone().requires_grad_()
                first = self._first(x)
                if not first.requires_grad:
                    raise RuntimeError(_APART)
                self._graph, self._output = (x, self._eps(first, x)), first.detach()
            x, eps = self._graph
            return torch.autograd.grad(eps, x, v, retain_graph=True)[0]

    def _difference(self, v: Tensor) -> Tensor:
        # The third root of the precision balances what is cut off against what is rounded. A step
        # is this part of a standard deviation of x_n, about 1, in the direction of v.
        precision = torch.finfo(self._precision()).eps ** (1 / 3)
        rms = v.flatten(1).square().mean(1).sqrt().clamp_min(torch.finfo(v.dtype).tiny)
        h = (precision / rms).reshape(-1, *(1,) * (v.ndim - 1))
        with torch.no_grad():
            ahead, behind = (
                self._eps(self._first(x), x) for x in (self._x + h * v, self._x - h * v)
            )
        return (ahead - behind) / (2 * h)

    def _precision(self) -> torch.dtype:
        """The coarsest of the types of x, of the weights and of autocast."""
        module, kind = module_of(self._model), self._x.device.type
        types = [self._x.dtype, *({p.dtype for p in module.parameters()} if module else ())]
        if torch.is_autocast_enabled(kind):
            types.append(torch.get_autocast_dtype(kind))
        if isinstance(self._model, NetworkCall) and self._model.autocast is not None:
            types.append(self._model.autocast)
        floats = [dtype for dtype in types if dtype.is_floating_point and dtype.itemsize > 1]
        return max(floats, key=lambda dtype: torch.finfo(dtype).eps)


def _usable(x: Tensor) -> Tensor:
    """A copy of what was made in inference mode, which autograd does not take."""
    return x.clone() if x.is_inference() else x


@cache
def _load_forward_mode() -> None:
    """PyTorch warns of its own deprecations when its forward mode is used for the first time."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with forward_ad.dual_level():
            forward_ad.make_dual(torch.zeros(1), torch.zeros(1))


_APART = "the network's output does not depend on x by rules of autograd"


class _NoRule(ValueError):
    """The network cannot be differentiated in the way that was asked for."""


@contextmanager
def _rules(way: str) -> Iterator[None]:
    """Errors of autograd as ``_NoRule``, in one line."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # also NotImplementedError
        said = " ".join(str(error).split()).partition(" Please file")[0]
        raise _NoRule(f"way {way!r}: {said[:200]}") from error


def check_derivable(model: Callable[..., Any]) -> None:
    """ValueError if an image's derivative would depend on its batch or on chance."""
    module = module_of(model)
    for name, part in () if module is None else module.named_modules():
        is_norm = isinstance(part, nn.modules.batchnorm._BatchNorm)
        if isinstance(part, nn.MultiheadAttention | nn.RNNBase):
            drops = part.dropout
        else:
            drops = part.p if isinstance(part, _DropoutNd) else 0
        if part.training and (is_norm or drops > 0):
            raise ValueError(
                f"the network's {type(part).__name__} {name!r} is in training mode; the covariance "
                "from a derivative needs model.eval()"
            )


class Probed:
    """A noise network with a second output, estimated by probes: what OCM learns.

    It is called as the network is, and returns the pair (output, diag(I - sqrt(b) J) [B, ...]).
    With variance "ocm" it serves wherever a pair is taken.

    Args:
        probes: random signs in a call, >= 1.
        generator: of the signs, on x's device.

    Other arguments and errors as in ``Remainder``.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        schedule: NoiseSchedule,
        *,
        probes: int = 1,
        generator: torch.Generator | None = None,
        way: str = "auto",
        predicts: str = "eps",
    ) -> None:
        check_whole("probes", probes, 1, MOST)
        check_derivable(model)
        self.model = module_of(model) or model
        self.way = way
        self._network = model
        self._schedule, self._predicts = schedule, predicts
        self._probes, self._generator = probes, generator

    def __call__(
        self, x: Tensor, n: Tensor, *, draw: Callable[[], Tensor] | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The pair at x_n [B, ...]; ``draw`` gives the signs, [B, ...], of one probe."""
        matrix = Remainder(
            self._network, self._schedule, x, n, way=self.way, predicts=self._predicts, **kwargs
        )
        draw = draw or (lambda: _signs(x, self._generator))
        diagonal = matrix.diagonal(draw() for _ in range(self._probes))
        self.way = matrix.way  # what was found need not be looked for again
        return matrix.output, diagonal


def covariance_times(
    model: Callable[..., Any],
    schedule: NoiseSchedule,
    x: Tensor,
    n: Tensor,
    v: Tensor,
    *,
    way: str = "auto",
    predicts: str = "eps",
    **kwargs: Any,
) -> Tensor:
    """Cov[x_0 | x_n] v for each image, [B, ...], in squared units of x_0 times v's.

    Arguments and errors as in ``Remainder``; v [B, ...] has x's shape. For many products at the
    same x_n use a ``Remainder``: its ``way`` tells how they were made.
    """
    matrix = Remainder(model, schedule, x, n, way=way, predicts=predicts, **kwargs)
    return _scale(matrix) * matrix.times(v)


@dataclass(frozen=True, eq=False)
class ProbedDiagonal:
    """Estimates of diag Cov[x_0 | x_n].

    Attributes:
        mean: over the probes, [B, ...], in squared units of x_0. It may be negative.
        standard_error: of ``mean``, [B, ...]; NaN with a single probe.
    """

    mean: Tensor
    standard_error: Tensor


def probed_diagonal(
    model: Callable[..., Any],
    schedule: NoiseSchedule,
    x: Tensor,
    n: Tensor,
    *,
    probes: int,
    generator: torch.Generator | None = None,
    way: str = "auto",
    predicts: str = "eps",
    **kwargs: Any,
) -> ProbedDiagonal:
    """diag Cov[x_0 | x_n] by the mean of r * (Cov r) over random signs r (Hutchinson's estimate).

    It is unbiased. Entry i has the variance sum_{j != i} Cov_ij^2 / probes.

    Args:
        probes: number of sign vectors, >= 1; each costs a derivative of the network.
        generator: of the signs, on x's device.

    Other arguments and errors as in ``Remainder``.
    """
    check_whole("probes", probes, 1, MOST)
    matrix = Remainder(model, schedule, x, n, way=way, predicts=predicts, **kwargs)
    found = torch.stack([matrix.diagonal([_signs(x, generator)]) for _ in range(probes)])
    scale = _scale(matrix)
    error = found.std(0) / probes**0.5 if probes > 1 else torch.full_like(found[0], torch.nan)
    return ProbedDiagonal(scale * found.mean(0), scale * error)


def _signs(x: Tensor, generator: torch.Generator | None) -> Tensor:
    bits = torch.randint(2, x.shape, generator=generator, device=x.device)
    return (2 * bits - 1).to(x.dtype)


def _scale(matrix: Remainder) -> Tensor:
    return (matrix._b / matrix._a) ** 2


def lanczos_root(
    model: Callable[..., Any],
    schedule: NoiseSchedule,
    x: Tensor,
    n: Tensor,
    z: Tensor,
    *,
    steps: int,
    way: str = "auto",
    predicts: str = "eps",
    **kwargs: Any,
) -> Tensor:
    """Cov[x_0 | x_n]^(1/2) z for each image, [B, ...], in units of x_0 times z's.

    Args:
        z: [B, ...]; of standard normal numbers for a draw with this covariance.
        steps: of Lanczos, >= 1; each costs a derivative of the network. As many as the covariance
            has different eigenvalues give the exact result.

    Other arguments and errors as in ``Remainder``. See ``root_times`` for what happens where the
    matrix has negative eigenvalues.
    """
    matrix = Remainder(model, schedule, x, n, way=way, predicts=predicts, **kwargs)
    scale = _scale(matrix)
    return root_times(lambda v: scale * matrix.times(v), z, steps, lambda values: values)


def root_times(
    times: Callable[[Tensor], Tensor],
    z: Tensor,
    steps: int,
    variance: Callable[[Tensor], Tensor],
) -> Tensor:
    """g(A) z for each image by Lanczos, g = the root of ``variance``, A symmetric.

    With Krylov vectors V and the tridiagonal T = V^T A V the result is |z| V g(T) e_1
    (arXiv 2605.22723). The vectors are made orthogonal again in each step. Where A is not quite
    symmetric, as for a trained network, T is still taken as symmetric; its negative eigenvalues
    count as 0.

    Args:
        times: A v for one vector an image, [B, ...] to [B, ...].
        z: [B, ...].
        steps: >= 1.
        variance: of A's eigenvalues, [B, steps] float64, >= 0, to the variances along the
            eigenvectors.
    """
    check_whole("steps", steps, 1, MOST)
    steps = min(steps, z[0].numel())
    length = z.flatten(1).norm(dim=1, keepdim=True)
    smallest = torch.finfo(z.dtype).eps ** 0.75
    basis, diagonal, beside = [_unit(z.flatten(1), length)], [], []
    for k in range(steps):
        new = times(basis[k].reshape(z.shape)).flatten(1)
        diagonal.append((basis[k] * new).sum(1))
        if k + 1 == steps:
            break
        size = new.norm(dim=1, keepdim=True)
        for _ in range(2):  # once leaves what was rounded; twice is enough (Kahan and Parlett)
            for earlier in basis:
                new = new - (earlier * new).sum(1, keepdim=True) * earlier
        norm = new.norm(dim=1, keepdim=True)
        # The Krylov space is exhausted: what is left is rounding, and T ends here.
        norm = torch.where(norm > smallest * size, norm, 0.0)
        beside.append(norm[:, 0])
        basis.append(_unit(new, norm))
    T = torch.diag_embed(torch.stack(diagonal, 1).double())
    if beside:
        off = torch.diag_embed(torch.stack(beside, 1).double(), offset=1)
        T = T + off + off.mT
    finite = T.isfinite().all(2).all(1)
    length = torch.where(finite[:, None], length, torch.nan)  # the solver may fail at a NaN
    values, vectors = torch.linalg.eigh(torch.where(finite[:, None, None], T, 0.0))
    roots = variance(values.clamp_min(0)).sqrt()
    weights = (vectors * (roots * vectors[:, 0]).unsqueeze(1)).sum(2).to(z.dtype)
    total = sum(weights[:, k : k + 1] * v for k, v in enumerate(basis))
    return (length * total).reshape(z.shape)


def lanczos_noise(matrix: Remainder, c: ReverseCoefficients, z: Tensor, steps: int) -> Tensor:
    """z as the noise of the step of ``c``, of covariance small I + cov_weight Cov[x_0 | x_t].

    ``c.limit`` bounds the variance in every direction. Other arguments as in ``root_times``.
    """
    weight = c.cov_weight * (c.b / c.a) ** 2
    return root_times(
        matrix.times, z, steps, lambda values: (c.small + weight * values).clamp_max(c.limit)
    )


def _unit(v: Tensor, length: Tensor) -> Tensor:
    """v / length, or 0 where the length is 0."""
    return torch.where(length > 0, v / length.where(length > 0, torch.ones_like(length)), 0.0)
