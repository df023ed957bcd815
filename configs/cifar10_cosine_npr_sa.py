"""NPR-DPM with the SA loss on CIFAR10, cosine schedule: see configs/cifar10.py."""

from configs.cifar10 import experiment


def get_config():
    return experiment("npr", cosine=True)
