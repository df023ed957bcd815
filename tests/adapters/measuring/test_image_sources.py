"""Folders of mixed images, as training and as evaluation read them: by one rule."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from adapters.evaluate import main
from adapters.experiment.run import run
from adapters.hosts import SN_DPM
from adapters.measuring.image_sources import open_images
from tests.commands import one_line, words

SMALL = {
    "schedule": {"N": 30},
    "network": {"args": {"model_channels": 8}},
    "base": {"iterations": 2, "batch_size": 4},
    "head": {"iterations": 2, "batch_size": 4},
    "sample": {"n_images": 12, "steps": "(2,)", "processes": "('ddim',)"},
    "evaluate": {"splits": 2},
}
pytestmark = pytest.mark.filterwarnings("ignore:.*singular.*:UserWarning")


def fill(folder, shapes):
    """A folder of noise, one PNG for each of the shapes."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for i, shape in enumerate(shapes):
        pixels = generator.integers(0, 256, shape, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02d}.png")
    return folder


def train(folder, workdir, *arguments, **data):
    sections = SMALL | {"data": {"root": folder, "size": 8} | data}
    command = ["x", *words("folder_sn_sa.py", **sections), f"--workdir={workdir}", *arguments]
    return run(SN_DPM, command)


def evaluate(*arguments):
    return main(["evaluate", *map(str, arguments), "--features=thumbnails"])


@pytest.mark.parametrize("channels", [1, 3])
def test_grey_images_are_trained_and_evaluated_by_one_rule(tmp_path, channels):
    folder = fill(tmp_path / "grey", [(8, 8)] * 6)
    assert train(folder, tmp_path / "run", size=0, channels=channels) == 0
    samples, out = tmp_path / "run/samples/ddim_2.npz", tmp_path / "metrics.json"
    assert np.load(samples)["arr_0"].shape == (12, 8, 8, channels)
    assert evaluate(samples, "--against", folder, "--out", out) == 0
    trained = json.loads((tmp_path / "run/metrics.json").read_text())["ddim"]["2"]
    measured = json.loads(out.read_text())
    assert measured == pytest.approx({key: trained[key] for key in measured}, rel=1e-6)
    assert evaluate(folder, "--against", samples, "--out", out) == 0
    assert json.loads(out.read_text())["frechet_thumbnails"] == pytest.approx(
        measured["frechet_thumbnails"], rel=1e-6
    )


def test_one_grey_image_does_not_make_the_others_grey(tmp_path, caplog):
    folder = fill(tmp_path / "mixed", [(8, 8), *[(8, 8, 3)] * 7])
    found = torch.cat(list(open_images(str(folder)).uint8_batches(8)))
    assert np.array_equal(found[1].permute(1, 2, 0), Image.open(folder / "01.png"))
    assert "7 RGB (01.png), 1 L (00.png); all are read as RGB" in caplog.text
    grey = open_images(str(folder), channels=1)
    assert grey.image_shape == (1, 8, 8)


def test_mixed_sizes_are_told_in_the_plan_and_trained_at_one_size(tmp_path, caplog, capsys):
    caplog.set_level("INFO")
    folder = fill(tmp_path / "mixed", [(9, 12, 3)] * 4 + [(16, 10, 3)] * 3)
    assert train(folder, tmp_path / "run", "--dry_run") == 0
    assert "holds 7 images: 4 12x9 (00.png), 3 10x16 (04.png); 7 RGB" in capsys.readouterr().err
    assert train(folder, tmp_path / "run") == 0
    assert np.load(tmp_path / "run/samples/ddim_2.npz")["arr_0"].shape == (12, 8, 8, 3)
    capsys.readouterr()
    assert evaluate(folder, "--against", folder) == 2
    one_line(capsys, "--size of adapters.evaluate")
    assert evaluate(folder, "--against", folder, "--size=8") == 0


def test_another_folder_is_other_data(tmp_path, capsys):
    one, two = (fill(tmp_path / name, [(8, 8, 3)] * 4) for name in ("one", "two"))
    assert train(one, tmp_path / "run", "--stage=base") == 0
    assert train(two, tmp_path / "run", "--stage=base") == 2
    assert f"data.root is '{one}' there" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("shapes", "size", "said"),
    [
        ([(8, 8, 3)], 8, "holds one image, 00.png: must hold at least 2"),
        ([(9, 12, 3), (16, 10, 3)], 0, "give a size"),
    ],
)
@pytest.mark.parametrize("dry", [[], ["--dry_run"]])
def test_what_cannot_be_trained_on_is_said_first(tmp_path, capsys, shapes, size, said, dry):
    folder = fill(tmp_path / "few", shapes)
    assert train(folder, tmp_path / "run", *dry, size=size) == 2
    one_line(capsys, folder, said)
    assert not (tmp_path / "run").exists()


def test_a_size_is_refused_where_the_images_have_one(tmp_path, capsys):
    command = ["x", *words("digits_sn_sa.py", data={"size": 16}), f"--workdir={tmp_path / 'run'}"]
    assert run(SN_DPM, command) == 2
    one_line(capsys, "dataset 'digits' has no option 'size'")
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("ignore:Palette images with Transparency:UserWarning")
def test_a_mixed_folder_is_read_as_pytorch_fid_reads_it_but_for_orientation(tmp_path):
    """Grey among colour, transparency and palettes are equal; a turned photo is upright here."""
    from pytorch_fid.fid_score import ImagePathDataset

    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 4), dtype=np.uint8)
    picture, exif = Image.fromarray(noise), Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    for i, mode in enumerate(("RGB", "L", "LA", "RGBA", "P", "1")):
        picture.convert(mode).save(tmp_path / f"{i}.png")
    picture.convert("RGB").save(tmp_path / "turned.jpg", exif=exif)
    (ours,) = open_images(str(tmp_path)).uint8_batches(10)
    theirs = ImagePathDataset(sorted(tmp_path.iterdir()))
    *same, turned = (torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in theirs)
    assert torch.equal(ours[:-1], torch.stack(same))
    assert torch.equal(ours[-1], turned.rot90(-1, (1, 2)))
    assert not torch.equal(ours[-1], turned)
