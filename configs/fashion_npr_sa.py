"""NPR-DPM with the SA loss on Fashion-MNIST: see configs/fashion.py."""

from configs.fashion import experiment


def get_config():
    return experiment("npr")
