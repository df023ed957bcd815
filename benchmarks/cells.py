"""The cells of a grid's report, as its ``cells.csv`` holds them."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

Cells = Mapping[tuple[str, str, int], Mapping[int, Mapping[str, float]]]


def read_cells(paths: Sequence[Path], metrics: Sequence[str]) -> Cells:
    """(line, process, steps) -> seed -> metrics; a line is "TRAINING" or "TRAINING/SAMPLING"."""
    cells: dict[tuple[str, str, int], dict[int, dict[str, float]]] = {}
    for path in paths:
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                sampling = row["sampling"]
                line = row["training"] + ("" if sampling == "default" else f"/{sampling}")
                key = line, row["process"], int(row["steps"])
                found = {name: float(row[name]) for name in metrics}
                cells.setdefault(key, {})[int(row["seed"])] = found
    return cells
