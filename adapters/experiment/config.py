"""Read and check the command line and the configuration, and store it with the results.

A configuration file is Python code and is run: give only files that you trust.
"""

from __future__ import annotations

import difflib
import json
import re
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, FrozenConfigDict, config_flags

from adapters.shell.locks import locked
from configs.base import base_config
from sa_files.stored import read_json
from sa_files.writing import write_atomically

CONFIG_FILE = "config.json"
LOCK_FILE = ".lock"
# A killed run's loader processes keep its lock until they notice its end, at most 5 seconds.
PATIENCE = 10.0  # seconds


@dataclass(frozen=True)
class Schema:
    """What a kind of configuration file must hold.

    ``expected``: makes a configuration with all keys and their defaults. ``free``: keys below these
    are checked by the code that uses them. ``workdir``: the output folder where none is given.
    """

    expected: Callable[[], ConfigDict]
    free: tuple[str, ...]
    workdir: Callable[[FrozenConfigDict], str | Path]


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
        ValueError: a flag, key or stage is unknown, a value has another type, or a file is missing.
    """
    values = _declare_flags(argv, stages)
    _check_file(argv)
    try:
        rest = values(list(argv))
        chosen = values["config"].value
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        raise ValueError(_one_line(error)) from error
    if len(rest) > 1:
        raise ValueError(f"unknown argument {rest[1]!r}; options begin with --")
    if chosen is None:
        raise ValueError(f"a configuration is needed: python -m {module} --config configs/FILE.py")
    config = FrozenConfigDict(chosen)
    schema = schema or EXPERIMENT
    check_keys(config, schema)
    return CommandLine(
        config=config,
        workdir=Path(values["workdir"].value or schema.workdir(config)).absolute(),
        stages=_chosen(values["stage"].value, stages),
        dry_run=values["dry_run"].value,
        device=values["device"].value or _default_device(),
        progress=values["progress"].value,
    )


def _declare_flags(argv: Sequence[str], stages: Sequence[str]) -> flags.FlagValues:
    values = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config",
        None,
        "file of the experiment; --config.KEY=VALUE changes a key",
        flag_values=values,
        sys_argv=list(argv),
    )
    text, switch = flags.DEFINE_string, flags.DEFINE_boolean
    text("workdir", None, "output folder; default: runs/NAME/LABEL", flag_values=values)
    text("stage", None, f"stages to run, of {','.join(stages)}; default: all", flag_values=values)
    switch("dry_run", False, "print the plan, run nothing", flag_values=values)
    text("device", None, "cpu, cuda, cuda:1, ...; default: cuda if available", flag_values=values)
    switch("progress", True, "show progress bars", flag_values=values)
    return values


def _check_file(argv: Sequence[str]) -> None:
    """Check before absl does: its message for a missing file is many lines long."""
    for i, word in enumerate(argv):
        name, equals, value = word.partition("=")
        if name.lstrip("-") == "config" and word.startswith("-"):
            path = value if equals else "".join(argv[i + 1 : i + 2])
            path = path.partition(":")[0]  # FILE.py:NAME is get_config(NAME)
            if not Path(path).is_file():
                raise ValueError(f"--config: there is no file {path!r}")


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
    """ValueError unless the keys are the schema's, with values of their types."""
    schema = schema or EXPERIMENT
    expected, given = flatten(schema.expected()), flatten(config)

    def is_free(key: str) -> bool:
        return key in schema.free or key.startswith(tuple(f"{free}." for free in schema.free))

    for key in given:
        if key not in expected and not is_free(key):
            raise ValueError(f"unknown configuration key {key!r}{_did_you_mean(key, expected)}")
    for key, default in expected.items():
        if is_free(key):
            continue
        if key not in given:
            raise ValueError(f"configuration key {key!r} is missing")
        if type(given[key]) is not type(default):
            raise ValueError(
                f"configuration key {key!r} must be a {type(default).__name__}, got {given[key]!r}"
            )


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Join nested keys by dots; an empty dictionary stays a value."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict | FrozenConfigDict | dict) and len(value):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def default_workdir(config: FrozenConfigDict) -> Path:
    """runs/NAME/LABEL; the label names what comparisons vary: the SA term and the seed."""
    sa = config.sa
    label = f"sa{sa.K}_lam{sa.lam:g}" if sa.lam else "baseline"
    for option, default in (("window", "down"), ("weighting", "uniform"), ("backprop", "all")):
        if sa.lam and sa[option] != default:
            label += f"_{sa[option]}"
    if sa.lam and sa.reuse:
        label += "_reuse"
    if config.base.init_from:
        label += "_warm"
    return Path("runs") / config.name / f"{label}_seed{config.seed}"


