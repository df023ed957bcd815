"""Load a published checkpoint into a network that it fits, or convert it to another layout."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from torch import nn

from adapters.checkpoints import layouts
from adapters.checkpoints.architecture import check_fits, cut_outputs, network_of_state
from adapters.checkpoints.layouts import UNNAMED, WRITERS, Published, StateDict, read_published


def load_published(path: str | os.PathLike[str], network: nn.Module, which: str = "ema") -> None:
    """Load a checkpoint in any published layout into ``network``: all of its weights, or none.

    Args:
        path: a file or a checkpoint folder of the host.
        network: receives the weights; it keeps its device and its precision.
        which: "ema" or "model", where the checkpoint has both.

    Raises:
        ValueError: the checkpoint cannot be read, is of no known layout, or does not fit.
    """
    network.load_state_dict(read_fitting(path, network, which))


def read_fitting(path: str | os.PathLike[str], network: nn.Module, which: str = "ema") -> StateDict:
    """Read what ``load_published`` would load. ``network`` is not changed; it may be on "meta"."""
    state = read_published(Path(path)).state(which)
    check_fits(state, network, path)
    return state


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    to: str = "plain",
    which: str | None = None,
    outputs: int | None = None,
    expected: Callable[[StateDict], nn.Module] | None = None,
    force: bool = False,
) -> str:
    """Write the checkpoint ``source``, in any layout, to ``target``; return a one-line summary.

    Args:
        source: a file or a checkpoint folder of the host.
        target: a new file, or for ``to="host"`` a new folder IT.ckpt.
        to: "plain" (ours), "host" or "sa_dpm".
        which: "ema" or "model". None: the average, or for ``to="host"`` both, each in its place.
        outputs: keep only this many channels of the network's output.
        expected: builds the network that a state dict must fit; None: the network that the state
            dict's names and shapes describe.
        force: replace an existing ``target``.

    Raises:
        ValueError: the checkpoint cannot be read, is of no known layout, or does not fit; or
            ``target`` must not be written. Nothing has been written then.
    """
    source, target = Path(source), Path(target)
    if to not in WRITERS:
        raise ValueError(f"to must be one of {tuple(WRITERS)}, got {to!r}")
    _check_target(source, target, to, force)
    published = read_published(source)
    states = _chosen(published, which, to)
    if outputs is not None:
        states = {name: cut_outputs(state, outputs) for name, state in states.items()}
    for state in states.values():
        network = network_of_state(state, source) if expected is None else expected(state)
        check_fits(state, network, source)
    WRITERS[to](states, target)
    kind, count = type(network).__name__, len(state)
    given = " and ".join(states)
    return f"{target}: {given} ({count} parameters, {kind}) of {source}, a {published.layout}"


def _chosen(published: Published, which: str | None, to: str) -> dict[str, StateDict]:
    """The state dicts to write, by name."""
    if UNNAMED in published.parts:
        return {UNNAMED: published.state(which or "ema")}
    if which is None and to == "host" and "ema" in published.parts:
        return {name: published.state(name) for name in published.parts}
    return {which or "ema": published.state(which or "ema")}


def _check_target(source: Path, target: Path, to: str, force: bool) -> None:
    """ValueError unless ``target`` may be written."""
    if to == "host":
        layouts.host_iteration(target)
    given, wanted = source.resolve(), target.resolve()
    if wanted in (given, *given.parents):
        raise ValueError(f"OUT={str(target)!r} is IN or holds it: give another path")
    if not os.path.lexists(target):
        return
    if not force:
        raise ValueError(f"OUT={str(target)!r} exists: give another path, or --force to replace it")
    replaceable = (target / "it.pth").is_file() if to == "host" else not target.is_dir()
    if not replaceable:
        kind = "checkpoint folder" if to == "host" else "file"
        raise ValueError(f"OUT={str(target)!r} exists and is not a {kind}: it is not replaced")
