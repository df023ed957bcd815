"""Tables of metrics: reverse processes by numbers of steps, of one run or over several seeds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from adapters.hosts import get_process
from sa_files.stored import read_json

Cell = dict[str, float]
Metrics = dict[str, dict[str, Cell]]  # process -> steps -> metric -> value


def read_metrics(path: Path) -> Metrics:
    """Read a run's metrics.json; a ValueError names the file if it holds no metrics."""
    return read_json(path, "is not a file of metrics", _as_metrics)


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
    """ValueError unless ``cell`` is metric -> number, with the metrics that every table needs."""
    if not isinstance(cell, dict) or not all(type(v) in (int, float) for v in cell.values()):
        raise ValueError("a cell must be metric -> number")
    missing = {"n_images", "sample_variance", "reference_variance"} - cell.keys()
    if missing:
        raise ValueError(f"a cell lacks {sorted(missing)}")


def headline_metrics(metrics: Metrics) -> list[str]:
    """The metrics that have a table, in order of importance: distances, then scores."""
    cell = next(iter(next(iter(metrics.values())).values()))
    distances = [name for name in cell if name == "fid" or name.startswith("frechet_")]
    scores = [name for name in cell if name == "inception_score" or name.startswith("is_")]
    scores = [name for name in scores if not name.endswith("_std")]
    return [*distances, *scores, "sample_variance"]


def explain(name: str, cell: Mapping[str, float]) -> str:
    """A table's heading: the metric, which direction is better, and the number of images."""
    images = f"{cell['n_images']:,.0f} images"
    if name == "sample_variance":
        return f"{name} (data: {cell['reference_variance']:.4g}), {images}"
    better = "lower" if name == "fid" or name.startswith("frechet_") else "higher"
    return f"{name} ({better} is better), {images}"


def markdown(metrics: Metrics) -> str:
    """The tables of one run, one for each metric."""
    return compare({"": [metrics]})


def compare(groups: Mapping[str, Sequence[Metrics]]) -> str:
    """The tables of several trainings, one for each metric, with a line for each training.

    Args:
        groups: training's name -> its runs, which differ only in the seed. The tables show their
            mean and standard deviation.

    Raises:
        ValueError: runs do not have the same reverse processes, steps and metrics.
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
    """Text from names or files as one line of Markdown; it cannot add lines or HTML."""
    line = "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
    return line.replace("<", "&lt;")


def as_cell(text: str) -> str:
    """``as_text`` for a cell of a table."""
    return as_text(text).replace("|", "\\|")


def table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int) -> str:
    """A Markdown table, aligned as plain text; the first ``left`` columns hold words."""
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
