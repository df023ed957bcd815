"""Tables of metrics: processes by steps, from one run or over the seeds of several."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from adapters.registry import get_process
from adapters.stored import read_json

Cell = dict[str, float]
Metrics = dict[str, dict[str, Cell]]  # process -> steps -> metric -> value


def read_metrics(path: Path) -> Metrics:
    """A run's metrics.json; ValueError with its path if it is not one."""
    return read_json(path, "is no file of metrics", _as_metrics)


def _as_metrics(content: Any) -> Metrics:
    if not any(content.values()):
        raise ValueError("no cells")
    for process, by_steps in content.items():
        get_process(process)
        for steps, cell in by_steps.items():
            int(steps)
            check_cell(cell)
    return content


def check_cell(cell: Any) -> None:
    """ValueError unless it is a metric's name -> number, with what every table needs."""
    if not isinstance(cell, dict) or not all(type(v) in (int, float) for v in cell.values()):
        raise ValueError("a cell must be metric -> number")
    missing = {"n_images", "sample_variance", "reference_variance"} - cell.keys()
    if missing:
        raise ValueError(f"a cell lacks {sorted(missing)}")


def headline_metrics(metrics: Metrics) -> list[str]:
    """The metrics that a table shows, in the order of importance: distances, then scores."""
    cell = next(iter(next(iter(metrics.values())).values()))
    distances = [name for name in cell if name == "fid" or name.startswith("frechet_")]
    scores = [name for name in cell if name == "inception_score" or name.startswith("is_")]
    scores = [name for name in scores if not name.endswith("_std")]
    return [*distances, *scores, "sample_variance"]


def explain(name: str, cell: Mapping[str, float]) -> str:
    """A table's heading: the metric, which way is better, and how many images stand behind it."""
    images = f"{cell['n_images']:,.0f} images"
    if name == "sample_variance":
        return f"{name} (data: {cell['reference_variance']:.4g}), {images}"
    better = "lower" if name == "fid" or name.startswith("frechet_") else "higher"
    return f"{name} ({better} is better), {images}"


def markdown(metrics: Metrics) -> str:
    """The tables of one run, one a metric."""
    return compare({"": [metrics]})


def compare(groups: Mapping[str, Sequence[Metrics]]) -> str:
    """The tables of several trainings, one a metric, a training's line below the other's.

    Args:
        groups: training's name -> its runs, which differ by the seed: mean and standard deviation.

    Raises:
        ValueError: runs that do not have the same processes, steps and metrics.
    """
    first = next(iter(groups.values()))[0]
    steps = sorted({int(s) for cells in first.values() for s in cells})
    names = headline_metrics(first)
    head = ["steps", *([""] if len(groups) > 1 else []), *map(str, steps)]
    cell = next(iter(next(iter(first.values())).values()))
    text = []
    for name in names:
        rows = [
            [get_process(process).title, *([label] if len(groups) > 1 else [])]
            + [_entry(_values(runs, process, str(s), name)) for s in steps]
            for process in first
            for label, runs in groups.items()
        ]
        rows_text = table(head, rows, left=len(head) - len(steps))
        text.append(f"**{explain(name, cell)}**\n\n{rows_text}")
    return "\n".join(text)


def _values(runs: Sequence[Metrics], process: str, steps: str, name: str) -> list[float]:
    try:
        return [run[process][steps][name] for run in runs]
    except KeyError as error:
        raise ValueError(
            f"a run has no {name} of {process!r} at {steps} steps: only runs with the same "
            "processes, steps and features can be compared"
        ) from error


def _entry(values: Sequence[float]) -> str:
    mean = sum(values) / len(values)
    if len(values) == 1:
        return f"{mean:.3f}"
    spread = (sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5
    return f"{mean:.2f} ± {spread:.2f}"


def as_text(text: str) -> str:
    """Words out of names and files, in one line of Markdown that no word of them can leave."""
    line = "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
    return line.replace("<", "&lt;")


def as_cell(text: str) -> str:
    """The same within a table."""
    return as_text(text).replace("|", "\\|")


def table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int) -> str:
    """Markdown that reads well as plain text; the first ``left`` columns are words."""
    lines = [[as_cell(word) for word in line] for line in (head, *rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]

    def row(line: Sequence[str]) -> str:
        words = [
            word.ljust(width) if i < left else word.rjust(width)
            for i, (word, width) in enumerate(zip(line, widths, strict=True))
        ]
        return "| " + " | ".join(words) + " |"

    rule = [("-" * (w + 1)) + ("-" if i < left else ":") for i, w in enumerate(widths)]
    return "\n".join([row(lines[0]), "|" + "|".join(rule) + "|", *map(row, lines[1:])]) + "\n"