EXPERIMENT = Schema(expected=base_config, free=("network.args",), workdir=default_workdir)


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
    with locked(workdir / LOCK_FILE, PATIENCE) as ours:
        if not ours:
            raise ValueError(
                f"another run is at work in {workdir}; wait until it ends, or give another {option}"
            )
        if not _is_of_the_run(workdir, resolved, option):
            content = json.dumps(resolved, indent=2, sort_keys=True).encode() + b"\n"
            write_atomically(workdir / CONFIG_FILE, content)
        yield


def check_holds(workdir: Path, config: FrozenConfigDict, module: str) -> None:
    """ValueError unless ``workdir`` holds a run of ``config``, made by ``module``."""
    path = workdir / CONFIG_FILE
    if not path.exists():
        raise ValueError(f"{workdir} holds no run: run python -m {module} first")
    _check_same(path, json.loads(json.dumps(config.to_dict())), "--workdir")


def _is_of_the_run(workdir: Path, resolved: dict[str, Any], option: str) -> bool:
    """Whether the folder holds this configuration; False where it is empty or does not exist."""
    path = workdir / CONFIG_FILE
    if path.exists():
        _check_same(path, resolved, option)
        return True
    if workdir.exists() and any(p.name != LOCK_FILE for p in workdir.iterdir()):
        raise ValueError(
            f"{workdir} is not empty and holds no {CONFIG_FILE}; give another folder with {option}"
        )
    return False


def _check_same(path: Path, resolved: dict[str, Any], option: str) -> None:
    there = read_json(path, "is not a resolved configuration", flatten)
    here = flatten(resolved)
    # A key that was added after the run had, in effect, the value that is now its default.
    defaults = flatten(json.loads(json.dumps(base_config().to_dict())))
    there = {k: v for k, v in defaults.items() if k in here} | there
    differing = sorted(k for k in there.keys() | here.keys() if there.get(k) != here.get(k))
    if differing:
        shown = "; ".join(
            f"{k} is {there.get(k)!r} there, {here.get(k)!r} here" for k in differing[:3]
        )
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise ValueError(
            f"{path.parent} holds a run of another configuration ({shown}{more}); give another "
            f"{option}"
        )


def _did_you_mean(key: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(key, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _one_line(error: BaseException) -> str:
    """The message of absl, ml_collections or a configuration file in one line, without extras."""
    while error.__context__ and "Error whilst parsing config file" in str(error):
        error = error.__context__  # ml_collections, and then absl, quote its whole traceback
    text = str(error).replace("\\n", " ").replace("\\'", "'")  # some hold another's repr
    text = " ".join(re.sub(r'Other fields present: "\{.*\}"', "", text, flags=re.DOTALL).split())
    text = re.sub(r"^([\"'])(.*)\1$", r"\2", text) or type(error).__name__
    if re.match(r"'\w+'( Did|$)", text):  # a bare KeyError
        text = f"unknown configuration key {text}"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.name == "get_config"]
    return (f"{frames[-1].filename}:{frames[-1].lineno}: " if frames else "") + text
