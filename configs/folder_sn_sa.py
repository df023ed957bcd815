"""SN-DPM with the SA loss on your own images, the main job; also its baseline, and B against SA."""

from configs import folder


def get_config():
    config = folder.get_config("sn")
    config.baseline = True
    return config
