"""Folders of anyone's images: what is listed, what is told first, and what an image may cost."""

import itertools
import logging
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from tests import ROOT
from tests.third_party.test_datasets import everything, get, noise, one_line_error, save
from third_party.common.data import BatchStream, Images, InfiniteCoins
from third_party.common.datasets.folders import ImageFolder
from third_party.common.datasets.listing import Names, list_images
from third_party.common.datasets.pixels import MEMORY, Preparation, read_image


def names(folder, *, follow_links=False):
    return [os.fsdecode(name) for name in list_images(folder, follow_links=follow_links)]


# --------------------------------------------------------------------------------------- listing


@pytest.mark.parametrize("follow_links", [False, True])
def test_a_link_in_a_circle_adds_no_image(tmp_path, follow_links):
    save(tmp_path / "sub/x.png", noise(4, 4, 3))
    (tmp_path / "b").symlink_to(".")
    (tmp_path / "sub/c").symlink_to("..")
    (tmp_path / "a").symlink_to("sub")  # sorted before what it leads to
    assert names(tmp_path, follow_links=follow_links) == ["sub/x.png"]


def test_links_that_leave_the_folder_are_followed_only_when_asked(tmp_path, caplog):
    inside, outside = tmp_path / "in", tmp_path / "out"
    save(inside / "a.png", noise(4, 4, 3))
    save(outside / "far.png", noise(4, 4, 3))
    (outside / "back").symlink_to(inside)
    (inside / "again.png").symlink_to("a.png")
    (inside / "one.png").symlink_to(outside / "far.png")
    (inside / "all").symlink_to(outside)
    (inside / "twice").symlink_to(outside)
    assert names(inside) == ["a.png", "again.png"]
    assert "3 links lead out of it, such as all, and are not followed" in caplog.text
    assert names(inside, follow_links=True) == ["a.png", "again.png", "all/far.png", "one.png"]
    assert len(get("folder", inside, follow_links=True)) == 4
    for name in ("a.png", "again.png"):
        (inside / name).unlink()
    one_line_error(lambda: get("folder", inside), "holds no images", "follow_links")


def test_names_that_a_terminal_would_obey_are_told_in_print(tmp_path, caplog):
    for side in (4, 5):
        save(tmp_path / f"in/{side}\x1b[2J.png", noise(side, side, 3))
    (tmp_path / "in/up\x1b[2J").symlink_to(tmp_path)
    assert "4?[2J.png" in one_line_error(lambda: get("folder", tmp_path / "in"), "2 images")
    one_line_error(lambda: get("folder", tmp_path / "in", size=4, labels=True), "[2J.png outside")
    one_line_error(lambda: get("npz", tmp_path / "none\x1b[2J"), "none?[2J")
    assert len(get("folder", tmp_path / "in", size=4)) == 2  # tells of the sizes and of the link
    assert "4?[2J.png" in caplog.text
    assert "up?[2J" in caplog.text
    assert "\x1b" not in caplog.text


def test_a_long_name_costs_its_own_length_alone():
    found = Names([b"a" * 200, *(b"%d" % i for i in range(1000))])
    assert [found[0], found[1], found[-1]] == [b"a" * 200, b"0", b"999"]
    assert found._joined.__sizeof__() + found._ends.nbytes < 15_000
    assert list(found)[1:] == [b"%d" % i for i in range(1000)]


# ---------------------------------------------------------------------------------------- survey


