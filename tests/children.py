"""Python processes of the tests, alone or several by torchrun."""

import os
import subprocess
import sys

from tests import ROOT


def command_of(*arguments, processes=1):
    """The command line of a Python process, or of so many by torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [sys.executable, *(torchrun if processes > 1 else []), *arguments]


def start(*arguments, processes=1):
    """Start them in the repository's root, with a thread each."""
    return subprocess.Popen(
        command_of(*arguments, processes=processes),
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    """Wait for the end of one that ``start`` gave; what it said on standard error."""
    _, said = process.communicate(timeout=240)
    assert process.returncode == 0, said[-3000:]
    return said
