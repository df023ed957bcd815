"""Statistics in files, moments over processes, KID, precision and recall."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from sa_plugin.metrics import Moments, Statistics, is_statistics, kernel_distance, precision_recall
from tests.refusals import refuses
from tests.toys import moments_of

DATA = np.random.default_rng(0).standard_normal((40, 5)) @ np.diag([1, 2, 3, 4, 5.0]) + 7


class TestFiles:
    def test_what_is_written_is_read(self, tmp_path: Path) -> None:
        path = tmp_path / "new" / "stats.npz"
        moments = moments_of(DATA)
        Statistics.of(moments, "pixels").save(path)
        assert [p.name for p in path.parent.iterdir()] == ["stats.npz"]
        read = Statistics.load(path, features="pixels", dim=5)
        np.testing.assert_array_equal(read.mu, moments.mu)
        np.testing.assert_array_equal(read.sigma, moments.sigma)
        assert (read.count, read.features) == (40, "pixels")
        assert is_statistics(path)

    def test_pytorch_fid_reads_them(self, tmp_path: Path) -> None:
        from pytorch_fid.fid_score import compute_statistics_of_path

        Statistics.of(moments_of(DATA), "inception").save(tmp_path / "s.npz")
        mu, sigma = compute_statistics_of_path(str(tmp_path / "s.npz"), None, 1, 5, "cpu")
        np.testing.assert_array_equal(mu, moments_of(DATA).mu)
        np.testing.assert_array_equal(sigma, moments_of(DATA).sigma)

    def test_files_of_pytorch_fid_are_read(self, tmp_path: Path) -> None:
        sigma = np.cov(DATA, rowvar=False).astype(np.float32)
        np.savez_compressed(tmp_path / "s.npz", mu=DATA.mean(0), sigma=sigma)
        read = Statistics.load(tmp_path / "s.npz", features="inception")
        assert (read.count, read.features, read.sigma.dtype) == (None, None, np.float64)

    @pytest.mark.parametrize(
        ("arrays", "said"),
        [
            ({"mu": np.zeros(5)}, "must hold 'mu' and 'sigma'"),
            ({"mu": np.zeros(5), "sigma": np.eye(4)}, r"mu has shape \(5,\), its sigma \(4, 4\)"),
            ({"mu": np.full(5, np.nan), "sigma": np.eye(5)}, "mu must be finite, 5 of 5"),
            ({"mu": np.zeros((5, 1)), "sigma": np.eye(5)}, "mu must have 1 dimension"),
            ({"mu": np.zeros(3), "sigma": np.eye(3)}, "of dimension 3, the features have 5"),
            (
                {"mu": np.zeros(5), "sigma": np.eye(5), "features": np.array("pixels")},
                "of the features 'pixels', must hold those of 'inception'",
            ),
            (
                {"mu": np.array([{}], dtype=object), "sigma": np.eye(5)},
                r"'mu' is pickled.*np\.savez\('NEW\.npz', mu=",
            ),
        ],
    )
    def test_refuses_others(self, tmp_path: Path, arrays: dict, said: str) -> None:
        path = tmp_path / "bad.npz"
        np.savez(path, **arrays)
        with pytest.raises(ValueError, match=said) as caught:
            Statistics.load(path, features="inception", dim=5)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)

    @refuses(
        ("s.npy", r"s\.npy cannot be used .* convert it by np\.savez"),
        ("gone.npz", r"there is none at .*gone\.npz"),
        ("half.npz", r"half\.npz cannot be used as statistics"),
    )
    def test_pickles_missing_and_damaged_files_are_refused(self, name: str, tmp_path: Path) -> None:
        np.save(tmp_path / "s.npy", {"mu": DATA.mean(0)}, allow_pickle=True)
        Statistics.of(moments_of(DATA), "pixels").save(tmp_path / "half.npz")
        content = (tmp_path / "half.npz").read_bytes()
        (tmp_path / "half.npz").write_bytes(content[: len(content) // 2])
        assert not is_statistics(tmp_path / "half.npz")
        with pytest.raises(ValueError, match=r"path must end in \.npz"):
            Statistics.of(moments_of(DATA), "pixels").save(tmp_path / "other.npy")
        Statistics.load(tmp_path / name)


def test_too_few_samples_are_told_of_once() -> None:
    moments = moments_of(DATA[:4])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(3):
            _ = moments.sigma
    assert [str(w.message)[:24] for w in told] == ["4 samples of dimension 5"]


PARTS = {"uneven": (0, 13, 40), "one has none": (0, 0, 40), "the other": (0, 40, 40)}


def _reduced(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for name, bounds in PARTS.items():
        moments = Moments()
        for batch in np.array_split(DATA[bounds[rank] : bounds[rank + 1]], 3):
            if len(batch):
                moments.update(batch)
        moments.all_reduce()
        Statistics.of(moments, name).save(f"{folder}/{name}-{rank}.npz")
    nothing = Moments()
    nothing.all_reduce()
    assert nothing.count == 0
    try:
        moments_of(np.zeros((2, 3 + rank))).all_reduce()
    except ValueError as error:
        Path(folder, f"error-{rank}").write_text(str(error))
    dist.destroy_process_group()


@pytest.mark.slow
def test_moments_of_two_processes_equal_the_single_pass(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_reduced, args=(str(tmp_path),), nprocs=2)
    single = moments_of(DATA)
    for name in PARTS:
        made = [Statistics.load(tmp_path / f"{name}-{rank}.npz") for rank in range(2)]
        assert made[0].count == made[1].count == 40
        np.testing.assert_array_equal(made[0].mu, made[1].mu)
        np.testing.assert_array_equal(made[0].sigma, made[1].sigma)
        np.testing.assert_allclose(made[0].mu, single.mu, rtol=1e-10)
        scale = np.abs(single.sigma).max()
        np.testing.assert_allclose(made[0].sigma, single.sigma, rtol=1e-10, atol=1e-12 * scale)
    for rank in range(2):
        assert "one dimension in all processes" in (tmp_path / f"error-{rank}").read_text()


class TestNeighbours:
    def test_kernel_distance_by_its_definition(self) -> None:
        x, y = np.random.default_rng(3).standard_normal((2, 12, 5))
        y += 2
        kernel = lambda a, b: (a @ b.T / 5 + 1) ** 3  # noqa: E731
        own = [(k.sum() - np.trace(k)) / (12 * 11) for k in (kernel(x, x), kernel(y, y))]
        expected = sum(own) - 2 * kernel(x, y).mean()
        mean, std = kernel_distance(x, y, subsets=2, subset_size=12)
        assert mean == pytest.approx(expected, rel=1e-9)
        assert std == pytest.approx(0, abs=1e-9 * abs(kernel(x, y)).max())
        # Smaller subsets give it on average: the estimate is unbiased, the rows are not repeated.
        mean, std = kernel_distance(x, y, subsets=400, subset_size=6)
        assert abs(mean - expected) < 3 * std / 20
        assert 3 * std / 20 < 0.2 * abs(expected)

    def test_precision_and_recall_by_their_definition(self) -> None:
        rng = np.random.default_rng(1)
        x, y = rng.standard_normal((50, 2)) + 0.8, 2 * rng.standard_normal((60, 2))

        def covered(points: np.ndarray, others: np.ndarray, k: int) -> float:
            hits = 0
            radii = [np.sort(np.linalg.norm(others - o, axis=1))[k] for o in others]
            for point in points:
                hits += bool((np.linalg.norm(others - point, axis=1) <= radii).any())
            return hits / len(points)

        for k in (1, 3):
            expected = covered(x, y, k), covered(y, x, k)
            assert precision_recall(x, y, neighbours=k) == pytest.approx(expected)
        assert 0.2 < expected[1] < expected[0] <= 1

    @refuses(
        (lambda: kernel_distance(DATA, DATA), "between 2 and the number of rows 40, got 1000"),
        (
            lambda: kernel_distance(DATA, DATA, subsets=0, subset_size=10),
            "subsets must be at least 1, got 0",
        ),
        (lambda: precision_recall(DATA, DATA[:, :4]), "one dimension, got 5 and 4"),
        (lambda: precision_recall(DATA, DATA, neighbours=40), "less one, 39, got 40"),
    )
    def test_refuses_bad_input(self, call: Callable[[], object]) -> None:
        call()
