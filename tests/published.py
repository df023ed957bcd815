"""Synthetic checkpoints in every published layout, with the names and shapes of tests/data."""

from __future__ import annotations

import argparse
import json
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests import DATA
from third_party.common import nets

PUBLISHED = json.loads((DATA / "models.json").read_text())
SMALL = json.loads((DATA / "models_small.json").read_text())
TINY = {
    "UNetModel": {
        "in_channels": 3,
        "model_channels": 4,
        "out_channels": 6,
        "num_res_blocks": 1,
        "attention_resolutions": [2],
        "channel_mult": [1, 2],
        "num_groups": 4,
    },
    "Model": {
        "ch": 4,
        "out_ch": 3,
        "ch_mult": [1, 2],
        "num_res_blocks": 1,
        "attn_resolutions": [4],
        "resolution": 8,
        "num_groups": 4,
    },
}
State = dict[str, Tensor]


def build(case: dict[str, Any], **changes: Any) -> nn.Module:
    return getattr(nets, case["cls"])(**case["kwargs"] | changes)


def tiny(cls: str = "Model", **changes: Any) -> nn.Module:
    return build({"cls": cls, "kwargs": TINY[cls.removesuffix("4Pretrained")] | changes})


def number(name: str) -> float:
    return zlib.crc32(name.encode()) / 2**32


def full_state(shapes: dict[str, list[int]], shift: float = 0.0) -> State:
    """Tensors of full size on one number each, which differs from name to name."""
    return {k: torch.tensor(number(k) + shift).expand(shape) for k, shape in shapes.items()}


def random_state(network: nn.Module, seed: int = 0) -> State:
    generator = torch.Generator().manual_seed(seed)
    shapes = {k: v.shape for k, v in network.state_dict().items()}
    return {k: torch.randn(shape, generator=generator) for k, shape in shapes.items()}


def assert_same(actual: State, expected: State) -> None:
    """Equal tensors under equal names in the same order."""
    assert list(actual) == list(expected)
    for name, tensor in expected.items():
        given = actual[name]
        assert (given.dtype, given.shape) == (tensor.dtype, tensor.shape)
        if not any(given.stride()) and not any(tensor.stride()):  # one number
            given, tensor = given.view(-1)[:1], tensor.view(-1)[:1]
        assert torch.equal(given, tensor), name


# ---------------------------------------------------------------------- the published layouts


def prefixed(state: State) -> OrderedDict[str, Tensor]:
    return OrderedDict((f"module.{name}", tensor) for name, tensor in state.items())


def adam(ema: State | None, first: int = 0) -> dict[str, Any]:
    """An optimizer's state dict, parameters numbered from ``first``."""
    zero = torch.zeros(())
    state = {
        first + i: {"step": 7, "exp_avg": zero.expand(t.shape), "exp_avg_sq": zero.expand(t.shape)}
        | ({} if ema is None else {"ema": t})
        for i, t in enumerate((ema or {}).values())
    }
    return {"state": state, "param_groups": [{"lr": 2e-4, "params": list(state)}]}


def settings_like_sa_dpm(**more: Any) -> argparse.Namespace:
    model = argparse.Namespace(ch=128, ch_mult=[1, 2, 2, 2, 4], var_type="fixedlarge", **more)
    return argparse.Namespace(
        seed=1234, nested={"device": torch.device("cpu"), "model": [model]}, none=None
    )


def save_plain(folder: Path, model: State, ema: State, **options: Any) -> Path:
    torch.save(ema, folder / "plain.pth", **options)
    return folder / "plain.pth"


def save_legacy(folder: Path, model: State, ema: State) -> Path:
    return save_plain(folder, model, ema, _use_new_zipfile_serialization=False)


def save_host(folder: Path, model: State, ema: State) -> Path:
    path = folder / "20000.ckpt"
    contents = {
        "it": 20000,
        "best_val_loss": float("inf"),
        "models_states/model": model,
        "ema_models_states/model": ema,
        "optimizers_states/all": adam(model),
        "lr_schedulers_states/all": {"last_epoch": 20000, "lr_lambdas": [None]},
    }
    for name, content in contents.items():
        file = path / f"{name}.pth"
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, file)
    return path


def save_sa_dpm_ema(folder: Path, model: State, ema: State) -> Path:
    torch.save(prefixed(ema), folder / "model_500_ema.pth")
    return folder / "model_500_ema.pth"


def save_sa_dpm_training(folder: Path, model: State, ema: State, **content: Any) -> Path:
    path = folder / "ckpt_500.pth"
    whole = {
        "epoch": 500,
        "global_step": 700_000,
        "args": settings_like_sa_dpm(),
        "model_dict": prefixed(model),
        "optimizer": adam(ema),
        "scheduler": {"last_epoch": 500},
    }
    torch.save(whole | content, path)
    return path


def save_ddim(folder: Path, model: State, ema: State) -> Path:
    path = folder / "ckpt.pth"
    torch.save([prefixed(model), adam(model, first=140_000_000), 5, 7000, ema], path)
    return path


def save_named(folder: Path, model: State, ema: State) -> Path:
    path = folder / "named.pth"
    torch.save({"model": model, "model_ema": prefixed(ema), "step": 3, "opt": adam(model)}, path)
    return path


LAYOUTS: dict[str, Callable[[Path, State, State], Path]] = {
    "plain": save_plain,
    "legacy": save_legacy,
    "host": save_host,
    "sa_dpm_ema": save_sa_dpm_ema,
    "sa_dpm_training": save_sa_dpm_training,
    "ddim": save_ddim,
    "named": save_named,
}
HOLDS_BOTH = ["host", "sa_dpm_training", "ddim", "named"]


def out_path(folder: Path, to: str) -> Path:
    return folder / ("30000.ckpt" if to == "host" else f"{to}_out.pth")
