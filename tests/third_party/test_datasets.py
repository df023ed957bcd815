"""Datasets read from files: tiny ones of each format, damaged ones, missing ones."""

import gzip
import multiprocessing
import pickle
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from sa_plugin.sampling.sampler import to_uint8
from third_party.common.data import BatchStream, Images
from third_party.common.datasets import (
    DATASETS,
    IMAGE_SHAPES,
    fashion,
    folders,
    get_dataset,
)
from third_party.common.datasets.folders import ImageFolder
from third_party.common.datasets.pixels import Preparation, read_image

RNG = np.random.default_rng(0)


def get(name, *arguments, **options):
    """A dataset; those of one size have the size that is known without their files."""
    dataset = get_dataset(name, *arguments, **options)
    assert dataset.image_shape == IMAGE_SHAPES.get(name, dataset.image_shape)
    return dataset


def everything(dataset, batch_size=2):
    """All images of a dataset; its batches have the right sizes and come in order."""
    batches = list(dataset.uint8_batches(batch_size))
    assert [len(b) for b in batches[:-1]] == [batch_size] * (len(batches) - 1)
    images = torch.cat(batches)
    assert images.dtype == torch.uint8
    assert images.shape == (len(dataset), *dataset.image_shape)
    return images


def noise(*shape):
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def save(path, pixels, mode=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    (image if mode is None else image.convert(mode)).save(path, **options)


def hwc(tensor):
    return tensor.permute(1, 2, 0).numpy()


def one_line_error(call, *parts):
    """The ValueError that the call raises, in one line with these parts."""
    with pytest.raises(ValueError, match=r".") as error:
        call()
    message = str(error.value)
    assert message.isprintable()
    for part in parts:
        assert str(part) in message
    return message


# ------------------------------------------------------------------------------ what all offer


def test_images_in_memory_offer_shape_and_bytes():
    data = Images(torch.from_numpy(noise(5, 3, 4, 6)))
    assert data.image_shape == (3, 4, 6)
    assert torch.equal(everything(data), data.images)
    with pytest.raises(ValueError, match="batch_size=0"):
        data.uint8_batches(0)


def test_floating_point_images_are_rounded_as_samples_are():
    digits = get("digits")
    assert digits.image_shape == (1, 8, 8)
    parts = [get("digits", split=split) for split in ("train", "test")]
    assert [len(part) for part in parts] == [1198, 599]
    assert torch.equal(parts[1].images, digits.images[2::3])
    assert torch.equal(parts[0].labels, digits.labels[torch.arange(1797) % 3 != 2])
    assert torch.equal(everything(digits, 100), to_uint8(digits.images))
    levels = torch.arange(256)[:, None, None, None].double() / 127.5 - 1
    assert everything(Images(levels), 256).flatten().tolist() == list(range(256))


def test_unknown_options_are_refused():
    one_line_error(lambda: get("digits", check_md5=False), "'digits' has no option 'check_md5'")
    one_line_error(lambda: get("celeba64", split="val"), "'split'", "has the options cache_limit")


MISSING = {
    "fashion": ("FashionMNIST/raw", "fashion-mnist", "apt install dataset-fashion-mnist"),
    "celeba64": ("img_align_celeba", "celeba/img_align_celeba", "mmlab.ie.cuhk.edu.hk"),
    "celebahq256": ("celebahq256", "https://"),
    "imagenet64": ("imagenet64", "https://image-net.org"),
    "lsun_bedroom": ("lsun_bedroom", "https://github.com/fyu/lsun"),
    "folder": ("", "root"),
    "npz": ("", "images.npz", "root"),
}


@pytest.mark.parametrize("name", sorted(DATASETS.keys() - {"digits", "cifar10"}))
def test_missing_data_says_where_it_was_looked_for_and_how_to_get_it(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fashion, "DEBIAN_FOLDER", tmp_path / "usr")
    places = [tmp_path / "none" / part for part in MISSING[name][:-1] if "//" not in part]
    one_line_error(lambda: get(name, "none"), f"dataset '{name}'", *places, MISSING[name][-1])


def test_the_root_may_begin_with_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("a.png", "b.png"):
        save(tmp_path / "mine" / name, noise(4, 4, 3))
    assert len(get("folder", "~/mine")) == 2


# ------------------------------------------------------------------------------------- Fashion


def packed(content):
    """As a .gz file without a date: test names hold it, and workers must agree on them."""
    return gzip.compress(content, mtime=0)


def idx(array):
    header = struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape)
    return header + array.tobytes()


