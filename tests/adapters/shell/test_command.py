"""Whether freed memory stays in the process, by the page faults of taking it again."""

import platform
import subprocess

import pytest

from adapters.shell.command import TUNED_BY, keep_freed_memory
from tests.children import ROOT, command_of

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")

PAGES = 1000  # of 64 blocks of 1 MiB in pages of 64 KiB; of the usual 4 KiB they have 16,384
SCRIPT = """
import resource
import torch
from adapters.shell.command import keep_freed_memory
kept = keep_freed_memory()
faults = []
for _ in range(5):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.zeros(2**18) for _ in range(64)]
    del blocks
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(kept, min(faults))
"""


@glibc
@pytest.mark.parametrize("tuned", [{}, {"MALLOC_TRIM_THRESHOLD_": "131072"}])
def test_memory_taken_again_is_asked_of_the_system_only_where_that_is_tuned(tuned):
    done = subprocess.run(
        command_of("-c", SCRIPT), cwd=ROOT, env=tuned, capture_output=True, text=True
    )
    kept, faults = done.stdout.split()
    assert kept == str(not tuned)
    assert int(faults) >= PAGES if tuned else int(faults) < PAGES / 2


@glibc
@pytest.mark.parametrize("name", TUNED_BY)
def test_what_the_environment_tunes_is_left_alone(name, monkeypatch):
    for other in TUNED_BY:
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, "1")
    assert not keep_freed_memory()
