"""NPR-DPM (arXiv 2206.07309) with the SA loss.

python -m adapters.npr_dpm --config configs/FILE.py:npr
"""

from __future__ import annotations

from adapters.host_command import main

if __name__ == "__main__":
    main("adapters.npr_dpm")
