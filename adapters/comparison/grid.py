"""What a comparison asks for: trainings and cells, named by what determines their numbers."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

from ml_collections import ConfigDict, FrozenConfigDict

from adapters.experiment.config import EXPERIMENT, Schema, check_keys, default_workdir
from adapters.hosts import get_process, host_of
from configs.comparison import base_comparison

# Sections that do not affect the noise network, and keys that change no number.
SAMPLING = ("sample", "evaluate", "head", "gamma")
WITHOUT_EFFECT = {
    "data": ("root", "check_md5"),
    "base": ("log_every", "ckpt_every", "keep"),
    "head": ("log_every", "ckpt_every", "keep", "training"),
    "gamma": ("batch_size",),
    "sample": ("batch_size", "processes", "steps"),
}
# Keys added later: names leave them out at these values, so that older results are still found.
LATER = {"sample": {"channels_last": False, "compile": False, "precision": "float32"}}
CORRECTIONS = ("spectral", "shifted")
COMPARISON = Schema(
    expected=base_comparison,
    free=("trainings", "samplings", "parts", "published", "experiment.network.args"),
    workdir=lambda config: f"runs/compare/{config.store}",
)


@dataclass(frozen=True)
class Line:
    """What a table compares: a training and a way to sample, written "TRAINING/SAMPLING"."""

    training: str
    sampling: str = "default"

    @classmethod
    def parse(cls, text: str) -> Line:
        """From "TRAINING" or "TRAINING/SAMPLING"."""
        training, _, sampling = text.partition("/")
        return cls(training, sampling or "default")


@dataclass(frozen=True)
class Cell:
    """One set of images: its line, its seed, its reverse process and the number of steps."""

    line: Line
    seed: int
    process: str
    steps: int


@dataclass(frozen=True)
class Part:
    """A table: see ``configs.comparison.part``."""

    key: str
    title: str
    lines: tuple[Line, ...]
    processes: tuple[str, ...]
    steps: tuple[int, ...]

    def cells(self, seed: int) -> Iterator[Cell]:
        """The cells of one seed."""
        for line, process, steps in product(self.lines, self.processes, self.steps):
            yield Cell(line, seed, process, steps)


class Grid:
    """A checked comparison.

    Raises:
        ValueError: a key is missing or has another type, or a name is unknown.
    """

    def __init__(self, config: FrozenConfigDict) -> None:
        self.config = config
        for key in ("name", "store"):
            if not config[key] or "/" in config[key]:
                raise ValueError(f"{key} must be a name without /, got {config[key]!r}")
        if not config.seeds or len(set(config.seeds)) < len(config.seeds):
            raise ValueError(f"seeds must be different numbers, got {config.seeds}")
        for key in config.tables:
            _has("tables", config.parts, key)
        self.parts = tuple(self._part(key) for key in config.tables)
        for line in [line for part in self.parts for line in part.lines]:
            _has("trainings", config.trainings, line.training)
            _has("samplings", config.samplings, line.sampling)
        for name in config.gap.trainings:
            _has("trainings", config.trainings, name)
        if not self.parts and not config.gap.trainings:
            raise ValueError("tables and gap.trainings must not both be empty")
        self._check_titles()
        self._check_gap()
        self._check_eps_scale()
        for name, sampling in config.samplings.items():
            if sampling.correction not in ("", *CORRECTIONS):
                raise ValueError(
                    f"samplings.{name}.correction must be one of {CORRECTIONS} or empty, got "
                    f"{sampling.correction!r}"
                )
            if not 0 <= sampling.q < math.inf:
                raise ValueError(f"samplings.{name}.q must be >= 0, got {sampling.q}")

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of the trainings; samples have the seed of their training."""
        return tuple(self.config.seeds)

    @cached_property
    def cells(self) -> tuple[Cell, ...]:
        """All cells, each once, seed by seed."""
        every = (cell for s in self.seeds for part in self.parts for cell in part.cells(s))
        return tuple(dict.fromkeys(every))

    @cached_property
    def trainings(self) -> tuple[str, ...]:
        """The keys of the trainings that the cells and gap curves need, each once."""
        of_cells = (line.training for part in self.parts for line in part.lines)
        return tuple(dict.fromkeys((*of_cells, *self.config.gap.trainings)))

    def title(self, line: Line) -> str:
        """The title of a line in tables."""
        training = self.config.trainings[line.training].title
        sampling = self.config.samplings[line.sampling].title
        return f"{training}, {sampling}" if sampling else training

    def _check_titles(self) -> None:
        """ValueError for two equal titles: tables and legends show nothing else of a line."""
        lines = dict.fromkeys(line for part in self.parts for line in part.lines)
        titles = [self.title(line) for line in lines]
        curves = [self.config.trainings[name].title for name in self.config.gap.trainings]
        for some in (titles, curves):
            for title in some:
                if some.count(title) > 1:
                    raise ValueError(f"titles must differ, got {title!r} for two lines")

    def experiment(self, line: Line, seed: int, process: str | None = None) -> FrozenConfigDict:
        """The experiment of a line and a seed; ``process`` is the only row of its table."""
        config = ConfigDict(self.config.experiment.to_dict())
        overrides = self.config.trainings[line.training]["set"]
        _override(config, f"trainings.{line.training}.set", overrides)
        sampling = self.config.samplings[line.sampling]["set"]
        _override(config.sample, f"samplings.{line.sampling}.set", sampling)
        config.seed = config.sample.seed = seed
        config.sample.processes = (process or "ddpm_small",)
        config.sample.steps = self._steps() or (1,)
        frozen = FrozenConfigDict(config)
        check_keys(frozen, EXPERIMENT)
        if frozen.head.training != "pretrained":
            raise ValueError(
                "experiment.head.training must be 'pretrained': all rows sample with the same "
                f"noise network, got {frozen.head.training!r}"
            )
        return frozen

    def _steps(self) -> tuple[int, ...]:
        """The steps of all columns, and those of the fitted constant if there is one."""
        fitted = any(self.eps_scale(line) == 0 for part in self.parts for line in part.lines)
        extra = (self.config.eps_scale.steps,) if fitted else ()
        return tuple(sorted({s for part in self.parts for s in part.steps} | set(extra)))

    def eps_scale(self, line: Line) -> float:
        """The factor of the predicted noise; 0 for the fitted constant."""
        return self.config.samplings[line.sampling].eps_scale

    def correction(self, line: Line) -> dict[str, str | float] | None:
        """What is done to the network while sampling: its name and q (0: the best); or None."""
        sampling = self.config.samplings[line.sampling]
        if not sampling.correction:
            return None
        return {"name": sampling.correction, "q": sampling.q}

    def _check_gap(self) -> None:
        gap, N = self.config.gap, self.config.experiment.schedule.N
        if gap.trainings and not 2 <= gap.start <= N:
            raise ValueError(f"gap.start must be in 2..{N}, got {gap.start}")
        if gap.n_images < 2 or gap.batch_size < 1:
            raise ValueError(
                "gap.n_images must be >= 2 and gap.batch_size >= 1, "
                f"got {gap.n_images} and {gap.batch_size}"
            )

    def _check_eps_scale(self) -> None:
        settings = self.config.eps_scale
        if get_process(settings.process).needs is not None:
            raise ValueError(
                "eps_scale.process must be a row that needs only the noise network, "
                f"got {settings.process!r}"
            )
        if not 0 < settings.low < settings.high:
            raise ValueError(
                f"eps_scale.low must lie between 0 and eps_scale.high = {settings.high}, "
                f"got {settings.low}"
            )
        for key, least in (("steps", 1), ("n_images", 2), ("evaluations", 1)):
            if settings[key] < least:
                raise ValueError(f"eps_scale.{key} must be >= {least}, got {settings[key]}")

    def _part(self, key: str) -> Part:
        given = self.config.parts[key].to_dict()
        try:
            lines = tuple(Line.parse(text) for text in given.pop("lines"))
            part = Part(key, lines=lines, **given)
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"parts.{key} must have title, lines, processes and steps: {error}"
            ) from error
        for process in part.processes:
            get_process(process)
        return part


