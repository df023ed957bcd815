"""Stand-ins for host training codes: their calling conventions around the loss, and no more.

Written from the papers (arXiv 2010.02502, 2102.09672, 2105.05233, 2206.00364, 2312.12431) and from
facts about the interfaces. The hosts of the recipes run one iteration up to the place where a
recipe has its lines. The criteria of Analytic-DPM and of its extension stand beside their ports.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum, auto
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


class MeanType(Enum):
    """What a network of improved- and guided-diffusion predicts."""

    PREVIOUS_X = auto()
    START_X = auto()
    EPSILON = auto()
    VELOCITY = auto()  # of a fork that none of us has seen


class LossType(Enum):
    """The losses of improved- and guided-diffusion."""

    MSE = auto()
    RESCALED_MSE = auto()
    KL = auto()
    RESCALED_KL = auto()


class Mapping:
    """The network of a respaced diffusion: its steps become original ones, and times."""

    def __init__(self, model: Callable[..., Tensor], times: Tensor) -> None:
        self.model, self.times = model, times

    def __call__(self, x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
        return self.model(x, self.times[t], **kwargs)


class GuidedDiffusion:
    """improved- and guided-diffusion: means, learned sigma, labels, rescaled and respaced time.

    Args:
        kept: the original steps of a respaced diffusion, from 0; default: all.
        rescale: whether the network's time is t * 1000 / T in floats.
    """

    original_steps = 50

    def __init__(
        self,
        kept: list[int] | None = None,
        rescale: bool = False,
        learned: bool = False,
        mean: str = "EPSILON",
        loss: str = "MSE",
    ) -> None:
        original = np.linspace(1e-4, 0.02, self.original_steps)
        self.respaced = kept is not None
        self.timestep_map = list(range(self.original_steps)) if kept is None else kept
        self.alphas_cumprod = np.cumprod(1 - original)[self.timestep_map]
        self.betas = 1 - self.alphas_cumprod / np.append(1.0, self.alphas_cumprod[:-1])
        self.model_mean_type, self.loss_type = MeanType[mean], LossType[loss]
        self.rescale, self.learned = rescale, learned

    def times(self) -> Tensor:
        """What the network gets for the steps 0..T-1."""
        original = torch.tensor(self.timestep_map)
        return original * (1000 / self.original_steps) if self.rescale else original

    def tables(self, t: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        """cum_alpha of t and of the step before, and beta, over x."""
        before = np.append(1.0, self.alphas_cumprod[:-1])
        arrays = self.alphas_cumprod, before, self.betas
        return tuple(over(torch.as_tensor(table)[t], x) for table in arrays)

    def previous(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The mean of q(x_{t-1} | x_t, x_0)."""
        a, before, beta = self.tables(t, x_t)
        first = before.sqrt() * beta / (1 - a) * x_start
        return first + (1 - beta).sqrt() * (1 - before) / (1 - a) * x_t

    def x_start_of(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The x_0 that an output means."""
        a, before, beta = self.tables(t, x_t)
        if self.model_mean_type is MeanType.START_X:
            return output
        if self.model_mean_type is MeanType.EPSILON:
            return (x_t - (1 - a).sqrt() * output) / a.sqrt()
        rest = (1 - beta).sqrt() * (1 - before) / (1 - a) * x_t
        return (output - rest) / (before.sqrt() * beta / (1 - a))

    def bound(self, output: Tensor, x_start: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The KL of one step, in bits, without what these codes do at the first."""
        output, *second = output.split(x_start.shape[1], 1)
        a, before, beta = self.tables(t, x_t)
        variance = (beta * (1 - before) / (1 - a)).clamp(min=1e-4)
        predicted = variance * second[0].tanh().exp() if self.learned else variance
        mean = self.previous(self.x_start_of(output, x_t, t), x_t, t)
        gap = (self.previous(x_start, x_t, t) - mean).square()
        kl = (predicted / variance).log() + (variance + gap) / predicted - 1
        return kl.mean((1, 2, 3)) / (2 * np.log(2))

    def training_losses(
        self,
        model: Callable[..., Tensor],
        x_start: Tensor,
        t: Tensor,
        model_kwargs: dict[str, Any] | None = None,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """{"loss": [B], ...}."""
        noise = torch.randn_like(x_start) if noise is None else noise
        a, *_ = self.tables(t, x_start)
        x_t = a.sqrt() * x_start + (1 - a).sqrt() * noise
        times = self.times()
        if self.respaced and not isinstance(model, Mapping):
            model, time = Mapping(model, times), t
        else:
            time = t if self.respaced else times[t]
        output = model(x_t, time, **(model_kwargs or {}))
        if self.loss_type.name.endswith("KL"):
            rate = len(self.betas) if self.loss_type is LossType.RESCALED_KL else 1
            return {"loss": rate * self.bound(output, x_start, x_t, t)}
        model_output = output[:, : x_start.shape[1]]
        target = {
            MeanType.PREVIOUS_X: self.previous(x_start, x_t, t),
            MeanType.START_X: x_start,
            MeanType.EPSILON: noise,
        }[self.model_mean_type]
        terms = {"mse": (target - model_output).square().mean((1, 2, 3))}
        terms["loss"] = terms["mse"]
        if self.learned:  # the bound's gradient reaches sigma alone
            frozen = torch.cat([model_output.detach(), output[:, x_start.shape[1] :]], 1)
            rate = len(self.betas) / 1000 if self.loss_type is LossType.RESCALED_MSE else 1
            terms["vb"] = rate * self.bound(frozen, x_start, x_t, t)
            terms["loss"] = terms["mse"] + terms["vb"]
        return terms


class Denoises(nn.Module):
    """D(x, sigma, labels, augment_labels=): the kept part of x, shifted by the labels."""

    sigma_data = 0.5

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.9, dtype=torch.float64))
        self.calls: list[int] = []

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        self.calls.append(len(x))
        sigma = sigma.reshape(-1, 1, 1, 1)
        kept = self.sigma_data**2 / (self.sigma_data**2 + sigma**2)
        guess = self.scale * kept * x
        for labels in (class_labels, augment_labels):
            if labels is not None:
                guess = guess + 0.1 * self.scale**2 * over(labels.mean(1), x)
        return guess


