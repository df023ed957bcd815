"""SN-DPM with the SA loss on scikit-learn's digits, the main job: configs/digits.py:sn."""

from configs.digits import get_config as get_config
