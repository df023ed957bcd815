"""SN-DPM with the SA loss on CelebA 64x64: see configs/celeba64.py."""

from configs.celeba64 import experiment


def get_config():
    return experiment("sn")
