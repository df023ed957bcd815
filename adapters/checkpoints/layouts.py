"""The layouts in which the original codes publish weights; docs/checkpoints.md describes them.

A layout holds state dicts under two names: "ema", the averaged weights, which are used to sample,
and "model", the weights of the last training step. A file with a single state dict does not say
which of the two it holds. Its state dict is called "weights" and is returned for both names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapters.checkpoints.diffusers_folders import (
    folder_of_diffusers,
    is_of_diffusers,
    read_diffusers,
)
from adapters.checkpoints.files import compact, read_file, write_file
from sa_files.reading import printable
from sa_files.tensors import entries_once
from third_party.common.checkpoints import Checkpoint, write_checkpoint

StateDict = dict[str, Tensor]

WHICH = ("ema", "model")
UNNAMED = "weights"
PREFIX = "module."  # torch.nn.DataParallel puts it before every name
PREFIXES = (PREFIX, "_orig_mod.")  # the second: torch.compile
AVERAGE = "ema_model."  # ema_pytorch puts it before the names of the average
# Where the average is, in the entry that is one: a state dict, or a list in the order of the model.
NESTED = ("shadow", "shadow_params", "state_dict", "model", "module")
HOST_FOLDERS = {"ema": "ema_models_states", "model": "models_states"}
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Published:
    """A checkpoint whose layout is known.

    Attributes:
        path: its file or folder.
        layout: the layout, in words.
        parts: readers of "ema" and "model", those that it has, or of "weights".
        entries: the names of what the file holds, in words.
    """

    path: Path
    layout: str
    parts: Mapping[str, Callable[[], Mapping[str, Tensor]]]
    entries: str = ""

    def state(self, which: str = "ema") -> StateDict:
        """One of its state dicts, names without prefix, in the order of the file.

        Raises:
            ValueError: it does not exist, or holds something that cannot be a network's weight.
        """
        if which not in WHICH:
            raise ValueError(f"which must be one of {WHICH}, got {which!r}")
        if which not in self.parts and UNNAMED not in self.parts:
            raise ValueError(
                f"{self.path} ({self.layout}) holds no {which!r} weights, only "
                f"{', '.join(map(repr, self.parts))}: choose with ``which`` or --which"
                + (f"; its entries are {self.entries}" if self.entries else "")
            )
        state = _weights(self.parts[which if which in self.parts else UNNAMED]())
        for name, tensor in state.items():
            _check_tensor(f"{self.path}: {name!r}", tensor)
        return {name: tensor.detach() for name, tensor in state.items()}


def read_published(path: Path) -> Published:
    """Open a checkpoint in any of the layouts.

    Raises:
        ValueError: the file or folder does not exist or is unreadable, or its layout is unknown.
    """
    if path.is_dir():
        folder = folder_of_diffusers(path)
        if folder is None:
            return _host_folder(path)
        return Published(path, "folder of diffusers", {UNNAMED: lambda: read_diffusers(folder)})
    if not path.exists():
        raise ValueError(f"there is no checkpoint {path}")
    content = read_file(path)
    if _is_state_dict(content):
        if is_of_diffusers(content):
            raise ValueError(
                f"{path} has the names of diffusers' UNets: give the folder, whose config.json "
                "says which network it is"
            )
        return Published(path, _name_plain(content), {UNNAMED: lambda: content})
    if isinstance(content, dict) and _is_state_dict(content.get("model_dict")):
        return _sa_dpm_training(path, content)
    if isinstance(content, list | tuple):
        return _listed(path, content)
    if isinstance(content, dict):
        return _named(path, content)
    raise ValueError(f"{path} holds a {type(content).__name__}: must hold a network's weights")


# ------------------------------------------------------------------------------- reading


def _name_plain(state: Mapping[str, Tensor]) -> str:
    return "module.-prefixed state dict" if _is_prefixed(state) else "plain state dict"


def _host_folder(path: Path) -> Published:
    """IT.ckpt/ with models_states/model.pth and ema_models_states/model.pth."""
    files = {which: _only_file(path / folder) for which, folder in HOST_FOLDERS.items()}
    parts = {which: _file_reader(file) for which, file in files.items() if file is not None}
    if not parts:
        folders = " or ".join(f"{folder}/model.pth" for folder in HOST_FOLDERS.values())
        raise ValueError(f"{path} is not a checkpoint folder of the host: it has no {folders}")
    return Published(path, "checkpoint folder of the host", parts)


def _only_file(folder: Path) -> Path | None:
    found = sorted(folder.glob("*.pth"))
    if len(found) > 1 and folder / "model.pth" in found:
        return folder / "model.pth"
    if len(found) > 1:
        raise ValueError(f"{folder} holds {len(found)} networks: give one of its files")
    return found[0] if found else None


def _file_reader(file: Path) -> Callable[[], Mapping[str, Tensor]]:
    def read() -> Mapping[str, Tensor]:
        content = read_file(file)
        if not _is_state_dict(content):
            raise ValueError(f"{file} must hold a state dict, name -> tensor")
        return content

    return read


def _sa_dpm_training(path: Path, content: dict[str, Any]) -> Published:
    """SA-DPM's ckpt_EPOCH.pth: the optimiser's state holds a parameter's average as ``ema``."""
    model, optimizer = content["model_dict"], content.get("optimizer")
    parts: dict[str, Callable[[], Mapping[str, Tensor]]] = {"model": lambda: model}
    states = optimizer.get("state") if isinstance(optimizer, dict) else None
    if isinstance(states, dict) and any("ema" in s for s in states.values() if isinstance(s, dict)):
        parts["ema"] = lambda: _optimizer_averages(path, optimizer, model)
    return Published(path, "training checkpoint of SA-DPM", parts, _short(content))


