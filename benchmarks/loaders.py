"""Every kind of file that is read: a small valid sample, and the call that reads it."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import pickle
import struct
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ml_collections import FrozenConfigDict
from PIL import Image
from torch import Tensor

from adapters.checkpoints.layouts import read_published
from adapters.comparison.tasks import DAMAGED, as_result
from adapters.experiment.config import CONFIG_COPY, check_holds, claimed
from adapters.experiment.logs import read_rows
from adapters.experiment.tables import read_metrics
from adapters.measuring.classifiers import Classifier, read_cache
from adapters.measuring.image_sources import open_images
from adapters.sampling.sinks import NpzFile, TarShards, read_batches
from sa_files.stored import read_arrays, read_json
from sa_plugin import Gamma
from sa_plugin.bounds.gap import GapCurve
from sa_plugin.metrics import Statistics
from sa_plugin.sampling.tally import Store, Tally
from third_party.common import checkpoints
from third_party.common.datasets import get_dataset
from third_party.common.datasets.mapped import MappedArrays
from third_party.common.datasets.pixels import Preparation, read_image

RANDOM = np.random.default_rng(0)
PIXELS = RANDOM.integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
STATE = {
    "conv.weight": torch.from_numpy(RANDOM.normal(size=(4, 3, 3, 3))).float(),
    "conv.bias": torch.from_numpy(RANDOM.normal(size=4)).float(),
    "half": torch.arange(6.0).half(),
}
NAMES = {part: ["net"] for part in checkpoints.PARTS}
PICTURES = ("png", "jpg", "bmp", "ppm", "tiff", "webp")
CELL = {"n_images": 40.0, "sample_variance": 1.5, "reference_variance": 1.6, "fid": 3.25}


@dataclass(frozen=True)
class Loader:
    """A kind of file.

    Attributes:
        file: its path below a folder.
        write: writes a valid file at that path, and other files that it needs.
        read: reads the file at that path.
        has_sums: whether its format has checksums, so that every changed bit must be noticed.
    """

    file: str
    write: Callable[[Path], object]
    read: Callable[[Path], Any]
    has_sums: bool = False


def fingerprint(value: Any) -> str:
    """Equal if the contents are equal bit by bit: tensors, arrays and containers of them."""
    digest = hashlib.sha256()
    _feed(digest, value)
    return digest.hexdigest()


def _feed(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        value = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    if isinstance(value, np.ndarray):
        digest.update(f"{value.dtype}{value.shape}".encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    elif isinstance(value, Mapping):
        _feed(digest, [part for item in value.items() for part in item])
    elif isinstance(value, list | tuple):
        digest.update(f"{len(value)}[".encode())
        for part in value:
            _feed(digest, part)
    elif is_dataclass(value):
        _feed(digest, [getattr(value, f.name) for f in fields(value)])
    else:
        digest.update(repr(value).encode())


# ------------------------------------------------------------------------------ the samples


def _write_checkpoint(path: Path) -> None:
    states = {part: {"net": {"weight": STATE["conv.bias"], "step": 3}} for part in NAMES}
    resume = {"keys": torch.arange(5), "rest": [1, 0, 0.5]}
    folder = path.parent.parent
    checkpoints.write_checkpoint(folder.parent, checkpoints.Checkpoint(7, states, 0.25, resume))


def _read_checkpoint(path: Path) -> Any:
    return checkpoints.read_checkpoint(path.parent.parent, NAMES)


def _write_sa_dpm(path: Path) -> None:
    optimizer = {
        "state": {i: {"step": 7, "ema": t} for i, t in enumerate(STATE.values())},
        "param_groups": [{"lr": 2e-4, "params": list(range(len(STATE)))}],
    }
    torch.save({"epoch": 5, "model_dict": STATE, "optimizer": optimizer}, path)


def _write_safetensors(path: Path) -> None:
    header: dict[str, Any] = {}
    content = b""
    for name, tensor in STATE.items():
        part = tensor.numpy().tobytes()
        offsets = [len(content), len(content) + len(part)]
        header[name] = {
            **{"dtype": "F16" if tensor.dtype == torch.half else "F32"},
            **{"shape": list(tensor.shape), "data_offsets": offsets},
        }
        content += part
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content)


def _store(path: Path) -> Store:
    return Store(path, 60.0, {"betas": [0.1, 0.2], "seed": 0})


def _read_tally(path: Path) -> Any:
    tally = Tally(3)
    _store(path).read_into(tally)
    return tally.state()


def _write_statistics(path: Path) -> None:
    Statistics(RANDOM.normal(size=5), np.eye(5), 40, "pixels").save(path)


def _write_imagenet(path: Path) -> None:
    np.savez_compressed(path, data=RANDOM.integers(0, 9, (2, 12288), dtype=np.uint8))


def _read_imagenet(path: Path) -> Any:
    for unpacked in path.parent.glob("*.npy"):
        unpacked.unlink()
    data = get_dataset("imagenet64", path.parent.parent, split="val")
    return [data[i] for i in range(len(data))]


def _cifar_batch() -> bytes:
    data = RANDOM.integers(0, 256, (2, 3072), dtype=np.uint8)
    return pickle.dumps({"data": data, "labels": [1, 2], "batch_label": "x"}, protocol=2)


def _write_cifar_folder(path: Path) -> None:
    for i in range(1, 6):
        (path.parent / f"data_batch_{i}").write_bytes(_cifar_batch())


def _write_cifar_archive(path: Path) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for i in range(1, 6):
            content = _cifar_batch()
            member = tarfile.TarInfo(f"cifar-10-batches-py/data_batch_{i}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def _write_fashion(path: Path) -> None:
    images = struct.pack(">4I", 0x803, 2, 28, 28) + RANDOM.bytes(2 * 28 * 28)
    path.write_bytes(gzip.compress(images) if path.suffix == ".gz" else images)
    labels = path.with_name("train-labels-idx1-ubyte")
    labels.write_bytes(struct.pack(">2I", 0x801, 2) + b"\1\2")


def _read_fashion(path: Path) -> Any:
    return get_dataset("fashion", path.parent.parent, check_md5=False)


def _write_parts(path: Path) -> None:
    NpzFile(path.parent.with_suffix(".npz"), 4).write(0, PIXELS)


def _read_parts(path: Path) -> Any:
    whole = path.parent.with_suffix(".npz")
    whole.unlink(missing_ok=True)
    NpzFile(whole, 4).finish()
    return _read_images(whole)


def _read_images(path: Path) -> Any:
    return list(read_batches(path, 4))


def _read_all(source: Path) -> Any:
    return list(open_images(str(source)).uint8_batches(4))


_CLASSIFIER = {"format": 1, "data": "0" * 64, "width": 1}


def _classifier() -> Classifier:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return Classifier(8, width=1, dim=2, dropout=0.0)


def _write_classifier(path: Path) -> None:
    torch.save({"key": _CLASSIFIER, "state": _classifier().state_dict()}, path)


def _read_classifier(path: Path) -> Any:
    model = _classifier()
    if not read_cache(path, _CLASSIFIER, model):
        raise ValueError(f"{path} was made otherwise")
    return model.state_dict()


def _write_text(content: Any) -> Callable[[Path], object]:
    return lambda path: path.write_text(json.dumps(content, indent=2))


_RUN = FrozenConfigDict({"name": "x", "sa": {"K": 2, "lam": 1.0}})


def _write_config(path: Path) -> None:
    with claimed(path.parent, _RUN):
        (path.parent / CONFIG_COPY).unlink()  # else it takes the place of a damaged file


def _picture(suffix: str) -> Loader:
    return Loader(
        f"image.{suffix}",
        lambda path: Image.fromarray(PIXELS[0]).save(path),
        lambda path: read_image(path, Preparation()),
    )


def _gamma_array(path: Path) -> None:
    torch.save(np.linspace(0, 1, 9), path)


_CURVE = {f.name: np.linspace(1, 2, 3) for f in fields(GapCurve)}
_RESULT = {"metrics": CELL, "eps_scale": 1.0, "seconds": 2.5, "made_with": {"torch": "2"}}
_LOG = "iteration,loss,sa_loss\n2,0.5,0.25\n4,0.4,0.2\n"

LOADERS: dict[str, Loader] = {
    "weights, zip format": Loader(
        "state.pth", lambda p: torch.save(STATE, p), checkpoints.read_state, has_sums=True
    ),
    "weights, format before 1.6": Loader(
        "old.pth",
        lambda p: torch.save(STATE, p, _use_new_zipfile_serialization=False),
        checkpoints.read_state,
    ),
    "training checkpoint": Loader(
        "7.ckpt/models_states/net.pth", _write_checkpoint, _read_checkpoint, has_sums=True
    ),
    "published checkpoint of SA-DPM": Loader(
        "ckpt_5.pth", _write_sa_dpm, lambda p: read_published(p).state(), has_sums=True
    ),
    "weights, safetensors": Loader(
        "x.safetensors", _write_safetensors, lambda p: read_published(p).state()
    ),
    "classifier, cached": Loader(
        "classifier.pt", _write_classifier, _read_classifier, has_sums=True
    ),
    "unfinished Gamma": Loader(
        "state.pth", lambda p: _store(p).save(Tally(3)), _read_tally, has_sums=True
    ),
    "Gamma, npz": Loader(
        "gamma.npz", Gamma(np.linspace(0, 1, 9), np.ones(9)).save, Gamma.load, has_sums=True
    ),
    "Gamma, array of torch.save": Loader("ms_eps.pth", _gamma_array, Gamma.load, has_sums=True),
    "statistics": Loader("stats.npz", _write_statistics, Statistics.load, has_sums=True),
    "images, npz": Loader(
        "images.npz",
        lambda p: np.savez(p, images=PIXELS, labels=np.arange(4)),
        lambda p: get_dataset("npz", p),
        has_sums=True,
    ),
    "ImageNet64": Loader("imagenet64/val_data.npz", _write_imagenet, _read_imagenet, has_sums=True),
    "mapped array": Loader(
        "x.npy",
        lambda p: np.save(p, PIXELS.transpose(0, 3, 1, 2)),
        lambda p: [MappedArrays([p], [4], (3, 8, 8))[i] for i in range(4)],
    ),
    "CIFAR10, archive": Loader(
        "cifar-10-python.tar.gz",
        _write_cifar_archive,
        lambda p: get_dataset("cifar10", p.parent, check_md5=False),
        has_sums=True,
    ),
    "CIFAR10, batch": Loader(
        "cifar-10-batches-py/data_batch_1",
        _write_cifar_folder,
        lambda p: get_dataset("cifar10", p.parent.parent, check_md5=False),
    ),
    "Fashion-MNIST, gz": Loader(
        "fashion-mnist/train-images-idx3-ubyte.gz", _write_fashion, _read_fashion, has_sums=True
    ),
    "Fashion-MNIST, idx": Loader(
        "fashion-mnist/train-images-idx3-ubyte", _write_fashion, _read_fashion
    ),
    "tar shard": Loader(
        "shard-000000.tar", lambda p: TarShards(p.parent, 4).write(0, PIXELS), _read_all
    ),
    **{f"image, {suffix}": _picture(suffix) for suffix in PICTURES},
    "part of samples": Loader("samples.parts/00000000.npy", _write_parts, _read_parts),
    "images of a cell": Loader("x.npz", lambda p: np.savez(p, PIXELS), _read_images, has_sums=True),
    "gap curve": Loader(
        "gap.npz",
        lambda p: np.savez(p, **_CURVE),
        lambda p: GapCurve(**read_arrays(p, DAMAGED, *_CURVE)),
        has_sums=True,
    ),
    "cell of a grid": Loader(
        "cell.json", _write_text(_RESULT), lambda p: read_json(p, DAMAGED, as_result)
    ),
    "metrics": Loader("metrics.json", _write_text({"ddpm_small": {"5": CELL}}), read_metrics),
    "configuration of a run": Loader(
        "config.json", _write_config, lambda p: check_holds(p.parent, _RUN, "adapters.sn_dpm")
    ),
    "training log": Loader("log.csv", lambda p: p.write_text(_LOG), read_rows),
}