@pytest.fixture(params=["FashionMNIST/raw", "fashion-mnist", "debian"])
def clothes(request, tmp_path, monkeypatch):
    """Root, folder and contents of a small Fashion-MNIST."""
    folder = tmp_path / request.param
    monkeypatch.setattr(fashion, "DEBIAN_FOLDER", tmp_path / "debian")
    folder.mkdir(parents=True)
    contents = {}
    for split, count in (("train", 5), ("t10k", 3)):
        contents[split] = noise(count, 28, 28), noise(count) % 10
        for kind, array in zip(("images-idx3", "labels-idx1"), contents[split], strict=True):
            name = f"{split}-{kind}-ubyte"
            if request.param == "FashionMNIST/raw":
                (folder / name).write_bytes(idx(array))
            else:
                (folder / f"{name}.gz").write_bytes(packed(idx(array)))
    return tmp_path, folder, contents


@pytest.mark.parametrize("split", ["train", "test"])
def test_fashion_is_padded_with_black(clothes, split):
    root, _, contents = clothes
    pixels, labels = contents[{"train": "train", "test": "t10k"}[split]]
    data = get("fashion", root, split=split, check_md5=False)
    images = everything(data)
    assert data.image_shape == (1, 32, 32)
    assert np.array_equal(images[:, 0, 2:30, 2:30], pixels)
    assert images.sum() == pixels.sum(dtype=np.int64)
    assert data.labels.tolist() == labels.tolist()


def test_fashion_of_other_contents_is_refused(clothes):
    root, folder, _ = clothes
    one_line_error(lambda: get("fashion", root), folder, "f4a8712d7a061bf5bd6d2ca38dc4d50a")
    one_line_error(lambda: get("fashion", root, split="val"), "split='val'", "'train', 'test'")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (packed(idx(noise(5, 28, 28)))[:-20], "damaged"),
        (b"no gzip", "damaged"),
        (packed(b""), "is damaged: it is no idx file"),
        (packed(idx(noise(5, 28, 28))[:9]), "is damaged: it is no idx file"),
        (packed(idx(noise(5, 28, 28))[:-1]), "3919 bytes follow the header, must be 3920"),
        (packed(idx(noise(5, 28, 28)) + b"x"), "3921 bytes follow the header, must be 3920"),
        (packed(idx(noise(5, 27, 28))), r"shape (28, 28)"),
        (packed(idx(noise(5))), r"shape (28, 28)"),
        (packed(b"\0\0\x0b" + idx(noise(5, 28, 28))[3:]), "no idx file of uint8"),
        (packed(idx(noise(4, 28, 28))), "holds 4 images of 'train', 5 labels"),
        (None, "holds neither train-images-idx3-ubyte nor train-images-idx3-ubyte.gz"),
    ],
)
def test_damaged_fashion_files_are_named(tmp_path, content, said):
    folder = tmp_path / "fashion-mnist"
    folder.mkdir()
    (folder / "train-labels-idx1-ubyte").write_bytes(idx(noise(5) % 10))
    if content is not None:
        (folder / "train-images-idx3-ubyte.gz").write_bytes(content)
    one_line_error(lambda: get("fashion", tmp_path, check_md5=False), folder, said)


# -------------------------------------------------------------------------------------- CelebA


