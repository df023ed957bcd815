"""One run a folder: the second is refused, whatever became of the first it is free again."""

import errno
import json
import os
import signal
import subprocess
import sys

import pytest
from ml_collections import FrozenConfigDict

from adapters.experiment import config
from adapters.experiment.config import CONFIG_FILE, LOCK_FILE, claimed
from tests import ROOT

RUN = FrozenConfigDict({"a": 1, "b": {"c": (1, 2)}})
HOLDER = """
import sys, time
from pathlib import Path
from adapters.shell.locks import locked
with locked(Path(sys.argv[1])) as ours:
    print(ours, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of ``tmp_path / "run"``."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run" / LOCK_FILE)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "True\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_run_is_refused_until_the_first_has_ended(tmp_path, holder, monkeypatch):
    monkeypatch.setattr(config, "PATIENCE", 0.1)
    folder = tmp_path / "run"
    second = claimed(folder, RUN, option="--out")
    said = r"another run is at work in .*run; .* another --out"
    with pytest.raises(ValueError, match=said), second:
        raise AssertionError
    assert not (folder / CONFIG_FILE).exists()
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with claimed(folder, RUN):
        assert json.loads((folder / CONFIG_FILE).read_text()) == {"a": 1, "b": {"c": [1, 2]}}


def test_a_run_waits_a_little_for_one_that_is_ending(tmp_path, holder, monkeypatch):
    waited = []

    def acquire(lock, timeout):
        waited.append(timeout)
        holder.kill()
        holder.wait()
        return original(lock, timeout=timeout)

    from adapters.shell import locks

    original = locks.FileLock.acquire
    monkeypatch.setattr(locks.FileLock, "acquire", acquire)
    with claimed(tmp_path / "run", RUN):
        assert waited == [config.PATIENCE]


def test_a_file_system_without_locks_is_refused(tmp_path, monkeypatch):
    """Not a file that only marks the lock, and stays when its process is killed."""
    import fcntl

    def flock(descriptor, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match="has no locks"), claimed(tmp_path / "run", RUN):
        raise AssertionError
    assert not (tmp_path / "run" / CONFIG_FILE).exists()
    monkeypatch.undo()
    with claimed(tmp_path / "run", RUN):
        pass


def test_a_folder_is_free_after_its_run_and_after_an_error(tmp_path):
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), claimed(tmp_path, RUN):
            raise ZeroDivisionError


def test_nothing_is_written_into_a_foreign_folder(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match="is not empty"), claimed(tmp_path, RUN):
        raise AssertionError
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    with claimed(tmp_path / "run", RUN):
        pass
    (tmp_path / "run" / LOCK_FILE).unlink()
    other = claimed(tmp_path / "run", FrozenConfigDict({"a": 2, "b": {"c": (1, 2)}}))
    with pytest.raises(ValueError, match="a is 1 there, 2 here"), other:
        raise AssertionError
    assert not (tmp_path / "run" / LOCK_FILE).exists()


def test_a_run_killed_before_it_wrote_its_configuration_is_begun_anew(tmp_path):
    (tmp_path / LOCK_FILE).touch()
    with claimed(tmp_path, RUN):
        assert (tmp_path / CONFIG_FILE).exists()
