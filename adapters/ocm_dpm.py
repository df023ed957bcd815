"""OCM-DPM (arXiv 2406.10808) with the SA loss.

python -m adapters.ocm_dpm --config configs/FILE.py:ocm
"""

from __future__ import annotations

from adapters.host_command import main

if __name__ == "__main__":
    main("adapters.ocm_dpm")
