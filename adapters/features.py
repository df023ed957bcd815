"""Feature spaces in which images are compared: each a name in ``EXTRACTORS``.

A metric bears its feature space's name (``frechet_pixels``, ``is_digit_classifier``): numbers of
different spaces cannot be compared. Only Inception's are called ``fid`` and ``inception_score``.
To add a space, write a builder and enter it in the registry.
"""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sa_plugin._files.reading import reading
from sa_plugin._files.tensors import load_tensors
from sa_plugin.sampler import to_uint8


@dataclass(frozen=True)
class Extracted:
    """What one forward pass gives: ``features`` [B, D] and, of a classifier, ``logits`` [B, C]."""

    features: Tensor
    logits: Tensor | None = None


@dataclass(frozen=True)
class Extractor:
    """A named map from images [B, C, H, W] in [-1, 1], on any device, to what they contain.

    ``established_names``: what the Fréchet distance and the Inception-Score formula are called on
    these features, where the literature has names of its own for them.
    """

    name: str
    extract: Callable[[Tensor], Extracted]
    established_names: tuple[str, str] | None = None

    @property
    def metric_names(self) -> tuple[str, str]:
        """Keys of the distance and of the score: ``frechet_NAME``, ``is_NAME`` by default."""
        return self.established_names or (f"frechet_{self.name}", f"is_{self.name}")


Builder = Callable[[Path | None, torch.device], Extractor]


def check_names(names: Sequence[str]) -> None:
    """ValueError unless these are extractors' names, each once, and at least one."""
    for name in names:
        if name not in EXTRACTORS:
            raise ValueError(f"features must be among {sorted(EXTRACTORS)}, got {name!r}")
    if not names or len(set(names)) < len(names):
        raise ValueError(f"features must be names that differ from each other, got {names}")


def build_extractors(
    names: Iterable[str], *, cache_dir: str | Path | None = None, device: str | torch.device = "cpu"
) -> tuple[Extractor, ...]:
    """The extractors of these names; weights are kept in, or read from, ``cache_dir``, if given."""
    names = tuple(names)
    check_names(names)
    folder = None if cache_dir is None else Path(cache_dir)
    return tuple(EXTRACTORS[name](folder, torch.device(device)) for name in names)


# ---------------------------------------------------------------------------------------- pixels


def from_uint8(images: Tensor) -> Tensor:
    """uint8 images [B, C, H, W] to float32 in [-1, 1]: x / 127.5 - 1."""
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise ValueError(
            f"images must be uint8 [B, C, H, W], got {images.dtype} of shape {tuple(images.shape)}"
        )
    return images.to(torch.float32) / 127.5 - 1


def pixels(cache_dir: Path | None, device: torch.device) -> Extractor:
    """The flattened images themselves, D = C H W; their moments take D^2 numbers."""
    return Extractor("pixels", lambda x: Extracted(x.flatten(1)))


# ----------------------------------------------------------------------------------- any network


def network_features(
    name: str,
    network: Callable[[Tensor], Tensor | tuple[Tensor, Tensor]],
    *,
    device: str | torch.device = "cpu",
) -> Extractor:
    """The features of any network, for ``summarise`` and ``evaluate``.

    ``network``: images [B, C, H, W] in [-1, 1], float32 on ``device``, to features [B, ...], which
    are flattened, or to such features and a classifier's logits [B, classes]. A module is moved to
    ``device`` and to evaluation. Wrap it where it wants other sizes or another range.
    """
    if not name.isidentifier():
        raise ValueError(f"name must be an identifier, as metrics bear it, got {name!r}")
    if isinstance(network, nn.Module):
        network = network.to(device).eval()

    @torch.no_grad()
    def extract(x: Tensor) -> Extracted:
        output = network(x.to(device))
        features, logits = output if isinstance(output, tuple) else (output, None)
        if features.ndim < 2 or len(features) != len(x):
            raise ValueError(
                f"network {name!r} must give features [{len(x)}, ...], got {tuple(features.shape)}"
            )
        return Extracted(features.flatten(1), logits)

    return Extractor(name, extract)


# ---------------------------------------------------------------------- a classifier of the digits


