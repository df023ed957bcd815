"""The digits that come with scikit-learn."""

from __future__ import annotations

from pathlib import Path

import torch

from ..data import Images
from ._registry import register


@register("digits")
def digits(root: Path) -> Images:
    """scikit-learn's 1,797 handwritten digits, [1,8,8], pixels 0..16 (UCI, Alpaydin and Kaynak).

    They come with scikit-learn; `root` is not used.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.images / 8 - 1).to(torch.float32)[:, None]
    return Images(images, torch.from_numpy(bunch.target).to(torch.int64))
