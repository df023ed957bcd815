"""The objectives of the host of SN-DPM and NPR-DPM (arXiv 2206.07309), in discrete time; and OCM.

DTDSM      the plain noise prediction of DDPM (arXiv 2006.11239, equation 14)
DTDSDM     SN-DPM: optimal covariance by predicting E[eps^2 | x_n] (arXiv 2206.07309)
DTDSDMErr  NPR-DPM: optimal covariance by predicting the squared noise prediction residual
           (eps - eps_pred)^2 (arXiv 2206.07309)
OCM        optimal covariance from the derivative of the noise prediction (arXiv 2406.10808); the
           host has no such objective

The second output learns this prediction. Norms are sums over the dimensions of an image.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..common.criterion_base import Criterion, sum_squares
from ..common.schedule import IntArray, Schedule, per_image

Wrapper = Callable[..., Tensor | tuple[Tensor, Tensor]]


class DTDSM(Criterion):
    """|eps - eps_pred|^2 at one random step an image."""

    typ: ClassVar[str] = "eps"  # what the wrapper must predict

    def __init__(
        self,
        schedule: Schedule,
        wrapper: Wrapper,
        models: Mapping[str, nn.Module],
        optimizers: Mapping[str, Optimizer],
        lr_schedulers: Mapping[str, LRScheduler],
    ) -> None:
        super().__init__(models, optimizers, lr_schedulers)
        typ = getattr(wrapper, "typ", self.typ)
        if typ != self.typ:
            raise ValueError(f"wrapper.typ={typ!r}: {type(self).__name__} needs {self.typ!r}")
        self.schedule = schedule
        self.wrapper = wrapper

    def terms(self, v: Tensor, **labels: Tensor) -> dict[str, Tensor]:
        """The parts of the objective by name, each [B], before they are weighted."""
        n, eps, xn = self.schedule.sample(v)
        return {"dsm": sum_squares(eps - self.wrapper(xn, n, **labels))}

    def objective(self, v: Tensor, **labels: Tensor) -> Tensor:
        """The loss of each image of `v`, [B]; `labels` go to the network."""
        terms = self.terms(v, **labels)
        for name, values in terms.items():
            self._record(name, values)
        return self.combine(**terms)

    def combine(self, dsm: Tensor) -> Tensor:
        """The objective from its parts."""
        return dsm

    def replace_networks(self, wrap: Callable[[nn.Module], nn.Module]) -> None:
        """Let the objective call `wrap(network)`; `models` keeps the networks themselves."""
        self.wrapper.model = wrap(self.wrapper.model)


class DTDSDM(DTDSM):
    """|eps - eps_pred|^2 + ratio |eps^2 - eps2_pred|^2.

    `ratio` is a number >= 0, or "adaptive". The adaptive ratio makes the two parts equal in size in
    this batch and counts as a constant for the gradient.
    """

    typ: ClassVar[str] = "eps_eps2"

    def __init__(
        self,
        schedule: Schedule,
        ratio: float | str,
        wrapper: Wrapper,
        models: Mapping[str, nn.Module],
        optimizers: Mapping[str, Optimizer],
        lr_schedulers: Mapping[str, LRScheduler],
    ) -> None:
        super().__init__(schedule, wrapper, models, optimizers, lr_schedulers)
        if ratio != "adaptive" and (isinstance(ratio, str) or not 0 <= ratio < float("inf")):
            raise ValueError(f"ratio={ratio!r}: must be a finite number >= 0 or 'adaptive'")
        if schedule.input_perturbation:
            raise ValueError(
                f"schedule.input_perturbation={schedule.input_perturbation}: must be 0 for "
                f"{type(self).__name__}, whose second output is of x_n itself"
            )
        self.ratio = ratio

    def terms(self, v: Tensor, **labels: Tensor) -> dict[str, Tensor]:
        """The parts of the objective by name, each [B], before they are weighted."""
        n, eps, xn = self.schedule.sample(v)
        eps_pred, second = self.wrapper(xn, n, **labels)
        target = self.second_target(eps, eps_pred, xn, n, labels)
        return {"dsm": sum_squares(eps - eps_pred), "ddm": sum_squares(target - second)}

    def second_target(
        self, eps: Tensor, eps_pred: Tensor, xn: Tensor, n: IntArray, labels: Mapping[str, Tensor]
    ) -> Tensor:
        """The quantity whose mean the second output learns."""
        return eps.square()

    def combine(self, dsm: Tensor, ddm: Tensor) -> Tensor:
        """The objective from its parts."""
        if self.ratio == "adaptive":
            return dsm + dsm.detach().mean() / ddm.detach().mean() * ddm
        return dsm + self.ratio * ddm


class DTDSDMErr(DTDSDM):
    """|eps - eps_pred|^2 + ratio |(eps - eps_pred)^2 - epsc_pred|^2, `ratio` as in DTDSDM."""

    typ: ClassVar[str] = "eps_epsc"

    def second_target(
        self, eps: Tensor, eps_pred: Tensor, xn: Tensor, n: IntArray, labels: Mapping[str, Tensor]
    ) -> Tensor:
        """The quantity whose mean the second output learns; no gradient reaches `eps_pred`."""
        return (eps - eps_pred).detach().square()


class OCM(DTDSDM):
    """|eps - eps_pred|^2 + ratio |r * (I - sqrt(cum_beta_n) J) r - h|^2, J = d eps_pred / d x_n.

    r are random signs. The mean over r is the diagonal of the matrix, which the second output h
    learns: cum_beta_n / cum_alpha_n h is then the variance of x_0 given x_n. For a frozen noise
    network: J counts as a constant.
    """

    typ: ClassVar[str] = "eps_ocm"

    def second_target(
        self, eps: Tensor, eps_pred: Tensor, xn: Tensor, n: IntArray, labels: Mapping[str, Tensor]
    ) -> Tensor:
        """The quantity whose mean the second output learns."""
        x = xn.detach().requires_grad_()
        with torch.enable_grad():
            derived, _ = self.wrapper(x, n, **labels)
        signs = torch.randint_like(derived, 2) * 2 - 1
        (product,) = torch.autograd.grad(derived, x, signs)
        signs = signs.to(product)
        return 1 - per_image(np.sqrt(self.schedule.cum_betas[n]), product) * signs * product
