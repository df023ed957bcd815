"""SN-DPM (arXiv 2206.07309) with the SA loss: python -m adapters.sn_dpm --config configs/FILE.py"""

from __future__ import annotations

from adapters.shell.options import help_first

if __name__ == "__main__":
    help_first("adapters.sn_dpm")

    import sys

    from adapters.experiment.run import run
    from adapters.hosts import SN_DPM
    from adapters.shell.command import keep_freed_memory

    keep_freed_memory()
    sys.exit(run(SN_DPM))
