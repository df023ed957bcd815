"""Feature extractors and the evaluation that streams images through them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from adapters.measuring.classifiers import (
    CLASSIFIERS,
    ClassifierSettings,
    held_out_accuracy,
    labelled_images,
    load,
    train,
)
from adapters.measuring.evaluation import PixelVariance, evaluate, summarise
from adapters.measuring.extractor import Extracted, Extractor, from_uint8
from adapters.measuring.features import EXTRACTORS, build_extractors
from sa_files.writing import write_atomically
from sa_plugin.metrics import frechet_distance, inception_score
from sa_plugin.sampling.sampler import to_uint8

QUICK = ClassifierSettings(epochs=1, width=8)


@pytest.fixture(scope="module")
def digits():
    return labelled_images("digits")


@pytest.fixture(scope="module")
def extractors():
    return build_extractors(["pixels", "digit_classifier"])


@pytest.fixture(scope="module")
def reference(digits, extractors):
    return summarise(digits[0].split(256), extractors)


def weights(model: torch.nn.Module) -> bytes:
    return b"".join(tensor.numpy().tobytes() for tensor in model.state_dict().values())


class TestImages:
    def test_every_level_survives_the_round_trip(self):
        levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
        x = from_uint8(levels)
        assert (x.min().item(), x.max().item()) == (-1.0, 1.0)
        assert torch.equal(to_uint8(x), levels)

    def test_rounds_to_the_nearest_and_clips(self):
        x = torch.tensor([-1.2, -1.0, 0.0, 0.5, 1.0, 7.0])
        assert to_uint8(x).tolist() == [0, 0, 128, 191, 255, 255]

    def test_digits_are_the_data_set_within_rounding(self, digits):
        from sklearn import datasets as sklearn_datasets

        data = sklearn_datasets.load_digits()
        images, labels = digits
        assert images.shape == (1797, 1, 8, 8)
        np.testing.assert_array_equal(labels.numpy(), data.target)
        x = from_uint8(images)[:, 0].numpy()
        np.testing.assert_allclose(x, data.images / 8 - 1, atol=0.5 / 127.5 + 1e-6)
        assert len(images.unique()) == 17

    @pytest.mark.parametrize("images", [torch.zeros(2, 1, 8, 8), torch.zeros(8, 8).byte()])
    def test_refuses_other_images(self, images):
        with pytest.raises(ValueError, match=r"images must be uint8 \[B, C, H, W\], got"):
            from_uint8(images)


class TestClassifiers:
    def test_held_out_accuracy(self):
        assert held_out_accuracy("digits") >= 0.97

    def test_seed_alone_decides_the_weights(self, digits):
        torch.manual_seed(1)
        first = weights(train(*digits, QUICK))
        torch.manual_seed(2)
        before = torch.get_rng_state()
        second = weights(train(*digits, QUICK))
        assert torch.equal(torch.get_rng_state(), before)
        other = ClassifierSettings(epochs=1, width=8, seed=1)
        assert first == second != weights(train(*digits, other))

    def test_features_of_real_images_have_full_rank(self, reference):
        sigma = reference.moments["digit_classifier"].sigma
        values = np.linalg.eigvalsh(sigma)
        assert sigma.shape == (64, 64)
        assert values[0] > 1e-5 * values[-1]
        assert np.trace(sigma) == pytest.approx(64, rel=1e-4)

    def test_logits_are_the_head_of_the_features(self, digits):
        model = train(*digits, QUICK)
        result = model(from_uint8(digits[0][:5]))
        assert (result.features.shape, result.logits.shape) == ((5, 64), (5, 10))
        torch.testing.assert_close(model.head(result.features * model.scale), result.logits)

    def test_cache_is_used_for_its_own_settings_only(self, tmp_path, monkeypatch):
        made = load("digits", tmp_path, settings=QUICK)
        (path,) = tmp_path.iterdir()  # nothing temporary is left
        other = load("digits", tmp_path, settings=replace(QUICK, epochs=2))
        assert weights(other) != weights(made)
        assert len(list(tmp_path.iterdir())) == 2
        monkeypatch.delattr("adapters.measuring.classifiers.train")
        assert weights(load("digits", tmp_path, settings=QUICK)) == weights(made)

        stored = torch.load(path, weights_only=True)
        torch.save({**stored, "key": {**stored["key"], "seed": 5}}, path)
        with pytest.raises(NameError):  # it would train
            load("digits", tmp_path, settings=QUICK)

    @pytest.mark.parametrize("content", [b"", b"no such format"])
    def test_damaged_cache_is_made_anew(self, tmp_path, content):
        made = load("digits", tmp_path, settings=QUICK)
        (path,) = tmp_path.iterdir()
        good = path.read_bytes()
        path.write_bytes(content)
        with pytest.warns(UserWarning, match="cannot be read, so the classifier is trained again"):
            again = load("digits", tmp_path, settings=QUICK)
        assert weights(again) == weights(made)
        assert path.read_bytes() == good

    def test_one_of_clothing_learns_what_tells_its_classes_apart(self, tmp_path, monkeypatch):
        """Class k: a bright band at row 3 k of 32x32 images, under noise."""
        labels = torch.arange(640) % 10
        noise = torch.Generator().manual_seed(0)
        images = torch.randint(0, 100, (640, 1, 32, 32), generator=noise, dtype=torch.uint8)
        for image, label in zip(images, labels.tolist(), strict=True):
            image[:, 3 * label : 3 * label + 3] += 150
        monkeypatch.setattr(
            "adapters.measuring.classifiers.labelled_images", lambda *_: (images, labels)
        )
        monkeypatch.setitem(CLASSIFIERS, "fashion", replace(QUICK, epochs=10, batch_size=32))
        assert held_out_accuracy("fashion") > 0.95
        (extractor,) = build_extractors(["fashion_classifier"], cache_dir=tmp_path)
        seen = extractor.extract(from_uint8(images))
        assert (seen.features.shape, seen.logits.shape) == ((640, 64), (640, 10))
        assert seen.features.var(dim=0).mean().item() == pytest.approx(1, rel=1e-3)
        with pytest.raises(ValueError, match=r"fashion_classifier takes images \[B, 1, 32, 32\]"):
            extractor.extract(torch.zeros(2, 1, 8, 8))

    def test_refuses_too_few_images(self):
        few = torch.zeros(10, 1, 8, 8, dtype=torch.uint8)
        with pytest.raises(ValueError, match="at least 64, got 10"):
            train(few, torch.zeros(10).long(), QUICK)


class TestRegistry:
    def test_names(self):
        assert {"pixels", "digit_classifier"} <= set(EXTRACTORS)
        (pixels,) = build_extractors(["pixels"])
        x = torch.randn(2, 3, 4, 5)
        assert pixels.name == "pixels"
        assert torch.equal(pixels.extract(x).features, x.reshape(2, 60))
        assert pixels.extract(x).logits is None

    def test_thumbnails_are_averages_and_small_images_themselves(self):
        (thumbnails,) = build_extractors(["thumbnails"])
        x = torch.randn(2, 3, 32, 16, dtype=torch.float64)
        expected = x.reshape(2, 3, 8, 4, 8, 2).mean((3, 5)).flatten(1)
        torch.testing.assert_close(thumbnails.extract(x).features, expected)
        assert thumbnails.metric_names[0] == "frechet_thumbnails"
        small = torch.randn(2, 1, 4, 8)
        assert torch.equal(thumbnails.extract(small).features, small.flatten(1))

    def test_refuses_unknown_and_repeated_names(self):
        with pytest.raises(
            ValueError, match=r"among \['digit_classifier', 'fashion_classifier', 'inception', "
        ):
            build_extractors(["pixels", "fid"])
        with pytest.raises(ValueError, match="got 'fid'"):
            build_extractors(["pixels", "fid"])
        with pytest.raises(ValueError, match="must be different names, at least one"):
            build_extractors(["pixels", "pixels"])

    def test_digit_classifier_refuses_other_sizes(self, extractors):
        with pytest.raises(ValueError, match=r"takes images \[B, 1, 8, 8\], got \(2, 3, 8, 8\)"):
            extractors[1].extract(torch.zeros(2, 3, 8, 8))


class TestEvaluate:
    def test_real_images_against_themselves(self, digits, reference):
        metrics = evaluate(digits[0].split(100), reference)
        assert list(metrics) == [
            "n_images",
            "sample_variance",
            "reference_variance",
            "frechet_pixels",
            "frechet_digit_classifier",
            "is_digit_classifier",
            "is_digit_classifier_std",
        ]
        assert metrics["n_images"] == 1797
        assert metrics["frechet_pixels"] < 1e-9
        assert metrics["frechet_digit_classifier"] < 1e-9
        assert metrics["sample_variance"] == metrics["reference_variance"]
        assert 9.5 < metrics["is_digit_classifier"] < 10

    def test_noise_is_far_away(self, reference):
        noise = torch.randint(
            0, 256, (500, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
        )
        metrics = evaluate([noise], reference)
        assert metrics["frechet_pixels"] > 20
        assert metrics["frechet_digit_classifier"] > 20
        assert metrics["is_digit_classifier"] < 6

    def test_a_missing_class_is_seen(self, digits, reference):
        images, labels = digits
        halves = images[::2], images[labels != 3][::2]
        whole, lacking = (evaluate([half], reference) for half in halves)
        assert lacking["frechet_digit_classifier"] > 5 * whole["frechet_digit_classifier"]
        assert lacking["is_digit_classifier"] < whole["is_digit_classifier"] - 0.5

    def test_batch_size_does_not_matter(self, digits, reference):
        images = digits[0][:300]
        one = evaluate([images], reference)
        for size in (7, 64):
            assert evaluate(images.split(size), reference) == pytest.approx(one, rel=1e-6)

    def test_against_a_direct_computation(self, digits, extractors, reference):
        images = digits[0][:400]
        metrics = evaluate(images.split(64), reference)
        made, real = (
            (batch.double() / 127.5 - 1).flatten(1).numpy() for batch in (images, digits[0])
        )
        cov_made, cov_real = np.cov(made, rowvar=False), np.cov(real, rowvar=False)
        assert metrics["sample_variance"] == pytest.approx(np.trace(cov_made), rel=1e-12)
        assert metrics["reference_variance"] == pytest.approx(np.trace(cov_real), rel=1e-12)
        expected = frechet_distance(made.mean(0), cov_made, real.mean(0), cov_real)
        assert metrics["frechet_pixels"] == pytest.approx(expected, rel=1e-5)
        logits = extractors[1].extract(from_uint8(images)).logits
        score = metrics["is_digit_classifier"], metrics["is_digit_classifier_std"]
        assert score == pytest.approx(inception_score(logits), rel=1e-9)

    def test_one_pass_and_one_call_for_each_batch(self):
        calls = []

        def extract(x: Tensor) -> Extracted:
            calls.append(len(x))
            return Extracted(x.mean(dim=(2, 3)), logits=x.flatten(1))

        def batches() -> Iterator[Tensor]:
            generator = torch.Generator().manual_seed(0)
            for size in (5, 4, 0, 3):
                yield torch.randint(0, 256, (size, 3, 2, 2), dtype=torch.uint8, generator=generator)

        reference = summarise(batches(), [Extractor("means", extract)])
        assert calls == [5, 4, 0, 3]
        metrics = evaluate(batches(), reference, splits=2)
        assert calls == 2 * [5, 4, 0, 3]
        assert metrics["frechet_means"] < 1e-12
        assert metrics["is_means_std"] >= 0

    def test_refuses_bad_input(self, digits, extractors, reference):
        pixels = extractors[:1]
        with pytest.raises(ValueError, match="at least 2 images, got none"):
            summarise([], pixels)
        with pytest.raises(ValueError, match="at least 2 images, got 1"):
            summarise([digits[0][:1]], pixels)
        with pytest.raises(ValueError, match="must differ in name"):
            summarise([digits[0]], pixels * 2)
        small = torch.zeros(4, 1, 4, 4, dtype=torch.uint8)
        with pytest.raises(ValueError, match=r"shape \(1, 8, 8\), got \(1, 4, 4\)"):
            summarise([digits[0][:4], small], pixels)
        with pytest.raises(ValueError, match=r"shape \(1, 8, 8\), got \(1, 4, 4\)"):
            evaluate([small], reference)
        with pytest.raises(ValueError, match="uint8"):
            evaluate([torch.zeros(4, 1, 8, 8)], reference)


def test_the_variance_of_more_pixels_than_int64_has_room_for():
    """The sums of ImageNet at 64x64: of a pixel they fit, of all pixels they do not."""
    count, ones = 1_281_167, torch.ones(3, 64, 64, dtype=torch.int64)
    found = PixelVariance()
    found.add(count, torch.stack([count * 120 * ones, count * (120**2 + 72**2) * ones]))
    of_a_pixel = 72**2 * count / (count - 1) / 127.5**2
    assert found.total() == pytest.approx(3 * 64 * 64 * of_a_pixel, rel=1e-12)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "new folder" / "file"
    write_atomically(path, b"old")

    def fail(self: Path, target: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]
