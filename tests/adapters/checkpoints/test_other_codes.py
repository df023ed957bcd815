"""Checkpoints of other codes: averages inside an entry, wrappers' prefixes, safetensors."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from adapters.checkpoints.fitting import convert, load_published
from adapters.checkpoints.layouts import read_published
from adapters.convert import main
from tests.commands import one_line
from tests.published import State, adam, assert_same, out_path, prefixed, random_state, tiny
from third_party.common.checkpoints import read_state
from third_party.common.nets import Model


@pytest.fixture
def model() -> State:
    return random_state(tiny(), 2)


@pytest.fixture
def ema() -> State:
    return random_state(tiny(), 1)


def saved(folder: Path, content: Any) -> Path:
    torch.save(content, folder / "x.pth")
    return folder / "x.pth"


# ------------------------------------------------------------------------- nested averages

AVERAGES = {
    "a state dict in the entry": lambda ema: {"ema": {"decay": 0.999, "shadow": ema}},
    "a list in the entry": lambda ema: {
        "ema": {"decay": 0.9, "shadow_params": list(ema.values()), "collected_params": None}
    },
    "a list": lambda ema: {"shadow_params": list(ema.values())},
    "ema_pytorch": lambda ema: {
        "ema": {
            **{"initted": torch.tensor(True), "step": torch.tensor(5)},
            **{f"online_model.{name}": torch.zeros(1) for name in ema},
            **{f"ema_model.{name}": tensor for name, tensor in ema.items()},
        }
    },
    "torch.optim.swa_utils": lambda ema: {
        "model_ema": {"n_averaged": torch.tensor(7), **prefixed(ema)}
    },
}


@pytest.mark.parametrize("kind", AVERAGES)
def test_where_an_average_can_be(kind, ema, model, tmp_path):
    source = saved(tmp_path, {"model": prefixed(model), "step": 3, **AVERAGES[kind](ema)})
    assert_same(read_published(source).state("ema"), ema)
    assert_same(read_published(source).state("model"), model)
    convert(source, out_path(tmp_path, "host"), to="host")
    assert_same(read_published(tmp_path / "30000.ckpt").state("model"), model)


@pytest.mark.parametrize(
    ("average", "said"),
    [
        (
            {"decay": 0.9, "weights": 3},
            r"its entry 'ema' holds 'decay', 'weights': must be a state",
        ),
        (
            {"shadow_params": [torch.ones(1)]},
            "'ema' has 1 averages for the .* entries of the model",
        ),
        ([1, 2], "its entry 'ema' holds a list of 2"),
    ],
)
def test_an_average_that_is_not_understood(average, said, model, tmp_path):
    """It is told when it is asked for; the model can be had."""
    source = saved(tmp_path, {"model": model, "ema": average})
    with pytest.raises(ValueError, match=said):
        read_published(source).state("ema")
    assert_same(read_published(source).state("model"), model)


def test_what_is_there_is_named_if_there_is_no_average(model, tmp_path):
    source = saved(tmp_path, {"model": model, "opt": adam(model), "step": 1, "ema": None})
    with pytest.raises(
        ValueError,
        match=r"holds no 'ema' weights, only 'model': .*are 'model', 'opt', 'step', 'ema'",
    ):
        read_published(source).state("ema")


# -------------------------------------------------------------------------------- prefixes


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrappers(prefix, ema, tmp_path):
    source = saved(tmp_path, {prefix + name: tensor for name, tensor in ema.items()})
    convert(source, tmp_path / "out.pth")
    assert_same(read_state(tmp_path / "out.pth"), ema)


# ------------------------------------------------------------- denoising-diffusion-pytorch


def test_a_milestone_of_denoising_diffusion_pytorch_is_another_network(tmp_path, capsys):
    import denoising_diffusion_pytorch as lucid
    import ema_pytorch

    diffusion = lucid.GaussianDiffusion(
        lucid.Unet(dim=8, dim_mults=(1, 2), flash_attn=False), image_size=8, timesteps=10
    )
    average = ema_pytorch.EMA(diffusion)
    optimizer = torch.optim.Adam(diffusion.parameters())
    milestone = {
        **{"step": 1, "model": diffusion.state_dict(), "opt": optimizer.state_dict()},
        **{"ema": average.state_dict(), "scaler": None, "version": "2.3"},
    }
    source = saved(tmp_path, milestone)
    assert main([str(source), str(tmp_path / "out.pth")]) == 2
    one_line(capsys, source, "belongs to no known network", "model.init_conv.weight")
    with pytest.raises(ValueError, match=r"does not fit Model, parameters .* missing: temb\.dense"):
        load_published(source, tiny())


# ------------------------------------------------------------------------------ safetensors


def written(path: Path, header: dict[str, Any] | bytes, content: bytes) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content)
    return path


def test_safetensors(ema, tmp_path):
    import safetensors.torch as package

    state = {k: t.half() if "conv" in k else t.bfloat16() for k, t in ema.items()}
    package.save_file(state, tmp_path / "x.safetensors", metadata={"format": "pt"})
    found = read_published(tmp_path / "x.safetensors").state()
    assert_same({name: found[name] for name in state}, state)
    network = tiny()
    load_published(tmp_path / "x.safetensors", network)
    assert_same(network.state_dict(), {name: tensor.float() for name, tensor in state.items()})


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "content", "said"),
    [
        ({"a": ENTRY}, bytes(4), r"'a' ends after 4 bytes of 8"),
        ({"a": ENTRY}, bytes(9), "its tensors have 8 bytes, 9 are there"),
        ({"a": ENTRY | {"shape": [2**40]}}, bytes(8), "impossible shape"),
        ({"a": ENTRY | {"shape": [3]}}, bytes(8), r"claims the bytes 0 to 8 for \[3\]"),
        ({"a": ENTRY | {"data_offsets": [1, 9]}}, bytes(9), "the next is 0"),
        ({"a": ENTRY | {"shape": [-2, -1]}}, bytes(8), "impossible shape"),
        ({"a": ENTRY | {"dtype": "F8_E4M3"}}, bytes(8), "'a' is F8_E4M3, must be one of"),
        ({"a": ENTRY, "b": ENTRY}, bytes(8), "'b' claims the bytes 0 to 8"),
        ({"a": 3}, bytes(8), "TypeError"),
        (b"[" * 10_000, b"", "nested too deeply"),
        (b"{", b"", "its header claims 1 bytes"),
    ],
)
def test_a_damaged_file_of_safetensors(header, content, said, tmp_path):
    path = written(tmp_path / "x.safetensors", header, content)
    with pytest.raises(ValueError, match=rf"x\.safetensors is damaged .*{said}"):
        read_published(path)


def test_a_header_of_safetensors_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("json.loads", lambda _: pytest.fail("parsed"))
    for length in (2**22 + 1, 2**63):
        (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", length) + b"[" * (2**22 + 2))
        with pytest.raises(ValueError, match=f"its header claims {length} bytes"):
            read_published(tmp_path / "x.safetensors")


# -------------------------------------------------------------------------------- diffusers

SETTINGS = {
    **{"sample_size": 16, "block_out_channels": (32, 32, 64), "layers_per_block": 2},
    **{"down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D")},
    **{"up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D")},
    **{"flip_sin_to_cos": False, "freq_shift": 1, "downsample_padding": 0},
    **{"norm_eps": 1e-6, "attention_head_dim": None},
}
OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def diffusers_network(**changes: Any) -> nn.Module:
    import diffusers

    torch.manual_seed(0)
    network = diffusers.UNet2DModel(**{**SETTINGS, **changes}).eval()
    for parameter in network.parameters():  # the norms and biases too, which begin at 1 and 0
        nn.init.normal_(parameter, std=0.2)
    return network


def older(name: str) -> str:
    for new, old in OLD_NAMES.items():
        name = name.replace(f".{new}.", f".{old}.") if ".attentions." in name else name
    return name


@pytest.mark.parametrize("form", ["safetensors", "bin", "pipeline", "before 0.14"])
def test_the_ddpm_networks_of_diffusers_give_the_same_numbers(form, tmp_path):
    theirs = diffusers_network()
    folder = tmp_path / "x" / ("unet" if form == "pipeline" else "")
    theirs.save_pretrained(folder, safe_serialization=form in ("safetensors", "pipeline"))
    if form == "before 0.14":
        file = folder / "diffusion_pytorch_model.bin"
        torch.save({older(name): t for name, t in theirs.state_dict().items()}, file)
    assert main([str(tmp_path / "x"), str(tmp_path / "out.pth")]) == 0
    ours = Model(
        **{"ch": 32, "out_ch": 3, "ch_mult": [1, 1, 2], "num_res_blocks": 2, "resolution": 16},
        attn_resolutions=[8],
    ).eval()
    ours.load_state_dict(read_state(tmp_path / "out.pth"), strict=True)
    x, timestep = torch.randn(2, 3, 16, 16), torch.tensor([3, 700])
    with torch.no_grad():
        torch.testing.assert_close(
            ours(x, timestep), theirs(x, timestep).sample, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"flip_sin_to_cos": True}, "flip_sin_to_cos must be False, as in the DDPM UNet, got True"),
        ({"attention_head_dim": 8}, "attention_head_dim must be None, .* got 8"),
        ({"norm_eps": 1e-5}, "norm_eps must be 1e-06"),
        ({"_class_name": "UNet2DConditionModel"}, "_class_name must be 'UNet2DModel', got"),
    ],
)
def test_another_network_of_diffusers_is_refused_by_its_settings(changes, said, tmp_path):
    settings = {"_class_name": "UNet2DModel", **SETTINGS, **changes}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=rf"config\.json: {said}"):
        read_published(tmp_path).state()


def test_a_folder_of_diffusers_that_is_not_whole(tmp_path):
    settings = {"_class_name": "UNet2DModel", **SETTINGS}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="holds no weights: must hold diffusion_pytorch_model"):
        read_published(tmp_path).state()
    torch.save(
        {"down_blocks.0.resnets.0.conv1.bias": torch.ones(1)},
        tmp_path / "diffusion_pytorch_model.bin",
    )
    with pytest.raises(ValueError, match=r"does not fit Model, .*down\.0"):
        load_published(tmp_path, tiny())
    with pytest.raises(ValueError, match=r"has the names of diffusers' UNets: give the folder"):
        read_published(tmp_path / "diffusion_pytorch_model.bin")
