"""CIFAR10, the cosine schedule (CS): see configs/cifar10.py."""

from configs import cifar10


def get_config(method: str = "sn"):
    return cifar10.get_config(method, cosine=True)
