"""SN-DPM with the SA loss on LSUN bedroom 256x256: see configs/lsun_bedroom.py."""

from configs.lsun_bedroom import experiment


def get_config():
    return experiment("sn")
