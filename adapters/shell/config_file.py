"""Run a configuration file; whatever stops it is told in one line, with its place in the file."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags


def load(chosen: str) -> ConfigDict:
    """The configuration of FILE.py, or of FILE.py:NAME, which is get_config(NAME). Runs the file.

    Raises:
        ValueError: there is no such file, or its code fails, or it gives no configuration.
    """
    path, colon, name = chosen.partition(":")
    if not Path(path).is_file():
        raise ValueError(f"--config: there is no file {path!r}")
    scope = {"__name__": "configuration", "__file__": path}
    with _told(path):
        exec(compile(Path(path).read_bytes(), path, "exec"), scope)
    if "get_config" not in scope:
        raise ValueError(f"{path} has no function get_config: give --config a file of configs/")
    with _told(path):
        config = scope["get_config"](*([name] if colon else []))
    if not isinstance(config, ConfigDict):
        raise ValueError(
            f"get_config of {path} must return a ConfigDict, got {type(config).__name__}"
        )
    return config


def changed(config: ConfigDict, words: Iterable[str]) -> ConfigDict:
    """The configuration, now locked, with keys changed by words such as ``--config.sa.K=3``.

    Raises:
        ValueError: a word is no such change, or a key is unknown, or its value has another type.
    """
    for change in _changes(words):  # one by one, as absl joins the tuples of a key given twice
        change = _names_as_tuple(config, change)
        values = flags.FlagValues()
        line = ["", *change]
        try:
            config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=line)
            rest = values(line)
        except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{' '.join(change)}: {_message(error)}") from error
        if len(rest) > 1:
            raise ValueError(f"unknown argument {rest[1]!r}; options begin with --")
    return config.lock()


def _changes(words: Iterable[str]) -> list[list[str]]:
    """The words change by change: one word, ``--config.KEY=VALUE``, or two, without the sign."""
    changes: list[list[str]] = []
    for word in words:
        if word.startswith("--") or not changes or "=" in changes[-1][0]:
            changes.append([word])
        else:
            changes[-1].append(word)
    return changes


def _names_as_tuple(config: ConfigDict, change: list[str]) -> list[str]:
    """``KEY=a,b`` of a tuple as ``KEY=('a', 'b')``; absl splits numbers only."""
    key, _, value = "=".join(change).removeprefix("--config.").partition("=")
    found: Any = config
    for name in key.split("."):
        found = found.get(name) if isinstance(found, ConfigDict) else None
    if not isinstance(found, tuple) or not re.fullmatch(r"\s*[A-Za-z][^'\"()\[\]]*", value):
        return change
    return [f"--config.{key}={tuple(part.strip() for part in value.split(','))!r}"]


def _message(error: BaseException) -> str:
    """The message of absl, ml_collections or a configuration file in one line, without extras."""
    text = str(error).replace("\\n", " ").replace("\\'", "'")  # some hold another's repr
    text = " ".join(re.sub(r'Other fields present: "\{.*\}"', "", text, flags=re.DOTALL).split())
    text = re.sub(r"^([\"'])(.*)\1$", r"\2", text) or type(error).__name__
    if re.match(r"'\w+'( Did|$)", text):  # a bare KeyError
        text = f"unknown configuration key {text}"
    return text


@contextmanager
def _told(path: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the file's code can raise anything
        raise ValueError(f"{_place(path, error)}: {_what(error)}") from error


def _place(path: str, error: Exception) -> str:
    if isinstance(error, SyntaxError) and error.filename == path:
        return f"{path}:{error.lineno}"
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
    return f"{path}:{lines[-1]}" if lines else path


def _what(error: Exception) -> str:
    if isinstance(error, SyntaxError):
        return f"SyntaxError: {error.msg}; --config takes a Python file, such as configs/digits.py"
    if isinstance(error, ValueError | AttributeError | KeyError):
        return _message(error)
    return f"{type(error).__name__}: {_message(error)}"
