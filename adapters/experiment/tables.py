"""Tables of metrics: reverse processes by numbers of steps, of one run or over several seeds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from adapters.hosts import get_process
from adapters.measuring.metric_names import data_value, direction, in_words, lower_is_better
from adapters.measuring.statistics import paired, verdict
from sa_files.reading import one_line
from sa_files.stored import read_json

LIMITS = (
    "Both are single runs: another seed can turn the order round. A training step of SA-K makes K "
    "network calls, one of B makes one. Intervals need three or more seeds: "
    "python -m adapters.compare\n"
)

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
    if not isinstance(cell, dict) or not all(map(_is_number, cell.values())):
        raise ValueError("a cell must be metric -> finite number")
    missing = {"n_images", "sample_variance", "reference_variance"} - cell.keys()
    if missing:
        raise ValueError(f"a cell lacks {sorted(missing)}")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


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
    return f"{name} ({_note(name, cell)}), {images}"


def _note(name: str, cell: Mapping[str, float]) -> str:
    """The better direction, or the data's own value where there is none."""
    return direction(name) or f"data: {data_value(name, cell):.4g}"


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


def against(b: Metrics, sa: Metrics, *, line: str = "SA-2") -> str:
    """B against SA: one table of all metrics, and what one run of each lets one say.

    Args:
        b: metrics of the baseline's run.
        sa: those of a run with the SA loss that differs in nothing else.
        line: what the tables call the second run.

    A cell of the table holds both values and their difference.

    Raises:
        ValueError: ``sa`` lacks a reverse process, a number of steps or a metric of ``b``.
    """
    cell = next(iter(next(iter(b.values())).values()))
    steps = sorted({int(s) for cells in b.values() for s in cells})
    rows, sentences = [], []
    for name in headline_metrics(b):
        title = f"{in_words(name)} ({_note(name, cell)})"
        differences = []
        for process in b:
            texts = []
            for s in steps:
                before, after = _values([b, sa], process, str(s), name)
                difference = paired({0: after}, {0: before})
                differences.append(difference)
                texts.append(f"{before:.2f} → {after:.2f} ({after - before:+.2f})")
            rows.append([title, get_process(process).title, *texts])
            title = ""
        sentence = verdict(line, "B", differences, lower_is_better(name))
        sentences.append(f"- {in_words(name)}: {sentence}")
    head = [f"B = baseline → {line} (difference)", "steps", *map(str, steps)]
    return "\n".join([table(head, rows, left=2), *sentences, "", LIMITS])


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
    return one_line(text).replace("<", "&lt;")


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
