"""NoiseSchedule: reference numbers, identities, refusals."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sa_plugin.schedule import NoiseSchedule
from tests.refusals import refuses
from tests.toys import read_npz, schedule_of

REFERENCE = read_npz("schedules")


@pytest.mark.parametrize("name", sorted({key.split("/")[0] for key in REFERENCE}))
def test_tables_and_two_step_coefficients_equal_the_reference(name):
    schedule = schedule_of(name)
    for table in ("betas", "cum_alphas"):
        expected = REFERENCE[f"{name}/{table}"]
        assert len(expected) == schedule.N + 1
        np.testing.assert_allclose(getattr(schedule, table), expected, rtol=1e-12)
    s, t = REFERENCE[f"{name}/st"].T
    for method, key in (
        (schedule.skip_alpha, "skip_alphas"),
        (schedule.skip_beta, "skip_betas"),
        (schedule.tilde_beta, "tilde_beta"),
    ):
        # The reference takes 1 - product in float64: good to 1e-16 absolute.
        np.testing.assert_allclose(method(s, t), REFERENCE[f"{name}/{key}"], rtol=1e-12, atol=1e-15)


betas_lists = st.lists(st.floats(1e-6, 0.999), min_size=1, max_size=30)


@given(betas_lists)
def test_identities_hold_for_any_betas(betas):
    schedule = NoiseSchedule.from_betas(betas)
    n = np.arange(1, schedule.N + 1)
    np.testing.assert_allclose(schedule.cum_alphas + schedule.cum_betas, 1)
    np.testing.assert_allclose(schedule.skip_alpha(0 * n, n), schedule.cum_alphas[1:], rtol=1e-12)
    np.testing.assert_allclose(schedule.skip_beta(n - 1, n), schedule.betas[1:], atol=1e-14)
    np.testing.assert_allclose(schedule.tilde_beta(n, n), 0)
    assert schedule.tilde_beta(0, schedule.N) == 0
    assert np.all(np.diff(schedule.cum_betas) >= 0)


@given(betas_lists.filter(lambda b: np.prod(1 - np.array(b)) > 1e-8))
def test_from_alphas_cumprod_inverts_cum_alphas(betas):
    schedule = NoiseSchedule.from_betas(betas)
    again = NoiseSchedule.from_alphas_cumprod(schedule.cum_alphas[1:])
    np.testing.assert_allclose(again.betas, schedule.betas, rtol=1e-6, atol=1e-12)


def test_small_betas_keep_their_digits():
    """1 - (1 - 1e-12) has four right digits; the tables have all of them."""
    schedule = NoiseSchedule.from_betas([1e-12, 3e-12])
    np.testing.assert_allclose(schedule.cum_betas[1:], [1e-12, 4e-12 - 3e-24], rtol=1e-14)
    np.testing.assert_allclose(schedule.skip_beta(1, 2), 3e-12, rtol=1e-12)


def test_a_schedule_keeps_its_own_betas():
    betas = np.array([0.0, 0.1, 0.2])
    schedule = NoiseSchedule(betas)
    betas[1] = 0.5
    assert schedule.betas[1] == 0.1
    with pytest.raises(ValueError, match="read-only"):
        schedule.betas[1] = 0.5


@refuses(
    ([0.1, 0.0], r"inside \(0, 1\), got 0.0 at step n = 2"),
    ([0.1, 1.0, 0.2], r"got 1.0 at step n = 2"),
    ([-0.1], r"got -0.1 at step n = 1"),
    ([0.1, float("nan")], r"got nan at step n = 2"),
    ([], r"not empty, got shape \(0,\)"),
    ([[0.1]], r"one-dimensional"),
    ([0.1 + 0.1j], "betas must be real numbers, got complex128"),
    (torch.tensor([0.1 + 0.1j]), "betas must be real numbers, got complex64"),
    (["0.1"], "betas must be real numbers, got <U3"),
    ([None], "betas must be real numbers, got object"),
    # What float64 cannot hold:
    ([0.5, 5e-324], "betas must be at least 1.2e-38, got 4.94066e-324 at step n = 2"),
    ([1e-300, 0.5], "betas must be at least 1.2e-38, got 1e-300 at step n = 1"),
    ([1 - 1e-16] * 40, "cum_alphas must be at least 1.5e-154, got .* at step n = 10"),
)
def test_bad_betas_are_refused(betas):
    NoiseSchedule.from_betas(betas)


@refuses(([0.1, 0.2], "use from_betas"))
def test_a_first_beta_is_refused(betas):
    NoiseSchedule(betas)


@refuses(*[(p, "fall strictly") for p in ([0.9, 0.9], [0.5, 0.6], [1.0, 0.5], [0.5, 0.0])])
def test_products_that_do_not_fall_are_refused(products):
    NoiseSchedule.from_alphas_cumprod(products)


@pytest.mark.parametrize("kind", ["linear", "cosine", "vpsde"])
@refuses(*[(N, "N must be a whole number >= 1") for N in (0, -1, 2.5, True)])
def test_bad_step_counts_are_refused(N, kind):
    getattr(NoiseSchedule, kind)(N)


@refuses(*[(N, r"betas must lie inside \(0, 1\), got .* at step n") for N in (2, 3, 19, 20)])
def test_a_linear_schedule_too_short_is_refused(N):
    NoiseSchedule.linear(N)


@pytest.mark.parametrize("coefficient", ["skip_alpha", "skip_beta"])
@refuses(
    ((3, 2), "0 <= s <= t <= 100"),
    ((-1, 2), "0 <= s <= t <= 100"),
    ((0, 101), "0 <= s <= t <= 100"),
    ((0.0, 1.0), "steps must be integers"),
)
def test_bad_step_pairs_are_refused(steps, coefficient):
    getattr(NoiseSchedule.linear(100), coefficient)(*steps)
