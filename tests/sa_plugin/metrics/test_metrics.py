"""The numbers of sa_plugin.metrics against closed forms, SciPy and brute force."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sa_plugin.metrics import Moments, frechet_distance, inception_score
from tests.refusals import refuses
from tests.toys import moments_of

SEEDS = st.integers(0, 2**32 - 1)


def random_covariance(rng: np.random.Generator, dim: int, rank: int | None = None) -> np.ndarray:
    factor = rng.standard_normal((dim, rank or dim + 3))
    return factor @ factor.T / dim


def frechet_by_sqrtm(
    mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray
) -> float:
    root = scipy.linalg.sqrtm(sigma1 @ sigma2)
    return float(np.sum((mu1 - mu2) ** 2) + np.trace(sigma1 + sigma2 - 2 * np.real(root)))


class TestFrechetDistance:
    @pytest.mark.parametrize("dim", [1, 2, 5, 40])
    @pytest.mark.parametrize("seed", range(3))
    def test_agrees_with_scipys_matrix_root(self, dim: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        mu1, mu2 = rng.standard_normal((2, dim))
        sigma1, sigma2 = random_covariance(rng, dim), 3 * random_covariance(rng, dim)
        expected = frechet_by_sqrtm(mu1, sigma1, mu2, sigma2)
        assert frechet_distance(mu1, sigma1, mu2, sigma2) == pytest.approx(expected, rel=1e-6)

    def test_commuting_covariances(self) -> None:
        rng = np.random.default_rng(0)
        basis, _ = np.linalg.qr(rng.standard_normal((6, 6)))
        var1, var2 = rng.uniform(0, 4, (2, 6))
        var1[0] = var2[1] = 0.0
        mu1, mu2 = rng.standard_normal((2, 6))
        expected = np.sum((mu1 - mu2) ** 2) + np.sum((np.sqrt(var1) - np.sqrt(var2)) ** 2)
        value = frechet_distance(mu1, (basis * var1) @ basis.T, mu2, (basis * var2) @ basis.T)
        assert value == pytest.approx(expected, rel=1e-10)

    def test_singular_covariances_of_crossing_subspaces(self) -> None:
        """Rank one each, u u^T and v v^T: the trace of the root is |u . v|."""
        u, v = np.random.default_rng(1).standard_normal((2, 20))
        zero, expected = np.zeros(20), u @ u + v @ v - 2 * abs(u @ v)
        value = frechet_distance(zero, np.outer(u, u), zero, np.outer(v, v))
        assert value == pytest.approx(expected, rel=1e-12)

    @pytest.mark.parametrize(("rank1", "rank2"), [(30, 3), (5, 5), (1, 29), (29, 29)])
    def test_singular_covariances_agree_with_scipys_root(self, rank1: int, rank2: int) -> None:
        # SciPy's root of a singular product is itself off by 1e-8 and more: S_1 = R R^T turns the
        # trace into that of (R^T S_2 R)^(1/2), of which SciPy sees the regular part alone.
        rng = np.random.default_rng(10 * rank1 + rank2)
        factors = [rng.standard_normal((30, rank)) for rank in (rank1, rank2)]
        sigma1, sigma2 = (factor @ factor.T for factor in factors)
        mu1, mu2 = rng.standard_normal((2, 30))
        small = min(factors, key=lambda factor: factor.shape[1])
        other = sigma1 if small is factors[1] else sigma2
        trace = np.trace(scipy.linalg.sqrtm(small.T @ other @ small)).real
        expected = np.sum((mu1 - mu2) ** 2) + np.trace(sigma1) + np.trace(sigma2) - 2 * trace
        value = frechet_distance(mu1, sigma1, mu2, sigma2)
        assert value == pytest.approx(expected, rel=1e-6)
        # And SciPy's root of the full product, with a shift that makes it regular.
        shift = 1e-6 * np.eye(30)
        shifted = (mu1, sigma1 + shift, mu2, sigma2 + shift)
        assert frechet_distance(*shifted) == pytest.approx(frechet_by_sqrtm(*shifted), rel=1e-6)

    @pytest.mark.parametrize("rank", [1, 7, 63, 64, None])
    def test_zero_for_equal_moments(self, rank: int | None) -> None:
        rng = np.random.default_rng(2)
        sigma = random_covariance(rng, 64, rank)
        mu = 1e3 * rng.standard_normal(64)
        value = frechet_distance(mu, sigma, mu, sigma)
        assert 0 <= value < 1e-11 * np.trace(sigma)

    def test_of_point_masses(self) -> None:
        zero = np.zeros((3, 3))
        assert frechet_distance([0, 0, 0], zero, [1, 2, 2], zero) == 9.0
        assert frechet_distance([0, 0, 0], zero, [0, 0, 0], 2 * np.eye(3)) == pytest.approx(6.0)

    @settings(deadline=None, max_examples=40)
    @given(seed=SEEDS, dim=st.integers(1, 12), rank1=st.integers(1, 12), rank2=st.integers(1, 12))
    def test_symmetric_and_blind_to_rotation(
        self, seed: int, dim: int, rank1: int, rank2: int
    ) -> None:
        rng = np.random.default_rng(seed)
        mu1, mu2 = rng.standard_normal((2, dim))
        sigma1 = random_covariance(rng, dim, rank1)
        sigma2 = random_covariance(rng, dim, rank2)
        value = frechet_distance(mu1, sigma1, mu2, sigma2)
        scale = np.trace(sigma1) + np.trace(sigma2) + np.sum((mu1 - mu2) ** 2)
        assert value >= 0
        assert frechet_distance(mu2, sigma2, mu1, sigma1) == pytest.approx(value, abs=1e-10 * scale)
        turn, _ = np.linalg.qr(rng.standard_normal((dim, dim)))
        turned = frechet_distance(
            turn @ mu1, turn @ sigma1 @ turn.T, turn @ mu2, turn @ sigma2 @ turn.T
        )
        # A rotated singular covariance has null eigenvalues of 1e-16, whose roots are 1e-8.
        assert turned == pytest.approx(value, abs=1e-6 * scale)

    def test_takes_tensors_of_single_precision(self) -> None:
        rng = np.random.default_rng(3)
        sigma = torch.tensor(random_covariance(rng, 8), dtype=torch.float32)
        mu = torch.zeros(8, requires_grad=True)
        assert frechet_distance(mu, sigma, mu + 1, sigma) == pytest.approx(8.0, rel=1e-6)

    @refuses(
        (([[0.0]], [[1.0]], [0.0], [[1.0]]), "mu1 must have 1 dimension"),
        (([], np.zeros((0, 0)), [], np.zeros((0, 0))), "mu1 must not be empty"),
        (([0.0], [1.0], [0.0], [[1.0]]), "sigma1 must have 2 dimension"),
        (([0.0], np.eye(2), [0.0], [[1.0]]), r"sigma1 must have shape \(1, 1\)"),
        (([0.0], [[1.0]], [0.0, 0.0], np.eye(2)), "mu1 and mu2 must have one shape"),
        (([0.0], [[1.0]], [np.nan], [[1.0]]), "mu2 must be finite"),
        (([0.0], [[1.0]], [0.0], [[np.inf]]), "sigma2 must be finite"),
        (([0.0, 0.0], [[1.0, 0.5], [0.0, 1.0]], [0.0, 0.0], np.eye(2)), "sigma1 .* symmetric"),
        (([0.0, 0.0], np.eye(2), [0.0, 0.0], np.diag([1.0, -0.1])), "sigma2 .* semi-definite"),
        (([0.0], [[-1.0]], [0.0], [[1.0]]), "sigma1 .* semi-definite"),
        (([0.0], [[1.0 + 1j]], [0.0], [[1.0]]), "sigma1 must be real"),
    )
    def test_refuses_bad_input(self, arguments: tuple) -> None:
        frechet_distance(*arguments)


class TestMoments:
    @settings(deadline=None, max_examples=60)
    @given(
        seed=SEEDS,
        count=st.integers(8, 60),
        cuts=st.lists(st.integers(0, 60), max_size=6),
        merged_from=st.integers(0, 7),
    )
    def test_any_splitting_and_merging_equals_numpy(
        self, seed: int, count: int, cuts: list[int], merged_from: int
    ) -> None:
        rng = np.random.default_rng(seed)
        data = rng.standard_normal((count, 7)) @ rng.standard_normal((7, 7)) + 5 * rng.normal(7)
        parts = np.split(data, sorted(min(cut, count) for cut in cuts))
        first, second = Moments(), Moments()
        for index, part in enumerate(parts):
            (first if index < merged_from else second).update(part)
        first.merge(second)
        assert first.count == count
        np.testing.assert_allclose(first.mu, data.mean(axis=0), rtol=1e-12, atol=1e-12)
        expected = np.cov(data, rowvar=False)
        tolerance = 1e-12 * np.abs(expected).max()
        np.testing.assert_allclose(first.sigma, expected, rtol=1e-10, atol=tolerance)
        np.testing.assert_array_equal(first.sigma, first.sigma.T)

    def test_a_large_mean_costs_no_digits(self) -> None:
        centred = np.random.default_rng(0).integers(-8, 9, size=(1000, 3)).astype(np.float64)
        moments = Moments()
        for batch in np.split(centred + 2.0**40, 50):  # exact in float64, E[x^2] - E[x]^2 is not
            moments.update(batch)
        np.testing.assert_allclose(moments.sigma, np.cov(centred, rowvar=False), rtol=1e-12)

    def test_merging_leaves_the_other_alone_and_may_be_with_itself(self) -> None:
        data = np.random.default_rng(0).standard_normal((9, 4))
        empty, moments = Moments(), moments_of(data)
        empty.merge(moments)
        empty.update(data + 1)
        np.testing.assert_allclose(moments.mu, data.mean(axis=0))
        moments.merge(moments)
        assert moments.count == 18
        expected = np.cov(np.concatenate([data, data]), rowvar=False)
        np.testing.assert_allclose(moments.sigma, expected)
        moments.merge(Moments())
        assert moments.count == 18

    def test_results_are_copies(self) -> None:
        moments = moments_of(np.arange(12.0).reshape(6, 2) ** 2)
        mu, sigma = moments.mu, moments.sigma
        moments.mu[:] = 0.0
        moments.sigma[:] = 0.0
        np.testing.assert_array_equal(moments.mu, mu)
        np.testing.assert_array_equal(moments.sigma, sigma)

    def test_one_feature_and_tensor_input(self) -> None:
        data = torch.randn(20, 1, generator=torch.Generator().manual_seed(0), requires_grad=True)
        sigma = moments_of(data).sigma
        assert sigma.shape == (1, 1)
        assert sigma[0, 0] == pytest.approx(data.double().var().item(), rel=1e-12)

    def test_warns_when_the_covariance_must_be_singular(self) -> None:
        data = np.random.default_rng(0).standard_normal((5, 4))
        assert np.linalg.matrix_rank(moments_of(data).sigma) == 4  # a warning is an error here
        with pytest.warns(UserWarning, match=r"4 samples of dimension 4.*needs 5"):
            sigma = moments_of(data[:4]).sigma
        np.testing.assert_allclose(sigma, np.cov(data[:4], rowvar=False))

    @refuses(
        (lambda moments: moments.sigma, "at least 2 sample"),
        (lambda moments: Moments().mu, "at least 1 sample"),
        (lambda moments: moments.update(np.zeros(3)), r"2 dimension\(s\), got shape \(3,\)"),
        (lambda moments: moments.update(np.zeros((2, 4))), "dimension 3 as before, got 4"),
        (
            lambda moments: moments.merge(moments_of(np.zeros((2, 4)))),
            "dimension 3 as before, got 4",
        ),
        (lambda moments: moments.update(np.zeros((2, 0))), "at least one feature"),
        (lambda moments: moments.update(np.zeros((1, 2**14 + 1))), "at most 16384 features"),
        (lambda moments: moments.update([[0, 1, np.nan], [np.inf, 0, 0]]), "2 of 6 entries"),
        (lambda moments: moments.merge(np.zeros((2, 3))), "must be a Moments, got ndarray"),
    )
    def test_refuses_bad_input(self, call: Callable[[Moments], object]) -> None:
        moments = moments_of(np.zeros((1, 3)))
        try:
            call(moments)
        finally:
            assert moments.count == 1


def score_by_loops(logits: np.ndarray, splits: int, seed: int | None) -> tuple[float, float]:
    """The definition, one image and one class at a time."""
    rows = list(logits)
    if seed is not None:
        rows = [rows[i] for i in np.random.RandomState(seed).permutation(len(rows))]
    scores = []
    for k in range(splits):
        part = rows[k * len(rows) // splits : (k + 1) * len(rows) // splits]
        probabilities = [np.exp(row) / np.exp(row).sum() for row in part]
        marginal = sum(probabilities) / len(part)
        total = 0.0
        for p in probabilities:
            for y in range(len(p)):
                total += p[y] * (np.log(p[y]) - np.log(marginal[y]))
        scores.append(np.exp(total / len(part)))
    mean = sum(scores) / splits
    return mean, np.sqrt(sum((score - mean) ** 2 for score in scores) / splits)


class TestInceptionScore:
    @pytest.mark.parametrize("confidence", [50.0, 1e4])  # at 1e4 the other probabilities are 0
    def test_confident_and_balanced_predictions_score_the_classes(self, confidence: float) -> None:
        logits = confidence * np.tile(np.eye(5), (8, 1))
        value = inception_score(logits, splits=4, permutation_seed=None)
        assert value == pytest.approx((5.0, 0.0), abs=1e-9)

    def test_a_class_that_never_occurs_adds_nothing(self) -> None:
        logits = np.tile([[0.0, -1e5, -1e5], [-1e5, 0.0, -1e5]], (10, 1))
        assert inception_score(logits, splits=1) == pytest.approx((2.0, 0.0))

    @pytest.mark.parametrize("splits", [1, 3, 10, 47])
    @pytest.mark.parametrize("seed", [2020, 1, None])
    def test_agrees_with_the_definition(self, splits: int, seed: int | None) -> None:
        logits = 2 * np.random.default_rng(0).standard_normal((47, 5))
        value = inception_score(logits, splits, permutation_seed=seed)
        assert value == pytest.approx(score_by_loops(logits, splits, seed), rel=1e-12)

    def test_default_is_ten_splits_of_the_rows_permuted_with_2020(self) -> None:
        logits = np.random.default_rng(1).standard_normal((100, 4))
        assert inception_score(logits) == pytest.approx(score_by_loops(logits, 10, 2020))
        assert inception_score(logits) != inception_score(logits, permutation_seed=None)

    def test_blind_to_an_offset_and_to_precision(self) -> None:
        logits = torch.randn(30, 7, generator=torch.Generator().manual_seed(0))
        shifted = logits.double() + torch.arange(30.0).double()[:, None]
        assert inception_score(logits) == pytest.approx(inception_score(shifted), rel=1e-12)

    @refuses(
        ((np.zeros(5), 1), "logits must have 2 dimension"),
        ((np.zeros((5, 0)), 1), "at least one class"),
        ((np.zeros((5, 3)), 6), "between 1 and the number of rows 5, got 6"),
        ((np.zeros((5, 3)), 0), "between 1 and the number of rows 5, got 0"),
        ((np.full((5, 3), np.nan), 1), "logits must be finite, 15 of 15"),
    )
    def test_refuses_bad_input(self, arguments: tuple) -> None:
        inception_score(*arguments)
