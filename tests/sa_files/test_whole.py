"""A file that is empty, zeroed or cut is told by its ends; what is written is synced."""

import json
import os
import stat

import numpy as np
import pytest
import torch
from PIL import Image

from sa_files.whole import is_whole
from sa_files.writing import write_json

WRITERS = {
    "a.npz": lambda path: np.savez(path, np.arange(9)),
    "a.pth": lambda path: torch.save({"w": torch.zeros(9)}, path),
    "a.png": lambda path: Image.new("L", (9, 9), 7).save(path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_cut_file_is_not_whole(name, tmp_path):
    path = tmp_path / name
    WRITERS[name](path)
    content = path.read_bytes()
    assert is_whole(path)
    for cut in (content[:-1], content[: len(content) // 2], content[:5], b"", bytes(len(content))):
        path.write_bytes(cut)
        assert not is_whole(path)


def test_only_files_are_whole(tmp_path):
    assert not is_whole(tmp_path)
    assert not is_whole(tmp_path / "none")
    (tmp_path / "old.pth").write_bytes(b"\x80\x02}q\x00.")  # torch.save of before 2020: a pickle
    assert is_whole(tmp_path / "old.pth")


def test_the_disk_holds_a_file_before_its_name_and_its_name_before_the_end(tmp_path, monkeypatch):
    seen, fsync = [], os.fsync

    def note(descriptor):
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        seen.append((is_folder, (tmp_path / "a.json").exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    write_json(tmp_path / "a.json", {"a": 1})
    assert seen == [(False, False), (True, True)]
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}