def training_name(config: FrozenConfigDict) -> str:
    """The folder name of a noise network, with a digest of what determines its weights."""
    return f"{default_workdir(config).name}_{digest(_training_sections(config))}"


def goes_on_from(config: FrozenConfigDict, other: FrozenConfigDict) -> bool:
    """Whether ``config`` trains ``other``'s noise network further: only the iterations differ."""
    ours, others = _training_sections(config), _training_sections(other)
    all_of_it, first_part = (sections["base"].pop("iterations") for sections in (ours, others))
    return 0 < first_part < all_of_it and digest(ours) == digest(others)


def _training_sections(config: FrozenConfigDict) -> dict[str, Any]:
    sections = {k: v for k, v in config.to_dict().items() if k not in (*SAMPLING, "name")}
    if not config.sa.lam:
        sections["sa"] = {"lam": 0.0}  # the baseline: the other keys have no effect
    return sections


def second_name(config: FrozenConfigDict, needs: str) -> str:
    """The folder name of a head or of Gamma, inside the noise network's folder."""
    section = "gamma" if needs == "gamma" else "head"
    return f"{host_of([needs]).name}_{digest({section: config[section].to_dict()})}"


def cell_name(
    config: FrozenConfigDict,
    cell: Cell,
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
    return f"{cell.process}_{cell.steps}_{digest(decides)}"


def digest(sections: Mapping[str, Any]) -> str:
    """Ten hexadecimal digits: a hash of all values that have an effect."""
    kept = {name: _with_effect(name, section) for name, section in sections.items()}
    text = json.dumps(kept, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def _with_effect(name: str, section: Any) -> Any:
    without, later = WITHOUT_EFFECT.get(name, ()), LATER.get(name, {})
    if not without and not later:
        return section
    return {k: v for k, v in section.items() if k not in without and (k, v) not in later.items()}


def _override(config: ConfigDict, name: str, keys: Mapping[str, Any]) -> None:
    """Set existing keys, also nested ones, to values of the same types."""
    for key, value in keys.items():
        here = f"{name}.{key}"
        if key not in config:
            raise ValueError(f"{here}: the configuration has no such key")
        if isinstance(config[key], ConfigDict):
            _override(config[key], here, value)
            continue
        if type(value) is not type(config[key]):
            raise ValueError(f"{here} must be a {type(config[key]).__name__}, got {value!r}")
        config[key] = value


def _has(name: str, mapping: Mapping[str, Any], key: str) -> None:
    if key not in mapping:
        raise ValueError(f"{name} must be among {sorted(mapping)}, got {key!r}")
