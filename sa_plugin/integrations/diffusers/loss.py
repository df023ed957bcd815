"""The SA loss with the arguments that a diffusers training loop has at hand."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from sa_plugin.hooks.wrappers import EpsModel
from sa_plugin.integrations.diffusers.models import (
    call_unet,
    ends_in_noise,
    noise_schedule,
    predicts_of,
    unpack,
)
from sa_plugin.loss import SALoss, SALossOutput


class DiffusersSALoss:
    """L_simple + lambda L_sa with the arguments that a diffusers training loop has at hand::

        loss = F.mse_loss(model(noisy_images, timesteps).sample, noise)       # before
        loss = sa_loss(model, clean_images, noise, timesteps).total           # after

    Both terms compare noises, whatever the network predicts: the epsilon loss, for "sample" the
    official example's SNR-weighted loss, for "v_prediction" cum_alpha times the v loss. Means over
    an image's dimensions, as ``F.mse_loss`` has it. Learned-range channels get no gradient from it.
    At a zero terminal SNR x_T is the noise, and its step gets no gradient either, which is warned
    of: keep the loop's own loss and add ``lam * sa_loss(..., model_output).sa`` to it.

    Args:
        scheduler: the noise scheduler of the loop.
        K, lam, options: as in ``SALoss``.

    Raises:
        ValueError: as ``SALoss`` and ``unet_model``.
    """

    def __init__(
        self,
        scheduler: Any,
        K: int = 2,
        lam: float = 1.0,
        *,
        reduction: str = "mean",
        **options: Any,
    ) -> None:
        self.scheduler = scheduler
        self.loss = SALoss(noise_schedule(scheduler), K, lam, reduction=reduction, **options)
        if ends_in_noise(self.loss.schedule):
            warnings.warn(
                f"{type(scheduler).__name__} has a zero terminal SNR: this loss does not train its "
                "last step; keep your own v loss and add lam * sa_loss(..., model_output).sa to it",
                stacklevel=2,
            )
        self._eps_model = EpsModel(
            call_unet,
            self.loss.schedule,
            index_from=0,
            predicts=predicts_of(scheduler.config.prediction_type),
        )

    def __call__(
        self,
        unet: Any,
        clean_images: Tensor,
        noise: Tensor,
        timesteps: Tensor,
        model_output: Any = None,
        *,
        noises: Tensor | None = None,
        generator: torch.Generator | None = None,
        **unet_kwargs: Any,
    ) -> SALossOutput:
        """The loss; the window's K - 1 other rows where ``model_output`` is handed in, else all K.

        Args:
            unet: see ``unet_model``.
            clean_images: [B, C, H, W] in [-1, 1].
            noise: [B, C, H, W], the noise at ``timesteps``.
            timesteps: integers [B] in 0..T-1.
            model_output: what the network returned at ``scheduler.add_noise(clean_images, noise,
                timesteps)``, with its graph; None: it is called here, in one batch with the
                window's other rows.
            noises: [K-1, B, C, H, W], the noises of the window's other steps; drawn if not given.
            unet_kwargs: go to every call; tensors of length B (``class_labels``) follow their rows.
        """
        n = timesteps + 1
        own = None
        if model_output is not None:
            noisy = self.scheduler.add_noise(clean_images, noise, timesteps)
            own = self._eps_model.eps_of(unpack(model_output, noisy, cut=True), noisy, n)
        simple, sa = self.loss.sa_term(
            self._eps_model,
            clean_images,
            n,
            noise,
            own,
            noise=noises,
            generator=generator,
            unet=unet,
            **unet_kwargs,
        )
        total = simple.mean() + self.loss.lam * sa.mean()
        return SALossOutput(total, simple.mean(), sa.mean(), n, simple, sa)
