r"""denoising-diffusion-pytorch: its diffusions with the SA term, for its own trainers.

Without min-SNR the host's loss weights turn each objective into mean (eps_pred - eps)^2 (1, SNR and
cum_alpha for pred_noise, pred_x0 and pred_v), so that its loss is L_simple. With min-SNR a sample
at t weighs min(SNR_t, gamma) / SNR_t; its SA term gets the same weight, so that lambda keeps its
meaning.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sa_plugin._checks import check_choice, explain_absence
from sa_plugin._tensors import Coefficients
from sa_plugin.calls import HostCall, with_positions
from sa_plugin.hooks.interception import intercepted
from sa_plugin.hooks.wrappers import EpsModel
from sa_plugin.loss import Asked, SALoss
from sa_plugin.schedule import NoiseSchedule

try:
    from denoising_diffusion_pytorch import GaussianDiffusion, GaussianDiffusion1D
    from denoising_diffusion_pytorch import classifier_free_guidance as guidance
except ModuleNotFoundError as error:
    raise explain_absence(
        error, "denoising_diffusion_pytorch", "denoising-diffusion-pytorch"
    ) from None

_Host: Any = nn.Module  # the base beside which each class below names its host
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


class SADiffusion(_Host):
    """Before a host's class among the bases: its loss is the host's own plus lambda L_sa.

    The host's objective runs unchanged. Its network call also evaluates the window: the other rows
    ride behind its own, or come before it. With self-conditioning they get the x_0 that the call at
    t got; in sampling, too, a step is conditioned on what its neighbour predicted. State dicts are
    the host's.

    Args:
        model, options: as the host's class; ``immiscible`` is refused, because the host then noises
            images by other draws than it compares with.
        K, lam: as in ``SALoss``.
        sa_options: further options of ``SALoss``; ``reduction`` is the host's, "mean".

    Attributes:
        statistics: "simple_loss" (the host's own) and "sa_loss" (before lambda) of the last call,
            0-d tensors.

    Raises:
        ValueError: a bad option; a network of the package that another class is for; a network that
            returns other channels than it takes; a subclass of a host whose loss is another one.
    """

    host: ClassVar[type[nn.Module]]
    networks: ClassVar[tuple[str, ...]]  # of the package: module and class

    def __init__(
        self,
        model: nn.Module,
        *,
        K: int = 2,
        lam: float = 1.0,
        sa_options: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        if "objective" in options:
            check_choice("objective", options["objective"], tuple(OBJECTIVES))
        if options.get("immiscible"):
            raise ValueError("immiscible must be False for the SA loss, got True")
        self._check_host()
        self._check_network(model)
        super().__init__(model, **options)
        schedule = NoiseSchedule.from_betas(self.betas.double().numpy())
        self.sa_loss = SALoss(schedule, K, lam, reduction="mean", **(sa_options or {}))
        for name, off in {"reuse": False, "input_perturbation": 0}.items():
            if getattr(self.sa_loss, name):
                raise ValueError(f"sa_options: {name} must be {off}: L_simple is the host's own")
        snr = torch.from_numpy(schedule.cum_alphas[1:] / schedule.cum_betas[1:])
        own = {"pred_noise": torch.ones_like(snr), "pred_x0": snr, "pred_v": snr / (snr + 1)}
        weight = (self.loss_weight.double() / own[self.objective]).float()
        self.register_buffer("_sa_weight", weight, persistent=False)
        self._coefficients = Coefficients(schedule)
        self.statistics: dict[str, Tensor] = {}

    def _check_host(self) -> None:
        """ValueError for a class of the package with a loss of its own among the bases."""
        for kind in type(self).__mro__:
            own = "p_losses" in vars(kind) and kind.__module__.startswith(guidance.__package__)
            if own and kind is not self.host:
                raise ValueError(
                    f"{type(self).__name__} must have no other loss than {self.host.__name__}'s, "
                    f"got that of {kind.__name__}"
                )

    def _check_network(self, model: nn.Module) -> None:
        """ValueError for a network of the package that is not made for this class."""
        mro = [f"{kind.__module__}.{kind.__name__}" for kind in type(model).__mro__]
        package = f"{guidance.__package__}."
        known = [name.removeprefix(package) for name in mro if name.startswith(package)]
        if known and not set(known) & set(self.networks):
            raise ValueError(
                f"model must be one of {', '.join(self.networks)} or a network of your own for "
                f"{type(self).__name__}, got {known[0]}"
            )
        if model.out_dim != model.channels:
            raise ValueError(
                f"model must return its {model.channels} channels, got out_dim = {model.out_dim}"
            )

    def eps_model(self) -> EpsModel:
        """The network as ``Sampler`` and ``estimate_gamma`` call it; images in [-1, 1]."""
        return EpsModel(
            self._sampled(),
            self.sa_loss.schedule,
            index_from=0,
            predicts=OBJECTIVES[self.objective],
        )

    def _sampled(self) -> nn.Module:
        """The network as it is sampled from."""
        return self.model

    def _shared(self, batch: int, options: dict[str, Any]) -> dict[str, Any]:
        """The options of ``p_losses``, with the draws that all rows of a window share."""
        return options

    def p_losses(
        self,
        x_start: Tensor,
        t: Tensor,
        noise: Tensor | None = None,
        *,
        loss_reduction: str = "mean",
        noises: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """The host's loss plus lambda L_sa: a scalar, or [B] with ``loss_reduction="none"``.

        Args:
            x_start: images [B, ...] in [-1, 1].
            t: timesteps [B] in 0..T-1.
            noise: [B, ...]. As in the host, offset noise is added to it in place.
            noises: [K-1, B, ...], the noises of the window's other steps; drawn if not given
                (without offset noise).
            options: further ones of the host's ``p_losses``.
        """
        if not options.get("return_reduced_loss", True):
            raise ValueError("return_reduced_loss must be True for the SA loss, got False")
        noise = torch.randn_like(x_start) if noise is None else noise
        options = self._shared(len(x_start), options)
        graph, predicts = torch.is_grad_enabled(), OBJECTIVES[self.objective]
        asked: list[Asked] = []

        def around(network: nn.Module, x: Tensor, time: Tensor, *args: Any, **kwargs: Any) -> Any:
            if graph and not torch.is_grad_enabled():  # for self-conditioning, which comes before
                return network(x, time, *args, **kwargs)
            named = {"args": args, "kwargs": kwargs}
            call = _Call(with_positions(network), x, time, named, self._coefficients, predicts)
            asked.append(self.sa_loss.around(call, x_start, t + 1, noise, noise=noises))
            return asked[-1].output

        with intercepted(self, "model", around):
            simple = super().p_losses(x_start, t, noise=noise, loss_reduction="none", **options)
        sa = self._sa_weight[t] * asked[-1].terms()[1]
        self.statistics = {
            "simple_loss": simple.detach().mean(),
            "sa_loss": sa.detach().mean(),
        }
        loss = simple + self.sa_loss.lam * sa
        return loss if loss_reduction == "none" else loss.mean()


class SAGaussianDiffusion(SADiffusion, GaussianDiffusion):
    """``GaussianDiffusion`` with the SA term, for images; arguments as ``SADiffusion``."""

    host = GaussianDiffusion
    networks = (
        "denoising_diffusion_pytorch.Unet",
        "guided_diffusion.Unet",
        "repaint.Unet",
        "karras_unet.KarrasUnet",
    )


class SAGaussianDiffusion1D(SADiffusion, GaussianDiffusion1D):
    """``GaussianDiffusion1D`` with the SA term, for sequences; arguments as ``SADiffusion``."""

    host = GaussianDiffusion1D
    networks = ("denoising_diffusion_pytorch_1d.Unet1D", "karras_unet_1d.KarrasUnet1D")


class SAClassConditionalDiffusion(SADiffusion, guidance.GaussianDiffusion):
    """``classifier_free_guidance.GaussianDiffusion`` with the SA term, for images with classes.

    The rows of an image's window keep its class, or lose it, together. ``eps_model()`` takes
    ``classes=`` and keeps them all. Arguments as ``SADiffusion``.
    """

    host = guidance.GaussianDiffusion
    networks = ("classifier_free_guidance.Unet",)

    def _shared(self, batch: int, options: dict[str, Any]) -> dict[str, Any]:
        if options.get("cond_keep_mask") is not None:
            return options
        return options | {"cond_keep_mask": self.random_cond_keep_mask(batch)}

    def _sampled(self) -> nn.Module:
        return _Kept(self.model)


class _Kept(nn.Module):
    """A class-conditional network that drops no class."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, time: Tensor, classes: Tensor) -> Any:
        return self.model(x, time, classes, cond_drop_prob=0.0)