def face(seed):
    """218 x 178 pixels that tell their place: red the row, green the column, blue chance."""
    rows, columns = np.mgrid[:218, :178].astype(np.uint8)
    blue = np.random.default_rng(seed).integers(0, 256, rows.shape, dtype=np.uint8)
    return np.stack([rows, columns, blue], axis=-1)


@pytest.fixture(params=["img_align_celeba", "celeba/img_align_celeba"])
def faces(request, tmp_path):
    """Root and folder of a small CelebA."""
    for i in range(5):
        save(tmp_path / request.param / f"{i + 1:06d}.png", face(i))
    return tmp_path, tmp_path / request.param


def test_the_crop_of_celeba_to_the_pixel(tmp_path):
    white = np.zeros((218, 178, 3), dtype=np.uint8)
    white[57:185, 25:153] = 255
    path = tmp_path / "img_align_celeba/000001.jpg"
    save(path, white, quality=100, subsampling=0)
    data = get("celeba64", tmp_path, cache_limit=0)
    with Image.open(path) as image:
        decoded = np.asarray(image)
    crop = read_image(path, Preparation(crop=data.preparation.crop))
    assert np.array_equal(hwc(crop), decoded[57:185, 25:153])
    # One row or column of the black around it would show at the edge of the resized image.
    assert data[0].shape == (3, 64, 64)
    assert data[0].min() >= 250


def test_celeba_keeps_rows_columns_and_channels(faces):
    data = get("celeba64", faces[0], cache_limit=0)
    crop = read_image(data.path(1), Preparation(crop=data.preparation.crop))
    assert np.array_equal(hwc(crop), face(1)[57:185, 25:153])
    reference = torch.nn.functional.interpolate(
        crop[None].float(), size=64, mode="bilinear", antialias=True
    )
    assert (data[1].float() - reference[0]).abs().max() <= 1
    assert not torch.equal(data[1], data[2])


def test_celeba_images_that_are_not_the_aligned_ones_are_refused(tmp_path):
    save(tmp_path / "img_align_celeba/1.jpg", noise(178, 218, 3))
    one_line_error(
        lambda: get("celeba64", tmp_path), "1.jpg", "218 wide and 178 high, must be 178 wide"
    )


def files_beside(folder):
    return sorted(path.name for path in folder.parent.iterdir() if path != folder)


def test_the_cache_holds_the_same_images(faces, monkeypatch):
    root, folder = faces
    images = everything(get("celeba64", root, cache_limit=0))
    data = get("celeba64", root)
    assert not files_beside(folder), "nothing is written before images are asked for"
    assert torch.equal(everything(data), images)
    (cache,) = files_beside(folder)
    assert np.array_equal(np.load(folder.with_name(cache)), images)
    again = get("celeba64", root)
    monkeypatch.setattr(folders, "read_image", None)
    assert torch.equal(everything(again), images)
    assert torch.equal(again[-1], images[-1])
    with pytest.raises(IndexError):
        again[5]


def test_training_makes_the_cache_before_its_workers_start(faces):
    root, folder = faces
    next(BatchStream(get("celeba64", root), 2, 0, workers=1))
    assert len(files_beside(folder)) == 1


def test_the_cache_follows_the_files(faces):
    root, folder = faces
    everything(get("celeba64", root))
    save(folder / "000002.png", face(9))
    fresh = everything(get("celeba64", root, cache_limit=0))
    assert torch.equal(everything(get("celeba64", root)), fresh)
    (folder / "000005.png").unlink()
    assert torch.equal(everything(get("celeba64", root)), fresh[:4])
    everything(ImageFolder(folder, Preparation(size=64), cache_limit=2**20))
    assert len(files_beside(folder)) == 4


def test_the_cache_keeps_to_its_limit(faces):
    root, folder = faces
    size = 5 * 3 * 64 * 64
    everything(get("celeba64", root, cache_limit=size - 1))
    assert not files_beside(folder)
    everything(get("celeba64", root, cache_limit=size))
    assert len(files_beside(folder)) == 1
    one_line_error(lambda: get("celeba64", root, cache_limit=-1), "cache_limit=-1")


