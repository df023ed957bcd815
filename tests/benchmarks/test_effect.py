"""benchmarks.effect: measured cells beside the closed form."""

import csv
from itertools import product

import pytest
from PIL import Image

from adapters.hosts import PROCESSES
from benchmarks.effect import STEPS, Closed, main
from sa_plugin.effect.predicted import predict


@pytest.fixture
def cells(tmp_path):
    """B has variance 10, SA-2 has 11 with seed 0 and 13 with seed 1; a third seed lacks B."""
    path = tmp_path / "cells.csv"
    variances = {("b", 0): 10, ("b", 1): 10, ("sa", 0): 11, ("sa", 1): 13, ("sa", 2): 99}
    with path.open("w", newline="") as file:
        names = ["training", "sampling", "seed", "process", "steps", "sample_variance"]
        writer = csv.DictWriter(file, [*names, "frechet_pixels"])
        writer.writeheader()
        for (training, seed), process, steps in product(variances, ("ddpm_small", "ddim"), STEPS):
            cell = [training, "default", seed, process, steps, variances[training, seed]]
            writer.writerow(dict(zip(names, cell, strict=True)) | {"frechet_pixels": 1})
    return path


def test_changes_are_paired_by_seed_and_predicted_for_each_cell(cells, tmp_path, capsys):
    main(["--cells", str(cells), "--out", str(tmp_path / "effect.png")])
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| SA-2"))
    found = [word.strip() for word in row.strip("|").split("|")]
    closed, wanted = Closed(), []
    for process, steps in product(("ddpm_small", "ddim"), STEPS):
        chain = {"forward": PROCESSES[process].forward, "variance": PROCESSES[process].variance}
        one = predict(closed.loss("sa"), closed.s, steps=steps, **chain)
        wanted.append(f"{one.sample_variances[1] - one.sample_variances[0]:.2f} / 2.00")
    assert found == ["SA-2", "0.333", *wanted]
    with Image.open(tmp_path / "effect.png") as picture:
        assert picture.size == (1170, 845)
