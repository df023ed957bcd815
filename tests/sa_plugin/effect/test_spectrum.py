"""Spectrum: equal to np.cov and eigh, orthonormal, independent of the batches, safe in files."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sa_plugin.effect.spectrum import Spectrum, dct_matrix
from tests.refusals import refuses
from tests.toys import images, normal

SHAPE = (2, 3, 4)
D = 24
PICTURES = torch.from_numpy(np.random.RandomState(0).randint(0, 256, (90, *SHAPE), np.uint8))
X0 = PICTURES.double() / 127.5 - 1
PCA, DCT = Spectrum.of([PICTURES]), Spectrum.of([PICTURES], most=D - 1)
BOTH = pytest.mark.parametrize("spectrum", [PCA, DCT], ids=["pca", "dct"])


def matrix_of(spectrum: Spectrum) -> np.ndarray:
    """Row i: the direction of coordinate i."""
    return spectrum.coordinates(torch.eye(D).double().reshape(D, *spectrum.shape)).T.numpy()


def covariance(x: torch.Tensor) -> np.ndarray:
    return np.cov(x.flatten(1).numpy(), rowvar=False)


def written(tmp_path, **changes):
    """The path of the file of PCA with other arrays."""
    names = ("mean", "variances", "directions", "basis", "count")
    arrays = {name: getattr(PCA, name) for name in names} | changes
    np.savez(tmp_path / "s.npz", **{k: v for k, v in arrays.items() if v is not None})
    return tmp_path / "s.npz"


class TestValues:
    def test_pca_is_that_of_numpy(self):
        values, vectors = np.linalg.eigh(covariance(X0))
        np.testing.assert_allclose(PCA.mean, X0.mean(0), atol=1e-14)
        np.testing.assert_allclose(PCA.variances, values[::-1], rtol=1e-12)
        alike = np.abs((matrix_of(PCA) * vectors.T[::-1]).sum(1))
        np.testing.assert_allclose(alike, 1, rtol=1e-9)
        assert (PCA.basis, PCA.count, PCA.shape) == ("pca", 90, SHAPE)

    def test_dct_holds_the_covariance_s_diagonal(self):
        waves = matrix_of(DCT)
        np.testing.assert_allclose(
            DCT.variances, np.diag(waves @ covariance(X0) @ waves.T), rtol=1e-12
        )
        np.testing.assert_allclose(DCT.mean, X0.mean(0), atol=1e-14)
        assert (DCT.basis, DCT.directions.shape) == ("dct", (2, 2))

    def test_dct_is_exact_for_a_stationary_separable_covariance(self):
        """A mirrored stationary process in rows and columns, and colours that are mixed."""
        colours = np.array([[0.6, -0.8], [0.8, 0.6]])
        waves = np.kron(colours, np.kron(dct_matrix(3), dct_matrix(4)))
        variances = np.kron([1, 0.3], np.kron([1, 0.5, 0.2], [1, 0.7, 0.1, 0])) * 0.01
        spread = waves * np.sqrt(variances * (2 * D - 1) / 2)[:, None]
        x0 = torch.from_numpy(0.1 + np.concatenate([spread, -spread])).reshape(-1, *SHAPE)
        exact = np.linalg.eigvalsh(covariance(x0))
        found = Spectrum.of([x0], most=0)
        np.testing.assert_allclose(np.sort(found.variances), exact, atol=1e-16)
        np.testing.assert_allclose(found.variances, variances, atol=1e-16)

    @pytest.mark.parametrize("most", [D, 0])
    @pytest.mark.parametrize("sizes", [[90], [1] * 90, [7, 50, 33]])
    def test_the_cut_into_batches_changes_nothing(self, most, sizes, monkeypatch):
        monkeypatch.setattr("sa_plugin.effect.spectrum._NUMBERS_IN_A_BLOCK", 20 * D)
        found = [
            Spectrum.of(batches, most=most)
            for batches in (PICTURES.split(sizes), iter(X0.split(sizes)), X0.numpy()[None])
        ]
        for other in found[1:]:
            np.testing.assert_array_equal(other.variances, found[0].variances)
            np.testing.assert_array_equal(other.mean, found[0].mean)
        reference = PCA if most else DCT
        np.testing.assert_allclose(found[0].variances, reference.variances, rtol=1e-10)

    def test_few_images_have_missing_variances_and_none_below_zero(self):
        found = Spectrum.of([PICTURES[:5]])
        assert (found.variances >= 0).all()
        assert not found.variances[4:].any()
        assert found.variances[3] > 0

    def test_small_variances_of_many_pixels_stay(self):
        bright = torch.linspace(-1, 1, len(PICTURES), dtype=torch.float64)[:, None, None, None]
        found = Spectrum.of([1e-10 * PICTURES.double() + bright], most=0).variances
        assert 0 < found.min() < 1e-14 * found.max()

    def test_a_constant_image_has_none(self):
        assert not Spectrum.of([PICTURES[:1], PICTURES[:1]]).variances.any()


class TestApply:
    @BOTH
    def test_the_basis_is_orthonormal_and_complete(self, spectrum):
        matrix = matrix_of(spectrum)
        np.testing.assert_allclose(matrix @ matrix.T, np.eye(D), atol=1e-13)
        torch.testing.assert_close(spectrum.from_coordinates(spectrum.coordinates(X0)), X0)

    @BOTH
    def test_coordinates_are_multiplied(self, spectrum):
        factors, matrix = normal(1, 6, D).abs(), matrix_of(spectrum)
        x = images(2, 6, *SHAPE)
        expected = (x.flatten(1).numpy() @ matrix.T * factors.numpy()) @ matrix
        found = spectrum.apply(x, factors)
        np.testing.assert_allclose(found.flatten(1), expected, atol=1e-13)
        torch.testing.assert_close(spectrum.apply(x, factors[0].numpy())[0], found[0])

    @BOTH
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_other_types_are_computed_in_float32(self, spectrum, dtype):
        x, factors = images(2, 6, *SHAPE).to(dtype), normal(1, D).abs()
        found = spectrum.apply(x, factors)
        assert found.dtype == dtype
        expected = spectrum.apply(x.double(), factors).to(dtype)
        torch.testing.assert_close(found, expected)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(spectrum.apply(x, factors), found, rtol=0, atol=0)

    def test_read_only_arrays_are_taken_without_a_warning(self):
        pictures = PICTURES.numpy().copy()
        pictures.flags.writeable = False
        found = Spectrum.of([pictures])
        np.testing.assert_array_equal(found.variances, PCA.variances)
        found.apply(X0, found.variances)

    @BOTH
    def test_channels_last_changes_nothing(self, spectrum):
        x, factors = images(2, 6, *SHAPE), normal(1, D)
        last = x.contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(spectrum.apply(last, factors), spectrum.apply(x, factors))

    @refuses(
        ((images(0, 2, 2, 3, 5), np.ones(D)), r"x must be .* \[B, 2, 3, 4\], .* \(2, 2, 3, 5\)"),
        ((torch.zeros(2, *SHAPE, dtype=torch.uint8), np.ones(D)), "torch.uint8"),
        ((images(0, 2, *SHAPE), np.ones(D - 1)), r"\[B, D\] with D = 24, got \(23,\)"),
        ((images(0, 2, *SHAPE), np.ones((3, D))), r"got \(3, 24\)"),
    )
    def test_refused(self, bad):
        PCA.apply(*bad)


class TestFiles:
    @BOTH
    def test_what_is_written_is_read(self, spectrum, tmp_path):
        spectrum.save(tmp_path / "new" / "s.npz")
        assert [p.name for p in (tmp_path / "new").iterdir()] == ["s.npz"]
        read = Spectrum.load(tmp_path / "new" / "s.npz")
        for name in ("mean", "variances", "directions"):
            np.testing.assert_array_equal(getattr(read, name), getattr(spectrum, name))
        assert (read.basis, read.count) == (spectrum.basis, spectrum.count)

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"count": None}, "must hold"),
            ({"more": np.zeros(1)}, "must hold"),
            ({"mean": np.array([{}], dtype=object)}, "pickled, which is never read"),
            ({"mean": np.zeros((3, 2, 3))}, r"needs variances \(18,\)"),
            ({"mean": np.zeros(D)}, "mean must be real, of 3 dimension"),
            ({"mean": np.full(SHAPE, np.nan)}, "mean must be finite"),
            ({"variances": np.full(D, -1.0)}, "variances must be >= 0, the smallest is -1"),
            ({"variances": np.ones(D, np.complex128)}, "variances must be real"),
            ({"directions": 2 * np.eye(D)}, "directions must be orthonormal"),
            ({"directions": np.full((D, D), 1e300)}, "directions must be orthonormal"),
            ({"directions": np.eye(2)}, r"directions \(24, 24\), got \(24,\) and \(2, 2\)"),
            ({"basis": np.array("fft")}, "basis must be one of"),
            ({"basis": np.array(["pca", "dct"])}, "basis must be a word"),
            ({"count": np.array(1)}, "count must be a whole number"),
            ({"count": np.array(2.5)}, "count a whole number"),
        ],
    )
    def test_other_content_is_refused(self, changes, said, tmp_path):
        with pytest.raises(
            ValueError, match=rf"^\S+s\.npz holds no spectrum: .*{said}.*$"
        ) as caught:
            Spectrum.load(written(tmp_path, **changes))
        assert "\n" not in str(caught.value)

    def test_damage_is_refused_in_one_line(self, tmp_path):
        path = written(tmp_path)
        whole = path.read_bytes()
        at = whole.index(PCA.variances.tobytes()) + 3
        for damaged in (
            whole[: len(whole) // 2],
            whole[:at] + b"\x7f" + whole[at + 1 :],
            b"",
            b"?",
        ):
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match=r"s\.npz holds no spectrum: ") as caught:
                Spectrum.load(path)
            assert "\n" not in str(caught.value)

    def test_paths_are_checked(self, tmp_path):
        with pytest.raises(ValueError, match="there is no spectrum at"):
            Spectrum.load(tmp_path / "none.npz")
        with pytest.raises(ValueError, match=r"path must end in \.npz, got s\.npy"):
            PCA.save("s.npy")


@refuses(
    ([], "at least 2 images in all"),
    ([PICTURES[:1]], "at least 2 images in all"),
    ([PICTURES.long()], r"uint8 or floating point, got torch.int64 \(90, 2, 3, 4\)"),
    ([PICTURES[:, 0]], r"got torch.uint8 \(90, 3, 4\)"),
    ([PICTURES[:0]], r"got torch.uint8 \(0, 2, 3, 4\)"),
    ([PICTURES, PICTURES[:, :, :2]], r"images of one shape, got \(2, 3, 4\) and \(2, 2, 4\)"),
    ([torch.full((3, *SHAPE), torch.nan)], "finite images"),
)
def test_other_data_are_refused(bad):
    Spectrum.of(bad)


def test_images_that_were_not_scaled_are_told():
    with pytest.warns(UserWarning, match="images scaled to"):
        Spectrum.of([PICTURES.float()])


def test_most_must_be_a_size():
    with pytest.raises(ValueError, match="most must be a whole number"):
        Spectrum.of([PICTURES], most=-1)
