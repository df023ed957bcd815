"""SN-DPM with the SA loss on CIFAR10: configs/cifar10.py:sn under the name of the first release."""

from configs.cifar10 import get_config as get_config
