"""SN-DPM with the SA loss on scikit-learn's 8x8 digits (the main job); see configs/digits.py."""

from configs.digits import experiment


def get_config():
    return experiment("sn")
