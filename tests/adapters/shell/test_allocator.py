"""Whether freed memory stays in the process, by the page faults of taking it again."""

import argparse
import platform
import subprocess

import pytest

from adapters.shell.allocator import TUNED_BY, keep_freed_memory
from benchmarks.allocator import Measured, measure, row
from benchmarks.training_steps import Variant
from tests.children import ROOT, command_of

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")

PAGES = 1000  # of 64 blocks of 1 MiB in pages of 64 KiB; of the usual 4 KiB they have 16,384
SCRIPT = """
import resource
import torch
from adapters.shell.allocator import keep_freed_memory
kept = keep_freed_memory()
faults = []
for _ in range(5):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.zeros(2**18) for _ in range(64)]
    del blocks
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(kept, min(faults))
"""


def kept_and_faults(environment):
    done = subprocess.run(
        command_of("-c", SCRIPT), cwd=ROOT, env=environment, capture_output=True, text=True
    )
    kept, faults = done.stdout.split()
    return kept == "True", int(faults)


@glibc
def test_memory_taken_again_is_not_asked_of_the_system():
    kept, faults = kept_and_faults({})
    assert kept
    assert faults < PAGES / 2


@glibc
@pytest.mark.parametrize("name", TUNED_BY)
def test_what_the_environment_tunes_is_left_alone(name, monkeypatch):
    for other in TUNED_BY:
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, "1")
    assert not keep_freed_memory()


@glibc
def test_without_it_the_memory_is_asked_of_the_system_again():
    """Else the test above could not fail."""
    kept, faults = kept_and_faults({"MALLOC_TRIM_THRESHOLD_": "131072"})
    assert not kept
    assert faults >= PAGES


@glibc
def test_the_benchmark_s_processes_differ_in_their_page_faults(monkeypatch):
    for name in TUNED_BY:
        monkeypatch.delenv(name, raising=False)
    args = argparse.Namespace(network="digits", batch=128, threads=1, repeats=6, warmup=3)
    args.device = "cpu"
    as_is, kept = measure(args, Variant("all", 2))
    assert len(as_is) == len(kept) == args.repeats
    assert all(m.seconds > 0 and m.peak > 100 for m in as_is + kept)
    # Single steps overlap: a heap that is kept still grows now and then.
    assert 2 * sum(m.faults for m in kept) < sum(m.faults for m in as_is)


def test_the_benchmark_s_ratio_is_of_steps_made_one_after_the_other():
    as_is = [Measured(s, 100, 50) for s in (0.1, 0.2, 0.4)]
    kept = [Measured(s, 0, 51) for s in (0.1, 0.1, 0.1)]
    said = row(Variant("one", 2), (as_is, kept))
    assert said == "| SA-2 one | 200 | 100 | 0.500 (0.375 to 0.750) | 100 | 0 | 50 | 51 |"
