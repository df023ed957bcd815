"""Batches and datasets of the ported hosts."""

import io
import pickle
import tarfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset
from torchvision.datasets import CIFAR10

from third_party.common import datasets
from third_party.common.data import (
    BatchStream,
    Images,
    InfiniteShuffle,
    StoredImages,
    spread_images,
    spread_rows,
    to_unit_range,
)
from third_party.common.datasets import get_dataset, register


def numbered(count):
    """Images that carry their own index."""
    return torch.arange(count, dtype=torch.uint8).reshape(count, 1, 1, 1)


def indices(batch):
    return ((batch + 1) * 127.5).round().to(torch.int64).flatten().tolist()


class Files(Dataset):
    """A map-style dataset as a folder of images is one."""

    def __init__(self, count, kind):
        self.images = numbered(count)
        self.kind = kind

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        image = self.images[i]
        return {"uint8": image, "float": to_unit_range(image), "labelled": (image, i)}[self.kind]


# ------------------------------------------------------------------------------------- order


@given(
    length=st.integers(1, 40),
    batch=st.integers(1, 50),
    seed=st.integers(0, 2**40),
    epochs=st.integers(1, 4),
)
@settings(max_examples=60, deadline=None)
def test_batches_hold_every_image_exactly_once_an_epoch(length, batch, seed, epochs):
    stream = BatchStream(numbered(length), batch, seed)
    seen = []
    while len(seen) < epochs * length:
        b = next(stream)
        assert b.shape == (batch, 1, 1, 1)
        assert b.dtype == torch.float32
        seen += indices(b)
    for epoch in range(epochs):
        assert sorted(seen[epoch * length : (epoch + 1) * length]) == list(range(length))


@given(length=st.integers(1, 30), start=st.integers(0, 200), count=st.integers(1, 80))
@settings(max_examples=60, deadline=None)
def test_every_place_of_the_sequence_is_found_directly(length, start, count):
    from_the_start = InfiniteShuffle(length, 7).take(0, start + count)[start:]
    assert InfiniteShuffle(length, 7).take(start, count).tolist() == from_the_start.tolist()


def test_the_order_changes_with_the_epoch_and_the_seed():
    orders = {
        tuple(InfiniteShuffle(50, seed).take(50 * epoch, 50))
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(orders) == 9
    assert tuple(range(50)) not in orders


@pytest.mark.parametrize("workers", [None, 0, 2])
def test_the_position_can_be_set(workers):
    dataset = numbered(10) if workers is None else Files(10, "uint8")
    stream = BatchStream(dataset, 4, 1, workers=workers)
    batches = [indices(next(stream)) for _ in range(7)]
    assert stream.position == 7
    stream.position = 2
    assert [indices(next(stream)) for _ in range(5)] == batches[2:]
    again = BatchStream(dataset, 4, 1, workers=workers)
    again.position = 5
    assert [indices(next(again)) for _ in range(2)] == batches[5:]


@pytest.mark.parametrize("kind", ["uint8", "float", "labelled"])
def test_a_map_style_dataset_gives_the_batches_of_memory(kind):
    memory, files = BatchStream(numbered(9), 4, 3), BatchStream(Files(9, kind), 4, 3, workers=1)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    for _ in range(6):
        expected, batch = next(memory), next(files)
        assert batch.dtype == torch.float32
        assert torch.equal(batch, expected)
    assert torch.equal(torch.get_rng_state(), state), "the loader drew from the global generator"


# ------------------------------------------------------------------------------------- range


def test_uint8_to_the_unit_range():
    levels = torch.arange(256, dtype=torch.uint8)
    x = to_unit_range(levels)
    assert x.dtype == torch.float32
    np.testing.assert_allclose(x, np.arange(256) / 127.5 - 1, atol=1e-7)
    assert (x[0], x[-1]) == (-1, 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_floating_point_data_is_kept(dtype):
    values = torch.tensor([-1, -0.5, 0.25, 1], dtype=dtype).reshape(4, 1, 1, 1)
    batch = next(BatchStream(values, 4, 0))
    assert batch.dtype == torch.float32
    assert sorted(batch.flatten().tolist()) == [-1, -0.5, 0.25, 1]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Images(torch.zeros(3, 2, 2)), r"images has shape \(3, 2, 2\)"),
        (lambda: Images(torch.full((1, 1, 1, 1), 255.0)), r"\[255, 255\].*\[-1, 1\]"),
        (lambda: Images(torch.full((1, 1, 1, 1), float("nan"))), "nan"),
        (lambda: Images(torch.zeros(1, 1, 1, 1, dtype=torch.int64)), "int64"),
        (lambda: Images(numbered(3), torch.zeros(2)), "labels has 2 entries, images 3"),
        (lambda: BatchStream(numbered(3), 0, 1), "batch_size=0"),
        (lambda: BatchStream(numbered(3), 1, -1), "seed=-1"),
        (lambda: setattr(BatchStream(numbered(3), 1, 1), "position", -1), "position=-1"),
        (lambda: next(BatchStream(FarFiles(4, "float"), 2, 0, workers=0)), r"\[-1, 1\]"),
        (lambda: InfiniteShuffle(0, 1), "length=0"),
    ],
)
def test_bad_data_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


class FarFiles(Files):
    def __getitem__(self, i):
        return self.images[i] + 2.0


# ---------------------------------------------------------------------------------- datasets


