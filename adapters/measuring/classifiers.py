"""Small classifiers whose hidden layer is a feature space, for datasets without a published one.

Each classifier belongs to one dataset and is trained here. Its settings and the images determine
its weights, which are kept in a cache. To add a classifier, enter it in ``CLASSIFIERS``.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adapters.measuring.extractor import Extracted, Extractor, from_uint8
from adapters.shell.processes import torch_threads
from sa_files.reading import reading
from sa_files.tensors import load_tensors
from sa_files.writing import write_atomically
from third_party.common.datasets import IMAGE_SHAPES, get_dataset

CLASSES = 10  # ten digits, ten kinds of clothing


@dataclass(frozen=True)
class ClassifierSettings:
    """Everything that determines the trained weights, besides the images."""

    seed: int = 0
    epochs: int = 20
    width: int = 32
    dim: int = 64
    dropout: float = 0.3
    lr: float = 2e-3
    batch_size: int = 64


# By dataset: the settings, and the name of the feature space.
CLASSIFIERS = {"digits": ClassifierSettings(), "fashion": ClassifierSettings(epochs=4)}
NAMES = {"digits": "digit_classifier", "fashion": "fashion_classifier"}


class Classifier(nn.Module):
    """Four 3x3 convolutions and a hidden layer, for images [B, 1, S, S] in [-1, 1], S = 8 or 32.

    All activations are SiLU: with ReLU some units die, and the features' covariance loses rank. The
    features are the hidden layer's outputs divided by one number, ``scale``. It makes their mean
    variance over the training images 1, so that distances are comparable between seeds.
    """

    def __init__(self, size: int, width: int, dim: int, dropout: float) -> None:
        super().__init__()
        channels = (1, width, width, 2 * width, 2 * width)
        strides = {8: (1, 1, 2, 1), 32: (2, 2, 2, 1)}[size]  # to 4x4
        layers: list[nn.Module] = []
        for before, after, stride in zip(channels, channels[1:], strides, strict=False):
            layers += [nn.Conv2d(before, after, 3, stride=stride, padding=1), nn.SiLU()]
        self.hidden = nn.Sequential(
            *layers,
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(32 * width, dim),
            nn.SiLU(),
        )
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(dim, CLASSES))
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: Tensor) -> Extracted:
        hidden = self.hidden(x)
        return Extracted(hidden / self.scale, self.head(hidden))


def train(images: Tensor, labels: Tensor, settings: ClassifierSettings) -> Classifier:
    """Train on uint8 images [N, 1, S, S], on the CPU: equal arguments give equal weights.

    The global random state is neither used nor changed.
    """
    if len(images) < settings.batch_size:
        raise ValueError(f"images must be at least {settings.batch_size}, got {len(images)}")
    # A sum's rounding can depend on the number of threads.
    with torch_threads(1), torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would also seed the accelerators.
        torch.default_generator.manual_seed(settings.seed)
        model = _blank(images.shape[-1], settings)
        per_epoch = len(images) // settings.batch_size
        steps = settings.epochs * per_epoch
        optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.lr, total_steps=steps)
        for _ in range(settings.epochs):
            for batch in torch.randperm(len(images)).split(settings.batch_size)[:per_epoch]:
                loss = F.cross_entropy(model(from_uint8(images[batch])).logits, labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        model.eval().requires_grad_(False)
        parts = [model(from_uint8(part)).features.double() for part in images.split(4096)]
        model.scale.copy_(torch.cat(parts).var(dim=0).mean().sqrt())
    return model


def held_out_accuracy(dataset: str, root: Path | None = None) -> float:
    """Accuracy on a fixed fifth of a dataset's images after training on the other four fifths."""
    images, labels = labelled_images(dataset, root)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    learnt, held_out = order[: len(order) * 4 // 5], order[len(order) * 4 // 5 :]
    model = train(images[learnt], labels[learnt], CLASSIFIERS[dataset])
    logits = [model(from_uint8(images[part])).logits for part in held_out.split(4096)]
    return (torch.cat(logits).argmax(dim=1) == labels[held_out]).double().mean().item()


def labelled_images(dataset: str, root: Path | None = None) -> tuple[Tensor, Tensor]:
    """A dataset's training images, uint8 [N, 1, S, S], and their labels [N]."""
    data = get_dataset(dataset, root)
    return next(data.uint8_batches(len(data))), data.labels


def load(
    dataset: str,
    cache_dir: Path | None,
    root: Path | None = None,
    settings: ClassifierSettings | None = None,
) -> Classifier:
    """Load the classifier of a whole dataset from ``cache_dir``, or train it.

    ``root``: folder of the dataset's files. They are always read: the cache's key depends on them.
    """
    settings = settings or CLASSIFIERS[dataset]
    images, labels = labelled_images(dataset, root)
    if cache_dir is None:
        return train(images, labels, settings)
    data = hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()
    key = {"format": 1, "data": data, **asdict(settings)}
    digest = hashlib.sha256(repr(sorted(key.items())).encode()).hexdigest()[:12]
    path = cache_dir / f"{NAMES[dataset]}-{digest}.pt"
    model = _blank(images.shape[-1], settings)
    if path.exists():
        try:
            if read_cache(path, key, model):
                return model.eval().requires_grad_(False)
        except ValueError as error:
            warnings.warn(str(error), stacklevel=2)
    model = train(images, labels, settings)
    buffer = io.BytesIO()
    torch.save({"key": key, "state": model.state_dict()}, buffer)
    write_atomically(path, buffer.getvalue())
    return model


def extractor(
    dataset: str, cache_dir: Path | None, device: torch.device, root: Path | None
) -> Extractor:
    """Penultimate layer (D = 64) and logits of a dataset's ``Classifier``."""
    name, shape = NAMES[dataset], IMAGE_SHAPES[dataset]
    # In float64 the result depends neither on the batch size nor on TF32 or autocast.
    model = load(dataset, cache_dir, root).to(device=device, dtype=torch.float64)

    @torch.no_grad()
    def extract(x: Tensor) -> Extracted:
        if tuple(x.shape[1:]) != shape:
            size = ", ".join(map(str, shape))
            raise ValueError(f"{name} takes images [B, {size}], got {tuple(x.shape)}")
        return model(x.to(device=device, dtype=torch.float64))

    return Extractor(name, extract)


def _blank(size: int, settings: ClassifierSettings) -> Classifier:
    return Classifier(size, settings.width, settings.dim, settings.dropout)


def read_cache(path: Path, key: dict[str, object], model: nn.Module) -> bool:
    """Load a cache file's weights into ``model``; False if they were made with another ``key``.

    Raises:
        ValueError: the file cannot be read, or its weights do not fit ``model``.
    """
    with reading(path, "cannot be read, so the classifier is trained again") as file:
        stored = load_tensors(file)
        if stored["key"] != key:
            return False
        model.load_state_dict(stored["state"])
    return True
