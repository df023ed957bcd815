"""The objective of the host of Analytic-DPM: the plain noise prediction of DDPM."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy.typing as npt
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..common.criterion_base import Criterion, adam, sum_squares
from ..common.schedule import FloatArray, Schedule
from ..common.wrapper import DTWrapper


class DDPMDSM(Criterion):
    """|eps - eps_pred|^2 at one random step an image (arXiv 2006.11239, equation 14).

    betas               [N+1], betas[0] = 0; kept together with `cum_alphas` and `cum_betas`
    rescale_timesteps   `eps_model` receives the time n times 1000/N rather than n
    models              the one network, under any name; the objective calls `eps_model`
    shift1              `eps_model` receives n - 1: checkpoints of the DDIM line
    stratified          how steps are drawn, see `Schedule`
    input_perturbation  how x_n is made, see `Schedule`
    """

    def __init__(
        self,
        betas: npt.ArrayLike,
        rescale_timesteps: bool,
        models: Mapping[str, nn.Module],
        optimizers: Mapping[str, Optimizer],
        lr_schedulers: Mapping[str, LRScheduler],
        shift1: bool = False,
        stratified: bool = False,
        input_perturbation: float = 0.0,
    ) -> None:
        super().__init__(models, optimizers, lr_schedulers)
        if len(self.models) != 1:
            raise ValueError(f"models={list(self.models)}: must hold exactly one network")
        (self.eps_model,) = self.models.values()
        self.rescale_timesteps = rescale_timesteps
        self.shift1 = shift1
        self._schedule = Schedule(betas, stratified, input_perturbation)
        self.input_perturbation = input_perturbation
        self.betas: FloatArray = self._schedule.betas
        self.cum_alphas: FloatArray = self._schedule.cum_alphas
        self.cum_betas: FloatArray = self._schedule.cum_betas

    def objective(self, v: Tensor, **labels: Tensor) -> Tensor:
        """The loss of each image of `v`, [B]; `labels` go to the network."""
        n, eps, xn = self._schedule.sample(v)
        # Looked up at each call, because a hook may have replaced `eps_model`.
        eps_model = DTWrapper(
            self.eps_model, "eps", self.rescale_timesteps, self.shift1, self._schedule.N
        )
        dsm = sum_squares(eps - eps_model(xn, n, **labels))
        self._record("dsm", dsm)
        return dsm

    def replace_networks(self, wrap: Callable[[nn.Module], nn.Module]) -> None:
        """Let the objective call `wrap(network)`; `models` keeps the networks themselves."""
        self.eps_model = wrap(self.eps_model)


def build_criterion(
    schedule: Schedule,
    model: nn.Module,
    *,
    lr: float = 1e-4,
    grad_clip: float | None = None,
    lr_warmup: int = 0,
    lr_fall: tuple[int, int] | None = None,
    rescale_timesteps: bool = True,
    shift1: bool = False,
) -> DDPMDSM:
    """The criterion for `model`, with Adam.

    grad_clip   largest norm of the gradient, None for no limit
    lr_warmup   steps over which the rate rises to `lr`; 0: constant, as in the host
    lr_fall     two steps, between which the rate falls to 0; None: as in the host
    """
    optimizers, lr_schedulers = adam(model, lr, grad_clip, lr_warmup, lr_fall)
    criterion = DDPMDSM(
        schedule.betas,
        rescale_timesteps,
        {"model": model},
        optimizers,
        lr_schedulers,
        shift1,
        schedule.stratified,
        schedule.input_perturbation,
    )
    criterion.grad_clip = grad_clip
    return criterion
