"""NPR-DPM (arXiv 2206.07309) with the SA loss.

python -m adapters.npr_dpm --config configs/FILE.py
"""

from __future__ import annotations

import sys

from adapters.allocator import keep_freed_memory
from adapters.experiment import Adapter, run

NPR_DPM = Adapter(
    module="adapters.npr_dpm",
    needs="epsc",
    pretrained="pred_eps_epsc_pretrained",
    joint="pred_eps_epsc",
)

if __name__ == "__main__":
    keep_freed_memory()
    sys.exit(run(NPR_DPM))
