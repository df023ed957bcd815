"""Any two lines of a report, paired by seed: python -m benchmarks.cells CSV A B

A and B are LINE:PROCESS, such as ``sa:ddim`` or ``b/shifted:unipc``; CSV is ``cells.csv`` of a
comparison's report. Prints both means and A less B with its interval for each number of steps.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from adapters.experiment.tables import table
from adapters.measuring.statistics import Interval, paired, spread

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


def shown(interval: Interval | None) -> str:
    """A difference with its interval, bold where that excludes zero."""
    if interval is None:
        return ""
    text = f"{interval.mean:+.2f} [{interval.low:+.2f}, {interval.high:+.2f}]"
    return f"**{text}**" if interval.tells_apart else text


def values(cells: Cells, where: tuple[str, str, int], metric: str) -> dict[int, float]:
    """seed -> value; empty where there is no cell."""
    return {seed: one[metric] for seed, one in cells.get(where, {}).items()}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cells", type=Path)
    parser.add_argument("--metric", default="frechet_digit_classifier")
    parser.add_argument("lines", nargs=2, metavar="LINE:PROCESS")
    args = parser.parse_args(argv)
    try:
        cells, rows = read_cells([args.cells], (args.metric,)), []
    except KeyError:
        parser.error(f"--metric must be a column of {args.cells}, got {args.metric!r}")
    there = sorted({f"{line}:{process}" for line, process, _ in cells})
    if absent := set(args.lines) - set(there):
        parser.error(f"a line must be one of {', '.join(there)}, got {absent.pop()!r}")
    pair = [tuple(one.rsplit(":", 1)) for one in args.lines]
    for steps in sorted({steps for _, _, steps in cells}):
        ours, theirs = (values(cells, (*one, steps), args.metric) for one in pair)
        if (difference := paired(ours, theirs)) is not None:
            means = [f"{one.mean:.2f}" for one in map(spread, (ours, theirs)) if one]
            rows.append([str(steps), *means, shown(difference), str(difference.n)])
    print(table(["steps", *args.lines, "difference", "seeds"], rows, left=0))


if __name__ == "__main__":
    main()
