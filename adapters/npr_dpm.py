"""NPR-DPM (arXiv 2206.07309) with the SA loss.

python -m adapters.npr_dpm --config configs/FILE.py:npr
"""

from __future__ import annotations

from adapters.shell.options import help_first

if __name__ == "__main__":
    help_first("adapters.npr_dpm")

    import sys

    from adapters.experiment.run import run
    from adapters.hosts import NPR_DPM
    from adapters.shell.command import keep_freed_memory

    keep_freed_memory()
    sys.exit(run(NPR_DPM))
