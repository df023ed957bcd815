"""SN-DPM with the SA loss on scikit-learn's digits, the main job; also B, and B against SA."""

from configs import digits


def get_config():
    config = digits.get_config("sn")
    config.baseline = True
    return config
