"""TauTable: the 50-digit reference, the product form, Theorem 1's chain."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sa_plugin.schedule import NoiseSchedule
from sa_plugin.tau import TauTable, product_form
from tests.refusals import refuses
from tests.toys import read_npz, schedule_of

LINEAR = NoiseSchedule.linear(100)
REFERENCE = read_npz("tau")


@pytest.mark.parametrize("name", sorted(REFERENCE))
def test_theorem1_equals_the_reference(name):
    values = TauTable(schedule_of(name), "theorem1").values
    np.testing.assert_allclose(values, REFERENCE[name], rtol=1e-12, atol=0)


@given(st.lists(st.floats(1e-5, 0.99), min_size=1, max_size=40))
def test_closed_form_equals_product_form(betas):
    schedule = NoiseSchedule.from_betas(betas)
    np.testing.assert_allclose(
        TauTable(schedule, "theorem1").values, product_form(schedule), rtol=1e-10
    )


def test_uniform_relative_and_custom_weights():
    """The last are taken as they are."""
    assert np.array_equal(TauTable(LINEAR, "uniform").values, [0] + [1] * 100)
    relative = TauTable(LINEAR, "relative")
    assert relative.relative
    assert np.array_equal(relative.values, TauTable(LINEAR, "theorem1").values)
    weights = np.arange(101.0)[::-1]
    assert np.array_equal(TauTable(LINEAR, weights).values, [0, *weights[1:]])


@refuses(*[(w, "read-only") for w in ("uniform", "theorem1", "relative", np.ones(101))])
def test_weights_cannot_be_written(weighting):
    TauTable(LINEAR, weighting).values[3] = 1.0


@refuses(
    (np.ones(100), "101 finite numbers"),
    (np.full(101, np.nan), "101 finite numbers"),
    (np.ones((101, 1)), "101 finite numbers"),
    ("snr", r"uniform.*theorem1.*relative.*'snr'"),  # with the allowed names
)
def test_bad_weightings_are_refused(weighting):
    TauTable(LINEAR, weighting)


def test_the_default_that_differs_from_the_loss_is_told():
    with pytest.warns(UserWarning, match=r"SALoss\(schedule\) weighs every step by 1; name the"):
        table = TauTable(LINEAR)
    np.testing.assert_array_equal(table.values, TauTable(LINEAR, "theorem1").values)
