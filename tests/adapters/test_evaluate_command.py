"""python -m adapters.evaluate on each kind of source, and streams without files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from adapters.evaluate import main
from adapters.measuring.classifiers import labelled_images
from adapters.measuring.evaluation import compare, evaluate, summarise
from adapters.measuring.extractor import Extracted, Extractor, from_uint8
from adapters.measuring.features import EXTRACTORS, build_extractors
from adapters.measuring.image_sources import open_images
from adapters.sample import SINKS
from sa_plugin import NoiseSchedule, Sampler
from sa_plugin.metrics import Statistics, kernel_distance, precision_recall
from tests.commands import one_line

DIGITS = labelled_images("digits")[0]


def write(folder: Path, images: Tensor, kind: str) -> Path:
    """The images as ``adapters.sample`` writes them."""
    output = SINKS[kind](folder, len(images))
    arrays = images.permute(0, 2, 3, 1).numpy()
    for unit in output.missing():
        output.write(unit, arrays[unit * output.unit : (unit + 1) * output.unit])
    output.finish()
    return folder / "samples.npz" if kind == "npz" else folder


def run(*arguments: object) -> int:
    return main(["evaluate", *map(str, arguments)])


def expected(images: Tensor) -> dict[str, float]:
    pixels = build_extractors(["pixels"])
    return evaluate(images.split(256), summarise(DIGITS.split(256), pixels))


@pytest.mark.parametrize("kind", sorted(SINKS))
@pytest.mark.parametrize("channels", [1, 3])
def test_every_source_gives_the_images_back(tmp_path, kind, channels):
    images = (
        DIGITS[:70].repeat(1, channels, 1, 1) + torch.arange(channels).byte()[:, None, None] * 7
    )
    found = open_images(str(write(tmp_path / "images", images, kind)), channels=channels)
    assert (found.image_shape, len(found)) == ((channels, 8, 8), 70)
    assert torch.equal(torch.cat(list(found.uint8_batches(32))), images)


@pytest.mark.parametrize("kind", sorted(SINKS))
def test_against_a_dataset(tmp_path, capsys, kind):
    images = DIGITS[:300]
    source = write(tmp_path / "images", images, kind)
    out = tmp_path / "metrics.json"
    assert run(source, "--against", "digits", "--features", "pixels", "--out", out) == 0
    metrics = json.loads(out.read_text())
    assert metrics == pytest.approx(expected(images), rel=1e-9)
    assert f"| frechet_pixels | {metrics['frechet_pixels']:.6g} |" in capsys.readouterr().out


def test_against_statistics(tmp_path, capsys):
    images, stats, out = DIGITS[:300], tmp_path / "digits.npz", tmp_path / "metrics.json"
    assert run("digits", "--features", "pixels", "--save_stats", stats) == 0
    assert "1797 images" in capsys.readouterr().out
    source = write(tmp_path / "images", images, "npz")
    assert run(source, "--against", stats, "--features", "pixels", "--out", out) == 0
    reference = expected(images)
    del reference["reference_variance"]
    assert json.loads(out.read_text()) == pytest.approx(reference, rel=1e-9)


def test_kid_precision_and_recall_when_asked_for(tmp_path):
    images, out = DIGITS[:100], tmp_path / "metrics.json"
    source = write(tmp_path / "images", images, "npz")
    extras = ("--metrics", "kid,precision_recall", "--features", "pixels", "--out", out)
    assert run(source, "--against", "digits", *extras) == 0
    metrics = json.loads(out.read_text())
    made, real = (from_uint8(x).flatten(1) for x in (images, DIGITS))
    assert metrics["kid_pixels"] == pytest.approx(kernel_distance(made, real, subset_size=100)[0])
    near = metrics["precision_pixels"], metrics["recall_pixels"]
    assert near == pytest.approx(precision_recall(made, real))


def test_bad_input_is_one_line_and_exit_2(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    large = write(tmp_path / "large", DIGITS[:5].repeat(1, 1, 2, 2), "png")
    small = tmp_path / "small.npz"
    Statistics(np.zeros(3), np.eye(3), 10, "pixels").save(small)
    other = tmp_path / "other.npz"
    Statistics(np.zeros(64), np.eye(64), 100, "inception").save(other)
    np.save(tmp_path / "pickled.npy", {"mu": 0}, allow_pickle=True)
    np.savez(tmp_path / "floats.npz", np.zeros((4, 8, 8, 1)))
    (tmp_path / "empty").mkdir()
    pixels = ("--features", "pixels")
    cases = [
        (("digits", "--against", "nowhere", *pixels), "got 'nowhere'"),
        (("digits", "--against", large, *pixels), "images must have the shape of the reference"),
        (("digits", "--against", small, *pixels), "of dimension 3, the features have 64"),
        (("digits", "--against", other, *pixels), "of the features 'inception'"),
        (("digits", "--against", tmp_path / "pickled.npy", *pixels), "convert it by np.savez"),
        ((tmp_path / "floats.npz", "--against", "digits", *pixels), "must be uint8"),
        ((tmp_path / "empty", "--against", "digits", *pixels), "holds no images"),
        (("digits", "--against", "digits", "--features", "nothing"), "got 'nothing'"),
        (("digits", "--against", "digits", *pixels, "--metrics", "fid"), "got 'fid'"),
        (("digits", "--features", "pixels,digit_classifier", "--save_stats", "x.npz"), "one"),
        (("digits", "--against", "digits", "--cache_dir", tmp_path), "download http"),
    ]
    for arguments, said in cases:
        assert run(*arguments) == 2, arguments
        one_line(capsys, said)


def test_too_few_images_are_told_of_in_one_line(tmp_path):
    source = write(tmp_path / "images", DIGITS[:20], "npz")
    command = [sys.executable, "-m", "adapters.evaluate", str(source), "--against", "digits"]
    done = subprocess.run(
        [*command, "--features", "pixels"], capture_output=True, text=True, check=True
    )
    assert done.stderr.count("20 samples of dimension 64") == 1
    assert done.stderr.count("\n") == 1


def test_a_sampler_streams_into_the_metrics_without_files():
    class Zero(nn.Module):
        def forward(self, x: Tensor, n: Tensor) -> Tensor:
            return torch.zeros_like(x)

    sampler = Sampler(Zero(), NoiseSchedule.linear(100), steps=3)
    stream = lambda: sampler.stream(200, (1, 8, 8), seed=1, batch_size=64)  # noqa: E731
    reference = summarise(DIGITS.split(256), build_extractors(["pixels"]))
    metrics = evaluate(stream(), reference)
    assert metrics["n_images"] == 200
    assert metrics == evaluate([torch.cat(list(stream()))], reference) | {
        name: pytest.approx(metrics[name], rel=1e-9) for name in metrics
    }


def test_extras_need_the_references_features():
    reference = summarise([DIGITS], build_extractors(["pixels"]))
    with pytest.raises(ValueError, match="its statistics alone"):
        compare(reference, reference, extras=["kid"])
    with pytest.raises(ValueError, match=r"among \['kid', 'precision_recall'\], got 'fid'"):
        compare(reference, reference, extras=["fid"])


@pytest.mark.filterwarnings("default:.*(singular|left out).*:UserWarning")
def test_too_few_images_for_a_score_leave_the_distance(tmp_path, capsys, monkeypatch):
    toy = Extractor("digit_classifier", lambda x: Extracted(x[:, 0, 0], x[:, 0, 1]))
    monkeypatch.setitem(EXTRACTORS, "digit_classifier", lambda *_: toy)
    source = write(tmp_path / "images", DIGITS[:8], "npz")
    features = ("--features", "digit_classifier")
    assert run(source, "--against", "digits", *features) == 0
    said = capsys.readouterr()
    assert "| frechet_digit_classifier | " in said.out
    assert "| is_digit_classifier" not in said.out
    assert "is_digit_classifier is left out: its 10 splits need an image each, got 8" in said.err
    assert run(source, "--against", "digits", *features, "--splits", 2) == 0
    assert "| is_digit_classifier | " in capsys.readouterr().out


def test_without_inception_s_weights_the_way_out_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    assert run("digits", "--against", "digits", "--cache_dir", tmp_path) == 2
    one_line(capsys, "--features pixels")
    assert run("digits", "--against", "digits", "--splits", 0) == 2
    one_line(capsys, "--splits must be >= 1, got 0")
