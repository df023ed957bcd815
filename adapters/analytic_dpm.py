"""Analytic-DPM (arXiv 2201.06503) with the SA loss.

python -m adapters.analytic_dpm --config configs/FILE.py:analytic
"""

from __future__ import annotations

from adapters.host_command import main

if __name__ == "__main__":
    main("adapters.analytic_dpm")
