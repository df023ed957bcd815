"""Stand-ins for host training codes: their calling conventions around the loss, and no more.

Written from the papers (arXiv 2010.02502, 2102.09672, 2105.05233, 2206.00364, 2312.12431) and from
facts about the interfaces. The hosts of the recipes run one iteration up to the place where a
recipe has its lines. The criteria of Analytic-DPM and of its extension stand beside their ports.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.reference import sa_terms
from tests.toys import Toy, images, normal, over
from third_party.analytic_dpm.criterions import DDPMDSM
from third_party.common.schedule import NamedSchedule
from third_party.common.wrapper import DTWrapper
from third_party.extended_analytic_dpm.criterions import DTDSDM, DTDSM, DTDSDMErr

SHAPE = (8, 2, 4, 4)
PORT = NamedSchedule("linear", 100)  # of the criteria
KINDS = ("eps", "eps_eps2", "eps_epsc", "analytic")  # of criteria


class DDIMFork:
    """The DDIM line: t from 0 in pairs t, T-1-t; betas [T] in float32; sums over an image."""

    def __init__(self, T: int = 50) -> None:
        self.b = torch.linspace(1e-4, 0.02, T)
        self.model = Toy()

    def iteration(self) -> dict[str, Any]:
        """What the training loop has at hand before its loss."""
        x, half = images(0, *SHAPE), torch.tensor([0, 1, 20, 49])
        t = torch.cat([half, len(self.b) - 1 - half])
        return {"model": self.model, "x": x, "t": t, "e": normal(1, *SHAPE), "b": self.b}

    def published_loss(self, x: Tensor, t: Tensor, e: Tensor, K: int = 2, lam: float = 1.0):
        """The SA loss as SA-DPM has it: downward, uniform weights; the other noises are drawn."""
        noise = torch.cat([e[None], torch.randn(K - 1, *x.shape, dtype=x.dtype)])
        a = torch.cat([torch.ones(1), (1 - self.b.double()).cumprod(0)])
        simple, sa = sa_terms(lambda x, n: self.model(x, n - 1), x, t + 1, noise, a)
        return simple.mean() + lam * sa.mean()


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


# -- criteria


class OriginalSchedule:
    """NumPy tables; n is a NumPy array."""

    def __init__(self, N: int = PORT.N) -> None:
        self.betas = np.append(0.0, np.linspace(0.1 / N, 20 / N, N))
        self.cum_alphas = (1 - self.betas).cumprod()
        self.cum_betas = 1 - self.cum_alphas
        self.N = N

    def sample(self, x0):
        n = np.random.randint(1, self.N + 1, len(x0))  # noqa: NPY002 - as the hosts draw
        eps = torch.randn_like(x0)
        a, b = (over(torch.from_numpy(t[n] ** 0.5), x0) for t in (self.cum_alphas, self.cum_betas))
        return n, eps, a * x0 + b * eps


class OriginalWrapper:
    """(xn, n) -> output or pair; n becomes a tensor inside."""

    def __init__(self, model, typ, rescale_timesteps=True, shift1=False) -> None:
        self.model, self.typ = model, typ
        self.rate, self.shift = (1000 / PORT.N if rescale_timesteps else 1), int(shift1)

    def __call__(self, xn, n):
        assert isinstance(n, np.ndarray)
        t = torch.from_numpy((n - self.shift) * self.rate).to(xn.device)
        out = self.model(xn, t)
        return out.chunk(2, 1) if "_" in self.typ else out


class Original:
    """What the original criteria share: a dictionary of floats, logged after each step."""

    def start(self, model) -> None:
        self.statistics = {}
        self.optimizer = torch.optim.Adam(model.parameters(), lr=0.05)

    def update(self, data_loader) -> None:
        loss = self.objective(next(data_loader)).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.statistics["loss"] = loss.item()


class OriginalExtended(Original):
    def __init__(self, typ, model, **habits) -> None:
        self.schedule = OriginalSchedule()
        self.wrapper = OriginalWrapper(model, typ, **habits)
        self.start(model)

    def objective(self, v):
        n, eps, xn = self.schedule.sample(v)
        out = self.wrapper(xn, n)
        first = out[0] if "_" in self.wrapper.typ else out
        loss = (eps - first).square().flatten(1).sum(1)
        if self.wrapper.typ == "eps_eps2":
            loss = loss + (eps**2 - out[1]).square().flatten(1).sum(1)
        if self.wrapper.typ == "eps_epsc":
            loss = loss + ((eps - first).detach() ** 2 - out[1]).square().flatten(1).sum(1)
        self.statistics["objective"] = loss.mean().item()
        return loss


class OriginalAnalytic(Original):
    """A plain object; or a module, with the network among its own, as ``OriginalModule``."""

    def __init__(self, model, rescale_timesteps=True, shift1=False) -> None:
        super().__init__()
        tables = OriginalSchedule()
        self.draw, self.betas = tables.sample, tables.betas
        self.cum_alphas, self.cum_betas = tables.cum_alphas, tables.cum_betas
        self.eps_model, self.rescale_timesteps, self.shift1 = model, rescale_timesteps, shift1
        self.start(model)

    def objective(self, v):
        n, eps, xn = self.draw(v)
        t = torch.from_numpy(n - int(self.shift1)).to(v.device)
        t = t.double() * 1000 / PORT.N if self.rescale_timesteps else t
        loss = (eps - self.eps_model(xn, t)).square().flatten(1).sum(1)
        self.statistics["loss_simple"] = loss.mean().item()
        return loss


class OriginalModule(OriginalAnalytic, nn.Module):
    pass


def original(kind, model, **habits):
    """The stand-in for the original criterion of this kind."""
    if kind == "analytic":
        return OriginalAnalytic(model, **habits)
    return OriginalExtended(kind, model, **habits)


def port(kind, model, rescale_timesteps=True, shift1=False):
    """The port of the criterion of this kind."""
    states = {"model": model}, {"all": torch.optim.Adam(model.parameters(), lr=0.05)}, {}
    if kind == "analytic":
        return DDPMDSM(PORT.betas, rescale_timesteps, *states, shift1=shift1)
    wrapper = DTWrapper(model, kind, rescale_timesteps, shift1, PORT.N)
    if kind == "eps":
        return DTDSM(PORT, wrapper, *states)
    return {"eps_eps2": DTDSDM, "eps_epsc": DTDSDMErr}[kind](PORT, 1.0, wrapper, *states)


def seed(number: int = 0) -> None:
    """The states that the hosts draw their steps and noises from."""
    np.random.seed(number)  # noqa: NPY002
    torch.manual_seed(number)
