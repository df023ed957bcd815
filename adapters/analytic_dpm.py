"""Analytic-DPM (arXiv 2201.06503) with the SA loss.

python -m adapters.analytic_dpm --config configs/FILE.py:analytic
"""

from __future__ import annotations

from adapters.shell.options import help_first

if __name__ == "__main__":
    help_first("adapters.analytic_dpm")

    import sys

    from adapters.experiment.run import run
    from adapters.hosts import ANALYTIC_DPM
    from adapters.shell.command import keep_freed_memory

    keep_freed_memory()
    sys.exit(run(ANALYTIC_DPM))