def load_digit_images() -> tuple[Tensor, Tensor]:
    """scikit-learn's 1,797 digits: uint8 images [N, 1, 8, 8] and labels [N].

    The 17 grey levels p = 0..16 stand for x = p / 8 - 1 and are rounded to 256 levels as samples
    are, so that real and generated images are treated alike.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    levels = torch.from_numpy(digits.images).to(torch.float32)[:, None]
    return to_uint8(levels / 8 - 1), torch.from_numpy(digits.target).to(torch.int64)


@dataclass(frozen=True)
class DigitClassifierSettings:
    """All that decides the trained weights, besides the images."""

    seed: int = 0
    epochs: int = 20
    width: int = 32
    dim: int = 64
    dropout: float = 0.3
    lr: float = 2e-3
    batch_size: int = 64

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in ("seed", "dropout") and value <= 0:
                raise ValueError(f"{field.name} must be positive, got {value}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")


class DigitClassifier(nn.Module):
    """Four 3x3 convolutions and a hidden layer, for images [B, 1, 8, 8] in [-1, 1].

    SiLU throughout: with ReLU some of the units die, and the features' covariance loses rank. The
    features are the hidden layer's outputs over one number, ``scale``, that brings their mean
    variance over the training images to 1: distances then mean the same for every seed.
    """

    def __init__(self, width: int, dim: int, dropout: float) -> None:
        super().__init__()
        self.hidden = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.SiLU(),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(32 * width, dim),
            nn.SiLU(),
        )
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(dim, 10))
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: Tensor) -> Extracted:
        hidden = self.hidden(x)
        return Extracted(hidden / self.scale, self.head(hidden))


def train_digit_classifier(
    images: Tensor, labels: Tensor, settings: DigitClassifierSettings
) -> DigitClassifier:
    """Train on uint8 images [N, 1, 8, 8], on the CPU: equal arguments give equal weights.

    The global random state has no part in the result and is left as it was.
    """
    if len(images) < settings.batch_size:
        raise ValueError(f"images must be at least {settings.batch_size}, got {len(images)}")
    x = from_uint8(images)
    with _one_thread(), torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would also seed the accelerators.
        torch.default_generator.manual_seed(settings.seed)
        model = DigitClassifier(settings.width, settings.dim, settings.dropout)
        per_epoch = len(x) // settings.batch_size
        steps = settings.epochs * per_epoch
        optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.lr, total_steps=steps)
        for _ in range(settings.epochs):
            for batch in torch.randperm(len(x)).split(settings.batch_size)[:per_epoch]:
                loss = F.cross_entropy(model(x[batch]).logits, labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        model.eval().requires_grad_(False)
        model.scale.copy_(model(x).features.double().var(dim=0).mean().sqrt())
    return model


def held_out_accuracy(settings: DigitClassifierSettings | None = None) -> float:
    """Accuracy on a fixed fifth of the digits after training on the other four."""
    images, labels = load_digit_images()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order[: len(order) * 4 // 5], order[len(order) * 4 // 5 :]
    model = train_digit_classifier(
        images[train], labels[train], settings or DigitClassifierSettings()
    )
    predicted = model(from_uint8(images[test])).logits.argmax(dim=1)
    return (predicted == labels[test]).double().mean().item()


def load_digit_classifier(
    cache_dir: str | Path | None, settings: DigitClassifierSettings | None = None
) -> DigitClassifier:
    """The classifier trained on all digits: from ``cache_dir`` if it is there, else trained."""
    settings = settings or DigitClassifierSettings()
    images, labels = load_digit_images()
    if cache_dir is None:
        return train_digit_classifier(images, labels, settings)
    data = hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()
    key = {"format": 1, "data": data, **asdict(settings)}
    digest = hashlib.sha256(repr(sorted(key.items())).encode()).hexdigest()[:12]
    path = Path(cache_dir) / f"digit_classifier-{digest}.pt"
    model = DigitClassifier(settings.width, settings.dim, settings.dropout)
    if _load_cache(path, key, model):
        return model.eval().requires_grad_(False)
    model = train_digit_classifier(images, labels, settings)
    buffer = io.BytesIO()
    torch.save({"key": key, "state": model.state_dict()}, buffer)
    write_atomically(path, buffer.getvalue())
    return model


def digit_classifier(cache_dir: Path | None, device: torch.device) -> Extractor:
    """Penultimate layer (D = 64) and logits of ``DigitClassifier``."""
    # float64: a batch's result then depends neither on its size nor on TF32 or autocast.
    model = load_digit_classifier(cache_dir).to(device=device, dtype=torch.float64)

    @torch.no_grad()
    def extract(x: Tensor) -> Extracted:
        if tuple(x.shape[1:]) != (1, 8, 8):
            raise ValueError(f"digit_classifier takes images [B, 1, 8, 8], got {tuple(x.shape)}")
        return model(x.to(device=device, dtype=torch.float64))

    return Extractor("digit_classifier", extract)


# ------------------------------------------------------------------------------------- Inception


def inception(cache_dir: Path | None, device: torch.device) -> Extractor:
    """pool3 (D = 2048) and logits of pytorch-fid's network; see ``adapters.inception``."""
    from adapters import inception as module  # not above: that module imports this one

    return module.inception(cache_dir, device)


def inception_tf(cache_dir: Path | None, device: torch.device) -> Extractor:
    """The same network on torch-fidelity's input; see ``adapters.inception``."""
    from adapters import inception as module

    return module.inception_tf(cache_dir, device)


EXTRACTORS: dict[str, Builder] = {
    "pixels": pixels,
    "digit_classifier": digit_classifier,
    "inception": inception,
    "inception_tf": inception_tf,
}


# ----------------------------------------------------------------------------------------- files


def write_atomically(path: str | Path, content: bytes) -> None:
    """Write under a temporary name and rename: ``path`` is never seen half written."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _load_cache(path: Path, key: dict[str, object], model: nn.Module) -> bool:
    """Whether a cache file has given ``model`` its weights, made as ``key`` says."""
    if not path.exists():
        return False
    try:
        with reading(path, "cannot be read and is made anew") as file:
            stored = load_tensors(file)
            if stored["key"] != key:
                return False
            model.load_state_dict(stored["state"])
            return True
    except ValueError as error:
        warnings.warn(str(error), stacklevel=3)
        return False


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread within: the order of a sum, and so its rounding, can depend on their number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
