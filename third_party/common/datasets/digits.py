"""The digits that come with scikit-learn."""

from __future__ import annotations

from pathlib import Path

import torch

from ..data import Images
from ._common import check_choice
from ._registry import register

SPLITS = ("all", "train", "test")


@register("digits")
def digits(root: Path, *, split: str = "all") -> Images:
    """scikit-learn's 1,797 handwritten digits, [1,8,8], pixels 0..16 (UCI, Alpaydin and Kaynak).

    They come with scikit-learn; `root` is not used. Every third image belongs to the split "test",
    the others to "train".
    """
    from sklearn.datasets import load_digits

    check_choice("split", split, SPLITS)
    bunch = load_digits()
    images = torch.from_numpy(bunch.images / 8 - 1).to(torch.float32)[:, None]
    labels = torch.from_numpy(bunch.target).to(torch.int64)
    is_test = torch.arange(len(labels)) % 3 == 2
    chosen = {"all": torch.ones_like(is_test), "train": ~is_test, "test": is_test}[split]
    return Images(images[chosen], labels[chosen])
