"""SN-DPM with the SA loss on CelebA-HQ 256x256: see configs/celebahq256.py."""

from configs.celebahq256 import experiment


def get_config():
    return experiment("sn")
