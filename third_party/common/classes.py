"""The classes of images, and networks that know them: functions of (x_n, n, y).

The labels y are 0..C-1. Where labels are dropped in training, the network has one row of its
embedding more, for the null class y = C: an image of any class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .data import BatchStream
from .order import DROPS, InfiniteShuffle

CHOICES = ("data", "even")
_SHOWN = 20


@dataclass(frozen=True, eq=False)
class Classes:
    """The `names` of a data set's classes, and the class of each image: `labels`, int64 [M]."""

    names: tuple[str, ...]
    labels: Tensor

    def __post_init__(self) -> None:
        if len(self.names) < 2:
            raise ValueError(f"data.labels needs two classes or more, got {', '.join(self.names)}")

    @classmethod
    def of(cls, data: str, dataset: Any) -> Classes:
        """The classes of a dataset that has `labels`; ValueError, with its name `data`, if none."""
        labels = getattr(dataset, "labels", None)
        if labels is None:
            raise ValueError(f"data.labels: the images of {data!r} have no classes")
        found = labels.unique().tolist()
        if labels.is_floating_point() or found != list(range(len(found))):
            shown = ", ".join(map(str, found[:3]))
            raise ValueError(f"data.labels: labels must be all of 0..C-1, got {shown}, ...")
        names = getattr(dataset, "class_names", None) or tuple(map(str, found))
        return cls(names, labels.long())

    def __len__(self) -> int:
        return len(self.names)

    def __str__(self) -> str:
        counts = torch.bincount(self.labels).tolist()
        shown = [f"{name} ({count})" for name, count in zip(self.names, counts, strict=True)]
        more = [f"{len(self) - _SHOWN} others"] if len(self) > _SHOWN else []
        return f"{len(self)}: {', '.join(shown[:_SHOWN] + more)}"

    @property
    def null(self) -> int:
        """The label of the null class."""
        return len(self)

    def check_choice(self, which: str) -> None:
        """ValueError unless `which` can be given to `of_samples`."""
        if which not in (*CHOICES, *self.names):
            raise ValueError(
                f"sample.classes must be data, even or a class's name, got {which!r}; the classes "
                f"are {self}"
            )

    def of_samples(self, which: str, seed: int, first: int, count: int) -> Tensor:
        """The classes of the samples first..first + count - 1, int64 [count].

        A sample's class depends on its number and the seed alone. `which`: "data", as often as
        among the images; "even", each in turn; or the name of a class.
        """
        if which == "data":
            return self.labels[InfiniteShuffle(len(self.labels), seed).take(first, count)]
        if which == "even":
            return torch.arange(first, first + count) % len(self)
        return torch.full((count,), self.names.index(which))


class LabelledBatches(Iterator[tuple[Tensor, Tensor]]):
    """The batches of `images` with their labels [B], each the null class with probability `drop`.

    Which labels are dropped depends only on the seed and the position of `images`.
    """

    def __init__(self, images: BatchStream, classes: Classes, drop: float = 0.0) -> None:
        self.images = images
        self.classes = classes
        self.drop = drop
        self._uniforms = images.uniforms(DROPS)

    @property
    def position(self) -> int:
        """The number of batches returned."""
        return self.images.position

    @position.setter
    def position(self, position: int) -> None:
        self.images.position = position

    def __next__(self) -> tuple[Tensor, Tensor]:
        y = self.classes.labels[torch.from_numpy(self.images.indices())]
        if self.drop:
            is_dropped = torch.from_numpy(self.images.of_batch(self._uniforms)) < self.drop
            y = torch.where(is_dropped, self.classes.null, y)
        return next(self.images), y.to(self.images.device, non_blocking=True)


class Guided:
    """Classifier-free guidance (arXiv 2207.12598): (1 + w) eps(x, n, y) - w eps(x, n, null).

    `weight` is the paper's w: 0 is the conditional network itself. `null` is the label of the null
    class. The covariance stays that of the conditional network: a second output `epsc` is the
    network's own, and `eps2` moves with eps^2, of which it is the mean.
    """

    def __init__(self, model: Callable[..., Any], typ: str, weight: float, null: int) -> None:
        self.network = model
        self.model = getattr(model, "model", model)  # samplers read device and dtype from it
        self.typ = typ
        self.weight = weight
        self.null = null

    def __call__(self, xn: Tensor, n: Any, *, y: Tensor) -> Any:
        """The outputs at `xn` [B,C,H,W], steps `n` and labels `y` [B]."""
        output = self.network(xn, n, y=y)
        eps, second = output if isinstance(output, tuple) else (output, None)
        other = self.network(xn, n, y=torch.full_like(y, self.null))
        other = other[0] if isinstance(other, tuple) else other
        guided = eps + self.weight * (eps - other)
        if second is None:
            return guided
        if self.typ == "eps_eps2":
            second = second + (guided.square() - eps.square())
        return guided, second
