"""Read and check the command line and the configuration, and store it with the results.

A configuration file is Python code and is run: give only files that you trust.
"""

from __future__ import annotations

import difflib
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from ml_collections import ConfigDict, FrozenConfigDict

from adapters.experiment.identity import default_workdir, has_effect
from adapters.shell.config_file import changed, load
from adapters.shell.locks import locked
from adapters.shell.options import shared_options, stage_options
from configs import comparison
from configs.base import KEYS, base_config
from configs.keys import Key, Keys, flat
from sa_files.reading import UnreadableFile
from sa_files.stored import read_json
from sa_files.writing import is_unfinished, remove_unfinished, write_atomically

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
CONFIG_COPY = ".config.json"  # for the case that the file is lost
LOCK_FILE = ".lock"
T = TypeVar("T")
# A killed run's loader processes keep its lock until they notice its end, at most 5 seconds.
PATIENCE = 10.0  # seconds


@dataclass(frozen=True)
class Schema:
    """What a kind of configuration file must hold.

    Attributes:
        kind: its name, such as "an experiment".
        commands: the modules that take it, in words.
        keys: the descriptions of all keys.
        workdir: gives the output folder where none is given.
        instead: keys that another key, or an option, sets: a change of them would change nothing.
    """

    kind: str
    commands: str
    keys: Keys
    workdir: Callable[[FrozenConfigDict], str | Path]
    instead: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def flat(self) -> dict[str, Key]:
        """The descriptions by the keys' full names."""
        return flat(self.keys)


@dataclass(frozen=True)
class CommandLine:
    """The values of a command line."""

    config: FrozenConfigDict
    workdir: Path
    stages: tuple[str, ...] | None
    dry_run: bool
    device: str
    progress: bool


def read_command_line(
    argv: Sequence[str], stages: Sequence[str], module: str, schema: Schema | None = None
) -> CommandLine:
    """Parse ``argv`` (program name first); the configuration is an experiment's by default.

    Raises:
        ValueError: a flag, key or stage is unknown, a value is not allowed, or a file is missing.
    """
    schema = schema or EXPERIMENT
    _, rest = stage_options(module, schema.keys).parse_known_args(list(argv[1:]))
    given, changes = shared_options(module).parse_known_args(rest)
    if given.config is None:
        raise ValueError(f"a configuration is needed: python -m {module} --config configs/FILE.py")
    for name, other in schema.instead.items():
        if any(re.match(rf"--?config\.{re.escape(name)}(=|$)", word) for word in changes):
            raise ValueError(f"--config.{name} changes nothing in {schema.kind}: set {other}")
    loaded = load(given.config)
    _check_kind(given.config, loaded, module, schema)
    config = FrozenConfigDict(changed(loaded, changes))
    check_keys(config, schema)
    return CommandLine(
        config=config,
        workdir=_folder(Path(given.workdir or schema.workdir(config)).absolute()),
        stages=_chosen(given.stage, stages),
        dry_run=given.dry_run,
        device=given.device or _default_device(),
        progress=given.progress,
    )


def _check_kind(chosen: str, config: ConfigDict, module: str, schema: Schema) -> None:
    found = max(SCHEMAS, key=lambda some: len(some.keys.keys() & set(config)))
    if found is not schema:
        raise ValueError(
            f"{chosen} is {found.kind}, which {found.commands} takes; python -m {module} takes "
            f"{schema.kind}"
        )


def _folder(path: Path) -> Path:
    """The same path; ValueError if a file is in its way."""
    for part in (path, *path.parents):
        if part.exists() and not part.is_dir():
            raise ValueError(f"--workdir must be a folder, got {path}: {part} is a file")
    return path


def _chosen(value: str | None, stages: Sequence[str]) -> tuple[str, ...] | None:
    if value is None:
        return None
    chosen = tuple(name.strip() for name in value.split(","))
    for name in chosen:
        if name not in stages:
            raise ValueError(f"--stage must be some of {','.join(stages)}, got {name!r}")
    return chosen


def _default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def check_keys(config: FrozenConfigDict, schema: Schema | None = None) -> None:
    """ValueError unless the keys are the schema's, with values that their descriptions allow."""
    expected, given = (schema or EXPERIMENT).flat, flatten(config)
    free = tuple(f"{name}." for name, key in expected.items() if key.free)
    for name in given:
        if name not in expected and not name.startswith(free):
            raise ValueError(f"unknown configuration key {name!r}{_did_you_mean(name, expected)}")
    for name, key in expected.items():
        if key.free:
            continue
        if name not in given:
            raise ValueError(f"configuration key {name!r} is missing")
        key.check(name, given[name])


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Join nested keys by dots; an empty dictionary stays a value."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict | FrozenConfigDict | dict) and len(value):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


EXPERIMENT = Schema(
    "an experiment",
    "python -m adapters.sn_dpm, npr_dpm, ocm_dpm or analytic_dpm",
    KEYS,
    default_workdir,
)
COMPARISON = Schema(
    "a comparison",
    "python -m adapters.compare",
    comparison.KEYS,
    lambda config: f"runs/compare/{config.store}",
    comparison.INSTEAD,
)
SCHEMAS = (EXPERIMENT, COMPARISON)