def test_a_damaged_cache_is_named(faces):
    root, folder = faces
    everything(get("celeba64", root))
    cache = folder.with_name(files_beside(folder)[0])
    whole = cache.read_bytes()
    for content in (whole[:-1], b"", b"text"):
        cache.write_bytes(content)
        one_line_error(lambda: everything(get("celeba64", root)), cache, "delete it")
    np.save(cache, np.zeros((5, 3, 64, 64)))
    one_line_error(lambda: everything(get("celeba64", root)), cache, "float64, must be uint8")


def test_a_folder_that_cannot_be_written_is_read_without_cache(faces, monkeypatch, caplog):
    root, folder = faces

    def refuse(path):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(folders, "written_atomically", refuse)
    assert len(everything(get("celeba64", root))) == 5
    assert "the images stay uncached" in caplog.text
    assert not files_beside(folder)


def test_a_damaged_image_leaves_no_cache(faces):
    root, folder = faces
    path = folder / "000004.png"
    path.write_bytes(path.read_bytes()[:5000])
    one_line_error(lambda: everything(get("celeba64", root)), path)
    assert not files_beside(folder)


# --------------------------------------------------------------------- other folders of images


def test_celebahq_takes_images_as_they_are(tmp_path):
    pixels = noise(256, 256, 3)
    save(tmp_path / "celebahq256/b.png", pixels)
    data = get("celebahq256", tmp_path)
    assert data.image_shape == (3, 256, 256)
    assert np.array_equal(hwc(everything(data)[0]), pixels)
    save(tmp_path / "celebahq256/a.png", noise(128, 128, 3))
    one_line_error(lambda: get("celebahq256", tmp_path), "a.png", "must be 256 wide and 256 high")


def test_lsun_takes_the_middle_square(tmp_path):
    pixels = noise(256, 341, 3)
    save(tmp_path / "lsun_bedroom/0/0/a.png", pixels)
    save(tmp_path / "lsun_bedroom/0/1/b.webp", np.full((400, 300, 3), 77, dtype=np.uint8))
    images = everything(get("lsun_bedroom", tmp_path))
    assert images.shape == (2, 3, 256, 256)
    assert np.array_equal(hwc(images[0]), pixels[:, 42:298])
    assert (images[1].int() - 77).abs().max() <= 2


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path):
    for level, name in enumerate(["a/2.png", "a/b/1.JPEG", "b.png", "c.bmp"]):
        save(tmp_path / name, np.full((4, 4, 3), 50 * level, dtype=np.uint8))
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "a/._2.png").write_bytes(b"of another system")
    data = get("folder", tmp_path)
    assert [data.path(i).relative_to(tmp_path).as_posix() for i in range(4)] == [
        "a/2.png",
        "a/b/1.JPEG",
        "b.png",
        "c.bmp",
    ]
    assert everything(data, 3)[:, 0, 0, 0].tolist() == [0, 50, 100, 150]
    for path in list(tmp_path.rglob("*.*")):
        path.unlink()
    one_line_error(lambda: get("folder", tmp_path), tmp_path, "holds no images")


def test_images_of_several_sizes_need_a_size(tmp_path):
    first, second = noise(4, 6, 3), noise(7, 4, 3)
    save(tmp_path / "1.png", first)
    save(tmp_path / "2.png", second)
    message = one_line_error(
        lambda: get("folder", tmp_path), tmp_path, "give a size (data.size in a"
    )
    assert "holds 2 images: 1 6x4 (1.png), 1 4x7 (2.png); 2 RGB (1.png)." in message
    images = everything(get("folder", tmp_path, size=4))
    assert np.array_equal(hwc(images[0]), first[:, 1:5])
    assert np.array_equal(hwc(images[1]), second[1:5])
    one_line_error(lambda: get("folder", tmp_path, size=0), "size=0")
    one_line_error(lambda: get("folder", tmp_path, channels=4), "channels=4", "1, 3")


