"""The folder of a run, and what another configuration replaces in it.

``config.json`` is the configuration of all results in the folder. A run of another one keeps the
results that rest on nothing that changed (``adapters.experiment.identity``). It moves the others to
``replaced/DIGEST/``, with the configuration that made them. Only the noise network stays: a
configuration of another noise network is refused.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ml_collections import FrozenConfigDict

from adapters.experiment.config import (
    CONFIG_FILE,
    check_empty,
    config_path,
    flatten,
    read_config,
    record,
    refuse_differing,
    reserved,
    with_defaults,
    write_config,
)
from adapters.experiment.identity import Identity, continues, digest, identity_of, with_effect
from adapters.experiment.tables import headline_metrics, read_metrics
from adapters.hosts import PROCESSES
from sa_files.reading import UnreadableFile
from third_party.common.checkpoints import checkpoint_paths

logger = logging.getLogger(__name__)

REPLACED = "replaced"
METRICS_FILE = "metrics.json"
TABLE_FILE = "table.md"
OVERVIEW_FILE = "samples.png"
# What other commands make of a run's networks.
OF_OTHER_COMMANDS = ("likelihood.json", "likelihood", "pictures")


@dataclass(frozen=True)
class Change:
    """The results that a run replaces in its folder.

    Attributes:
        paths: files and folders in the run's folder.
        target: the folder to which they are moved.
        made_by: the configuration that made them, resolved.
    """

    paths: tuple[Path, ...] = ()
    target: Path = Path()
    made_by: dict[str, Any] | None = None

    def __str__(self) -> str:
        names = [path.name for path in self.paths if path.parent.name != "samples"]
        images = len(self.paths) - len(names)
        names += [f"{images} files of samples"] if images else []
        return f"{', '.join(names)}: made again, as they rest on what changed; now in {self.target}"

    def make(self) -> None:
        """Move the results away, each at once; what is interrupted is done by the next call."""
        if not self.paths:
            return
        logger.info("replaced: %s", self)
        write_config(self.target / CONFIG_FILE, self.made_by)
        workdir = self.target.parent.parent
        for path in self.paths:
            target = self.target / path.relative_to(workdir)
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.is_dir():
                shutil.rmtree(target)
            path.replace(target)


def change_by(workdir: Path, config: FrozenConfigDict) -> Change:
    """What a run of ``config`` replaces in ``workdir``; nothing is written.

    Raises:
        ValueError: the folder holds another noise network, or no run but other files.
    """
    path = config_path(workdir)
    if not path.exists():
        check_empty(workdir)
        return Change()
    resolved = _resolved(config)

    def read(found: dict[str, Any]) -> tuple[dict[str, Any], Identity]:
        found = with_defaults(found, resolved)
        return found, identity_of(FrozenConfigDict(found))

    made_by, there = read_config(path, read)
    here = identity_of(FrozenConfigDict(resolved))
    target = workdir / REPLACED / digest(made_by)
    found = (*_trainings(workdir, there, here), *_results(workdir, there, here))
    return Change(tuple(path for path in found if path.exists()), target, made_by)


def _trainings(workdir: Path, there: Identity, here: Identity) -> Iterator[Path]:
    """The trainings that the results here cannot use; ValueError for another noise network."""
    other_host = bool(there.host and here.host and there.host != here.host)
    is_other = digest(there.base) != digest(here.base) or (other_host and "joint" in here.base)
    if is_other and not continues(here.base, there.base, "base"):
        is_begun = bool(checkpoint_paths(workdir / "base" / "ckpts"))
        if is_begun or not (there.base.keys() ^ here.base.keys()) <= {"joint"}:
            _refuse(workdir, there, here)
        yield workdir / "base"
    if digest(there.second) == digest(here.second) and not other_host:
        return
    if other_host or not continues(here.second, there.second, "head"):
        yield workdir / "head"
        yield workdir / "gamma"
    yield from (workdir / name for name in OF_OTHER_COMMANDS)


def _results(workdir: Path, there: Identity, here: Identity) -> Iterator[Path]:
    """The images, pictures and metrics that rest on what differs."""
    others = [name for name in PROCESSES if there.images[name] != here.images[name]]
    for name in others:
        yield from sorted((workdir / "samples").glob(f"{name}_*"))
    if others or there.overview != here.overview:
        yield workdir / OVERVIEW_FILE
    if others or there.metrics != here.metrics:
        yield workdir / METRICS_FILE
        yield workdir / TABLE_FILE
        yield from _plots(workdir)


def _plots(workdir: Path) -> list[Path]:
    try:
        metrics = read_metrics(workdir / METRICS_FILE)
    except UnreadableFile:
        return []
    return [workdir / f"{name}.png" for name in headline_metrics(metrics)]


def _refuse(workdir: Path, there: Identity, here: Identity) -> None:
    before, now = (flatten({"host": one.host, **with_effect(one.base)}) for one in (there, here))
    if not {"joint"} & here.base.keys():
        before["host"] = now["host"]  # hosts can share a noise network
    longer = before | {"base.iterations": now["base.iterations"]} == now
    why = "; with base.lr_decay > 0 a training is no beginning of a longer one"
    refuse_differing(workdir, before, now, why=why if longer and "base.lr_decay" in now else "")


@contextmanager
def claimed_run(workdir: Path, config: FrozenConfigDict) -> Iterator[None]:
    """Reserve ``workdir`` for a run of ``config`` until the end of the block.

    What the run replaces is moved away, and ``config`` is written there, with a copy.

    Raises:
        ValueError: as ``change_by``; or another run is at work in the folder.
    """
    change_by(workdir, config)  # before anything is written into a foreign folder
    with reserved(workdir, "--workdir"):
        change_by(workdir, config).make()
        record(workdir, _resolved(config))
        yield


def _resolved(config: FrozenConfigDict) -> dict[str, Any]:
    return json.loads(json.dumps(config.to_dict()))
