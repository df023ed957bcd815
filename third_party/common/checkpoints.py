"""Checkpoints in the host's layout: one folder a checkpoint, one file a state.

    ckpts/IT.ckpt/it.pth  best_val_loss.pth
                  models_states/NAME.pth      ema_models_states/NAME.pth
                  optimizers_states/NAME.pth  lr_schedulers_states/NAME.pth
                  resume.pth                  (not in the host's: needed to continue exactly)
                  interim                     (not in the host's: removed after the next one)

A folder is written under a temporary name and renamed when it is complete. Every file is read with
`weights_only=True`, so an untrusted checkpoint cannot run code.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sa_files.reading import UnreadableFile, reading
from sa_files.tensors import load_tensors
from sa_files.whole import is_whole
from sa_files.writing import sync_names

logger = logging.getLogger(__name__)

PARTS = ("models", "ema_models", "optimizers", "lr_schedulers")
INTERIM = "interim"  # an empty file in the folder
TEMPORARY = ".tmp"  # ends the name of a folder that is not complete
DAMAGED = ".damaged"  # ends the name of a checkpoint that was set aside
_FOLDER = re.compile(r"(\d+)\.ckpt")


class DamagedCheckpoint(UnreadableFile):
    """A checkpoint that cannot be read, or that lacks a file."""


@dataclass
class Checkpoint:
    """The state after `iteration` steps."""

    iteration: int
    states: dict[str, dict[str, Any]]  # one of PARTS -> name -> state dict
    best_val_loss: float = float("inf")
    resume: dict[str, Any] | None = field(default=None)  # None: not written by us
    interim: bool = False  # saved because the run was stopped between two regular checkpoints


def write_checkpoint(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write `folder`/IT.ckpt and return its path; a checkpoint of that name is replaced.

    If the disk is full, an OSError is raised and the incomplete checkpoint is removed.
    """
    path = folder / f"{checkpoint.iteration}.ckpt"
    with _whole(path) as temporary:
        _write_states(temporary, checkpoint)
    return path


