"""SN-DPM (arXiv 2206.07309) with the SA loss: python -m adapters.sn_dpm --config configs/FILE.py"""

from __future__ import annotations

from adapters.host_command import main

if __name__ == "__main__":
    main("adapters.sn_dpm")
