"""Inception as pytorch-fid runs it, for FID, and as torch-fidelity runs it, for Inception Scores.

Both use the same network and weights, but prepare the images differently. pytorch-fid resizes with
half-pixel centres and takes [-1, 1]; torch-fidelity resizes as TensorFlow 1 did and takes
(levels-128)/128.

- "inception" gives ``fid``, equal to pytorch-fid's for the same images saved as PNG.
- "inception_tf" gives ``inception_score``, equal to torch-fidelity's.

The weights (a port of TensorFlow's inception-2015-12-05) are never downloaded. If
``SA_INCEPTION_WEIGHTS`` names a file, it is used. Otherwise the file must have pytorch-fid's name
and be in ``cache_dir`` or in the folder where pytorch-fid keeps it.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adapters.measuring.extractor import Extracted, Extractor
from sa_files.reading import reading
from sa_files.tensors import load_tensors
from sa_plugin.sampling.sampler import to_uint8

WEIGHTS_VARIABLE = "SA_INCEPTION_WEIGHTS"

# The network takes a batch in parts: at 299 x 299 it needs about 10 MB for an image.
_IMAGES_AT_ONCE = 128
_CLASSES = 1008  # of TensorFlow's network
_SIDE = 299  # pixels a side of the images that Inception takes
# The metrics' established names: of the distance, and of the Inception-Score formula.
NAMES = {
    "inception": ("fid", "is_inception"),
    "inception_tf": ("frechet_inception_tf", "inception_score"),
}


class FIDInception(nn.Module):
    """pytorch-fid's network with the classifier's last layer, which pytorch-fid leaves out.

    ``state``: a state dict in the layout of pytorch-fid's weights file. ``tensorflow``: resize and
    shift the images as torch-fidelity does.
    """

    def __init__(self, state: dict[str, Tensor], tensorflow: bool = False) -> None:
        super().__init__()
        self._resize = _tensorflow_resize() if tensorflow else None
        package = _pytorch_fid()
        # pytorch-fid accepts weights only from its own download.
        with mock.patch.object(package, "load_state_dict_from_url", return_value=state):
            self.trunk = package.InceptionV3(
                [package.InceptionV3.BLOCK_INDEX_BY_DIM[2048]],
                resize_input=not tensorflow,
                normalize_input=not tensorflow,
            )
        if state["fc.weight"].shape != (_CLASSES, 2048):
            raise ValueError(f"fc.weight has the shape {tuple(state['fc.weight'].shape)}")
        self.register_buffer("fc_weight", state["fc.weight"])
        self.eval()

    def forward(self, x: Tensor) -> Extracted:
        """Images [B, 1 or 3, H, W] in [-1, 1] to pool3 [B, 2048] and logits [B, 1008].

        The images are rounded to 256 levels, as in a PNG. The logits leave out the layer's bias, as
        in the Inception Score of Salimans et al. (2016) and of torch-fidelity.
        """
        if x.ndim != 4 or x.shape[1] not in (1, 3):
            raise ValueError(f"inception takes images [B, 1 or 3, H, W], got {tuple(x.shape)}")
        levels = to_uint8(x).to(torch.float32).expand(-1, 3, -1, -1)
        if self._resize is None:
            (pool3,) = self.trunk(levels / 255)  # [0, 1], which pytorch-fid's network takes
        else:
            resized = self._resize(levels, size=(_SIDE, _SIDE), align_corners=False)
            (pool3,) = self.trunk((resized - 128) / 128)
        features = pool3.flatten(1)
        return Extracted(features, F.linear(features, self.fc_weight))


def inception(cache_dir: Path | None, device: torch.device) -> Extractor:
    """pool3 (D = 2048) and logits of ``FIDInception``, in float32 as in pytorch-fid.

    Its score is called ``is_inception``: ``inception_score`` needs torch-fidelity's input.
    """
    extract = _extract_with(load_inception(find_weights(cache_dir)), device)
    return Extractor("inception", extract, established_names=NAMES["inception"])


def inception_tf(cache_dir: Path | None, device: torch.device) -> Extractor:
    """pool3 (D = 2048) and logits from torch-fidelity's input, by the same network and weights."""
    extract = _extract_with(load_inception(find_weights(cache_dir), tensorflow=True), device)
    return Extractor("inception_tf", extract, established_names=NAMES["inception_tf"])


def _extract_with(model: FIDInception, device: torch.device) -> Callable[[Tensor], Extracted]:
    model = model.to(device)

    @torch.no_grad()
    def extract(x: Tensor) -> Extracted:
        with torch.autocast(device.type, enabled=False):
            parts = [model(part.to(device)) for part in x.split(_IMAGES_AT_ONCE)]
        return Extracted(
            torch.cat([part.features for part in parts]), torch.cat([part.logits for part in parts])
        )

    return extract


def find_weights(cache_dir: str | Path | None) -> Path:
    """The weights file; if the environment variable names a file, no other file is used."""
    url: str = _pytorch_fid().FID_WEIGHTS_URL
    name = url.rsplit("/", maxsplit=1)[-1]
    named = os.environ.get(WEIGHTS_VARIABLE)
    if named:
        places = [Path(named)]
    else:
        folders = [] if cache_dir is None else [Path(cache_dir)]
        folders.append(Path(torch.hub.get_dir()) / "checkpoints")
        places = [folder / name for folder in folders]
    for path in places:
        if path.is_file():
            return path
    looked = " or ".join(str(path) for path in places)
    raise ValueError(
        f"Inception's weights must be a file at {looked}, got none: download {url} to there, or "
        f"name the file in the environment variable {WEIGHTS_VARIABLE}; the features 'pixels' need "
        "no file (--features pixels, or the key evaluate.features)"
    )


def load_inception(path: str | Path, tensorflow: bool = False) -> FIDInception:
    """The network with the weights of this file, on the CPU."""
    url = _pytorch_fid().FID_WEIGHTS_URL
    trouble = f"must hold the weights of {url}, got a file that cannot be read as such"
    if tensorflow:
        _tensorflow_resize()  # raises for a missing package, which must not be blamed on the file
    with reading(path, trouble) as file:
        return FIDInception(load_tensors(file), tensorflow)


def _pytorch_fid() -> ModuleType:
    """``pytorch_fid.inception``; an optional package, so imported only where it is used."""
    try:
        return importlib.import_module("pytorch_fid.inception")
    except ImportError as error:
        raise ImportError(
            "the features 'inception' need the package pytorch-fid, which comes with the extra "
            f"[metrics]: pip install '.[metrics]' ({error})"
        ) from error


def _tensorflow_resize() -> Callable[..., Tensor]:
    """torch-fidelity's bilinear resizing; also an optional package."""
    try:
        module = importlib.import_module("torch_fidelity.interpolate_compat_tensorflow")
    except ImportError as error:
        raise ImportError(
            "the features 'inception_tf' need the package torch-fidelity, which comes with the "
            f"extra [metrics]: pip install '.[metrics]' ({error})"
        ) from error
    return module.interpolate_bilinear_2d_like_tensorflow1x
