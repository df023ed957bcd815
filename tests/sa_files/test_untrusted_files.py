"""What files of unknown origin can try, one by one; the fuzz tries everything at random."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from adapters.measuring.image_sources import open_images
from sa_files.arrays import open_npz, open_zip, read_npy
from sa_files.pickled import load_pickled_arrays
from sa_files.reading import ROOM, UnreadableFile, reading, tar_files, unpack_gzip
from sa_files.tensors import entries_once, load_tensors
from sa_plugin import Gamma
from third_party.common.datasets.pixels import Preparation, read_image


def saved(value: Any, **options: Any) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(value, file, **options)
    file.seek(0)
    return file


def with_members(file: io.BytesIO, change: Callable[[str, bytes], bytes]) -> io.BytesIO:
    """A zip file with other contents under the same names, and the right sums."""
    changed = io.BytesIO()
    with zipfile.ZipFile(file) as archive, zipfile.ZipFile(changed, "w") as new:
        for name in archive.namelist():
            new.writestr(name, change(name, archive.read(name)))
    changed.seek(0)
    return changed


def with_pickle(pickled: bytes) -> io.BytesIO:
    """A file of tensors with this in place of its pickle."""
    return with_members(saved([1.0]), lambda n, c: pickled if n.endswith("data.pkl") else c)


def assert_unreadable(said: str, read: Callable[..., Any], *arguments: Any) -> None:
    with pytest.raises(UnreadableFile, match=said):
        read(*arguments)


# ------------------------------------------------------------------------------------ tensors


def test_a_storage_that_claims_more_than_its_record_is_refused(monkeypatch):
    """PyTorch 2.4 and 2.6 read what lies behind it in memory."""
    size, claimed = b"K\x04", b"J" + struct.pack("<i", 100)  # 4 and 100 in a pickle

    def change(name: str, content: bytes) -> bytes:
        if not name.endswith("data.pkl"):
            return content
        content = content.replace(size + b"tq", claimed + b"tq")
        return content.replace(b"K\x00" + size, b"K\x00" + claimed)

    file = with_members(saved({"a": torch.arange(4.0)}), change)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("reached PyTorch"))
    assert_unreadable("storage '0' claims 400 bytes, has 16", load_tensors, file)


def test_a_storage_has_one_size(monkeypatch):
    """The reader here would check one of them, and PyTorch take the other."""
    storage = b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0000X\3\0\0\0cpuK%ctQ"
    pickled = b"\x80\x02(" + storage % 100 + storage % 4 + b"t."
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("reached PyTorch"))
    assert_unreadable("storage '0' claims two different sizes", load_tensors, with_pickle(pickled))


def test_a_tensor_cannot_be_made_of_nothing():
    """torch.Tensor(n) is n numbers of whatever lies in memory; PyTorch lets it through.

    So is a tensor with more entries than its storage: PyTorch makes the storage grow.
    """
    file = with_pickle(b"\x80\x02ctorch\nTensor\nJ" + struct.pack("<i", 10**6) + b"\x85R.")
    assert torch.load(file, weights_only=True).shape == (10**6,)
    file.seek(0)
    assert_unreadable(r"asks for torch\.Tensor, which is no data", load_tensors, file)
    shape = b"K\x00K\x04\x85"  # offset 0, shape (4,)
    grown = with_members(
        saved(torch.arange(4.0)),
        lambda _, content: content.replace(shape, b"K\x00J" + struct.pack("<i", 10**6) + b"\x85"),
    )
    with pytest.raises((UnreadableFile, RuntimeError), match=r"hold 4000000 bytes|not resizable"):
        load_tensors(grown)


def test_a_legacy_storage_cannot_grow_when_it_is_read():
    content = saved(torch.arange(4.0), _use_new_zipfile_serialization=False).getvalue()
    shape = b"K\x00K\x04\x85"  # offset 0, shape (4,)
    assert content.count(shape) == 1
    grown = content.replace(shape, b"K\x00J" + struct.pack("<i", 10**6) + b"\x85")
    with pytest.raises(RuntimeError, match="wrong byte size"):  # PyTorch's own
        load_tensors(io.BytesIO(grown))
    many = content.replace(b"K\x04Nt", b"J" + struct.pack("<i", 2**30) + b"Nt")
    assert many != content
    said = "storages claim 4294967296 bytes, there are 24"
    assert_unreadable(said, load_tensors, io.BytesIO(many))


def test_repeated_entries_are_counted_once():
    number = torch.tensor(2.0)
    assert entries_once(number.expand(10**5, 10**5)).shape == (1, 1)
    assert entries_once(torch.ones(3, 4).t()).shape == (4, 3)
    overlapping = torch.ones(2 * 10**4).as_strided((10**4, 10**4), (1, 1))
    assert_unreadable("overlaps itself", entries_once, overlapping)
    loaded = load_tensors(saved({"x": number.expand(10**6, 10**6)}))
    assert loaded["x"].shape == (10**6, 10**6)


@pytest.mark.parametrize(
    ("pickled", "said"),
    [
        (b"cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.", r"asks for builtins\.bytearray"),
        (b"c_codecs\nencode\nX\x01\x00\x00\x00aX\x04\x00\x00\x00idna\x86R.", "codec 'idna'"),
        (b"\x96\xff\xff\xff\xff\xff\x00\x00\x00.", "damaged"),  # BYTEARRAY8 of 2^40 bytes
        (b"\x82\x01.", "damaged"),  # EXT1
    ],
)
def test_a_pickle_cannot_ask_for_memory_or_time(pickled, said):
    assert_unreadable(said, load_pickled_arrays, pickled)
    assert_unreadable(said, load_tensors, with_pickle(b"\x80\x02" + pickled))
    # A place far out in the memo, that takes no room:
    assert load_pickled_arrays(b"Nr\xff\xff\xff\xff.") is None


def test_pickled_arrays_are_as_long_as_their_bytes():
    for protocol in (2, 4):
        for array in (np.arange(6, dtype=">i4").reshape(2, 3), np.ones((2, 2), order="F")):
            found = load_pickled_arrays(pickle.dumps({"x": array}, protocol=protocol))["x"].array
            assert np.array_equal(found, array)
            assert found.dtype == array.dtype
    state = (1, (10**9, 10**9), np.dtype("f8"), False, b"12345678")

    class Claims:
        def __reduce__(self) -> Any:
            import numpy.core.multiarray as module  # noqa: F401

            return np.zeros(0).__reduce__()[0], (np.ndarray, (0,), b"b"), state

    with pytest.raises(UnreadableFile, match="impossible shape"):
        load_pickled_arrays(pickle.dumps(Claims(), protocol=2))


# ------------------------------------------------------------------------------------ archives


def test_zip_files_that_two_readers_may_see_differently():
    whole = saved({"a": torch.zeros(4)}).getvalue()
    for content in (whole[:300] + whole, whole[:-2] + b"\x05\x00hello"):
        assert_unreadable("other bytes before or after", load_tensors, io.BytesIO(content))
    twice = io.BytesIO()
    with zipfile.ZipFile(twice, "w") as archive:
        archive.writestr("a", b"1")
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("a", b"2")
    with pytest.raises(UnreadableFile, match="two of its members"), open_zip(twice):
        pass


def test_a_member_marked_as_a_folder_is_refused():
    """PyTorch would take its storage for empty, and give what lies in memory."""
    file = io.BytesIO()
    with zipfile.ZipFile(saved({"a": torch.arange(4.0)})) as old, zipfile.ZipFile(file, "w") as new:
        for name in old.namelist():
            info = zipfile.ZipInfo(name)
            info.external_attr = 0x10 if name.endswith("/data/0") else 0
            new.writestr(info, old.read(name))
    file.seek(0)
    assert_unreadable("data/0' is a folder", load_tensors, file)


def test_a_header_that_claims_terabytes(tmp_path):
    file = io.BytesIO()
    header = {"descr": "<f8", "fortran_order": False, "shape": (2**40,)}
    np.lib.format.write_array_header_1_0(file, header)
    assert_unreadable(r"claims 8796093022208 bytes .*, 0 are there", read_npy, file)
    with zipfile.ZipFile(tmp_path / "gamma.npz", "w") as archive:
        archive.writestr("values.npy", file.getvalue())
    with pytest.raises(ValueError, match=r"gamma\.npz holds no Gamma.*claims 8796093022208 bytes"):
        Gamma.load(tmp_path / "gamma.npz")


def test_arrays_that_would_unpack_without_bound():
    file = io.BytesIO()
    np.savez_compressed(file, x=np.broadcast_to(np.uint8(0), ROOM + 1))
    size = file.tell()
    assert size < ROOM / 500
    with pytest.raises(UnreadableFile, match="store it unpacked"), open_npz(file):
        pass
    np.savez_compressed(file := io.BytesIO(), x=np.zeros(10**7, np.uint8))  # small: no matter
    with open_npz(file) as arrays:
        assert not arrays["x"].any()
    zipped = io.BytesIO(gzip.compress(bytes(ROOM + 1), 1))
    assert_unreadable("store it unpacked", unpack_gzip, zipped)


def tar_of(*members: tarfile.TarInfo, content: bytes = b"") -> io.BytesIO:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for member in members:
            member.size = len(content) if member.isreg() else 0
            tar.addfile(member, io.BytesIO(content))
    file.seek(0)
    return file


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def test_members_that_leave_the_folder_are_only_names(tmp_path):
    names = ("/etc/x.png", "../../x.png", "a/../../x.png")
    links = [
        link("own.png", "own.png"),  # a circle
        link("passwd.png", "/etc/passwd"),
        link("hard.png", "/etc/passwd", tarfile.LNKTYPE),
        link("device.png", "", tarfile.CHRTYPE),
    ]
    png = io.BytesIO()
    Image.new("RGB", (4, 4)).save(png, "PNG")
    file = tar_of(*map(tarfile.TarInfo, names), *links, content=png.getvalue())
    found = [name for name, _ in tar_files(file, lambda name: True)]
    assert found == list(names)
    (tmp_path / "x.tar").write_bytes(file.getvalue())
    before = sorted(tmp_path.parent.rglob("*"))
    assert len(open_images(str(tmp_path / "x.tar"))) == 3
    assert sorted(tmp_path.parent.rglob("*")) == before


def test_a_tar_archive_does_not_end_at_a_damaged_header():
    """As it does for tarfile, which would leave out every image behind it in silence."""

    def read(content: bytes) -> list[Any]:
        return list(tar_files(io.BytesIO(content), lambda name: True))

    whole = tar_of(*(tarfile.TarInfo(f"{i}.png") for i in range(3))).getvalue()
    damaged = whole[:512] + bytes([whole[512] ^ 1]) + whole[513:]  # in the second header
    with tarfile.open(fileobj=io.BytesIO(damaged)) as tar:
        assert tar.getnames() == ["0.png"]
    assert_unreadable("damaged or cut off at byte 512", read, damaged)
    assert_unreadable("damaged or cut off at byte 1536", read, damaged[:512] * 3)


def test_a_pipe_is_not_waited_for_and_folders_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "."):
        with (
            pytest.raises(UnreadableFile, match="is no good: it is not a regular file"),
            reading(tmp_path / name, "is no good"),
        ):
            pass


# ------------------------------------------------------------------------------------ images


def test_no_program_is_started_for_an_image(tmp_path, monkeypatch):
    """Pillow knows PostScript by its first bytes, whatever the name, and runs Ghostscript."""
    trace, programs = tmp_path / "trace", tmp_path / "bin"
    programs.mkdir()
    (programs / "gs").write_text(f"#!/bin/sh\ntouch {trace}\n")
    (programs / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    path = tmp_path / "x.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    with pytest.raises(ValueError, match=r"x\.png cannot be used as an image"):
        read_image(path, Preparation())
    assert not trace.exists()
    with Image.open(path) as careless, pytest.raises(OSError, match=r"."):
        careless.load()
    assert trace.exists()  # else its absence above would show nothing


# ------------------------------------------------------------------------------------ messages


def test_an_error_is_one_printable_line(tmp_path):
    np.savez(tmp_path / "x.npz", **{"\x1b[31mred\nline": np.zeros(1)})
    with pytest.raises(ValueError, match=r"holds no Gamma") as caught:
        Gamma.load(tmp_path / "x.npz")
    assert str(caught.value).isprintable()
    for error, said in (
        (MemoryError(), "more memory than there is"),
        (RecursionError("maximum recursion depth exceeded"), "nested too deeply"),
        (KeyError("a"), "KeyError: 'a'"),
        (ValueError("a\x1b[31m"), "a?[31m"),
        (ValueError("x" * 10**6), "xxx..."),
    ):
        with (
            pytest.raises(UnreadableFile, match="is bad: ") as caught,
            reading(tmp_path / "x.npz", "is bad"),
        ):
            raise error
        assert str(caught.value).endswith(said)
        assert len(str(caught.value)) < 1000
