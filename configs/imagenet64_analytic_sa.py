"""Analytic-DPM with the SA loss on ImageNet 64x64: see configs/imagenet64.py."""

from configs.imagenet64 import experiment


def get_config():
    return experiment("analytic")
