"""Stand-ins for host training codes: their calling conventions around the loss, and no more.

Written from the papers (arXiv 2010.02502, 2102.09672, 2105.05233, 2206.00364, 2312.12431) and from
facts about the interfaces. Each runs one iteration up to the place where a recipe has its lines.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.toys import images, normal, over, toy_eps

SHAPE = (8, 2, 4, 4)  # sizes of 16 numbers: torch draws them alike, together and one by one


class Network(nn.Module):
    """A trainable ``(x, t, **labels) -> [B, outputs * C, H, W]`` that notes its calls."""

    def __init__(self, outputs: int = 1) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.1, dtype=torch.float64))
        self.outputs = outputs
        self.times: list[Tensor] = []

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        self.times.append(t)
        eps = self.scale * toy_eps(x, t)
        if y is not None:
            eps = eps + 0.1 * over(y, x)
        return torch.cat([eps, *[torch.tanh(x)] * (self.outputs - 1)], 1)


class DDIMFork:
    """The DDIM line: t from 0 in pairs t, T-1-t; betas [T] in float32; sums over an image."""

    def __init__(self, T: int = 50) -> None:
        self.b = torch.linspace(1e-4, 0.02, T)
        self.model = Network()

    def iteration(self) -> dict[str, Any]:
        """What the training loop has at hand before its loss."""
        x, half = images(0, *SHAPE), torch.tensor([0, 1, 20, 49])
        t = torch.cat([half, len(self.b) - 1 - half])
        return {"model": self.model, "x": x, "t": t, "e": normal(1, *SHAPE), "b": self.b}

    @staticmethod
    def published_loss(
        model: Callable[..., Tensor],
        x0: Tensor,
        t: Tensor,
        e: Tensor,
        b: Tensor,
        num_consecutive_steps: int = 2,
        lamda: float = 1.0,
    ) -> Tensor:
        """The SA loss as SA-DPM has it: downward, uniform weights, one call a step, in series."""
        a = (1 - b.double()).cumprod(0)
        total, window = torch.zeros(()), torch.zeros_like(x0)
        for k in range(num_consecutive_steps):
            eps = e if k == 0 else torch.randn_like(x0)
            step, inside = (t - k).clamp(min=0), over((t - k >= 0).long(), x0)
            noisy = over(a[step], x0).sqrt() * x0 + (1 - over(a[step], x0)).sqrt() * eps
            error = model(noisy, step) - eps
            if k == 0:
                total = error.square().sum((1, 2, 3)).mean()
            window = window + inside * error / num_consecutive_steps
        return total + lamda * window.square().sum((1, 2, 3)).mean()


class GuidedDiffusion:
    """improved- and guided-diffusion: means, learned sigma, labels, rescaled and respaced time.

    Args:
        kept: the original steps of a respaced diffusion, from 0; default: all.
        rescale: whether the network's time is t * 1000 / T in floats.
    """

    original_steps = 50

    def __init__(
        self, kept: list[int] | None = None, rescale: bool = False, learned: bool = True
    ) -> None:
        original = np.linspace(1e-4, 0.02, self.original_steps)
        self.respaced = kept is not None
        self.timestep_map = list(range(self.original_steps)) if kept is None else kept
        self.alphas_cumprod = np.cumprod(1 - original)[self.timestep_map]
        self.betas = 1 - self.alphas_cumprod / np.append(1.0, self.alphas_cumprod[:-1])
        self.rescale, self.learned = rescale, learned

    def _times(self, t: Tensor) -> Tensor:
        return t * (1000 / self.original_steps) if self.rescale else t

    def _mapping(self, model: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The network of a respaced diffusion: its steps become original ones, and times."""
        original = torch.tensor(self.timestep_map)
        return lambda x, t, **kwargs: model(x, self._times(original[t]), **kwargs)

    def training_losses(
        self,
        model: Callable[..., Tensor],
        x_start: Tensor,
        t: Tensor,
        model_kwargs: dict[str, Any],
        noise: Tensor,
        changed: Callable[[dict[str, Any]], None] = lambda variables: None,
    ) -> dict[str, Tensor]:
        """{"loss": [B], ...}; ``changed`` gets the variables where a fork has more lines."""
        a = torch.as_tensor(self.alphas_cumprod)[t]
        x_t = over(a, x_start).sqrt() * x_start + (1 - over(a, x_start)).sqrt() * noise
        if self.respaced:
            model, time = self._mapping(model), t
        else:
            time = self._times(t)
        model_output = model(x_t, time, **model_kwargs)
        eps, *variance = model_output.split(x_start.shape[1], 1)
        model_output = eps  # rebound where sigma is learned, as these codes do
        terms = {"mse": (noise - eps).square().mean((1, 2, 3))}
        terms["loss"] = terms["mse"] + sum(v.square().mean((1, 2, 3)) for v in variance)
        changed(locals())
        return terms


class EDM:
    """EDM: the network is D(x, sigma, class_labels); log-normal sigma, weights, no reduction."""

    sigma_data = 0.5

    def __init__(self) -> None:
        self.scale = torch.tensor(0.9, dtype=torch.float64, requires_grad=True)
        self.sigmas: list[Tensor] = []

    def net(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        sigma = sigma.reshape(-1, 1, 1, 1)
        self.sigmas.append(sigma.flatten())
        kept = self.sigma_data**2 / (self.sigma_data**2 + sigma**2)
        guess = self.scale * kept * x
        return guess if class_labels is None else guess + 0.1 * over(class_labels, x)

    def draw(self) -> dict[str, Any]:
        """Before sigma has served for anything."""
        labels = torch.arange(SHAPE[0]) % 3
        sigma = (1.2 * normal(2, SHAPE[0], 1, 1, 1) - 1.2).exp()
        sigma[0], sigma[1] = 1e-4, 1e3  # outside of the ladder
        return {"torch": torch, "net": self.net, "y": images(0, *SHAPE), "labels": labels} | {
            "sigma": sigma
        }

    def evaluate(self, variables: dict[str, Any]) -> None:
        """weight, noise, D_yn and loss [B, C, H, W] of the sigma that is there now."""
        sigma, y = variables["sigma"], variables["y"]
        weight = (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2
        noise = normal(3, *SHAPE) * sigma
        D_yn = self.net(y + noise, sigma, variables["labels"])
        loss = weight * (D_yn - y) ** 2
        variables.update(weight=weight, noise=noise, D_yn=D_yn, loss=loss)
