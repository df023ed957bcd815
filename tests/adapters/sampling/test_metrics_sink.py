"""adapters.sample --format metrics: the metrics of the images that the other formats write."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from adapters.measuring.classifiers import labelled_images
from adapters.measuring.evaluation import evaluate, summarise
from adapters.measuring.features import build_extractors
from adapters.sampling.metrics_sink import MetricsFile
from adapters.sampling.sinks import PngFolder
from sa_plugin.metrics import Moments
from tests.adapters.test_sample import (  # noqa: F401
    Command,
    arguments,
    contents,
    fill_disk,
    run,
    weights,
)
from tests.children import ROOT

DIGITS = labelled_images("digits")[0]
PIXELS = "--config.evaluate.features=('pixels',)"


@pytest.fixture(scope="module")
def extractors(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    return build_extractors(["digit_classifier", "pixels"], cache_dir=cache)


@pytest.fixture(scope="module")
def reference(extractors):
    return summarise(DIGITS.split(256), extractors)


def output(folder, extractors, reference, n=300):
    return MetricsFile(folder, n, extractors, lambda: reference)


def write(made, units):
    images = DIGITS[: made.n_images].permute(0, 2, 3, 1).numpy()
    for unit in units:
        made.write(unit, images[unit * 64 : (unit + 1) * 64])


def test_any_order_and_any_parts_give_one_passes_metrics(tmp_path, extractors, reference):
    first, second = (output(tmp_path, extractors, reference) for _ in range(2))
    assert first.missing() == [0, 1, 2, 3, 4]
    write(first, [0, 1])
    write(second, [4, 3])
    first.close()
    second.close()
    third = output(tmp_path, extractors, reference)
    assert third.missing() == [2]
    write(third, [2])
    third.close()
    third.finish()
    assert not third.missing()
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    expected = evaluate(DIGITS[:300].split(64), reference)
    assert metrics == pytest.approx(expected, rel=1e-9)
    exact = ("n_images", "sample_variance", "is_digit_classifier", "is_digit_classifier_std")
    assert {name: metrics[name] for name in exact} == {name: expected[name] for name in exact}
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]
    third.finish()
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics


def test_a_part_is_written_now_and_then_and_never_grows_too_large(
    tmp_path, extractors, reference, monkeypatch
):
    made = output(tmp_path, extractors, reference)
    write(made, [0, 1])
    assert made.missing() == [0, 1, 2, 3, 4]  # in memory alone
    monkeypatch.setattr("adapters.sampling.metrics_sink.SAVE_SECONDS", 0)
    write(made, [2])
    assert made.missing() == [3, 4]
    monkeypatch.setattr("adapters.sampling.metrics_sink.PART_UNITS", 4)
    write(made, [3, 4])
    assert sorted(p.name for p in (tmp_path / "parts").iterdir()) == [
        "from_00000000.npz",
        "from_00000004.npz",
    ]
    assert not made.missing()


def test_images_counted_twice_and_damaged_parts_are_refused(tmp_path, extractors, reference):
    one, two = (output(tmp_path, extractors, reference) for _ in range(2))
    write(one, [0, 1, 2])
    write(two, [2, 3, 4])
    one.close()
    two.close()
    message = "parts holds images twice, from two commands at the same time"
    with pytest.raises(ValueError, match=message):
        one.finish()
    (tmp_path / "parts" / "from_00000002.npz").write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(ValueError, match=r"from_00000002.npz is damaged; remove it"):
        one.missing()


def test_the_command_equals_the_files_metrics(tmp_path, weights, capsys):  # noqa: F811
    assert run(tmp_path / "a", weights, PIXELS, form="metrics") == 0
    shown = capsys.readouterr().out
    assert run(tmp_path / "b", weights, form="npz") == 0
    with np.load(tmp_path / "b" / "samples.npz") as arrays:
        images = torch.from_numpy(arrays["arr_0"]).permute(0, 3, 1, 2)
    expected = evaluate(
        images.split(64), summarise(DIGITS.split(500), build_extractors(["pixels"]))
    )
    metrics = json.loads((tmp_path / "a" / "metrics.json").read_text())
    assert metrics == pytest.approx(expected, rel=1e-9)
    assert f"| frechet_pixels | {metrics['frechet_pixels']:.6g} |" in shown
    assert "150 images in" in shown
    assert set(contents(tmp_path / "a")) == {"config.json", ".config.json", "metrics.json"}


def test_the_command_continues(tmp_path, weights, monkeypatch, capsys):  # noqa: F811
    write_unit = MetricsFile.write
    fill_disk(monkeypatch, MetricsFile)
    assert run(tmp_path / "a", weights, PIXELS, form="metrics") == 1
    assert "No space left on device; the same command continues it" in capsys.readouterr().err
    monkeypatch.undo()
    made = []
    monkeypatch.setattr(
        MetricsFile,
        "write",
        lambda self, unit, images: made.append(unit) or write_unit(self, unit, images),
    )
    assert run(tmp_path / "a", weights, PIXELS, form="metrics", batch=64) == 0
    assert made == [1]  # 0 was written, and 2, which was ready when 1 failed
    assert run(tmp_path / "whole", weights, PIXELS, form="metrics") == 0
    one, two = (json.loads((tmp_path / k / "metrics.json").read_text()) for k in ("a", "whole"))
    assert one == pytest.approx(two, rel=1e-9)


@pytest.mark.filterwarnings("default:64 samples:UserWarning")
def test_other_references(tmp_path, weights, capsys):  # noqa: F811
    PngFolder(tmp_path / "png", 70).write(0, DIGITS[:64].permute(0, 2, 3, 1).numpy())
    options = (PIXELS, f"--against={tmp_path / 'png'}")
    assert run(tmp_path / "a", weights, *options, form="metrics") == 0
    error = capsys.readouterr().err
    assert error.startswith("adapters.sample: warning: 64 samples of dimension 64: the covariance")
    assert error.count("\n") == 1
    metrics = json.loads((tmp_path / "a" / "metrics.json").read_text())
    assert metrics["reference_variance"] == summarise([DIGITS[:64]], []).variance


@pytest.mark.parametrize(
    ("more", "form", "said"),
    [
        (["--against=digits"], "png", "--against goes with --format metrics, got --format png"),
        ([PIXELS, "--against=nowhere"], "metrics", "got 'nowhere'"),
        (["--config.evaluate.features=('inception',)"], "metrics", "download http"),
        (["--config.sample.n_images=1"], "metrics", "sample.n_images must be >= 2, got 1"),
        (["--config.evaluate.splits=151"], "metrics", "splits must be <= sample.n_images = 150"),
    ],
)
def test_bad_input(tmp_path, weights, capsys, monkeypatch, more, form, said):  # noqa: F811
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    assert run(tmp_path / "a", weights, *more, form=form) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "a").exists()


@pytest.mark.slow
def test_two_processes_and_a_kill_give_one_processs_metrics(tmp_path, weights):  # noqa: F811
    """Killed when a part is there: what is in it is not made again."""
    options = {"n": 2000, "steps": 10, "form": "metrics"}
    assert run(tmp_path / "one", weights, PIXELS, **options) == 0
    Command(tmp_path / "two", weights, PIXELS, processes=2, **options).finish()
    script = "import sys, adapters.sample as s, adapters.sampling.metrics_sink as m"
    script += "; m.SAVE_SECONDS = 0"
    killed = subprocess.Popen(
        [sys.executable, "-c", f"{script}; sys.exit(s.main(sys.argv))",
         *arguments(tmp_path / "killed", weights, PIXELS, **options)], cwd=ROOT,
    )  # fmt: skip
    while not list(tmp_path.glob("killed/parts/*.npz")) and killed.poll() is None:
        time.sleep(0.01)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    Command(tmp_path / "killed", weights, PIXELS, processes=2, **options).finish()
    one, two, again = (
        json.loads((tmp_path / name / "metrics.json").read_text())
        for name in ("one", "two", "killed")
    )
    assert two == pytest.approx(one, rel=1e-9)
    assert again == pytest.approx(one, rel=1e-9)


def test_moments_go_out_and_in_without_loss():
    made = Moments()
    made.update(np.random.default_rng(0).normal(size=(10, 3)))
    back = Moments.of_arrays(made.arrays())
    assert back.count == 10
    assert np.array_equal(back.mu, made.mu)
    assert np.array_equal(back.sigma, made.sigma)
    assert Moments.of_arrays(Moments().arrays()).count == 0
    with pytest.raises(ValueError, match=r"arrays must be of one dimension, got origin \(2,\)"):
        Moments.of_arrays(made.arrays() | {"origin": np.zeros(2)})