def test_digits():
    data = get_dataset("digits")
    assert data.images.shape == (1797, 1, 8, 8)
    assert data.images.dtype == torch.float32
    pixels = (data.images + 1) * 8
    assert torch.equal(pixels.unique(), torch.arange(17.0))
    # the first image of the set is a zero: its middle is empty, its ring is not
    assert data.labels[0] == 0
    assert pixels[0, 0, 0].tolist() == [0, 0, 5, 13, 9, 1, 0, 0]
    assert sorted(data.labels.unique().tolist()) == list(range(10))


def cifar_batches(per_file):
    """Files of CIFAR10's format whose every image has one value per channel and its own label."""
    names = [name for name, _ in CIFAR10.train_list + CIFAR10.test_list]
    for k, name in enumerate(names):
        planes = np.arange(per_file * 3, dtype=np.uint8).reshape(-1, 3) + 20 * k
        data = np.repeat(planes, 1024, axis=1)
        labels = [(k + i) % 10 for i in range(per_file)]
        yield name, pickle.dumps({"data": data, "labels": labels, "batch_label": name}, protocol=2)


@pytest.fixture(params=["folder", "archive"])
def cifar_root(request, tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    if request.param == "folder":
        folder.mkdir()
        for name, content in cifar_batches(4):
            (folder / name).write_bytes(content)
    else:
        with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as tar:
            for name, content in cifar_batches(4):
                member = tarfile.TarInfo(f"{folder.name}/{name}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return tmp_path


def test_cifar10_reads_folder_and_archive(cifar_root):
    train = get_dataset("cifar10", cifar_root, check_md5=False)
    assert train.images.shape == (20, 3, 32, 32)
    assert train.images.dtype == torch.uint8
    # image i of file k: channel c has the value 3 i + c + 20 k throughout
    expected = torch.tensor(
        [[20 * k + 3 * i + c for c in range(3)] for k in range(5) for i in range(4)]
    )
    assert (train.images == expected[:, :, None, None]).all()
    assert train.labels.tolist() == [(k + i) % 10 for k in range(5) for i in range(4)]
    test = get_dataset("cifar10", cifar_root, split="test", check_md5=False)
    assert test.images[:, 0, 0, 0].tolist() == [100, 103, 106, 109]
    assert next(BatchStream(train, 8, 0)).abs().max() <= 1


def test_cifar10_with_wrong_contents_is_refused(cifar_root):
    with pytest.raises(ValueError, match=r"data_batch_1.*must be c99cafc152244af753f735de768cd75f"):
        get_dataset("cifar10", cifar_root)


@pytest.mark.parametrize("label", [99, -1])
def test_cifar10_labels_outside_its_classes_are_refused(label, tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name, content in cifar_batches(4):
        batch = pickle.loads(content)
        batch["labels"][-1] = label
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    with pytest.raises(ValueError, match=r"data_batch_1 cannot .*whole numbers in 0\.\.9"):
        get_dataset("cifar10", tmp_path, check_md5=False)


def test_cifar10_that_lacks_a_file_is_refused(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    with pytest.raises(ValueError, match=f"{folder}/data_batch_1 is missing"):
        get_dataset("cifar10", tmp_path, check_md5=False)
    folder.rmdir()
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz"):
        pass  # an archive without members
    with pytest.raises(ValueError, match=r"tar\.gz holds no data_batch_1"):
        get_dataset("cifar10", tmp_path, check_md5=False)
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"not an archive")
    with pytest.raises(ValueError, match=r"tar\.gz is no archive of dataset .cifar10., or damaged"):
        get_dataset("cifar10", tmp_path, check_md5=False)


def test_missing_data_says_where_it_was_looked_for_and_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="cifar10") as error:
        get_dataset("cifar10")
    message = str(error.value)
    assert "\n" not in message
    for part in (
        f"{tmp_path}/data/cifar-10-batches-py",
        f"{tmp_path}/data/cifar-10-python.tar.gz",
        "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        "c58f30108f718f92721af3b95e74349a",
    ):
        assert part in message


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"dataset='mnist': must be one of .*cifar10, .*digits"):
        get_dataset("mnist")
    with pytest.raises(ValueError, match="split='val'"):
        get_dataset("cifar10", split="val")


def test_later_datasets_register_themselves(monkeypatch, tmp_path):
    monkeypatch.setitem(datasets.DATASETS, "toy", None)  # taken out again after the test

    @register("toy")
    def toy(root, *, count=2):
        return Images(numbered(count))

    assert len(get_dataset("toy", tmp_path, count=5)) == 5


# ---------------------------------------------------------------------------------------- spread


class Stored(StoredImages):
    """Images that carry their own index, of which only single ones may be read."""

    image_shape = (1, 1, 1)

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        return numbered(self.count)[i]

    def uint8_batches(self, batch_size):
        raise AssertionError("all images would be read")


@pytest.mark.parametrize("dataset", [Stored(9), Images(numbered(9))])
def test_spread_images_are_of_all_parts_of_a_sorted_data_set(dataset):
    assert spread_images(dataset, 4).flatten().tolist() == [0, 4, 2, 6]
    assert spread_images(dataset, 1).tolist() == [[[[0]]]]
    assert sorted(spread_images(dataset, 20).flatten().tolist()) == list(range(9))


@pytest.mark.parametrize(("length", "count"), [(300, 100), (1797, 100), (300, 300), (50_000, 256)])
@pytest.mark.parametrize("shown", [9, 25, 64])
def test_the_first_few_of_spread_rows_are_of_all_parts_too(length, count, shown):
    rows = sorted(spread_rows(length, count)[:shown])
    gaps = np.diff([0, *rows, length])
    assert gaps.max() < 3 * length / shown
