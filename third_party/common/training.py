"""The training loop of the hosts: steps, average, log, checkpoints, and continuation.

A stopped run continues from its newest checkpoint. On the CPU its weights are then byte for byte
those of a run that was never stopped. The same holds for several processes (see distributed.py):
each has its own random states and its own part of every batch. When a run is asked to stop, it
saves a checkpoint of its last step. This checkpoint is removed after the next regular one.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from tqdm import tqdm

from sa_files.progress import bar_options

from . import distributed, random_states
from .checkpoints import Checkpoint, newest_checkpoint, prune, write_checkpoint
from .criterion_base import Batch, Criterion
from .ema import EMA
from .window import Window

logger = logging.getLogger(__name__)


class Batches(Protocol):
    """An endless iterator whose `position` counts the batches returned."""

    position: int

    def __next__(self) -> Batch: ...


class TrainingDiverged(ValueError):
    """The loss or a weight is no longer a finite number."""

    def __init__(self, what: str, iteration: int, last_good: Path | None) -> None:
        self.iteration = iteration
        self.last_good = last_good
        kept = f"the last good checkpoint is {last_good}" if last_good else "no checkpoint before"
        super().__init__(f"{what} is not finite at iteration {iteration}; {kept}")


class TrainingStopped(KeyboardInterrupt):
    """The run was asked to stop; it continues from the checkpoint `path`."""

    def __init__(self, iteration: int, path: Path) -> None:
        self.iteration = iteration
        self.path = path
        super().__init__(f"stopped after iteration {iteration}, which is saved in {path}")


class Trainer:
    """Trains `criterion` on `data` for `n_iters` steps, with checkpoints in `folder`/ckpts.

    ckpt_every     steps between checkpoints; the last step always has one
    log_every      steps between calls of on_log(iteration, {name: mean since the last call}); after
                   a continuation the iterations since the checkpoint are reported again
    before_step    called as before_step(iteration) before each step; iterations count from 1
    on_checkpoint  called as on_checkpoint(iteration, path) after each checkpoint; on_log and
                   on_checkpoint may draw random numbers: the random states are restored
    stop           called after each step; True: save and raise TrainingStopped. With several
                   processes one True is enough, and all stop after the same step
    seed           seed of the random states of a new run
    keep           number of checkpoints kept (the newest); None for all, as in the host
    """

    def __init__(
        self,
        criterion: Criterion,
        ema: EMA,
        data: Batches,
        folder: str | os.PathLike[str],
        *,
        n_iters: int,
        ckpt_every: int,
        log_every: int,
        before_step: Callable[[int], None] | None = None,
        on_log: Callable[[int, dict[str, float]], None] | None = None,
        on_checkpoint: Callable[[int, Path], None] | None = None,
        stop: Callable[[], bool] | None = None,
        seed: int = 1234,
        progress: bool = True,
        keep: int | None = None,
    ) -> None:
        counts = {"n_iters": n_iters, "ckpt_every": ckpt_every, "log_every": log_every}
        for name, count in (counts if keep is None else counts | {"keep": keep}).items():
            if count < 1:
                raise ValueError(f"{name}={count!r}: must be at least 1")
        self.criterion = criterion
        self.ema = ema
        self.data = data
        self.ckpts = Path(folder).absolute() / "ckpts"
        self.n_iters = n_iters
        self.ckpt_every = ckpt_every
        self.log_every = log_every
        self.before_step = before_step
        self.on_log = on_log
        self.on_checkpoint = on_checkpoint
        self.stop = stop
        self.seed = seed
        self.progress = progress
        self.keep = keep
        self._window = Window()
        self._best_val_loss = float("inf")
        self._last_good: Path | None = None

    def run(self) -> None:
        """Train from the newest checkpoint up to `n_iters`; a finished run is only loaded."""
        start = self._continue()
        self._set_train()
        agreement = distributed.Agreement()
        hidden = not (self.progress and distributed.is_first())
        bar = tqdm(total=self.n_iters, initial=start, unit="it", disable=hidden, **bar_options())
        with bar as progress:
            for iteration in range(start + 1, self.n_iters + 1):
                if self.before_step is not None:
                    self.before_step(iteration)
                self.criterion.update(self.data)
                self.ema.update()
                self._window.add(iteration, self.criterion.statistics)
                progress.update()
                stop = agreement(self.stop is not None and self.stop())
                self._after_step(iteration, progress, stop)
                if stop and iteration < self.n_iters:
                    distributed.gather(None)  # no process leaves before the first has written
                    raise TrainingStopped(iteration, self._last_good)

    def _after_step(self, iteration: int, progress: Any, stop: bool) -> None:
        log = iteration % self.log_every == 0
        regular = iteration % self.ckpt_every == 0 or iteration == self.n_iters
        # Only here does the loop wait for the device.
        if not (log or regular or stop or self._window.is_full):
            return
        self._stop_if_not_finite()
        if log:
            means = _mean_of(distributed.gather(self._window.means()))
            shown = {name: f"{mean:.4g}" for name, mean in means.items()}
            progress.set_postfix(shown, refresh=False)
            self._call(self.on_log, iteration, means)
        if regular or stop:
            self._last_good = self._save(iteration, interim=not regular)
            self._call(self.on_checkpoint, iteration, self._last_good)

    def _stop_if_not_finite(self) -> None:
        """Raise in all processes if any had a loss or gradient norm that is not finite."""
        watched = ["loss"] if self.criterion.scaler is not None else ["loss", "grad_norm"]
        self._window.read("loss")
        found = self._window.first_bad
        first = min((found[name] for name in watched if name in found), default=None)
        terms = sorted(name for name, iteration in found.items() if iteration == first)
        stops = [stop for stop in distributed.gather((first, terms)) if stop[0] is not None]
        if stops:
            iteration, terms = min(stops)
            others = ", ".join(name for name in terms if name not in watched)
            what = "the loss" if "loss" in terms else "the gradient's norm"
            what += f" (by its term {others})" if others else ""
            raise TrainingDiverged(what, iteration, self._last_good)

    def _save(self, iteration: int, *, interim: bool = False) -> Path:
        # A finite loss can still have an infinite gradient.
        if not all(_is_finite(m) for m in self._networks()):
            raise TrainingDiverged("a weight", iteration, self._last_good)
        own = {"random": random_states.capture(), "window": self._window.state_dict()}
        first, *others = distributed.gather(own)
        path = self.ckpts / f"{iteration}.ckpt"
        if not distributed.is_first():
            return path
        scaler = self.criterion.scaler
        resume = first | {"data_position": self.data.position, "others": others}
        checkpoint = Checkpoint(
            iteration=iteration,
            best_val_loss=self._best_val_loss,
            states={
                part: {name: owner.state_dict() for name, owner in owners.items()}
                for part, owners in self._parts().items()
            },
            resume=resume | ({} if scaler is None else {"scaler": scaler.state_dict()}),
            interim=interim,
        )
        write_checkpoint(self.ckpts, checkpoint)
        prune(self.ckpts, self.keep, upto=iteration)
        return path

    def _continue(self) -> int:
        """Load the newest checkpoint and return its iteration; 0 if there is no checkpoint."""
        self._window = Window()
        parts = self._parts()
        found = newest_checkpoint(
            self.ckpts, parts, limit=self.n_iters, set_aside=distributed.is_first()
        )
        if found is None:
            random_states.seed_everything(distributed.own_seed(self.seed))
            self.data.position = 0
            return 0
        path, checkpoint = found
        try:
            for part, owners in parts.items():
                for name, owner in owners.items():
                    owner.load_state_dict(checkpoint.states[part][name])
        except (RuntimeError, ValueError, KeyError) as error:
            raise ValueError(f"{path} is of another network or optimiser: {error}") from error
        self._best_val_loss = checkpoint.best_val_loss
        self._last_good = path
        self._resume(path, checkpoint)
        return checkpoint.iteration

    def _resume(self, path: Path, checkpoint: Checkpoint) -> None:
        """Restore the states other than the weights if the checkpoint has them for this run."""
        resume = checkpoint.resume or {}
        states = [resume, *resume.get("others", [])] if resume else []
        if len(states) != distributed.world_size():
            held = f"those of {len(states)} processes" if states else "no random states"
            logger.warning("%s holds %s: continuing with others", path, held)
            seed = self.seed + checkpoint.iteration
            random_states.seed_everything(distributed.own_seed(seed))
            self.data.position = checkpoint.iteration
        else:
            own = states[distributed.rank()]
            random_states.restore(own["random"])
            self._window.load_state_dict(own["window"])
            self.data.position = resume["data_position"]
        if self.criterion.scaler is not None and "scaler" in resume:
            self.criterion.scaler.load_state_dict(resume["scaler"])

    def _parts(self) -> dict[str, dict[str, Any]]:
        return {
            "models": self.criterion.models,
            "ema_models": self.ema.models,
            "optimizers": self.criterion.optimizers,
            "lr_schedulers": self.criterion.lr_schedulers,
        }

    def _networks(self) -> Iterable[nn.Module]:
        return [*self.criterion.models.values(), *self.ema.models.values()]

    def _set_train(self) -> None:
        for model in self.criterion.models.values():
            model.train()

    def _call(self, callback: Callable[..., None] | None, *arguments: Any) -> None:
        if callback is not None and distributed.is_first():
            with random_states.preserved():
                callback(*arguments)
            self._set_train()  # the callback may have set the network to eval mode


def _is_finite(model: nn.Module) -> bool:
    return all(torch.stack([p.detach().isfinite().all() for p in model.parameters()]).tolist())


def _mean_of(means: list[dict[str, float]]) -> dict[str, float]:
    """The mean over processes of every statistic."""
    return {name: sum(m[name] for m in means) / len(means) for name in means[0]}
