"""benchmarks.calls, .cells and .derivatives: what counts as a call, and what is compared."""

from __future__ import annotations

import csv

import pytest
import torch
from ml_collections import FrozenConfigDict

from adapters.comparison.grid import Grid
from benchmarks import calls, cells, derivatives
from configs import digits_covariances_tables

GRID = Grid(FrozenConfigDict(digits_covariances_tables.get_config()))


@pytest.mark.parametrize(
    ("line", "process", "steps", "expected"),
    [
        ("b", "sn_ddpm", 10, 10),
        ("sa", "probes_ddpm", 10, 19),  # the last step needs no derivative
        ("b/probes16", "probes_ddim", 5, 69),
        ("b", "lanczos_ddim", 5, 17),
        ("b", "lanczos_ddim", 1, 1),
    ],
)
def test_a_derivative_counts_as_a_call(line, process, steps, expected):
    assert calls.calls(GRID, line, process, steps) == expected


def test_rows_are_compared_with_the_plain_row_at_no_more_calls(tmp_path, capsys):
    """Three seeds, whose differences are 0.9, 1.0 and 1.1: Student's interval is 1 +- 0.248."""
    metric = "frechet_digit_classifier"
    with (tmp_path / "cells.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["training", "sampling", "seed", "process", "steps", metric])
        writer.writeheader()
        for seed in range(3):
            for process, steps, value in (
                ("ddpm_small", 5, 9.0),
                ("ddpm_small", 10, 4.0 + seed),
                ("ddpm_small", 25, 2.0),
                ("probes_ddpm", 5, 4.9 + 1.1 * seed),
                ("probes_ddpm", 25, 1.0),
            ):
                row = {"training": "b", "sampling": "default", "seed": seed, "process": process}
                writer.writerow({**row, "steps": steps, metric: value})
    calls.main(["--cells", str(tmp_path / "cells.csv")])
    lines = [line.split("|") for line in capsys.readouterr().out.splitlines() if "Probes" in line]
    assert [word.strip() for word in lines[0]] == [
        "",
        "Probes-DDPM",
        "B",
        "6.00 (5)",
        "**+1.00 [+0.75, +1.25]**",
        "6.00 (5)",
        "**+4.00 [+1.27, +6.73]**",
        "1.00 (25)",
        "**-1.00 [-1.00, -1.00]**",
        "",
    ]
    assert len(lines) == 1


def test_any_two_lines_are_paired_by_seed(tmp_path, capsys):
    """Differences of 1.9, 2.0 and 2.1 over the seeds that both have; the fourth seed is alone."""
    names = ["training", "sampling", "seed", "process", "steps", "frechet_digit_classifier"]
    lines = [("b", "default", seed, "ddim", 5, 4.0 + seed) for seed in range(3)]
    lines += [("b", "shifted", seed, "unipc", 5, 5.9 + 1.1 * seed) for seed in range(4)]
    with (tmp_path / "cells.csv").open("w", newline="") as file:
        csv.writer(file).writerows([names, *lines])
    cells.main([str(tmp_path / "cells.csv"), "b/shifted:unipc", "b:ddim"])
    row = capsys.readouterr().out.strip().splitlines()[-1].split("|")
    assert [word.strip() for word in row[1:-1]] == [
        "5",
        "7.55",
        "5.00",
        "**+2.00 [+1.75, +2.25]**",
        "3",
    ]

    for words, said in (
        (["b:unipc", "b:ddim"], "one of b/shifted:unipc, b:ddim, got 'b:unipc'"),
        (["b:ddim", "b:ddim", "--metric", "fid"], "--metric must be a column of"),
    ):
        with pytest.raises(SystemExit):
            cells.main([str(tmp_path / "cells.csv"), *words])
        assert said in capsys.readouterr().err


def test_every_way_to_derive_gives_the_same():
    torch.manual_seed(0)
    ways = derivatives.ways_of("digits", 2, "cpu")
    assert len(ways) == 1 + 4 + 4 + 2
    held = derivatives.peaks(ways)
    assert min(held.values()) == held[derivatives.ALONE]
    assert held[derivatives.ALONE] * 2 < held["16 probes, vjp"] < 2 * held["1 probes, vjp"]
    for call in ways.values():
        assert call().isfinite().all()


def test_the_ratio_is_taken_within_a_round(capsys):
    alone, other = [0.001, 0.010, 0.002], [0.0011, 0.0120, 0.0026]
    derivatives.report({derivatives.ALONE: alone, "other": other})
    row = capsys.readouterr().out.splitlines()[-1]
    assert row.startswith("| other | 2.600 (1.850 to 7.300) | 1.200 (1.150 to 1.250) | 1.100 to")
