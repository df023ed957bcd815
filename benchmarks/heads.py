"""Do the second outputs learn the optimal variances? python -m benchmarks.heads

For x_0 ~ N(mu, S) the optimal reverse variances are known. From t to s they are small(s, t) +
weight(s, t) diag Cov[x_0 | x_t], with
Cov[x_0 | x_t] = cum_beta_t S (cum_alpha_t S + cum_beta_t)^-1. NPR, SN and OCM are trained on this
data, as heads on a frozen trunk ("simple" and "complex"); NPR and SN also jointly with the noise.
The variances that the sampler would use are compared with the exact ones.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import trange

from configs.digits import get_config
from sa_plugin import NoiseSchedule
from sa_plugin.sampling.jacobian import Probed
from sa_plugin.sampling.reverse import ReverseCoefficients, reverse_moments
from third_party.common.ema import EMA
from third_party.common.nets.by_name import build_network
from third_party.common.schedule import NamedSchedule
from third_party.common.wrapper import DTWrapper
from third_party.extended_analytic_dpm.methods import build_criterion, get_method

SHAPE = (1, 8, 8)
STEPS = 10
METHODS = {  # the variance, the host's method, the head's mode ("": no head)
    "NPR, simple head": ("npr", "pred_eps_epsc_pretrained", "simple"),
    "SN, simple head": ("sn", "pred_eps_eps2_pretrained", "simple"),
    "NPR, complex head": ("npr", "pred_eps_epsc_pretrained", "complex"),
    "SN, complex head": ("sn", "pred_eps_eps2_pretrained", "complex"),
    "NPR, joint": ("npr", "pred_eps_epsc", ""),
    "SN, joint": ("sn", "pred_eps_eps2", ""),
    "OCM, simple head": ("ocm", "pred_eps_ocm_pretrained", "simple"),
    "OCM, complex head": ("ocm", "pred_eps_ocm_pretrained", "complex"),
}
PROBES = 16


@dataclass(frozen=True)
class Problem:
    """The data's mean and covariance, float64 [64] and [64, 64], and the number of steps N.

    ``root``: a matrix whose product with its transpose is S.
    """

    mu: Tensor
    S: Tensor
    root: Tensor
    N: int = 1000

    @classmethod
    def two_halves(cls, reach: float = 0.0) -> Problem:
        """A left half with small variance and a right half with large variance.

        The correlation of two pixels falls by e where their distance grows by ``reach`` pixels; 0:
        they are independent.
        """
        size = SHAPE[-1]
        y, x = (torch.arange(size**2) // size, torch.arange(size**2) % size)
        sigma = torch.where(x < size // 2, 0.02, 0.3).double().sqrt()
        mu = torch.linspace(-0.5, 0.5, size**2, dtype=torch.float64)
        if not reach:
            return cls(mu, sigma.square().diag(), sigma.diag())
        places = torch.stack((y, x), dim=1).double()
        S = sigma[:, None] * (-torch.cdist(places, places) / reach).exp() * sigma
        return cls(mu, S, torch.linalg.cholesky(S))

    def batches(self, size: int, seed: int) -> Iterator[Tensor]:
        """Endless x_0, float32 [size, 1, 8, 8]."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            noise = torch.randn(size, len(self.mu), generator=generator, dtype=torch.float64)
            yield (self.mu + noise @ self.root.T).float().view(size, *SHAPE)

    def steps(self) -> list[tuple[int, ReverseCoefficients]]:
        """(t, coefficients as 0-d tensors) of a DDPM sampler of STEPS steps, t descending."""
        timesteps = np.linspace(1, self.N, STEPS).round().astype(int).tolist()
        tables = ReverseCoefficients.build(NoiseSchedule.linear(self.N), timesteps).stack()
        columns = (torch.from_numpy(column.copy()) for column in tables.T)
        return [
            (t, ReverseCoefficients.unstack(column))
            for t, column in zip(reversed(timesteps), columns, strict=True)
        ]

    def exact(self, c: ReverseCoefficients) -> Tensor:
        """The optimal reverse variance of each pixel."""
        a, b = c.a**2, c.b**2
        of_x_t = a * self.S + b * torch.eye(len(self.S), dtype=torch.float64)
        covariance = b * torch.linalg.solve(of_x_t, self.S)
        return c.small + c.cov_weight * covariance.diagonal().view(SHAPE)


def train(
    problem: Problem,
    method: str,
    iterations: int,
    *,
    trunk: dict[str, Tensor] | None = None,
    head_mode: str = "simple",
    batch_size: int = 128,
    lr: float = 1e-3,
    seed: int = 0,
) -> nn.Module:
    """The averaged network of one of the host's methods, in eval mode."""
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002, the host draws its steps from this state
    config, chosen = get_config(), get_method(method)
    network = build_network(
        config.network.name,
        config.network.args.to_dict(),
        SHAPE,
        trunk_channels=chosen.trunk_channels(1),
        head_channels=chosen.head_channels(1),
        head_mode=head_mode,
    )
    schedule = NamedSchedule("linear", problem.N)
    criterion = build_criterion(method, schedule, network, trunk=trunk, lr=lr)
    ema = EMA(criterion.models, 0.99)
    data = problem.batches(batch_size, seed)
    network.train()
    for _ in trange(iterations, desc=method, disable=None):
        criterion.update(data)
        ema.update()
    return ema.models["model"].eval()