def test_mixed_sizes_and_modes_are_told_before_an_image_is_decoded(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    for i, sides in enumerate([(4, 6), (4, 6), (7, 4), (5, 5), (8, 8)]):
        save(tmp_path / f"{i}.png", noise(*sides, 3))
    save(tmp_path / "5.png", noise(4, 6))
    for path in sorted(tmp_path.iterdir())[1:]:  # no pixel is left behind the header
        content = path.read_bytes()
        path.write_bytes(content[: content.index(b"IDAT") + 8])
    told = (
        f"{tmp_path} holds 6 images: 3 6x4 (0.png), 1 4x7 (2.png), 1 5x5 (3.png), "
        "1 of other sizes; 5 RGB (0.png), 1 L (5.png)"
    )
    get("folder", tmp_path, size=4)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage() == f"{told}; all are read as RGB at 4x4"
    assert one_line_error(
        lambda: get("folder", tmp_path), "data.size in a configuration, --size of"
    ).startswith(f"{told}. ")


@pytest.mark.parametrize(("channels", "level"), [(3, "INFO"), (1, "WARNING")])
def test_lost_colours_are_warned_of(tmp_path, caplog, channels, level):
    caplog.set_level(logging.INFO)
    for name in ("a.png", "b.png"):
        save(tmp_path / name, noise(4, 4, 3))
    get("folder", tmp_path, channels=channels)
    assert [record.levelname for record in caplog.records] == [level]


def test_one_image_is_refused_with_its_folder(tmp_path):
    save(tmp_path / "a.png", noise(4, 4, 3))
    one_line_error(lambda: get("folder", tmp_path), tmp_path, "one image, a.png", "at least 2")


def test_turned_photographs_count_by_their_upright_size(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    for suffix in ("jpg", "png", "webp"):
        save(tmp_path / f"turned.{suffix}", noise(4, 6, 3), exif=exif)
    save(tmp_path / "upright.png", noise(6, 4, 3))
    assert get("folder", tmp_path).image_shape == (3, 6, 4)


# ------------------------------------------------------------------------------------------ flip


def test_a_flip_depends_on_seed_and_position_alone():
    data = Images(torch.from_numpy(noise(7, 3, 4, 6)))

    def stream(**options):
        return BatchStream(data, 6, 3, flip=True, **options)

    batches = list(itertools.islice(stream(), 20))
    plain = list(itertools.islice(BatchStream(data, 6, 3), 20))
    flipped = [torch.equal(a, b.flip(2)) for a, b in zip(_each(batches), _each(plain), strict=True)]
    kept = [torch.equal(a, b) for a, b in zip(_each(batches), _each(plain), strict=True)]
    assert all(a != b for a, b in zip(flipped, kept, strict=True))
    assert 40 < sum(flipped) < 80  # of 120
    assert flipped[:6] != flipped[6:12]
    continued = stream()
    continued.position = 13
    assert torch.equal(next(continued), batches[13])
    parts = zip(*(stream(part=(rank, 2)) for rank in range(2)), strict=True)
    for whole, part in zip(batches, parts, strict=False):
        assert torch.equal(torch.cat(part), whole)
    coins = InfiniteCoins(50, 3).take(0, 100)
    assert coins[:50].tolist() != coins[50:].tolist(), "the epochs are alike"


def test_stored_images_are_flipped_like_images_in_memory(tmp_path):
    for i in range(5):
        save(tmp_path / f"{i}.png", noise(4, 6, 3))
    memory = Images(everything(get("folder", tmp_path)))
    stored = BatchStream(get("folder", tmp_path), 4, 1, workers=0, flip=True)
    for batch in itertools.islice(BatchStream(memory, 4, 1, flip=True), 4):
        assert torch.equal(next(stored), batch)


def _each(batches):
    return torch.cat(batches).unbind()


# ---------------------------------------------------------------------------------------- memory

# For each FILE and SIZE: the MiB that reading it takes beside the process as it was, and what came
# of it. The first file is read before, which loads its decoder.
READ = """
import sys
from pathlib import Path
from third_party.common.datasets import pixels

def memory(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024

pixels.MEMORY, small, *cases = int(sys.argv[1]), *sys.argv[2:]
for suffix in ("png", "jpg", "tif", "webp"):
    pixels.read_image(Path(f"{small}.{suffix}"), pixels.Preparation(size=2))
for path, size in zip(cases[::2], map(int, cases[1::2])):
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = memory("VmRSS")
    try:
        found = tuple(pixels.read_image(Path(path), pixels.Preparation(size=size or None)).shape)
    except ValueError as error:
        found = str(error)
    print(memory("VmHWM") - before, found)
"""


def costs(tmp_path, cases, bound=MEMORY):
    """(MiB, what came of it) of reading each (path, size) within a bound."""
    for suffix in ("png", "jpg", "tif", "webp"):
        Image.new("RGB", (4, 4)).save(tmp_path / f"small.{suffix}")
    words = [str(word) for case in cases for word in case]
    done = subprocess.run(
        [sys.executable, "-c", READ, str(bound), tmp_path / "small", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        # So that what is freed is given back at once, and does not count for the next image.
        env=os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    lines = [line.split(" ", 1) for line in done.stdout.splitlines()]
    return [(float(peak), found) for peak, found in lines]


def test_a_small_file_of_many_pixels_is_refused_before_it_is_decoded(tmp_path):
    path = tmp_path / "large.png"
    Image.new("1", (9400, 9400)).save(path)
    assert path.stat().st_size < 20_000
    [(peak, found)] = costs(tmp_path, [(path, 0)])
    assert "its 9400 x 9400 pixels would take 505 MiB, more than 256" in found
    assert peak < 10


KINDS = [  # suffix, mode, bytes a pixel, options of saving
    ("png", "1", 6, {}),
    ("png", "L", 6, {}),
    ("png", "LA", 8, {}),
    ("png", "P", 8, {"transparency": 0}),
    ("png", "RGB", 8, {}),
    ("png", "RGBA", 8, {}),
    ("jpg", "RGB", 8, {}),
    ("jpg", "CMYK", 12, {"progressive": True}),
    ("tif", "RGB", 12, {"compression": "tiff_deflate", "tiffinfo": {278: 10**6}}),
    ("webp", "RGB", 16, {}),
]


@pytest.mark.parametrize(("suffix", "mode", "bytes_a_pixel", "options"), KINDS)
def test_one_row_more_than_the_largest_image_is_refused(
    tmp_path, monkeypatch, suffix, mode, bytes_a_pixel, options
):
    monkeypatch.setattr("third_party.common.datasets.pixels.MEMORY", 100 * 50 * bytes_a_pixel)
    path = tmp_path / f"x.{suffix}"
    Image.new(mode, (100, 50)).save(path, **options)
    assert read_image(path, Preparation()).shape == (3, 50, 100)
    Image.new(mode, (100, 51)).save(path, **options)
    one_line_error(lambda: read_image(path, Preparation()), path, "100 x 51 pixels would take")


@pytest.mark.slow
def test_the_largest_image_of_each_kind_stays_within_the_bound(tmp_path):
    bound, cases, shapes = MEMORY // 4, [], []
    for i, (suffix, mode, bytes_a_pixel, options) in enumerate(KINDS):
        width = int((bound / bytes_a_pixel * 4 / 3) ** 0.5)  # three quarters as high
        height = bound // bytes_a_pixel // width
        Image.new(mode, (width, height)).save(tmp_path / f"{i}.{suffix}", **options)
        cases += [(tmp_path / f"{i}.{suffix}", size) for size in (0, 64)]
        shapes += [(3, height, width), (3, 64, 64)]
    for case, shape, (peak, found) in zip(
        cases, shapes, costs(tmp_path, cases, bound), strict=True
    ):
        assert found == str(shape), case
        assert 0.1 * bound < peak * 2**20 < 1.05 * bound, case


@pytest.mark.parametrize("progressive", [False, True])
def test_a_large_photograph_is_reduced_while_it_is_decoded(tmp_path, monkeypatch, progressive):
    smooth = Image.fromarray(noise(4, 4, 3)).resize((512, 512), Image.Resampling.BICUBIC)
    smooth.save(tmp_path / "a.jpg", quality=95, subsampling=0, progressive=progressive)
    whole = ImageFolder(tmp_path, Preparation(size=16))[0]
    room = 512 * 512 * 8 + 64 * 64 * 4 if progressive else 64 * 64 * 8  # enough for an eighth
    monkeypatch.setattr("third_party.common.datasets.pixels.MEMORY", room)
    image = ImageFolder(tmp_path, Preparation(size=16))[0]
    assert (image.int() - whole.int()).abs().max() <= 6
    assert not torch.equal(image, whole)  # else nothing has been reduced
    one_line_error(lambda: ImageFolder(tmp_path, Preparation()), "512 x 512 pixels would take")
    monkeypatch.setattr("third_party.common.datasets.pixels.MEMORY", room - 1)
    one_line_error(lambda: ImageFolder(tmp_path, Preparation(size=16)), "store it smaller")


# ------------------------------------------------------------------------------------------ crop


def test_a_crop_is_a_square_somewhere_and_depends_on_seed_and_position_alone(tmp_path):
    """Each image is a ramp along its longer side, so that a square tells where it was."""
    ramp = np.tile(np.arange(0, 120, 10, dtype=np.uint8), (4, 1))
    for i in range(6):
        save(tmp_path / f"{i}.png", ramp if i % 2 else ramp.T)

    def stream(**options):
        data = get("folder", tmp_path, size=4, channels=1)
        return BatchStream(data, 3, 1, **{"workers": 0, "crop": True} | options)

    batches = list(itertools.islice(stream(), 60))
    starts = [int(image.amin().add(1).mul(127.5).round()) for image in _each(batches)]
    assert sorted(set(starts)) == list(range(0, 90, 10))
    assert {image.unique().numel() for image in _each(batches)} == {4}
    continued = stream(workers=2)
    continued.position = 41
    assert torch.equal(next(continued), batches[41])
    parts = zip(*(stream(part=(rank, 3)) for rank in range(3)), strict=True)
    for whole, part in zip(batches, parts, strict=False):
        assert torch.equal(torch.cat(part), whole)
    middle = set(map(int, next(stream(crop=False)).add(1).mul(127.5).round().amin((1, 2, 3))))
    assert middle == {40}


def test_images_in_memory_are_not_cropped():
    with pytest.raises(ValueError, match=r"crop=True.*in memory"):
        BatchStream(Images(torch.from_numpy(noise(3, 1, 4, 6))), 2, 0, crop=True)


# ------------------------------------------------------------------------------ channels as found


@pytest.mark.parametrize("channels", [1, 3])
def test_channels_as_found(tmp_path, caplog, channels):
    caplog.set_level(logging.INFO)
    for i in range(2):
        save(tmp_path / f"{i}.png", noise(4, 4, *([3] if channels == 3 else [])))
    data = get("folder", tmp_path, channels=0)
    assert data.image_shape == (channels, 4, 4)
    assert caplog.messages[-1].endswith(f"all are read as {'RGB' if channels == 3 else 'grey'}")
    save(tmp_path / "other.png", noise(4, 4, *([] if channels == 3 else [3])))
    one_line_error(
        lambda: get("folder", tmp_path, channels=0), "(other.png)", "data.channels", "in colour"
    )
