"""Small files that ask for much work are refused before it is done."""

from __future__ import annotations

import gzip
import io
import struct
import time
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from adapters.checkpoints.fitting import read_fitting
from adapters.convert import main
from sa_files import arrays, pickled
from sa_files.arrays import open_npz
from sa_files.pickled import load_pickled_arrays
from sa_files.reading import ROOM_WHOLE, UnreadableFile, unpack_gzip
from sa_files.stored import LARGEST_JSON, read_json
from sa_files.tensors import load_tensors
from sa_plugin import Gamma
from tests.commands import one_line
from tests.published import tiny

PAIRS = b")q\x00" + b"h\x00\x86q\x00" * 40  # 2^40 entries
KEY = b"}" + PAIRS + b"K\x00s"


def in_zip(pickle: bytes) -> io.BytesIO:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02" + pickle + b".")
        archive.writestr("a/version", b"3")
    file.seek(0)
    return file


def test_a_key_that_takes_for_ever_to_hash(tmp_path, capsys):
    path = tmp_path / "x.pth"
    path.write_bytes(in_zip(KEY).getvalue())
    assert path.stat().st_size < 600
    began = time.process_time()
    with pytest.raises(ValueError, match=r"x\.pth holds no Gamma.*it has a tuple as a key"):
        Gamma.load(path)
    assert main([str(path), str(tmp_path / "out.pth")]) == 2
    one_line(capsys, path, "it has a tuple as a key, must have text or numbers")
    with pytest.raises(ValueError, match=r"x\.pth is .*it has a tuple as a key"):
        read_fitting(path, tiny())
    assert time.process_time() - began < 1


@pytest.mark.parametrize(
    ("pickle", "said"),
    [
        (KEY, "a tuple as a key"),
        (b"}(" + PAIRS + b"K\x00u", "a tuple as a key"),
        (b"(" + PAIRS + b"K\x00d", "a tuple as a key"),
        (b"ccollections\nOrderedDict\n)R" + PAIRS + b"K\x00s", "a tuple as a key"),
        (b"}\x8a\x08" + b"\x7f" * 8 + b"Ns", "a key beyond"),
        (PAIRS + b"\x85", "far more than its bytes hold"),
        (b"]q\x00h\x00a", "nested too deeply"),
        (b")" + b"\x85" * 101, "nested too deeply"),
        (b"N" * pickled.MOST_READS, "more than 2097152 instructions"),
        (b"(X\x00\x00\x01\x00" + b"a" * 2**16 + b"q\x00" + b"h\x00" * 2**15 + b"t", "far more"),
        (b"ctorch\nSize\n" + PAIRS + b"\x85R", "far more than its bytes hold"),
        (b"ccollections\nOrderedDict\n)R" + PAIRS + b"b", "far more than its bytes hold"),
        (PAIRS + b"Q", "far more than its bytes hold"),
        (b"ccollections\nCounter\n]K\x01a\x85R", "dict of other things than pairs"),
        (b"\x8f", "damaged"),  # EMPTY_SET
        (b"ctorch._utils\n_rebuild_sparse_tensor\n", r"asks for torch\._utils\._rebuild_sparse"),
    ],
)
def test_what_a_pickle_may_not_ask_for(pickle, said, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("reached PyTorch"))
    with pytest.raises(UnreadableFile, match=said):
        load_tensors(in_zip(pickle))


def test_an_array_with_a_slow_shape():
    shape = b"(" + (b"\x8a\xff" + b"\x7f" * 255) * 1000 + b"t"
    state = b"(K\x01" + shape + b"cnumpy\ndtype\nX\2\0\0\0u1\x85R(K\x03X\1\0\0\0|tb\x89U\x01atb"
    with pytest.raises(UnreadableFile, match="impossible shape"):
        load_pickled_arrays(b"cnumpy\nndarray\nK\x00\x85R" + state + b".")


def test_what_files_do_share_is_read():
    """Equal parts, names that occur often, dicts of Python 2, the counter of a scheduler."""
    pair, size = (0.9, 0.999), torch.Size([2, 3])
    content = {
        "groups": [{"betas": pair, "params": [i, i + 1]} for i in range(500)],
        "shared": [pair, [pair, pair]],
        "milestones": Counter({30: 1, 60: 2}),
        "state": OrderedDict((f"layer.{i}", torch.ones(2)) for i in range(200)),
        **{"size": size, "none": None, 1: True, 2.5: "x", "dtype": torch.float16},
    }
    for zipped in (True, False):
        file = io.BytesIO()
        torch.save(content, file, _use_new_zipfile_serialization=zipped)
        file.seek(0)
        loaded = load_tensors(file)
        assert all(torch.equal(loaded["state"].pop(k), t) for k, t in content["state"].items())
        assert loaded == {**content, "state": OrderedDict()}
    pairs = b"ccollections\nOrderedDict\n](](X\x01\0\0\0aK\x01ee\x85R"
    assert load_tensors(in_zip(pairs)) == OrderedDict(a=1)


# ------------------------------------------------------------------------------ other formats


def test_a_large_json_file_is_not_parsed(tmp_path, monkeypatch):
    path = tmp_path / "cell.json"
    path.write_bytes(b"[" + b"[]," * (LARGEST_JSON // 3) + b"[]]")
    monkeypatch.setattr("json.loads", lambda _: pytest.fail("parsed"))
    with pytest.raises(UnreadableFile, match=r"cell\.json is bad: it has \d+ bytes, must have at"):
        read_json(path, "is bad", dict)


def test_the_directory_of_a_zip_file_is_bounded(monkeypatch):
    file = io.BytesIO()
    torch.save(torch.ones(2), file)
    load_tensors(file := io.BytesIO(file.getvalue()))
    whole = bytearray(file.getvalue())
    record = whole.index(b"PK\x06\x06")  # of large files; zipfile takes its numbers
    whole[record + 40 : record + 48] = struct.pack("<Q", 2**24)
    with pytest.raises(UnreadableFile, match="its directory has 16777216 bytes"):
        load_tensors(io.BytesIO(whole))
    monkeypatch.setattr(arrays, "_LARGEST_DIRECTORY", 40)
    np.savez(small := io.BytesIO(), x=np.ones(2))
    with pytest.raises(UnreadableFile, match="must have at most 40"), open_npz(small):
        pass


def test_what_is_unpacked_as_a_whole_is_bounded_closer(tmp_path):
    many = ROOM_WHOLE + 2**20
    np.savez_compressed(tmp_path / "x.npz", x=np.broadcast_to(np.uint8(0), many))
    with (tmp_path / "x.npz").open("rb") as file, open_npz(file) as found:
        assert found.unpack("x").read(6) == b"\x93NUMPY"
        with pytest.raises(UnreadableFile, match="store it unpacked"):
            found["x"]
    with pytest.raises(UnreadableFile, match="store it unpacked"):
        unpack_gzip(io.BytesIO(gzip.compress(bytes(many), 1)))


def test_a_path_is_printable_in_an_error(tmp_path):
    path = tmp_path / "\x1b[31mred.json"
    with pytest.raises(UnreadableFile, match=r"\?\[31mred\.json is bad") as caught:
        read_json(path, "is bad", dict)
    assert str(caught.value).isprintable()
    assert Path(path).name not in str(caught.value)