@contextmanager
def claimed(
    workdir: Path, config: FrozenConfigDict, *, option: str = "--workdir"
) -> Iterator[None]:
    """Reserve ``workdir`` for this run until the end of the block.

    The resolved configuration is written there. ``option``: the option that sets the folder.

    Raises:
        ValueError: the folder holds a run of another configuration, or other files, or another run
            is at work in it.
    """
    resolved = json.loads(json.dumps(config.to_dict()))
    _is_of_the_run(workdir, resolved, option)  # before anything is written into a foreign folder
    with reserved(workdir, option):
        if _is_of_the_run(workdir, resolved, option):
            resolved = read_config(config_path(workdir), dict)
        record(workdir, resolved)
        yield


@contextmanager
def reserved(workdir: Path, option: str) -> Iterator[None]:
    """Hold the folder's lock; ValueError if another run has it."""
    with locked(workdir / LOCK_FILE, PATIENCE) as ours:
        if not ours:
            raise ValueError(
                f"another run is at work in {workdir}; wait until it ends, or give another {option}"
            )
        remove_unfinished(workdir)
        yield


def record(workdir: Path, resolved: dict[str, Any]) -> None:
    """Write a folder's resolved configuration and its copy, unless they are there."""
    if config_path(workdir).name == CONFIG_COPY:
        logger.warning("%s was lost or damaged: taken from its copy", workdir / CONFIG_FILE)
    for name in (CONFIG_COPY, CONFIG_FILE):
        write_config(workdir / name, resolved)


def write_config(path: Path, resolved: dict[str, Any]) -> None:
    """Write a resolved configuration, unless it is there."""
    content = json.dumps(resolved, indent=2, sort_keys=True).encode() + b"\n"
    if not path.is_file() or path.read_bytes() != content:
        write_atomically(path, content, sync=True)


def config_path(workdir: Path) -> Path:
    """The file with the folder's configuration: its copy if the other one is lost or damaged."""
    path, copy = workdir / CONFIG_FILE, workdir / CONFIG_COPY
    if not copy.exists():
        return path
    try:
        read_json(path, "is damaged", flatten)
    except UnreadableFile:
        return copy
    return path


def read_config(path: Path, of: Callable[[Any], T], option: str = "--workdir") -> T:
    """``of`` the resolved configuration in ``path``; the error says how to get it back."""
    lost = (
        f"is not a resolved configuration (to get it back, begin the same command with another "
        f"{option} and copy its {CONFIG_FILE} here)"
    )
    return read_json(path, lost, of)


def with_defaults(there: dict[str, Any], here: dict[str, Any]) -> dict[str, Any]:
    """``there`` with the keys of ``here`` that it lacks, at their defaults.

    A run from before a key existed had, in effect, the value that is now its default.
    """
    filled = dict(there)
    for name, default in json.loads(json.dumps(base_config().to_dict())).items():
        if name in here and isinstance(default, dict):
            known = {key: value for key, value in default.items() if key in here[name]}
            filled[name] = known | filled.get(name, {})
        elif name in here:
            filled.setdefault(name, default)
    return filled


def check_holds(workdir: Path, config: FrozenConfigDict, module: str) -> None:
    """ValueError unless ``workdir`` holds a run of ``config``, made by ``module``."""
    path = config_path(workdir)
    if not path.exists():
        raise ValueError(f"{workdir} holds no run: run python -m {module} first")
    _check_same(path, json.loads(json.dumps(config.to_dict())), "--workdir")


def _is_of_the_run(workdir: Path, resolved: dict[str, Any], option: str) -> bool:
    """Whether the folder holds this configuration; False where it is empty or does not exist."""
    path = config_path(workdir)
    if path.exists():
        _check_same(path, resolved, option)
        return True
    check_empty(workdir, option)
    return False


def check_empty(workdir: Path, option: str = "--workdir") -> None:
    """ValueError if a folder without a configuration holds anything."""
    entries = workdir.iterdir() if workdir.exists() else ()
    if any(path.name != LOCK_FILE and not is_unfinished(path) for path in entries):
        raise ValueError(
            f"{workdir} is not empty and holds no {CONFIG_FILE}; give another folder with {option}"
        )


def _check_same(path: Path, resolved: dict[str, Any], option: str) -> None:
    there = read_config(path, lambda found: flatten(with_defaults(found, resolved)), option)
    here = flatten(resolved)
    refuse_differing(
        path.parent, *({k: v for k, v in c.items() if has_effect(k)} for c in (there, here)), option
    )


def refuse_differing(
    workdir: Path,
    there: dict[str, Any],
    here: dict[str, Any],
    option: str = "--workdir",
    why: str = "",
) -> None:
    """ValueError that names the flattened keys that differ, if any."""
    differing = sorted(k for k in there.keys() | here.keys() if there.get(k) != here.get(k))
    if differing:
        shown = "; ".join(
            f"{k} is {there.get(k)!r} there, {here.get(k)!r} here" for k in differing[:3]
        )
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise ValueError(
            f"{workdir} holds a run of another configuration ({shown}{more}){why}; give another "
            f"{option}"
        )


def _did_you_mean(key: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(key, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
