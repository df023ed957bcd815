"""Metrics in words, with their better direction."""

import pytest

from adapters.measuring.metric_names import data_value, label, lower_is_better


@pytest.mark.parametrize(
    ("name", "said", "lower"),
    [
        ("fid", "Fréchet distance, Inception (FID) (lower is better)", True),
        ("frechet_pixels", "Fréchet distance, pixels (lower is better)", True),
        ("is_digit_classifier", "Inception Score, digit classifier (higher is better)", False),
        ("inception_score", "Inception Score (higher is better)", False),
        ("sample_variance", "Variance of the samples", None),
        ("reverse variance", "reverse variance", None),
    ],
)
def test_a_name_in_words(name, said, lower):
    assert label(name) == said
    assert lower_is_better(name) is lower


def test_the_datas_own_value_is_known_of_the_variance():
    cell = {"frechet_pixels": 1.0, "sample_variance": 2.0, "reference_variance": 3.0}
    assert {name: data_value(name, cell) for name in cell} == {
        "frechet_pixels": None,
        "sample_variance": 3.0,
        "reference_variance": None,
    }
