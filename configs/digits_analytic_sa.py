"""Analytic-DPM with the SA loss on scikit-learn's 8x8 digits; see configs/digits.py."""

from configs.digits import experiment


def get_config():
    return experiment("analytic")
