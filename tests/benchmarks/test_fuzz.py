"""Damaged and hostile files of every kind: a clean error that names the file, or what was in it.

The long run is `python -m benchmarks.fuzz`; docs/reliability_files.md has its figures.
"""

from __future__ import annotations

import mmap
import random
import re
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks import fuzz, work
from benchmarks.damage import BOMB, OUTSIDE, bombs, hostile, inside
from benchmarks.fuzz import Trial, in_own_process, row
from benchmarks.loaders import LOADERS, Loader, fingerprint

# On damaged TIFF files Pillow warns before it decides.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")
NUMBERS = st.integers(0, 2**40)
PLACES = st.tuples(st.sampled_from(sorted(OUTSIDE)), NUMBERS, NUMBERS)
QUICK = settings(
    max_examples=100,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(scope="module", params=LOADERS)
def trial(request):
    with tempfile.TemporaryDirectory() as folder:
        yield Trial(request.param, Path(folder) / "own")


@QUICK
@given(PLACES, st.booleans())
def test_damage_is_told_or_does_no_harm(trial, place, packed):
    """Within the format's sums as well as behind them, where the sums are made right again."""
    name, at, what = place
    operation = OUTSIDE[name]
    if packed:
        trial.check(inside(trial.sound, operation, at, what), sums_hold=True)
    else:
        trial.check(operation(trial.sound, at, what), sums_hold=False)


def test_files_of_other_kinds_and_empty_ones_are_told(trial, tmp_path):
    assert trial.read(b"") == "refused"
    for i, name in enumerate(LOADERS):
        trial.read(Trial(name, tmp_path / str(i)).sound)


@pytest.mark.parametrize("attack", hostile(Path("x")))
def test_no_file_runs_code(trial, attack):
    assert trial.read(hostile(trial.trace)[attack]) == "refused"


@pytest.mark.parametrize("bomb", bombs())
def test_what_would_fill_the_memory_is_refused(trial, bomb):
    assert len(bombs()[bomb]) < BOMB / 100
    assert trial.read(bombs()[bomb]) == "refused"


def test_files_that_ask_for_much_work_are_refused(trial, monkeypatch):
    """The bombs of the long run, but small: what grows beyond all bounds does so here, too."""
    monkeypatch.setattr(work, "LARGEST", 2**13)
    draw = random.Random(trial.name)
    began = time.process_time()
    for _ in range(10):
        trial.read(work.work_bomb(trial.sound, draw)[1])
    assert time.process_time() - began < fuzz.SECONDS


@pytest.mark.parametrize("name", ["statistics", "Gamma, npz"])
def test_no_bit_of_a_zip_directory_is_wrong_in_silence(name, tmp_path):
    """Both may lack some arrays: one that a damaged directory hides would not be missed."""
    trial = Trial(name, tmp_path / "own")
    for at in range(trial.sound.index(b"PK\x01\x02"), len(trial.sound)):
        for bit in range(8):
            trial.check(OUTSIDE["flip"](trial.sound, at, bit), sums_hold=False)


def test_a_loader_that_is_careless_is_found_out(monkeypatch):
    """One that unpickles, one that dies, one that looks away: else the tests above show nothing."""
    import os
    import pickle

    def unpickle(path: Path) -> object:
        try:
            return pickle.loads(path.read_bytes())
        except Exception as error:
            raise ValueError(f"{path}: {error}".replace("\n", " ")) from error

    def die(path: Path) -> bytes:
        if path.read_bytes() != b"sound":
            os.kill(os.getpid(), 9)
        return b""

    careless = {
        "unpickles": Loader("x", lambda p: p.write_bytes(pickle.dumps(1)), unpickle),
        "dies": Loader("x", lambda p: p.write_bytes(b"sound"), die),
        "looks away": Loader("x", lambda p: p.write_bytes(b"sound"), Path.read_bytes, True),
        "raises": Loader("x", lambda p: p.write_bytes(b"[1]"), lambda p: p.read_bytes()[1]),
    }
    for name, loader in careless.items():
        monkeypatch.setitem(LOADERS, name, loader)
    found = {name: in_own_process(name, 100, 0) for name in careless}
    assert any("code from the file was run" in what for what in found["unpickles"].wrong)
    assert found["dies"].wrong == ["empty: the process died with exit code -9"]
    assert any("read in silence" in what for what in found["looks away"].wrong)
    assert any("IndexError" in what for what in found["raises"].wrong)
    assert row("dies", found["dies"]).startswith("| dies | no | 0 | 0 | 0 | 0 | 1 |")


def test_a_loader_that_works_too_long_is_found_out(monkeypatch):
    """One that is slow, one that takes memory, and one that hangs where no signal is handled."""

    def burn(path: Path) -> object:
        began = time.process_time()
        while path.read_bytes() == b"" and time.process_time() - began < 0.3:
            pass
        return 0

    def hash_for_ever(path: Path) -> object:
        part: tuple[object, ...] = ()
        for _ in range(60 if path.read_bytes() == b"" else 0):
            part = (part, part)
        return hash(part)

    def fill(_: Path) -> object:
        memory = mmap.mmap(-1, 2**26)  # new, whatever the tests before have left in the heap
        memory[:: mmap.PAGESIZE] = b"x" * (len(memory) // mmap.PAGESIZE)
        return len(memory)

    for name, read in (
        ("burns", burn),
        ("fills", fill),
        ("hangs", hash_for_ever),
    ):
        monkeypatch.setitem(LOADERS, name, Loader("x", lambda p: p.write_bytes(b"1"), read))
    monkeypatch.setattr(fuzz, "SECONDS", 0.1)
    monkeypatch.setattr(fuzz, "MEMORY", 32)
    found = {name: in_own_process(name, 1, 0).wrong for name in ("burns", "fills", "hangs")}
    assert any(re.match(r"empty: \d\.\d s for 0\.0 MiB", what) for what in found["burns"])
    assert any(re.match(r"empty: 6\d MiB of memory", what) for what in found["fills"])
    assert found["hangs"] == ["empty: the process died with exit code -27"]


def test_a_loader_that_waits_for_something_is_ended_by_the_clock(monkeypatch):
    wait = lambda path: path.read_bytes() or time.sleep(600)  # noqa: E731
    monkeypatch.setitem(LOADERS, "waits", Loader("x", lambda p: p.write_bytes(b"1"), wait))
    monkeypatch.setattr(fuzz, "HANG", 1)
    (wrong,) = in_own_process("waits", 1, 0).wrong
    assert wrong.endswith("the process died with exit code -9")


def test_a_long_run_counts_its_cases_and_measures_memory():
    tally = in_own_process("Fashion-MNIST, gz", 60, seed=1)
    assert tally.wrong == []
    assert tally.cases == tally.refused + tally.same + tally.changed == 60
    assert 50 < tally.peak < 200  # MiB: the gzip bomb is unpacked up to the bound of 64
    assert tally.slowest > 0


def test_fingerprints_tell_contents_apart():
    import numpy as np
    import torch

    values = [1, 1.0, "1", [1], {"a": 1}, np.ones(2), np.ones(1), torch.ones(2), torch.ones(2, 1)]
    assert len({fingerprint(value) for value in values}) == len(values)
    assert fingerprint(np.array([np.nan])) == fingerprint(np.array([np.nan]))