def _optimizer_averages(
    path: Path, optimizer: dict[str, Any], model: Mapping[str, Tensor]
) -> StateDict:
    """The averages by name: an optimiser numbers parameters in the order of the state dict."""
    try:
        order = [index for group in optimizer["param_groups"] for index in group["params"]]
        averages = [optimizer["state"][index]["ema"] for index in order]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: a parameter has no 'ema' in the optimizer's state") from error
    return _in_order(path, averages, model, "the optimizer's 'ema'")


def _in_order(path: Path, averages: list[Any], model: Mapping[str, Tensor], what: str) -> StateDict:
    """The averages, which are in the order of the model's entries, by its names."""
    if len(averages) != len(model):
        raise ValueError(
            f"{path}: {what} has {len(averages)} averages for the {len(model)} entries of the "
            "model, so it is not clear which belong together"
        )
    for (name, tensor), average in zip(model.items(), averages, strict=True):
        if not isinstance(average, Tensor) or average.shape != tensor.shape:
            raise ValueError(f"{path}: {what} for {name!r} has another shape")
    return dict(zip(model, averages, strict=True))


def _listed(path: Path, content: list[Any] | tuple[Any, ...]) -> Published:
    """DDIM's list: [model, optimiser, epoch, step] and, if there is one, the average."""
    states = [entry for entry in content if _is_state_dict(entry)]
    if len(states) not in (1, 2) or states[0] is not content[0]:
        raise ValueError(
            f"{path} holds a list with {len(states)} state dicts: must begin with the model's and "
            "may hold one more, its average"
        )
    parts = {name: lambda s=s: s for name, s in zip(("model", "ema"), states, strict=False)}
    return Published(path, "training checkpoint of DDIM", parts)


def _named(path: Path, content: dict[Any, Any]) -> Published:
    """State dicts by name: the average is the one with "ema" or "shadow" in its name."""
    called = {str(name): value for name, value in content.items()}
    averages = [n for n in called if _is_average(n) and isinstance(called[n], dict | list)]
    others = [n for n in called if not _is_average(n) and _is_state_dict(called[n])]
    if len(averages) > 1 or len(others) > 1 or not averages + others:
        raise ValueError(
            f"{path} holds the entries {_short(content)}, {len(averages + others)} of them state "
            "dicts: must hold one network's weights, and at most one average, with 'ema' in its "
            "name"
        )
    model = called[others[0]] if others else {}
    parts: dict[str, Callable[[], Mapping[str, Tensor]]] = {}
    if averages:
        parts["ema"] = lambda: _average(path, averages[0], called[averages[0]], model)
    if others:
        parts["model"] = lambda: model
    layout = printable(f"state dicts by name ({', '.join(averages + others)})")
    return Published(path, layout, parts, _short(content))


