r"""denoising-diffusion-pytorch: GaussianDiffusion with the SA term, for its own Trainer.

Without min-SNR the host's loss weights turn each objective into mean (eps_pred - eps)^2 (1, SNR and
cum_alpha for pred_noise, pred_x0 and pred_v), so that its loss is L_simple. With min-SNR a sample
at t weighs min(SNR_t, gamma) / SNR_t; its SA term gets the same weight, so that lambda keeps its
meaning.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sa_plugin._checks import check_choice, explain_absence
from sa_plugin._tensors import Coefficients
from sa_plugin.calls import HostCall
from sa_plugin.hooks.interception import intercepted
from sa_plugin.hooks.wrappers import EpsModel
from sa_plugin.loss import Asked, SALoss
from sa_plugin.schedule import NoiseSchedule

try:
    from denoising_diffusion_pytorch import GaussianDiffusion
except ModuleNotFoundError as error:
    raise explain_absence(
        error, "denoising_diffusion_pytorch", "denoising-diffusion-pytorch"
    ) from None

OBJECTIVES = {"pred_noise": "eps", "pred_x0": "x0", "pred_v": "v"}


@dataclass(frozen=True)
class _Call(HostCall):
    """The host's call, with times 0..T-1."""

    coefficients: Coefficients
    predicts: str

    def time_of(self, n: Tensor) -> Tensor:
        return (n - 1).to(self.time)

    def eps_of(self, output: Any, x: Tensor, n: Tensor) -> Tensor:
        return self.coefficients.eps_of(output, x, n, self.predicts)


class SAGaussianDiffusion(GaussianDiffusion):
    """``GaussianDiffusion`` whose loss is the host's own plus lambda L_sa.

    The host's objective runs unchanged. Its network call also evaluates the window: the other rows
    ride behind its own, or come before it. With self-conditioning they get the x_0 that the call at
    t got; in sampling, too, a step is conditioned on what its neighbour predicted. State dicts are
    the host's.

    Args:
        model, options: as ``GaussianDiffusion``; ``immiscible`` is refused, because the host then
            noises images by other draws than it compares with.
        K, lam: as in ``SALoss``.
        sa_options: further options of ``SALoss``; ``reduction`` is the host's, "mean".

    Attributes:
        statistics: "simple_loss" (the host's own) and "sa_loss" (before lambda) of the last call,
            0-d tensors.

    Raises:
        ValueError: a bad option, or a network that returns other channels than it takes.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        K: int = 2,
        lam: float = 1.0,
        sa_options: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        check_choice("objective", options.get("objective", "pred_v"), tuple(OBJECTIVES))
        if options.get("immiscible"):
            raise ValueError("immiscible must be False for the SA loss, got True")
        if model.out_dim != model.channels:
            raise ValueError(
                f"model must return its {model.channels} channels, got out_dim = {model.out_dim}"
            )
        super().__init__(model, **options)
        schedule = NoiseSchedule.from_betas(self.betas.double().numpy())
        self.sa_loss = SALoss(schedule, K, lam, reduction="mean", **(sa_options or {}))
        if self.sa_loss.reuse:
            raise ValueError("sa_options: reuse must be False, for L_simple is the host's own")
        snr = torch.from_numpy(schedule.cum_alphas[1:] / schedule.cum_betas[1:])
        own = {"pred_noise": torch.ones_like(snr), "pred_x0": snr, "pred_v": snr / (snr + 1)}
        weight = (self.loss_weight.double() / own[self.objective]).float()
        self.register_buffer("_sa_weight", weight, persistent=False)
        self._coefficients = Coefficients(schedule)
        self.statistics: dict[str, Tensor] = {}

    def eps_model(self) -> EpsModel:
        """The network as ``Sampler`` and ``estimate_gamma`` call it; images in [-1, 1]."""
        return EpsModel(
            self.model,
            self.sa_loss.schedule,
            index_from=0,
            predicts=OBJECTIVES[self.objective],
        )

    def p_losses(
        self,
        x_start: Tensor,
        t: Tensor,
        noise: Tensor | None = None,
        offset_noise_strength: float | None = None,
        loss_reduction: str = "mean",
        *,
        noises: Tensor | None = None,
    ) -> Tensor:
        """The host's loss plus lambda L_sa: a scalar, or [B] with ``loss_reduction="none"``.

        Args:
            x_start: images [B, C, H, W] in [-1, 1].
            t: timesteps [B] in 0..T-1.
            noise: [B, C, H, W]. As in the host, offset noise is added to it in place.
            noises: [K-1, B, C, H, W], the noises of the window's other steps; drawn if not given
                (without offset noise).
        """
        noise = torch.randn_like(x_start) if noise is None else noise
        graph, predicts = torch.is_grad_enabled(), OBJECTIVES[self.objective]
        asked: list[Asked] = []

        def around(network: nn.Module, x: Tensor, time: Tensor, condition: Any = None) -> Tensor:
            if graph and not torch.is_grad_enabled():  # for self-conditioning, which comes before
                return network(x, time, condition)

            def positional(x: Tensor, time: Tensor, condition: Any) -> Tensor:
                return network(x, time, condition)

            named = {"condition": condition}
            call = _Call(positional, x, time, named, self._coefficients, predicts)
            asked.append(self.sa_loss.around(call, x_start, t + 1, noise, noise=noises))
            return asked[-1].output

        with intercepted(self, "model", around):
            simple = super().p_losses(x_start, t, noise, offset_noise_strength, "none")
        sa = self._sa_weight[t] * asked[-1].terms()[1]
        self.statistics = {
            "simple_loss": simple.detach().mean(),
            "sa_loss": sa.detach().mean(),
        }
        loss = simple + self.sa_loss.lam * sa
        return loss if loss_reduction == "none" else loss.mean()
