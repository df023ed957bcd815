"""The training steps that benchmarks.training compares, each with its network."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.machine import make_network
from sa_plugin import NoiseSchedule, SALoss, attach
from third_party.common.ema import EMA
from third_party.common.schedule import NamedSchedule
from third_party.common.step_options import StepOptions
from third_party.extended_analytic_dpm.methods import build_criterion

Step = Callable[[Tensor], None]
HOST = NamedSchedule("linear", 1000)
LOSS_SCHEDULE = NoiseSchedule.from_betas(HOST.betas[1:])
PLAIN_VARIANTS = ("plain", "host")
SA_VARIANTS = ("official", "series", "all", "one", "one_series", "price")
AS_THEY_ARE = ("host", "official")  # they take no options
OPTIONS = ("channels_last", "compile", "bf16")


@dataclass(frozen=True)
class Variant:
    """A way to make the step: its name, K (0: every K of --K) and its OPTIONS."""

    name: str
    K: int = 0
    options: frozenset[str] = frozenset()

    @property
    def title(self) -> str:
        """Its row in the table."""
        words = {
            "plain": "plain, ours",
            "host": "plain, host-style",
            "official": f"SA-{self.K}, official style",
            "series": f"SA-{self.K} all, series",
            "all": f"SA-{self.K} all, stacked",
            "one": f"SA-{self.K} one",
            "one_series": f"SA-{self.K} one, series",
            "price": f"SA-{self.K}, reuse, 1/{self.K} of the images",
        }
        return words[self.name] + "".join(f", {o}" for o in OPTIONS if o in self.options)

    @property
    def step_options(self) -> StepOptions:
        """How our step is computed."""
        has = self.options.__contains__
        precision = "bf16" if has("bf16") else "float32"
        return StepOptions(has("channels_last"), has("compile"), precision)

    def loss(self) -> SALoss | None:
        """The SA loss, if it has one."""
        if not self.K:
            return None
        backprop = "one" if self.name.startswith("one") else "all"
        price = self.name == "price"
        stack = self.name in ("all", "one") or price
        return SALoss(LOSS_SCHEDULE, K=self.K, backprop=backprop, stack=stack, reuse=price)

    def images(self, v: Tensor) -> Tensor:
        """What it trains on of a batch of the plain step; "price": as many network calls as that.

        Raises:
            ValueError: the batch has no K-th part.
        """
        if self.name != "price":
            return v
        if len(v) % self.K:
            raise ValueError(f"--batch must be a multiple of {self.K} for price, got {len(v)}")
        return v[: len(v) // self.K]


@dataclass(frozen=True)
class Weights:
    """A network with its optimiser and its average; variants with one memory layout share it.

    The variants take turns in training it. Nothing is restored between them, because times do not
    depend on the values of the weights.
    """

    model: nn.Module
    optimizer: Optimizer
    average: nn.Module

    def nbytes(self) -> int:
        """Bytes of the weights, their gradients and averages, and the optimiser's state."""
        own = [*self.model.parameters(), *self.average.parameters()]
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        states = [v for s in self.optimizer.state.values() for v in s.values()]
        return sum(v.nbytes for v in [*own, *grads, *states] if isinstance(v, Tensor))


def host_step(model: nn.Module) -> tuple[Step, Weights]:
    """The plain step as the hosts make it."""
    average = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, foreach=False, fused=False)
    statistics: dict[str, float] = {}

    def step(v: Tensor) -> None:
        n = np.random.choice(np.arange(1, HOST.N + 1), len(v))  # noqa: NPY002
        eps = torch.randn_like(v)
        a = torch.tensor(HOST.cum_alphas[n] ** 0.5, dtype=v.dtype).to(v.device).view(-1, 1, 1, 1)
        b = torch.tensor(HOST.cum_betas[n] ** 0.5, dtype=v.dtype).to(v.device).view(-1, 1, 1, 1)
        time_of_step = torch.tensor(n, dtype=v.dtype).to(v.device)
        loss = (eps - model(a * v + b * eps, time_of_step)).pow(2).flatten(1).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        statistics["loss"] = loss.item()
        with torch.no_grad():
            for kept, p in zip(average.parameters(), model.parameters(), strict=True):
                kept.mul_(0.9999).add_(p, alpha=1 - 0.9999)

    return step, Weights(model, optimizer, average)


class OurSteps:
    """Steps of the port's criterion and average, all on one network in one memory layout."""

    def __init__(self, model: nn.Module, options: StepOptions) -> None:
        criterion = build_criterion("pred_eps", HOST, model)
        criterion.configure(options)  # channels_last and compile change the network in place
        self._first = criterion
        self._ema = EMA(criterion.models)
        self.weights = Weights(model, criterion.optimizers["all"], self._ema.models["model"])

    def step(self, options: StepOptions, loss: SALoss | None) -> Step:
        """A step with its own criterion, with the SA term attached if ``loss`` is given."""
        criterion = build_criterion("pred_eps", HOST, self.weights.model)
        criterion.optimizers = self._first.optimizers
        criterion.lr_schedulers = self._first.lr_schedulers
        criterion.configure(replace(options, compile=False))  # __init__ has compiled it if wanted
        if loss is not None:
            attach(criterion, loss)

        def step(v: Tensor) -> None:
            criterion.update(iter([v]))
            self._ema.update()

        return step


def build_steps(
    rows: Sequence[Variant], network: str, device: str
) -> dict[Variant, tuple[Step, Weights]]:
    """(step, the weights that it trains) of every row."""
    shared: dict[tuple[bool, bool], OurSteps] = {}

    def build(row: Variant) -> tuple[Step, Weights]:
        if row.name == "host":
            return host_step(make_network(network, device))
        options = row.step_options
        layout = options.channels_last, options.compile
        if layout not in shared:
            shared[layout] = OurSteps(make_network(network, device), options)
        return shared[layout].step(options, row.loss()), shared[layout].weights

    return {row: build(row) for row in rows}
