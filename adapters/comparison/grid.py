"""What a comparison asks for: trainings and cells, named by what determines their numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

from ml_collections import ConfigDict, FrozenConfigDict

from adapters.experiment.config import check_keys
from adapters.experiment.identity import loss_title, training_name
from adapters.hosts import get_process
from adapters.measuring.features import headlines

CORRECTIONS = ("spectral", "shifted", "norms")
FITTED = (0, "line")  # the values of eps_scale that ask for a fit


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
            if "/" in config[key]:
                raise ValueError(f"{key} must be a name without /, got {config[key]!r}")
        for key in config.tables:
            _has("tables", config.parts, key)
        self.parts = tuple(self._part(key) for key in config.tables)
        for line in [line for part in self.parts for line in part.lines]:
            _has("trainings", config.trainings, line.training)
            _has("samplings", config.samplings, line.sampling)
        for name in config.gap.trainings:
            _has("trainings", config.trainings, name)
        for name in self.trainings:
            if self.init(name):
                _has("trainings", config.trainings, self.init(name))
        if not self.parts and not config.gap.trainings:
            raise ValueError("tables and gap.trainings must not both be empty")
        measured = headlines(config.experiment.evaluate.features)
        for name in config.metrics:
            _has("metrics", measured, name)
        self._check_titles()
        self._check_gap()
        self._check_eps_scale()
        for name, sampling in config.samplings.items():
            scale = sampling.eps_scale
            if scale != "line" and (isinstance(scale, str) or not 0 <= scale < math.inf):
                raise ValueError(
                    f"samplings.{name}.eps_scale must be >= 0 or 'line', got {scale!r}"
                )
            if sampling.correction not in ("", *CORRECTIONS):
                raise ValueError(
                    f"samplings.{name}.correction must be one of {CORRECTIONS} or empty, got "
                    f"{sampling.correction!r}"
                )
            if sampling.correction and scale in FITTED:
                raise ValueError(
                    f"samplings.{name}.eps_scale must be > 0 with a correction, got {scale!r}: the "
                    "fit samples without it"
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
        training = self.training_title(line.training)
        sampling = self.config.samplings[line.sampling].title
        return f"{training}, {sampling}" if sampling else training

    def training_title(self, name: str) -> str:
        """The title of a training in tables, with what "{loss}" in it stands for."""
        training = self.config.trainings[name]
        sa = ConfigDict(self.config.experiment.sa.to_dict())
        _override(sa, f"trainings.{name}.set.sa", training["set"].get("sa", {}))
        return str(training.title).replace("{loss}", loss_title(sa))

    def _check_titles(self) -> None:
        """ValueError for two equal titles: tables and legends show nothing else of a line."""
        lines = dict.fromkeys(line for part in self.parts for line in part.lines)
        titles = [(line.training, self.title(line)) for line in lines]
        curves = [(name, self.training_title(name)) for name in self.config.gap.trainings]
        for some in (titles, curves):
            for _, title in some:
                those = [name for name, other in some if other == title]
                if len(those) > 1:
                    raise ValueError(
                        f"titles must differ, got {title!r} for two lines, of {those[0]} and "
                        f"{those[1]}: leave one of them out"
                    )

    def experiment(self, line: Line, seed: int, process: str | None = None) -> FrozenConfigDict:
        """The experiment of a line and a seed; ``process`` is the only row of its table."""
        config = ConfigDict(self.config.experiment.to_dict())
        overrides = self.config.trainings[line.training]["set"]
        _override(config, f"trainings.{line.training}.set", overrides)
        self._multiply(config, line.training)
        sampling = self.config.samplings[line.sampling]["set"]
        _override(config.sample, f"samplings.{line.sampling}.set", sampling)
        config.seed = config.sample.seed = seed
        if self.init(line.training):
            # No path but a name, so that it determines this training's own name in any folder.
            start = self.experiment(Line(self.init(line.training)), seed)
            config.base.init_from = training_name(start)
        config.sample.processes = (process or "ddpm_small",)
        config.sample.steps = self._steps() or (1,)
        frozen = FrozenConfigDict(config)
        check_keys(frozen)
        if frozen.head.training != "pretrained":
            raise ValueError(
                "experiment.head.training must be 'pretrained': all rows sample with the same "
                f"noise network, got {frozen.head.training!r}"
            )
        return frozen

    def _multiply(self, config: ConfigDict, training: str) -> None:
        """Set the keys of ``base`` that a training gives as factors: ``times``."""
        factors = {"K": config.sa.K, "1/K": 1 / config.sa.K}
        for key, factor in self.config.trainings[training].get("times", {}).items():
            value = factors.get(factor, factor)
            is_number = isinstance(value, int | float) and 0 < value < math.inf
            if key not in ("iterations", "batch_size") or not is_number:
                raise ValueError(
                    f"trainings.{training}.times must hold iterations or batch_size with factors "
                    f"> 0, 'K' or '1/K', got {key}: {factor!r}"
                )
            config.base[key] = max(1, round(config.base[key] * value))

    def init(self, training: str) -> str:
        """The training whose averaged network this one starts from, or ""."""
        return self.config.trainings[training].get("init", "")

    def _steps(self) -> tuple[int, ...]:
        """The steps of all columns, and those of the fitted epsilon scaling if there is one."""
        fitted = any(self.eps_scale(line) in FITTED for part in self.parts for line in part.lines)
        extra = (self.config.eps_scale.steps,) if fitted else ()
        return tuple(sorted({s for part in self.parts for s in part.steps} | set(extra)))

    def eps_scale(self, line: Line) -> float | str:
        """The factor of the predicted noise; 0 for a fitted constant, "line" for a fitted line."""
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

    def _check_eps_scale(self) -> None:
        settings = self.config.eps_scale
        if get_process(settings.process).needs is not None:
            raise ValueError(
                "eps_scale.process must be a row that needs only the noise network, "
                f"got {settings.process!r}"
            )
        if not settings.low < settings.high:
            raise ValueError(
                f"eps_scale.low must be < eps_scale.high = {settings.high}, got {settings.low}"
            )

    def _part(self, key: str) -> Part:
        given_as = self.config.parts[key].to_dict()
        given = dict(given_as)
        try:
            lines = tuple(Line.parse(text) for text in given.pop("lines"))
            part = Part(key, lines=lines, **given)
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"parts.{key} must have title, lines, processes and steps: {error}"
            ) from error
        for process in part.processes:
            get_process(process)
        for name in ("lines", "processes", "steps"):
            values = getattr(part, name)
            if name == "steps" and not all(isinstance(value, int) for value in values):
                raise ValueError(f"parts.{key}.steps must be whole numbers, got {values}")
            if len(set(values)) < len(values):
                raise ValueError(f"parts.{key}.{name} must hold each once, got {given_as[name]}")
        return part


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


def _has(name: str, known: Iterable[str], key: str) -> None:
    if key not in known:
        raise ValueError(f"{name} must be among {sorted(known)}, got {key!r}")
