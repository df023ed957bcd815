"""What decides a result: the parts of its configuration that its numbers rest on.

Grids name their trainings and cells by it, and a run's folder tells by it which of its results
another configuration replaces (``adapters.experiment.folder``). Keys that change no number, such as
``base.log_every``, are no part of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ml_collections import FrozenConfigDict

from adapters.hosts import PROCESSES, get_process, host_of

# Sections that do not affect the noise network, and keys that change no number.
SAMPLING = ("sample", "evaluate", "head", "gamma")
COMMAND = ("name", "baseline")  # where the runs are, and which
WITHOUT_EFFECT = {
    "data": ("root", "check_md5"),
    "base": ("log_every", "ckpt_every", "keep"),
    "head": ("log_every", "ckpt_every", "keep"),
    "gamma": ("batch_size",),
    "sample": ("batch_size", "processes", "steps"),
}
# Keys added later: names leave them out at these values, so that older results are still found.
LATER = {
    "sample": {
        "channels_last": False,
        "compile": False,
        "precision": "float32",
        "classes": "data",
        "guidance": 0.0,
        "probes": 1,
        "lanczos_steps": 3,
    },
    "data": {
        "split": "",
        "size": 0,
        "channels": 3,
        "follow_links": False,
        "flip": False,
        "crop": False,
        "labels": False,
    },
    "base": {"lr_decay": 0, "label_drop": 0.0, "input_perturbation": 0.0},
    "head": {"lr_decay": 0},
    "evaluate": {"reference": ""},
}


class CellOfTable(Protocol):
    """One reverse process with a number of steps."""

    @property
    def process(self) -> str: ...
    @property
    def steps(self) -> int: ...


def has_effect(key: str) -> bool:
    """Whether any number of a run depends on a key, given by its full name."""
    section, _, name = key.partition(".")
    return key not in COMMAND and name not in WITHOUT_EFFECT.get(section, ())


def digest(sections: Mapping[str, Any]) -> str:
    """Ten hexadecimal digits: a hash of all values that have an effect."""
    text = json.dumps(with_effect(sections), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def with_effect(sections: Mapping[str, Any]) -> dict[str, Any]:
    """The sections without the keys that change no number."""
    return {name: _with_effect(name, section) for name, section in sections.items()}


def _with_effect(name: str, section: Any) -> Any:
    without, later = WITHOUT_EFFECT.get(name, ()), LATER.get(name, {})
    if name == "data" and section["name"] in ("folder", "npz"):
        without = ()  # the root is the data
    if not without and not later:
        return section
    return {k: v for k, v in section.items() if k not in without and (k, v) not in later.items()}


# ---------------------------------------------------------------------------------------- trainings


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


def loss_title(sa: Mapping[str, Any]) -> str:
    """What a table calls a loss with these keys of the section sa: "B", or such as "SA-2"."""
    if not sa["lam"]:
        return "B"
    return f"SA-{sa['K']}" + ("" if sa["lam"] == 1 else f", lambda {sa['lam']:g}")


def training_name(config: FrozenConfigDict) -> str:
    """The folder name of a noise network, with a digest of what determines its weights."""
    return f"{default_workdir(config).name}_{digest(training_sections(config))}"


def training_sections(config: FrozenConfigDict) -> dict[str, Any]:
    """What decides the noise network; for a joint training, what decides both outputs."""
    sections = {k: v for k, v in config.to_dict().items() if k not in (*SAMPLING, *COMMAND)}
    if not config.sa.lam:
        sections["sa"] = {"lam": 0.0}  # the baseline: the other keys have no effect
    if "head" in config and config.head.training == "joint":
        sections["joint"] = {"mode": config.head.mode, "ratio": config.head.ratio}
    return sections


def goes_on_from(config: FrozenConfigDict, other: FrozenConfigDict) -> bool:
    """Whether ``config`` trains ``other``'s noise network further: only the iterations differ."""
    return continues(training_sections(config), training_sections(other), "base")


def continues(ours: Mapping[str, Any], others: Mapping[str, Any], name: str) -> bool:
    """Whether a training differs from another one only by more iterations in the section ``name``.

    The other one is then its first part, unless its rate has fallen at its end.
    """
    if name not in ours or name not in others or ours[name]["lr_decay"]:
        return False
    all_of_it, first_part = ours[name]["iterations"], others[name]["iterations"]
    shortened = {**ours, name: {**ours[name], "iterations": first_part}}
    return 0 < first_part < all_of_it and digest(shortened) == digest(others)


def second_name(config: FrozenConfigDict, needs: str) -> str:
    """The folder name of a head or of Gamma, inside the noise network's folder."""
    section = "gamma" if needs == "gamma" else "head"
    return f"{host_of([needs]).name}_{digest(_second_section(config, section))}"


def _second_section(config: FrozenConfigDict, section: str) -> dict[str, Any]:
    # Only a head that is trained alone has a folder.
    return {section: {k: v for k, v in config[section].to_dict().items() if k != "training"}}


# -------------------------------------------------------------------------------------------- cells


def cell_name(
    config: FrozenConfigDict,
    cell: CellOfTable,
    eps_scale: Mapping[str, Any] | float,
    correction: Mapping[str, Any] | None = None,
) -> str:
    """The file name of a cell, inside its training's folder."""
    needs = get_process(cell.process).needs
    decides = {
        "sample": config.sample.to_dict(),
        "evaluate": config.evaluate.to_dict(),
        "second": second_name(config, needs) if needs else None,
        "eps_scale": eps_scale,
    }
    if correction is not None:  # a key that came later: cells without it keep their names
        decides["correction"] = dict(correction)
        if correction["name"] == "norms":  # earlier ones were fitted on the first images
            decides["correction"]["images"] = "spread"
    return f"{cell.process}_{cell.steps}_{digest(decides)}"


# --------------------------------------------------------------------------------------- whole runs


@dataclass(frozen=True)
class Identity:
    """What decides the results in a run's folder.

    Attributes:
        host: whose head, or second output, it is; "" where no row of the tables tells.
        base: the sections that decide the noise network.
        second: those that decide the head or Gamma.
        images: for each reverse process, a digest of what decides its images.
        metrics: a digest of what decides the metrics of given images.
        overview: which images ``samples.png`` shows.
    """

    host: str
    base: dict[str, Any]
    second: dict[str, Any]
    images: dict[str, str]
    metrics: str
    overview: tuple[tuple[str, ...], int]


def identity_of(config: FrozenConfigDict) -> Identity:
    """What decides the results of a run of ``config``, resolved and without foreign sections."""
    base = training_sections(config)
    second: dict[str, Any] = {"trunk": digest(base)}
    for section in ("head", "gamma"):
        if section in config and "joint" not in base:
            second |= _second_section(config, section)
    sample = config.sample.to_dict()
    rests_on = {name: second if row.needs else base for name, row in PROCESSES.items()}
    needs = {get_process(name).needs for name in config.sample.processes} - {None}
    return Identity(
        host=host_of(needs).name if needs else "",
        base=base,
        second=second,
        images={
            name: digest({"sample": sample, "rests_on": digest(sections)})
            for name, sections in rests_on.items()
        },
        metrics=digest({"evaluate": config.evaluate.to_dict()}),
        overview=(config.sample.processes, overview_steps(config.sample.steps)),
    )


def overview_steps(steps: tuple[int, ...]) -> int:
    """The number of steps whose images ``samples.png`` shows: a small one."""
    return sorted(steps)[len(steps) // 3]