def test_grey_and_transparent_images(tmp_path):
    grey, colour = noise(4, 4), noise(4, 4, 3)
    alpha = np.dstack([colour, noise(4, 4)])
    save(tmp_path / "1grey.png", grey)
    save(tmp_path / "2grey_alpha.png", np.dstack([grey, noise(4, 4)]))
    save(tmp_path / "3alpha.png", alpha)
    save(tmp_path / "4bit.png", (grey > 127).astype(np.uint8) * 255, mode="1")
    save(tmp_path / "5palette.png", colour // 128 * 255, mode="P", transparency=b"\0\x80")
    images = everything(get("folder", tmp_path))
    grey3 = np.dstack([grey] * 3)
    for image, pixels in zip(images, [grey3, grey3, colour, grey3 // 128 * 255], strict=False):
        assert np.array_equal(hwc(image), pixels)
    assert set(images[4].unique().tolist()) <= {0, 255}
    one = everything(get("folder", tmp_path, channels=1))
    assert one.shape == (5, 1, 4, 4)
    assert np.array_equal(one[0, 0], grey)


def test_orientation_is_followed_and_deep_images_are_refused(tmp_path):
    pixels = noise(4, 6, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    save(tmp_path / "1.png", pixels, exif=exif)
    save(tmp_path / "2.png", np.rot90(pixels, -1))
    for image in everything(get("folder", tmp_path)):
        assert np.array_equal(hwc(image), np.rot90(pixels, -1))
    save(tmp_path / "0.png", noise(4, 4).astype(np.uint16) * 200)
    one_line_error(lambda: get("folder", tmp_path), "0.png", "more than 8 bits")


@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.webp"])
@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"text"])
def test_damaged_images_are_named(tmp_path, name, damage):
    save(tmp_path / "a.png", noise(32, 32, 3))
    save(tmp_path / name, noise(32, 32, 3))
    (tmp_path / name).write_bytes(damage((tmp_path / name).read_bytes()))
    data = ImageFolder(tmp_path, Preparation())
    for read in (lambda: data[1], lambda: everything(data, 1), lambda: get("folder", tmp_path)[1]):
        one_line_error(read, f"{tmp_path / name} cannot be used as an image: ")


def test_workers_name_a_damaged_image_and_end(tmp_path, monkeypatch):
    monkeypatch.setattr("third_party.common.data.WORTH_WORKERS", 0)
    for name in ("a.png", "b.png"):
        save(tmp_path / name, noise(32, 32, 3))
    data = get("folder", tmp_path)
    assert len(everything(data, 1)) == 2
    (tmp_path / "b.png").write_bytes(b"")
    stream = BatchStream(data, 2, 0, workers=1)
    for read in (lambda: everything(data, 1), lambda: next(stream)):
        message = one_line_error(read)
        assert message.startswith(f"{tmp_path / 'b.png'} cannot be used as an image: ")
        assert not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", ["celeba64", "folder", "imagenet64"])
def test_stored_images_train_like_images_in_memory(tmp_path, name, workers):
    for i in range(5):
        save(tmp_path / f"img_align_celeba/{i}.png", face(i))
    write_imagenet64(tmp_path, 3)
    root = tmp_path / "img_align_celeba" if name == "folder" else tmp_path
    data = get(name, root)
    stored = BatchStream(data, 4, 1, workers=workers)
    memory = BatchStream(Images(everything(get(name, root))), 4, 1)
    state = torch.get_rng_state()
    for _ in range(4):
        assert torch.equal(next(stored), next(memory))
    everything(data)
    assert torch.equal(torch.get_rng_state(), state), "a loader drew from the global generator"
    copy = pickle.loads(pickle.dumps(data))
    assert len(pickle.dumps(data)) < 5000, "a mapped array would be pickled as a whole"
    assert torch.equal(everything(copy), everything(data))


# -------------------------------------------------------------------------------- ImageNet 64


def write_imagenet64(root, parts, *, images=2, save=np.savez):
    """Parts whose images have one level each, in counting order; the folder."""
    folder = root / "imagenet64"
    folder.mkdir(exist_ok=True)
    for part in range(parts):
        levels = np.arange(images, dtype=np.uint8)[:, None] + part * images
        data = np.repeat(levels, 12288, axis=1)
        data[:, 4096:8192] += 100  # green
        data[:, 1] += 1  # the second pixel of the first row
        save(folder / f"train_data_batch_{part + 1}.npz", data=data, labels=np.arange(images) + 1)
    return folder


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_imagenet64_parts_in_the_order_of_their_numbers(tmp_path, save):
    folder = write_imagenet64(tmp_path, 11, save=save)
    data = get("imagenet64", tmp_path)
    assert data.image_shape == (3, 64, 64)
    assert not list(folder.glob("*.npy")), "nothing is unpacked before images are asked for"
    images = everything(data, 7)
    assert images[:, 0, 0, 0].tolist() == list(range(22))
    assert images[:, 0, 0, 1].tolist() == list(range(1, 23))
    assert images[:, 1, 63, 63].tolist() == list(range(100, 122))
    assert torch.equal(data[21], images[21])
    unpacked = {path: path.stat().st_mtime_ns for path in folder.glob("*.npy")}
    assert len(unpacked) == 11
    assert torch.equal(get("imagenet64", tmp_path)[-1], images[-1])
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*.npy")} == unpacked


def test_imagenet64_unpacks_anew_what_has_changed(tmp_path):
    folder = write_imagenet64(tmp_path, 1)
    first = everything(get("imagenet64", tmp_path))
    (unpacked,) = folder.glob("*.npy")
    unpacked.write_bytes(unpacked.read_bytes()[:-1])
    assert torch.equal(everything(get("imagenet64", tmp_path)), first)
    pixels = noise(2, 12288)
    np.savez(folder / "train_data_batch_1.npz", data=pixels)
    assert np.array_equal(everything(get("imagenet64", tmp_path)).flatten(1), pixels)


def test_imagenet64_validation_images(tmp_path):
    folder = tmp_path / "imagenet64"
    folder.mkdir()
    pixels = noise(3, 3, 64, 64)
    np.savez(folder / "val_data.npz", data=pixels, labels=np.ones(3))
    assert np.array_equal(everything(get("imagenet64", tmp_path, split="val")), pixels)
    one_line_error(lambda: get("imagenet64", tmp_path), folder / "train_data_batch_1.npz")
    one_line_error(lambda: get("imagenet64", tmp_path, split="test"), "'train', 'val'")


def test_imagenet64_that_lacks_a_part_or_is_pickled_is_refused(tmp_path):
    folder = write_imagenet64(tmp_path, 3)
    (folder / "train_data_batch_2.npz").unlink()
    one_line_error(lambda: get("imagenet64", tmp_path), folder / "train_data_batch_2.npz")
    (folder / "train_data_batch_2").write_bytes(pickle.dumps({"data": Surprise()}))
    one_line_error(
        lambda: get("imagenet64", tmp_path), folder / "train_data_batch_2", "python pickle"
    )


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"images": noise(2, 12288)}, "holds ['images'], must hold 'data'"),
        ({"data": noise(2, 3072)}, "(2, 3072), must be uint8 of [M, 12288] or [M, 3, 64, 64]"),
        ({"data": np.zeros((2, 12288))}, "float64"),
        ({"data": np.asfortranarray(noise(2, 12288))}, "must be uint8"),
    ],
)
def test_other_arrays_than_imagenet64s_are_refused(tmp_path, arrays, said):
    (tmp_path / "imagenet64").mkdir()
    path = tmp_path / "imagenet64/train_data_batch_1.npz"
    np.savez(path, **arrays)
    one_line_error(lambda: get("imagenet64", tmp_path), path, said)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damaged_imagenet64_files_are_named(tmp_path, save):
    folder = write_imagenet64(tmp_path, 1, save=save)
    path = folder / "train_data_batch_1.npz"
    whole = bytearray(path.read_bytes())
    whole[200] ^= 255  # in the data, which the header does not tell
    path.write_bytes(whole)
    one_line_error(lambda: everything(get("imagenet64", tmp_path)), path)
    assert [p.name for p in folder.iterdir()] == [path.name]
    for content in (whole[: len(whole) // 2], b""):
        path.write_bytes(content)
        one_line_error(lambda: get("imagenet64", tmp_path), path)


# ----------------------------------------------------------------------------------------- npz


class Surprise:
    def __reduce__(self):
        return (print, ("code from a dataset has run",))


@pytest.mark.parametrize("key", ["arr_0", "images"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_npz_in_both_layouts(tmp_path, key, channels, layout):
    pixels = noise(5, channels, 4, 6)
    stored = pixels if layout == "NCHW" else pixels.transpose(0, 2, 3, 1)
    np.savez_compressed(tmp_path / "images.npz", **{key: stored, "labels": np.arange(5)})
    for root in (tmp_path, tmp_path / "images.npz"):
        data = get("npz", root)
        assert data.image_shape == (channels, 4, 6)
        assert np.array_equal(everything(data), pixels)
        assert data.labels.tolist() == list(range(5))


def test_npz_of_either_layout_asks(tmp_path):
    pixels = noise(2, 3, 5, 3)
    np.savez(tmp_path / "images.npz", pixels)
    one_line_error(lambda: get("npz", tmp_path), "(2, 3, 5, 3)", "give layout=")
    assert np.array_equal(everything(get("npz", tmp_path, layout="NCHW")), pixels)
    assert get("npz", tmp_path, layout="NHWC").image_shape == (3, 3, 5)
    one_line_error(lambda: get("npz", tmp_path, layout="CHWN"), "layout='CHWN'", "'NHWC'")


@pytest.mark.parametrize(
    ("arrays", "options", "said"),
    [
        ({"data": noise(2, 4, 4, 3)}, {}, "holds ['data'], must hold one of ['arr_0', 'images']"),
        ({"images": np.zeros((2, 4, 4, 3))}, {}, "float64"),
        ({"images": noise(2, 4, 4)}, {}, "(2, 4, 4)"),
        ({"images": noise(2, 4, 4, 2)}, {}, "no axis of 1 or 3 channels"),
        ({"images": noise(2, 4, 4, 3)}, {"layout": "NCHW"}, "no axis of 1 or 3 channels there"),
        ({"images": noise(2, 4, 4, 3), "labels": np.ones(3)}, {}, "labels has 3 entries"),
        ({"images": np.array([Surprise()], dtype=object)}, {}, "allow_pickle=False"),
        (b"", {}, "it is empty"),
        ("npy", {}, "not an npz file, or it is damaged"),
    ],
)
def test_other_npz_files_are_refused_by_name(tmp_path, capsys, arrays, options, said):
    path = tmp_path / "x.npz"
    if isinstance(arrays, dict):
        np.savez(path, **arrays)
    elif arrays == "npy":
        with path.open("wb") as file:
            np.save(file, noise(2, 4, 4, 3))
    else:
        path.write_bytes(arrays)
    one_line_error(lambda: get("npz", path, **options), path, said)
    assert capsys.readouterr().out == ""


def test_damaged_cifar10_is_named_without_its_sums_too(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for i in range(1, 6):
        (folder / f"data_batch_{i}").write_bytes(b"\x80\x02no pickle")
    one_line_error(
        lambda: get("cifar10", tmp_path, check_md5=False), "data_batch_1", "cannot be read"
    )