def _is_average(name: str) -> bool:
    return "ema" in name.lower() or "shadow" in name.lower()


def _average(path: Path, name: str, value: Any, model: Mapping[str, Tensor]) -> StateDict:
    """The average in the entry ``name``: a state dict, or inside it one or a list of tensors."""
    found = [value] if not isinstance(value, dict) else [value, *map(value.get, NESTED)]
    for part in found:
        if _is_state_dict(part):
            return part
        if isinstance(part, list) and part and all(isinstance(t, Tensor) for t in part):
            return _in_order(path, part, _weights(model), f"{name!r}")
    held = _short(value) if isinstance(value, dict) else f"a list of {len(value)}"
    raise ValueError(
        f"{path}: its entry {name!r} holds {held}: must be a state dict, or hold one, or a list "
        f"of tensors, as {' or '.join(map(repr, NESTED))}"
    )


def _is_state_dict(value: object) -> bool:
    return (
        isinstance(value, dict)
        and len(value) > 0
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())
    )


def _is_prefixed(state: Mapping[str, Tensor]) -> bool:
    return all(name.startswith(PREFIX) for name in state)


def _weights(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The network's weights, without what wrappers add: prefixes of all names, and counters."""
    if any(name.startswith(AVERAGE) for name in state):
        state = {n.removeprefix(AVERAGE): t for n, t in state.items() if n.startswith(AVERAGE)}
    state = {n: t for n, t in state.items() if n != "n_averaged"}  # torch.optim.swa_utils
    while prefix := next(
        (p for p in PREFIXES if state and all(n.startswith(p) for n in state)), ""
    ):
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def _check_tensor(what: str, tensor: Tensor) -> None:
    if tensor.layout != torch.strided or tensor.is_meta or tensor.dtype not in DTYPES:
        kind = "a tensor without data" if tensor.is_meta else f"{tensor.layout}, {tensor.dtype}"
        raise ValueError(f"{what} is {kind}: must be a dense floating-point tensor")
    try:
        tensor = entries_once(tensor)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error
    # Much faster than isfinite() on all entries: both ends are NaN if an entry is.
    if tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
        raise ValueError(f"{what} is not finite")


def _short(names: Mapping[Any, Any]) -> str:
    listed = ", ".join(repr(name) for name in list(names)[:8])
    return listed + (f" and {len(names) - 8} more" if len(names) > 8 else "") or "none"


# ------------------------------------------------------------------------------- writing


def write_plain(states: Mapping[str, StateDict], target: Path) -> None:
    """Write one plain state dict: our own layout, and that of the published files."""
    write_file(_single(states), target)


def write_sa_dpm(states: Mapping[str, StateDict], target: Path) -> None:
    """Write SA-DPM's model_EPOCH_ema.pth: the state dict with DataParallel's prefix."""
    write_file({PREFIX + name: tensor for name, tensor in _single(states).items()}, target)


def write_host(states: Mapping[str, StateDict], target: Path) -> None:
    """Write a checkpoint folder of the host, IT.ckpt, without the states to continue training."""
    folders = {"models": "model", "ema_models": "ema"}
    parts = {
        folder: {"model": compact(states.get(which) or _single(states))}
        for folder, which in folders.items()
    }
    states_of_training: dict[str, dict[str, Any]] = {"optimizers": {}, "lr_schedulers": {}}
    checkpoint = Checkpoint(host_iteration(target), parts | states_of_training)
    write_checkpoint(target.parent, checkpoint)


def host_iteration(target: Path) -> int:
    """The iteration in the name of a checkpoint folder of the host."""
    match = re.fullmatch(r"(\d+)\.ckpt", target.name)
    if match is None or str(int(match[1])) != match[1]:
        raise ValueError(
            f"OUT={str(target)!r}: the host's folder must be called IT.ckpt, where IT is a number "
            "of iterations, such as 500000.ckpt"
        )
    return int(match[1])


def _single(states: Mapping[str, StateDict]) -> StateDict:
    return next(iter(states.values()))


WRITERS: dict[str, Callable[[Mapping[str, StateDict], Path], None]] = {
    "plain": write_plain,
    "host": write_host,
    "sa_dpm": write_sa_dpm,
}
