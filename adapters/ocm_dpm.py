"""OCM-DPM (arXiv 2406.10808) with the SA loss.

python -m adapters.ocm_dpm --config configs/FILE.py:ocm
"""

from __future__ import annotations

from adapters.shell.options import help_first

if __name__ == "__main__":
    help_first("adapters.ocm_dpm")

    import sys

    from adapters.experiment.run import run
    from adapters.hosts import OCM_DPM
    from adapters.shell.command import keep_freed_memory

    keep_freed_memory()
    sys.exit(run(OCM_DPM))