def copy_checkpoint(path: Path, folder: Path) -> Path:
    """Copy the checkpoint `path` into `folder`, completely or not at all; return the new path."""
    copy = folder / path.name
    with _whole(copy) as temporary:
        shutil.copytree(path, temporary)
        for file in temporary.rglob("*.pth"):
            with file.open("rb") as copied:
                os.fsync(copied.fileno())
    return copy


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A folder that is renamed to `path` once it is complete; removed on an OSError."""
    temporary = path.with_name(path.name + TEMPORARY)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        yield temporary
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if path.exists():
        # Only a damaged checkpoint is ever replaced: the run would have continued an intact one.
        shutil.rmtree(path)
    temporary.rename(path)
    sync_names(path.parent)


def _write_states(temporary: Path, checkpoint: Checkpoint) -> None:
    temporary.mkdir(parents=True)
    _save(checkpoint.iteration, temporary / "it.pth")
    _save(checkpoint.best_val_loss, temporary / "best_val_loss.pth")
    if checkpoint.resume is not None:
        _save(checkpoint.resume, temporary / "resume.pth")
    for part in PARTS:
        (temporary / f"{part}_states").mkdir()
        for name, state in checkpoint.states[part].items():
            _save(state, temporary / f"{part}_states" / f"{name}.pth")
    if checkpoint.interim:
        (temporary / INTERIM).touch()


def read_checkpoint(path: Path, names: Mapping[str, Iterable[str]]) -> Checkpoint:
    """Read the states called `names` (one of PARTS -> names) from the folder `path`."""
    iteration = _load_number(path / "it.pth")
    match = _FOLDER.fullmatch(path.name)
    if match and iteration != int(match[1]):
        raise DamagedCheckpoint(f"{path}: it.pth holds {iteration!r}")
    resume = path / "resume.pth"
    return Checkpoint(
        iteration=iteration,
        best_val_loss=float(_load_number(path / "best_val_loss.pth")),
        states={
            part: {
                name: _load_dict(path / f"{part}_states" / f"{name}.pth") for name in names[part]
            }
            for part in PARTS
        },
        resume=_load_dict(resume) if resume.exists() else None,
        interim=(path / INTERIM).exists(),
    )


def checkpoint_paths(folder: Path) -> dict[int, Path]:
    """The checkpoints in `folder` by iteration, newest first, damaged ones included."""
    entries = folder.iterdir() if folder.is_dir() else ()
    found = {int(m[1]): path for path in entries if (m := _FOLDER.fullmatch(path.name))}
    return dict(sorted(found.items(), reverse=True))


def average_of(path: Path) -> Path:
    """The averaged weights in the checkpoint `path`: a plain state dict."""
    return path / "ema_models_states" / "model.pth"


def is_complete(path: Path) -> bool:
    """Whether a checkpoint of one network called `model` has all its files, and none is cut.

    The states of the optimiser belong to `resume.pth`; the host's checkpoints and converted weights
    have none. The files' content is not read.
    """
    weights = ("models_states/model.pth", "ema_models_states/model.pth")
    training = ("optimizers_states/all.pth", "lr_schedulers_states/all.pth")
    needed = ("it.pth", "best_val_loss.pth", *weights)
    if (path / "resume.pth").exists():
        needed += training
    return all(map(is_whole, {*(path / name for name in needed), *path.rglob("*.pth")}))


def newest_checkpoint(
    folder: Path, names: Mapping[str, Iterable[str]], limit: int, *, set_aside: bool = True
) -> tuple[Path, Checkpoint] | None:
    """The newest readable checkpoint of at most `limit` iterations; None if there is no checkpoint.

    Damaged checkpoints after it are reported and, with `set_aside`, renamed to IT.ckpt.damaged. If
    all are damaged, an error is raised instead of starting the run anew.
    """
    damaged: dict[Path, DamagedCheckpoint] = {}
    for iteration, path in checkpoint_paths(folder).items():
        if iteration > limit:
            continue
        try:
            checkpoint = read_checkpoint(path, names)
        except DamagedCheckpoint as error:
            damaged[path] = error
            continue
        for other, error in damaged.items():
            aside = other.with_name(other.name + DAMAGED)
            logger.warning("%s; set aside as %s, going on from %s", error, aside.name, path.name)
            if set_aside:
                shutil.rmtree(aside, ignore_errors=True)
                other.rename(aside)
        return path, checkpoint
    if damaged:
        raise DamagedCheckpoint(
            f"none of the {len(damaged)} checkpoints in {folder} can be read: move them away to "
            f"train from the start ({next(iter(damaged.values()))})"
        )
    return None


def prune(folder: Path, keep: int | None, upto: int) -> None:
    """Remove all but the `keep` newest checkpoints of at most `upto` iterations; None keeps all.

    Interim checkpoints of fewer iterations are always removed, and so are incomplete folders that a
    killed run left.
    """
    _remove_temporary(folder)
    there = {it: path for it, path in checkpoint_paths(folder).items() if it <= upto}
    passing = [path for it, path in there.items() if it < upto and (path / INTERIM).exists()]
    done = [path for path in there.values() if path not in passing]
    for path in passing + ([] if keep is None else done[keep:]):
        path.rename(path.with_name(path.name + TEMPORARY))
    _remove_temporary(folder)


def _remove_temporary(folder: Path) -> None:
    for path in folder.glob(f"*.ckpt{TEMPORARY}"):
        shutil.rmtree(path)


def read_state(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """A plain state dict from one file; published checkpoints have this form."""
    file = Path(path).absolute()
    if not file.is_file():
        raise UnreadableFile(
            f"no checkpoint at {file}: give the path of a state dict saved as .pth"
        )
    try:
        with reading(file, "is damaged or holds more than weights") as opened:
            state = load_tensors(opened)
    except UnreadableFile as error:
        raise UnreadableFile(
            f"{error}. If a run made it, remove its folder IT.ckpt, and the run's command makes it "
            "again. If you trust its origin otherwise, convert it: "
            'python -c "import torch; '
            f"torch.save(torch.load('{file}', map_location='cpu', weights_only=False)['KEY'], "
            "'weights.pth')\", KEY being the entry with the state dict"
        ) from error
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        found = f"the entries {list(state)[:8]}" if isinstance(state, Mapping) else type(state)
        raise UnreadableFile(f"{file} holds {found}: must be a plain state dict, name -> tensor")
    return dict(state)


def _save(value: Any, path: Path) -> None:
    with open(path, "wb") as file:
        try:
            torch.save(value, file)
        except RuntimeError as error:  # torch's error for a failed write; it lacks the reason
            said = _first_line(error)
            raise OSError(f"{path} cannot be written; is the disk full? ({said})") from error
        file.flush()
        os.fsync(file.fileno())  # or a power cut after the rename could leave empty files


def _load(path: Path) -> Any:
    if not path.is_file():
        raise DamagedCheckpoint(f"{path} is missing")
    try:
        with reading(path, "is damaged") as file:
            return load_tensors(file)
    except UnreadableFile as error:
        raise DamagedCheckpoint(str(error)) from error


def _load_number(path: Path) -> int | float:
    value = _load(path)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DamagedCheckpoint(f"{path} holds a {type(value).__name__}: must hold a number")
    return value


def _load_dict(path: Path) -> dict[str, Any]:
    value = _load(path)
    if not isinstance(value, dict):
        raise DamagedCheckpoint(f"{path} holds a {type(value).__name__}: must hold a state dict")
    return value


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
