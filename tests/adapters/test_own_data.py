"""The commands of docs/own_data.md, as they stand, with shorter settings."""

import shlex
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from ml_collections import FrozenConfigDict
from PIL import Image

from adapters import compare, evaluate
from adapters.experiment.own_images import check_images, record_images
from adapters.experiment.run import run
from adapters.hosts import SN_DPM
from tests import ROOT
from tests.code_blocks import blocks
from tests.commands import QUIET
from third_party.common.datasets import get_dataset

SHORT = {
    "data.size": 8,
    "schedule.N": 30,
    "network.args.model_channels": 8,
    "base.iterations": 2,
    "base.batch_size": 4,
    "head.iterations": 2,
    "head.batch_size": 4,
    "sample.n_images": 12,
}
GRID = [
    "--config.seeds=(0,)",
    "--config.parts.main.steps=(2,)",
    "--config.parts.compute.steps=(2,)",
]
ONE_CELL = [
    "--config.tables=main",
    "--config.parts.main.lines=b",
    "--config.parts.main.processes=ddim",
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
    is_grid = module == "adapters.compare"
    prefix = "config.experiment" if is_grid else "config"
    changes = [f"--{prefix}.{k}={v}" for k, v in SHORT.items()]
    own = [*GRID, "--workers=1"] if is_grid else ["--config.sample.steps=(2,25)"]
    return [*words, *changes, *own, *QUIET]


def take_photos(tmp_path):
    """A folder of 24 images in two folders."""
    generator = np.random.default_rng(0)
    photos = tmp_path / "photos"
    for i in range(24):
        pixels = generator.integers(0, 256, (9 + i % 5, 12 - i % 3, 3), dtype=np.uint8)
        path = photos / ("cats", "dogs")[i % 2] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return photos


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*singular.*:UserWarning")
def test_the_commands_of_the_page_train_sample_and_compare(tmp_path, monkeypatch):
    photos = take_photos(tmp_path)
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


def command(module, config, root, workdir, *more):
    """The exit code of a short run, or of a grid of one cell, on these images."""
    is_grid = module == "adapters.compare"
    own = [
        f"--{'config.experiment' if is_grid else 'config'}.data.root={root}",
        *(ONE_CELL if is_grid else ["--config.baseline=False"]),
        f"--workdir={workdir}",
    ]
    words = ["--config", str(ROOT / "configs" / config), *own]
    return COMMANDS[module]([module, *shortened(module, words), *more])


@pytest.mark.filterwarnings("ignore:.*singular.*:UserWarning")
@pytest.mark.parametrize(
    ("module", "config"),
    [("adapters.sn_dpm", "folder_sn_sa.py"), ("adapters.compare", "folder_tables.py")],
)
def test_results_of_other_images_are_not_mixed(module, config, tmp_path, capsys):
    photos, workdir = take_photos(tmp_path), tmp_path / "results"
    assert command(module, config, photos, workdir) == 0
    before = written(workdir)
    assert command(module, config, photos, workdir) == 0
    assert written(workdir) == before
    first = min(photos.rglob("*.png"))
    moved = first.rename(tmp_path / "moved.png")
    capsys.readouterr()
    assert command(module, config, photos, workdir) == 2
    assert f"other images of {photos} (24 were there, 23 are)" in capsys.readouterr().err
    moved.rename(first.with_name("other.png"))
    assert command(module, config, photos, workdir) == 2
    assert "(files have other names or sizes)" in capsys.readouterr().err
    if module == "adapters.compare":  # what is finished can be told
        assert command(module, config, photos, workdir, "--report_only") == 0
        assert "(files have other names or sizes)" in capsys.readouterr().err
    first.with_name("other.png").rename(first)
    assert command(module, config, photos, workdir) == 0
    assert written(workdir) == before


def written(folder):
    kept = {path for path in folder.rglob("*") if path.is_file() and "reports" not in path.parts}
    return {p: p.stat().st_mtime_ns for p in kept if p.suffix in (".pth", ".json", ".npz")}


def data_at(path, name="npz"):
    return FrozenConfigDict({"name": name, "root": str(path), "follow_links": False})


PIXELS, LABELS = np.zeros((3, 4, 8, 1), np.uint8), np.arange(3)


@pytest.mark.parametrize(
    "other", [{"arr_0": PIXELS + 1}, {"arr_0": PIXELS.reshape(3, 8, 4, 1)}, {"labels": LABELS + 1}]
)
def test_an_npz_file_is_told_by_its_arrays(other, tmp_path):
    path, workdir = tmp_path / "own.npz", tmp_path / "run"
    np.savez(path, arr_0=PIXELS, labels=LABELS)
    record_images(workdir, data_at(path), get_dataset("npz", path))
    check_images(workdir, data_at(path), get_dataset("npz", path))
    np.savez(path, **{"arr_0": PIXELS, "labels": LABELS, **other})
    with pytest.raises(ValueError, match="pixels differ"):
        check_images(workdir, data_at(path), get_dataset("npz", path))


def test_one_store_holds_the_images_of_two_roots(tmp_path):
    one, other = tmp_path / "one.npz", tmp_path / "other.npz"
    for path, count in ((one, 2), (other, 3)):
        np.savez(path, arr_0=PIXELS[:count])
        check_images(tmp_path, data_at(path), get_dataset("npz", path))
        record_images(tmp_path, data_at(path), get_dataset("npz", path))
    for path in (one, other):
        check_images(tmp_path, data_at(path), get_dataset("npz", path))
    np.savez(other, arr_0=PIXELS[:2])
    with pytest.raises(ValueError, match=r"3 were there, 2 are"):
        check_images(tmp_path, data_at(other), get_dataset("npz", other))


@pytest.mark.parametrize("text", ["", "[]", '{"a": {"images": "x", "digest": 5}}'])
def test_a_damaged_record_says_what_to_do(text, tmp_path):
    path = tmp_path / "own.npz"
    np.savez(path, arr_0=PIXELS)
    (tmp_path / "images.json").write_text(text)
    with pytest.raises(ValueError, match="remove it if the images are those of the results"):
        check_images(tmp_path, data_at(path), get_dataset("npz", path))
