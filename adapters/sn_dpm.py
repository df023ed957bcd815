"""SN-DPM (arXiv 2206.07309) with the SA loss: python -m adapters.sn_dpm --config configs/FILE.py"""

from __future__ import annotations

import sys

from adapters.allocator import keep_freed_memory
from adapters.experiment import Adapter, run

SN_DPM = Adapter(
    module="adapters.sn_dpm",
    needs="eps2",
    pretrained="pred_eps_eps2_pretrained",
    joint="pred_eps_eps2",
)

if __name__ == "__main__":
    keep_freed_memory()
    sys.exit(run(SN_DPM))
