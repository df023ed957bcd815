"""The extractor "inception" against pytorch-fid itself, on random weights in its file's layout."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pytorch_fid import inception as reference_package
from torch import Tensor, nn

from adapters.measuring.evaluation import Summary, evaluate, summarise
from adapters.measuring.extractor import Extracted, Extractor, from_uint8
from adapters.measuring.features import EXTRACTORS, build_extractors
from adapters.measuring.inception import WEIGHTS_VARIABLE, find_weights, load_inception
from benchmarks.metrics import NAME, random_images, random_weights
from sa_plugin.metrics import inception_score


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A torch hub folder whose checkpoints hold the random weights."""
    folder = tmp_path_factory.mktemp("torch")
    (folder / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(random_weights(), folder / "hub" / "checkpoints" / NAME)
    return folder / "hub"


@pytest.fixture(scope="module", autouse=True)
def surroundings(hub):
    """Neither the user's weights nor the user's settings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TORCH_HUB", raising=False)
        patch.setenv("TORCH_HOME", str(hub.parent))
        patch.setattr(torch.hub, "_hub_dir", None)
        patch.delenv(WEIGHTS_VARIABLE, raising=False)
        yield


@pytest.fixture(scope="module")
def weights(hub):
    return torch.load(hub / "checkpoints" / NAME, weights_only=True)


@pytest.fixture(scope="module")
def pytorch_fid_network(surroundings):
    """Made by pytorch-fid alone, which finds the file in torch hub's folder."""
    return reference_package.InceptionV3([3]).eval()


@pytest.fixture(scope="module")
def extractor(surroundings):
    (made,) = build_extractors(["inception"])
    return made


def save_pngs(folder: Path, images: Tensor) -> list[Path]:
    """The images as PNG files in ``folder``."""
    from PIL import Image as image_module

    paths = [folder / f"{i:03d}.png" for i in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        levels = image.permute(1, 2, 0).squeeze(2).numpy()  # [H, W, 3], or [H, W] if grey
        image_module.fromarray(levels).save(path)
    return paths


def activations(folder: Path, network: nn.Module, images: Tensor) -> np.ndarray:
    """What pytorch-fid makes of the images saved as PNG files in ``folder``: [B, 2048]."""
    from pytorch_fid import fid_score

    return fid_score.get_activations(save_pngs(folder, images), network, num_workers=0)


class TestFeatures:
    @pytest.mark.parametrize("size", [24, 299])
    def test_equal_pytorch_fids(self, extractor, pytorch_fid_network, size):
        images = random_images(2, size=size)
        (expected,) = pytorch_fid_network(images / 255)
        features = extractor.extract(from_uint8(images)).features
        assert features.shape == (2, 2048)
        torch.testing.assert_close(features, expected[:, :, 0, 0], rtol=1e-6, atol=0)
        # The random network tells the images apart: the comparison is not one of constants.
        assert features.std(dim=0).mean() > 0.05 * features.mean()

    def test_logits_are_without_the_bias_and_of_the_same_pass(
        self, extractor, weights, monkeypatch
    ):
        calls = []
        forward = reference_package.InceptionV3.forward

        def counted(self: nn.Module, x: Tensor) -> list[Tensor]:
            calls.append(len(x))
            return forward(self, x)

        monkeypatch.setattr(reference_package.InceptionV3, "forward", counted)
        result = extractor.extract(from_uint8(random_images(2)))
        assert calls == [2]
        expected = result.features.double() @ weights["fc.weight"].double().T
        assert result.logits.shape == (2, 1008)
        torch.testing.assert_close(result.logits.double(), expected, rtol=1e-5, atol=1e-3)
        assert weights["fc.bias"].abs().mean() > 0.05  # so that adding it would have been seen

    def test_images_are_rounded_as_in_a_png(self, extractor):
        x = from_uint8(random_images(2))
        exact = extractor.extract(x).features
        nudged = x + 0.3 / 127.5
        assert torch.equal(extractor.extract(nudged).features, exact)
        beyond = extractor.extract(torch.full((1, 3, 8, 8), 1.7)).features
        assert torch.equal(beyond, extractor.extract(torch.ones(1, 3, 8, 8)).features)

    def test_neither_autocast_nor_the_cut_into_batches_matters(self, extractor, monkeypatch):
        x = from_uint8(random_images(3))
        whole = extractor.extract(x)
        monkeypatch.setattr("adapters.measuring.inception._IMAGES_AT_ONCE", 2)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cut = extractor.extract(x)
        torch.testing.assert_close(cut.features, whole.features, rtol=1e-5, atol=0)
        torch.testing.assert_close(cut.logits, whole.logits, rtol=1e-5, atol=1e-3)

    def test_an_empty_batch(self, extractor):
        nothing = extractor.extract(torch.zeros(0, 3, 8, 8))
        assert (nothing.features.shape, nothing.logits.shape) == ((0, 2048), (0, 1008))

    @pytest.mark.parametrize("shape", [(2, 4, 8, 8), (3, 8, 8)])
    def test_refuses_other_shapes(self, extractor, shape):
        with pytest.raises(ValueError, match=r"takes images \[B, 1 or 3, H, W\], got"):
            extractor.extract(torch.zeros(shape))


@pytest.mark.filterwarnings("ignore:.*the covariance is singular:UserWarning")
class TestMetrics:
    def test_equal_pytorch_fids_on_pngs(self, extractor, pytorch_fid_network, weights, tmp_path):
        made, real = random_images(4, seed=1), random_images(3, seed=2)
        features = [activations(tmp_path, pytorch_fid_network, images) for images in (made, real)]
        means = [rows.mean(axis=0) for rows in features]
        roots = [(rows - rows.mean(axis=0)) / np.sqrt(len(rows) - 1) for rows in features]
        # FID from pytorch-fid's activations: with S_i = R_i^T R_i, tr (S_1 S_2)^(1/2) is the sum
        # of the singular values of R_1 R_2^T. (SciPy 1.18 lacks what its own function calls.)
        overlap = np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False).sum()
        traces = sum(np.sum(root**2) for root in roots)
        fid = np.sum((means[0] - means[1]) ** 2) + traces - 2 * overlap
        score = inception_score(features[0] @ weights["fc.weight"].double().numpy().T, splits=2)

        reference = summarise([real], [extractor])
        moments = reference.moments["inception"]
        np.testing.assert_allclose(moments.mu, means[1], rtol=1e-5)
        np.testing.assert_allclose(moments.sigma, roots[1].T @ roots[1], rtol=1e-3, atol=1e-6)
        metrics = evaluate([made], reference, splits=2)
        assert list(metrics)[3:] == ["fid", "is_inception", "is_inception_std"]
        assert metrics["fid"] == pytest.approx(fid, rel=1e-4)
        assert fid > 1
        assert metrics["is_inception"] - 1 == pytest.approx(score[0] - 1, rel=1e-3)
        assert metrics["is_inception_std"] == pytest.approx(score[1], rel=1e-3)
        assert score[0] > 1.001

    @pytest.mark.slow
    def test_inception_score_equals_torch_fidelitys(self, hub, extractor, tmp_path):
        import torch_fidelity

        images = random_images(6, seed=3)
        save_pngs(tmp_path, images)
        expected = torch_fidelity.calculate_metrics(
            input1=str(tmp_path),
            isc=True,
            isc_splits=2,
            cuda=False,
            cache=False,
            verbose=False,
            save_cpu_ram=True,
            feature_extractor_weights_path=str(hub / "checkpoints" / NAME),
        )
        (tensorflow,) = build_extractors(["inception_tf"])
        metrics = evaluate([images], summarise([images], [tensorflow, extractor]), splits=2)
        mean, std = (expected[f"inception_score_{of}"] for of in ("mean", "std"))
        assert metrics["inception_score"] == pytest.approx(mean, rel=1e-6)
        assert metrics["inception_score_std"] == pytest.approx(std, rel=1e-6 * mean / std)
        assert mean > 1.001
        # pytorch-fid's input gives another number, which therefore has another name.
        assert abs(metrics["is_inception"] - mean) > 1e-5

    def test_grey_pngs(self, extractor, pytorch_fid_network, tmp_path):
        grey = random_images(2, channels=1)
        expected = activations(tmp_path, pytorch_fid_network, grey)
        features = extractor.extract(from_uint8(grey)).features
        np.testing.assert_allclose(features.numpy(), expected, rtol=1e-5, atol=1e-6)

    def test_an_extractor_carries_its_metrics_names(self, extractor):
        def channel_means(x: Tensor) -> Extracted:
            return Extracted(x.mean(dim=(2, 3)), x.mean(dim=3).flatten(1))

        spaces = [
            Extractor("means", channel_means),
            Extractor("others", channel_means, established_names=("distance", "score")),
        ]
        images = random_images(6)
        reference: Summary = summarise([images], spaces)
        keys = ["frechet_means", "is_means", "is_means_std", "distance", "score", "score_std"]
        assert list(evaluate([images], reference, splits=2))[3:] == keys
        assert extractor.metric_names == ("fid", "is_inception")


class TestWeights:
    def test_registered(self):
        assert "inception" in EXTRACTORS

    def test_environment_then_cache_then_hub(self, hub, tmp_path, monkeypatch):
        assert find_weights(None) == hub / "checkpoints" / NAME
        assert find_weights(tmp_path) == hub / "checkpoints" / NAME
        (tmp_path / NAME).touch()
        assert find_weights(tmp_path) == tmp_path / NAME
        named = tmp_path / "named.pth"
        monkeypatch.setenv(WEIGHTS_VARIABLE, str(named))
        with pytest.raises(ValueError, match=r"file at \S+named\.pth, got none"):
            find_weights(tmp_path)
        named.touch()
        assert find_weights(tmp_path) == named

    def test_missing_file_is_told_in_one_line(self, tmp_path, monkeypatch):
        monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
        with pytest.raises(ValueError, match="Inception's weights must be a file at") as caught:
            build_extractors(["inception"], cache_dir=tmp_path / "cache")
        message = str(caught.value)
        assert str(tmp_path / "cache" / NAME) in message
        assert str(tmp_path / "home" / "hub" / "checkpoints" / NAME) in message
        assert reference_package.FID_WEIGHTS_URL in message
        assert WEIGHTS_VARIABLE in message
        assert "\n" not in message
        assert not any(tmp_path.iterdir())  # nothing fetched, no folder made

    def test_older_files_without_batch_counts(self, weights, extractor, tmp_path):
        plain = {k: v for k, v in weights.items() if not k.endswith("num_batches_tracked")}
        assert len(plain) < len(weights)
        path = tmp_path / NAME
        torch.save(plain, path, _use_new_zipfile_serialization=False)
        model = load_inception(path)
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())
        x = from_uint8(random_images(1))
        assert torch.equal(model(x).features, extractor.extract(x).features)

    @pytest.mark.parametrize("content", [b"", b"half a file", {"fc.weight": torch.ones(2)}, [1]])
    def test_refuses_other_files(self, tmp_path, content):
        path = tmp_path / NAME
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        with pytest.raises(ValueError, match="cannot be read as such") as caught:
            load_inception(path)
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value)

    def test_missing_package_names_the_extra(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "pytorch_fid.inception", None)
        with pytest.raises(ImportError, match=r"extra \[metrics\]: pip install") as caught:
            build_extractors(["inception"])
        assert "\n" not in str(caught.value)
