"""The commands of docs/own_data.md, as they stand, with shorter settings."""

import shlex
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from adapters import compare, evaluate
from adapters.experiment.run import run
from adapters.hosts import SN_DPM
from tests import ROOT
from tests.code_blocks import blocks
from tests.commands import QUIET

SHORT = {
    "data.size": 8,
    "schedule.N": 30,
    "network.args.model_channels": 8,
    "base.iterations": 2,
    "base.batch_size": 4,
    "head.iterations": 2,
    "head.batch_size": 4,
    "sample.n_images": 12,
    "sample.steps": "(2,25)",
}
GRID = [
    "--config.seeds=(0,)",
    "--config.trainings.b_equal.set.base.iterations=4",
    "--config.parts.main.steps=(2,)",
    "--config.parts.compute.steps=(2,)",
]
COMMANDS = {
    "adapters.sn_dpm": lambda words: run(SN_DPM, words),
    "adapters.compare": compare.main,
    "adapters.evaluate": evaluate.main,
}


def commands():
    """The words after python -m, of every command of the page."""
    lines = "".join(b.code for b in blocks(ROOT / "docs/own_data.md", "sh")).splitlines()
    return [line.split("python -m ")[1] for line in lines if line.startswith("python -m ")]


def shortened(module, words):
    if module == "adapters.evaluate":
        return [word.replace("--size=32", "--size=8") for word in words]
    prefix = "config.experiment" if module == "adapters.compare" else "config"
    return [*words, *(f"--{prefix}.{k}={v}" for k, v in SHORT.items()), *QUIET] + (
        [*GRID, "--workers=1"] if module == "adapters.compare" else []
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*singular.*:UserWarning")
def test_the_commands_of_the_page_train_sample_and_compare(tmp_path, monkeypatch):
    generator = np.random.default_rng(0)
    photos = tmp_path / "photos"
    for i in range(24):
        pixels = generator.integers(0, 256, (9 + i % 5, 12 - i % 3, 3), dtype=np.uint8)
        path = photos / ("cats", "dogs")[i % 2] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    used = set()
    for command in commands():
        module, *words = shlex.split(command.replace("$FOLDER", str(photos)))
        used.add(module)
        assert COMMANDS[module]([module, *shortened(module, words)]) == 0, command
    assert used == set(COMMANDS)
    for name, label in product(("folder_sn", "folder_classes"), ("sa2_lam1", "baseline")):
        with np.load(Path("runs", name, f"{label}_seed0", "samples/ddim_25.npz")) as samples:
            assert samples["arr_0"].shape == (12, 8, 8, 3)
    report = Path("runs/compare/folder/reports/folder/report.md").read_text()
    assert "Equal compute" in report
    assert "SA-2" in report
