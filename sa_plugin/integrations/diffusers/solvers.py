"""The fast solvers of diffusers, in place of the steps of ``Sampler``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from diffusers import (
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    IPNDMScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from sa_plugin._arrays import bound
from sa_plugin._checks import check_choice, check_whole
from sa_plugin._tensors import FirstBad
from sa_plugin.prediction import to_eps, to_x0
from sa_plugin.sampling.reverse import split_output
from sa_plugin.sampling.sampler import ReverseStep, Sampler
from sa_plugin.sampling.trajectory import resolve_trajectory
from sa_plugin.schedule import NoiseSchedule

_GIVEN = {"prediction_type": "v_prediction"}
# DPM-Solver++ is the "2M" of the papers; 3 is what diffusers recommends without guidance for the
# others. iPNDM is of v, and has no such option.
SOLVERS: dict[str, Callable[..., Any]] = {
    "ddim": partial(DPMSolverMultistepScheduler, solver_order=1, **_GIVEN),
    "dpm_solver": partial(DPMSolverMultistepScheduler, solver_order=2, **_GIVEN),
    "unipc": partial(UniPCMultistepScheduler, solver_order=3, **_GIVEN),
    "deis": partial(DEISMultistepScheduler, solver_order=3, **_GIVEN),
    "ipndm": IPNDMScheduler,
}
_NEARLY_ZERO = 1e-6  # the last noise level of DEIS, which takes its logarithm


class SolverSampler(Sampler):
    """Draws images by a solver of the probability-flow ODE; arguments and draws as ``Sampler``.

    A chain is one call of the network for each step, and ends at x_0. It is deterministic: image i
    depends on its x_N alone. The first step is DDIM's, and so is the last one but for "ipndm"; the
    one of diffusers' DEIS is so with fewer than 15 steps.

    The noise levels are those of ``schedule`` in float64. From ``trained_betas`` diffusers would
    cumulate them in float32, and its IPNDMScheduler would take the betas themselves for noise
    levels. Between steps "dpm_solver" and "ddim" round to float32.

    Args:
        solver: "dpm_solver" (DPM-Solver++(2M), arXiv 2211.01095), "unipc" (UniPC-3, 2302.04867),
            "deis" (tAB-DEIS-3, 2204.13902), "ipndm" (order 4 for steps of one length, 2202.09778)
            or "ddim", for comparison at the same steps.
        steps: calls of the network, 1..N-1.
        trajectory: a kind of ``choose_timesteps`` for steps + 1 steps, of which the smallest is
            left out: a call there would remove next to nothing. "linear" is diffusers' "linspace".
            Or an ascending list, which is visited as it is.
        clip_x0: cut the predicted x_0 to [-1, 1] before the solver gets it. Its eps follows, so
            that both still make x_t; in ``Sampler``'s DDIM eps stays. The solver's own
            extrapolation is not cut.
        predicts, device, channels_last, autocast, compile: as in ``Sampler``.

    Raises:
        ValueError: an unknown or impossible option.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        schedule: NoiseSchedule,
        *,
        solver: str,
        steps: int | None = None,
        trajectory: str | Sequence[int] = "linear",
        predicts: str = "eps",
        clip_x0: bool = True,
        device: torch.device | str | None = None,
        channels_last: bool = False,
        autocast: str | None = None,
        compile: bool = False,
    ) -> None:
        check_choice("solver", solver, tuple(SOLVERS))
        if isinstance(trajectory, str):
            check_whole("steps", steps, 1, schedule.N - 1)
            trajectory = resolve_trajectory(schedule, int(steps or 0) + 1, trajectory)[1:]
        super().__init__(
            model,
            schedule,
            forward="ddim",
            steps=steps,
            trajectory=resolve_trajectory(schedule, steps, trajectory),
            predicts=predicts,
            clip_x0=clip_x0,
            device=device,
            channels_last=channels_last,
            autocast=autocast,
            compile=compile,
        )
        self.solver = solver

    def scheduler(self) -> Any:
        """A new scheduler of diffusers, for one chain: it keeps the outputs of the last steps."""
        descending = self.timesteps[::-1]
        made = SOLVERS[self.solver](num_train_timesteps=self.schedule.N)
        made.set_timesteps(len(descending))
        visited = torch.tensor([*descending, 0])
        made.timesteps = visited[:-1] - 1
        a, b = (
            torch.from_numpy(table)[visited] ** 0.5
            for table in (self.schedule.cum_alphas.copy(), self.schedule.cum_betas.copy())
        )
        if self.solver == "ipndm":
            made.alphas, made.betas = a, b
        else:
            made.sigmas = b / a
        if self.solver == "deis":
            made.sigmas[-1] = _NEARLY_ZERO
        return made

    def _chain(
        self, x: Tensor, draw: Any, signs: Any, kwargs: dict[str, Any]
    ) -> Iterator[ReverseStep]:
        scheduler, first_bad = self.scheduler(), FirstBad()
        descending = self.timesteps[::-1]
        pairs = zip(descending, [*descending[1:], 0], strict=True)
        for c, (t, s) in zip(self._steps, pairs, strict=True):
            with torch.no_grad() if torch.is_grad_enabled() else nullcontext():
                n = torch.full((len(x),), t, dtype=torch.int64, device=x.device)
                output, _ = split_output(self._network(x, n, **kwargs), x, "small")
                first_bad.note(t, output)
                x0 = to_x0(output, x, c.a, c.b, self._options["predicts"])
                if self._options["clip_x0"]:
                    x0 = bound(x0, -1.0, 1.0)
                eps = to_eps(x0, x, c.a, c.b, "x0")
                if s == 0:
                    scheduler.lower_order_nums = 0  # as if no step came before
                x_s = scheduler.step(c.a * eps - c.b * x0, t - 1, x).prev_sample
            yield ReverseStep(t, s, x, x_s, x0, eps)
            x = x_s
        first_bad.refuse()
