"""How the command of a host starts."""

from __future__ import annotations

import sys

from adapters.shell.command import exit_code, keep_freed_memory
from adapters.shell.options import stage_options


def main(module: str) -> None:
    """Run the host's command ``module`` and exit; its help does not wait for PyTorch."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        sys.exit(exit_code(module, lambda: stage_options(module).parse_args(["--help"])))

    from adapters.experiment.run import run
    from adapters.hosts import HOSTS

    keep_freed_memory()
    sys.exit(run(next(host for host in HOSTS if host.module == module)))