@torch.no_grad()
def reverse_variances(
    problem: Problem, network: Callable[..., Any], variance: str, n_images: int = 1000
) -> Tensor:
    """The sampler's variances as means over x_t: float64 [STEPS, 1, 8, 8], t descending.

    ``network``: (x, n) -> (eps, second output).
    """
    x0 = next(problem.batches(n_images, seed=1)).double()
    generator = torch.Generator().manual_seed(2)
    means = []
    for t, c in problem.steps():
        eps = torch.randn(x0.shape, generator=generator, dtype=torch.float64)
        x = c.a * x0 + c.b * eps
        first, second = network(x.float(), torch.full((n_images,), t))
        moments = reverse_moments(c, x, first.double(), second.double(), variance=variance)
        means.append(moments.variance.mean(0))
    return torch.stack(means)


def learnt(
    problem: Problem,
    iterations: int,
    names: Sequence[str] = tuple(METHODS),
    *,
    head_iterations: int | None = None,
    head_lr: float = 1e-3,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Reverse variances by name: of heads, of the frozen network by probes, fixed and exact ones.

    ``iterations`` counts those of the trunk and of joint training. ``head_iterations`` counts those
    of each head; default: ``iterations``.
    """
    trunk = None
    columns = [c for _, c in problem.steps()]
    found = {
        "exact": torch.stack([problem.exact(c) for c in columns]),
        "DDPM small": torch.stack([c.small.expand(SHAPE) for c in columns]),
        "DDPM big": torch.stack([c.big.expand(SHAPE) for c in columns]),
    }
    if any(METHODS[name][2] for name in names):
        frozen = train(problem, "pred_eps", iterations, seed=seed)
        trunk = frozen.state_dict()
        probed = Probed(
            DTWrapper(frozen, "eps", N=problem.N),
            NoiseSchedule.linear(problem.N),
            probes=PROBES,
            generator=torch.Generator().manual_seed(seed),
        )
        found[f"{PROBES} probes"] = reverse_variances(problem, probed, "ocm")
    for name in names:
        variance, method, mode = METHODS[name]
        if mode:
            options = {"trunk": trunk, "head_mode": mode, "lr": head_lr, "seed": seed}
            network = train(problem, method, head_iterations or iterations, **options)
        else:
            network = train(problem, method, iterations, seed=seed)
        wrapper = DTWrapper(network, get_method(method).typ, N=problem.N)
        found[name] = reverse_variances(problem, wrapper, variance)
    return found


def errors(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Mean over pixels of |log(variance / exact)| at each step, [STEPS], last step included."""
    exact = found["exact"]
    return {
        name: (values / exact).log().abs().flatten(1).mean(1)
        for name, values in found.items()
        if name != "exact"
    }


def table(problem: Problem, found: dict[str, Tensor]) -> str:
    """Markdown: each method's error at some steps and its mean over all steps but the last.

    At the last step, to x_0, the variance of "DDPM small" is zero and has no relative error.
    """
    timesteps = [t for t, _ in problem.steps()]
    shown = [0, 2, 4, 6, 8]
    head = " | ".join(f"t = {timesteps[i]}" for i in shown)
    lines = [f"| variance | {head} | mean |", "|---|" + "---:|" * (len(shown) + 1)]
    for name, error in errors(found).items():
        cells = [error[i] for i in shown] + [error[:-1].mean()]
        lines.append(f"| {name} | " + " | ".join(f"{100 * cell:.1f} %" for cell in cells) + " |")
    return "\n".join(lines)


def draw(problem: Problem, found: dict[str, Tensor], path: Path) -> None:
    """The variance over t, relative to the exact one, for the two halves of the image."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    timesteps = [t for t, _ in problem.steps()][:-1]
    half = SHAPE[-1] // 2
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained")
    for axis, columns, title in zip(
        axes,
        (slice(0, half), slice(half, None)),
        ("left half, S = 0.02", "right half, S = 0.3"),
        strict=True,
    ):
        for name, values in found.items():
            ratio = (values / found["exact"])[:-1, ..., columns].flatten(1).mean(1)
            axis.plot(timesteps, ratio, **_style(name), label=name, markersize=4, linewidth=1.3)
        axis.set(title=title, xlabel="t", yscale="log", ylim=(0.09, 11))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("reverse variance / the exact one")
    axes[1].legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _style(name: str) -> dict[str, str]:
    """Black for variances that are not learnt; a colour per way of training, a mark per method."""
    known = {"exact": "-", "DDPM small": ":", "DDPM big": "--", f"{PROBES} probes": "-."}
    if name in known:
        return {"color": "black", "linestyle": known[name]}
    colours = {"simple head": "#D55E00", "complex head": "#009E73", "joint": "#0072B2"}
    method, training = name.split(", ")
    style = {"NPR": ("-", "o"), "SN": ("--", "s"), "OCM": ("-.", "^")}[method]
    return {"color": colours[training], "linestyle": style[0], "marker": style[1]}


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.heads", description=__doc__)
    parser.add_argument("--iterations", type=int, default=600, help="for a noise network")
    parser.add_argument("--head_iterations", type=int, help="for a head; default: --iterations")
    parser.add_argument("--head_lr", type=float, default=1e-3)
    parser.add_argument("--reach", type=float, default=0.0, help="of the correlation, in pixels")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--out", type=Path, default=Path("docs/figures/heads_gaussian.png"))
    options = parser.parse_args(argv)
    problem = Problem.two_halves(options.reach)
    found = learnt(
        problem,
        options.iterations,
        options.methods,
        head_iterations=options.head_iterations,
        head_lr=options.head_lr,
    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    draw(problem, found, options.out)
    print(table(problem, found))


if __name__ == "__main__":
    main()