class EDM:
    """EDM's losses: labels [B, 3], augmentation labels [B, 9], weights, no reduction.

    Args:
        law: of sigma and of the weight: "edm" (log-normal), "vp" (to 152) or "ve" (0.02 to 100).
    """

    def __init__(self, law: str = "edm") -> None:
        self.net, self.law = Denoises(), law

    def _sigma(self, seed: int) -> Tensor:
        draw = normal(seed, SHAPE[0], 1, 1, 1)
        if self.law == "edm":
            return (1.2 * draw - 1.2).exp()
        u = torch.special.ndtr(draw)
        if self.law == "ve":
            return 0.02 * (100 / 0.02) ** u
        t = 1 + u * (1e-5 - 1)
        return ((19.9 * t**2 / 2 + 0.1 * t).exp() - 1).sqrt()

    def variables(self, seed: int = 0) -> dict[str, Any]:
        """What the loss has at hand where it calls its network."""
        sigma = self._sigma(seed + 2)
        weight = 1 / sigma**2
        if self.law == "edm":
            data = self.net.sigma_data
            weight = (sigma**2 + data**2) / (sigma * data) ** 2
        labels = torch.eye(3, dtype=torch.float64)[torch.arange(SHAPE[0]) % 3]
        augment_labels = normal(seed + 4, SHAPE[0], 9)
        y, n = images(seed, *SHAPE), normal(seed + 3, *SHAPE) * sigma
        names = ("net", "y", "n", "sigma", "weight", "labels", "augment_labels")
        return dict(
            zip(names, (self.net, y, n, sigma, weight, labels, augment_labels), strict=True)
        )


class KDiffusion(nn.Module):
    """k-diffusion's Denoiser: the network behind a preconditioning, and its own loss."""

    sigma_data, scales = 1.0, 1

    def __init__(self) -> None:
        super().__init__()
        self.inner_model, self.weighting = Denoises(), torch.ones_like

    def get_scalings(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        total = sigma**2 + self.sigma_data**2
        return self.sigma_data**2 / total, sigma * self.sigma_data / total.sqrt(), 1 / total.sqrt()

    def _inner(self, x: Tensor, sigma: Tensor, aug_cond: Tensor, class_cond: Tensor):
        c_skip, c_out, c_in = (over(c, x) for c in self.get_scalings(sigma))
        return self.inner_model(c_in * x, sigma, class_cond, aug_cond), c_skip, c_out

    def forward(self, x: Tensor, sigma: Tensor, **conditions: Tensor) -> Tensor:
        output, c_skip, c_out = self._inner(x, sigma, **conditions)
        return c_out * output + c_skip * x

    def loss(self, reals: Tensor, noise: Tensor, sigma: Tensor, **conditions: Tensor) -> Tensor:
        """[B]."""
        noised = reals + noise * over(sigma, reals)
        output, c_skip, c_out = self._inner(noised, sigma, **conditions)
        return (output - (reals - c_skip * noised) / c_out).square().mean((1, 2, 3))


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


class OriginalContinuous(Original):
    """Continuous times u of the VP SDE; the network's are 999 u, behind a wrapper or not."""

    def __init__(self, model, network="wrapper", numpy=False) -> None:
        self.model, self.network, self.numpy = model, network, numpy
        setattr(self, network, lambda x, t: model(x, self.network_times(t)))
        self.start(model)

    def network_times(self, t):
        t = torch.as_tensor(t)
        return t * 999 if self.network == "wrapper" else t

    def draw(self, v):
        u = np.random.uniform(1e-5, 1, len(v))  # noqa: NPY002
        return u, torch.randn_like(v)

    def noised(self, v, u, eps):
        integral = over(torch.as_tensor(0.1 * u + 19.9 / 2 * u**2), v)
        return (-integral / 2).exp() * v + (1 - (-integral).exp()).sqrt() * eps

    def objective(self, v):
        u, eps = self.draw(v)
        t = u if self.network == "wrapper" else 999 * u
        predicted = getattr(self, self.network)(
            self.noised(v, u, eps), t if self.numpy else torch.from_numpy(t)
        )
        return (eps - predicted).square().flatten(1).sum(1)


def original(kind, model, **habits):
    """The stand-in for the original criterion of this kind."""
    if kind == "analytic":
        return OriginalAnalytic(model, **habits)
    return OriginalExtended(kind, model, **habits)


def port(kind, model, rescale_timesteps=True, shift1=False, schedule=PORT):
    """The port of the criterion of this kind."""
    states = {"model": model}, {"all": torch.optim.Adam(model.parameters(), lr=0.05)}, {}
    if kind == "analytic":
        perturbation = schedule.input_perturbation
        return DDPMDSM(PORT.betas, rescale_timesteps, *states, shift1, False, perturbation)
    wrapper = DTWrapper(model, kind, rescale_timesteps, shift1, PORT.N)
    if kind == "eps":
        return DTDSM(schedule, wrapper, *states)
    return {"eps_eps2": DTDSDM, "eps_epsc": DTDSDMErr}[kind](schedule, 1.0, wrapper, *states)


def seed(number: int = 0) -> None:
    """The states that the hosts draw their steps and noises from."""
    np.random.seed(number)  # noqa: NPY002
    torch.manual_seed(number)
