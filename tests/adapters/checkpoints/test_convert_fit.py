"""Which network a state dict belongs to, and how what does not fit is told."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.checkpoints.architecture import network_of_config, network_of_state
from adapters.checkpoints.fitting import convert, load_published
from adapters.convert import main
from tests import ROOT
from tests.commands import one_line
from tests.published import (
    PUBLISHED,
    SMALL,
    TINY,
    assert_same,
    full_state,
    random_state,
    save_sa_dpm_ema,
    tiny,
)
from third_party.common.checkpoints import read_state

TINY_CONFIG = """
from configs.base import base_config
def get_config():
    config = base_config()
    config.network.name = {name!r}
    config.network.args = {args!r}
    config.head.training = {training!r}
    return config
"""


# ------------------------------------------------------------------- what fits which network


ARCHITECTURES = {
    **{name: case["state"] for name, case in (PUBLISHED | SMALL).items()},
    **{
        label: {k: list(v.shape) for k, v in tiny(cls, **changes).state_dict().items()}
        for label, cls, changes in (
            ("no attention", "Model", {"attn_resolutions": []}),
            ("attention everywhere", "Model", {"attn_resolutions": [8, 4]}),
            ("one level", "Model", {"ch_mult": [2], "attn_resolutions": []}),
            ("one channel", "Model", {"in_channels": 1, "out_ch": 1, "num_res_blocks": 3}),
            ("classes", "UNetModel", {"num_classes": 10, "use_scale_shift_norm": True}),
            ("no weights in sampling", "UNetModel", {"conv_resample": False}),
            ("one level, iDDPM", "UNetModel", {"channel_mult": [3], "attention_resolutions": [1]}),
            ("three levels", "UNetModel", {"channel_mult": [1, 3, 2], "num_res_blocks": 2}),
        )
    },
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_state_dict_tells_its_network(name):
    shapes = ARCHITECTURES[name]
    network = network_of_state(full_state(shapes))
    assert {k: list(v.shape) for k, v in network.state_dict().items()} == shapes
    assert all(p.is_meta for p in network.parameters())


@settings(max_examples=60, deadline=None)
@given(data=st.data(), cls=st.sampled_from(sorted(TINY)), with_network=st.booleans())
def test_one_wrong_parameter_is_named(data, cls, with_network, tmp_path_factory):
    """With a configuration's network, and with the one that the state dict tells itself."""
    path = tmp_path_factory.mktemp("wrong") / "x.pth"
    state = random_state(tiny(cls))
    name = data.draw(st.sampled_from(sorted(state)))
    kind = data.draw(st.sampled_from(["missing", "extra", "shape"]))
    if kind == "missing":
        del state[name]
        message = f"1 missing: {name}"
    elif kind == "extra":
        name = f"{name}x"
        state[name] = torch.zeros(2)
        message = f"1 extra: {name}"
    else:
        old = list(state[name].shape)
        state[name] = torch.zeros([*old[:-1], old[-1] + 1])
        message = f"1 of another shape: {name} {list(state[name].shape)} instead of {old}"
    torch.save(state, path)
    network = tiny(cls) if with_network else None
    with pytest.raises(ValueError, match=r"does not fit|describes no") as caught:
        convert(path, path.with_name("out.pth"), expected=network and (lambda state: network))
    assert str(path) in str(caught.value)
    assert message in str(caught.value) or (kind == "shape" and not with_network)
    assert not path.with_name("out.pth").exists()


def test_a_long_list_is_cut_and_counted(tmp_path):
    state, network = random_state(tiny("UNetModel")), tiny("Model")
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="does not fit Model") as caught:
        load_published(tmp_path / "x.pth", network)
    lost, found = list(network.state_dict()), list(state)
    text = str(caught.value)
    for kind, names in (("missing", lost), ("extra", found)):
        listed = f"{', '.join(names[:10])} and {len(names) - 10} more"
        assert f"{len(names)} {kind}: {listed}" in text
        assert names[10] not in text


def test_a_prefix_before_some_names_only_is_part_of_them(tmp_path):
    state = random_state(tiny())
    state["module.conv_in.bias"] = state.pop("conv_in.bias")
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(
        ValueError, match=r"1 missing: conv_in\.bias; 1 extra: module\.conv_in\.bias"
    ):
        load_published(tmp_path / "x.pth", tiny())


@pytest.mark.parametrize("name", ["fc.weight", "", "downx", "input_blocks"])
def test_a_network_of_no_family_is_refused(name, tmp_path):
    torch.save({name: torch.zeros(2, 2)}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"x\.pth belongs to no known network"):
        convert(tmp_path / "x.pth", tmp_path / "out.pth")


@pytest.mark.parametrize(
    "shapes",
    [
        {"down.0.x": [1]},
        {"down.4000000000.x": [1], "conv_in.weight": [4, 3, 3, 3]},
        {"input_blocks.0.0.weight": []},
        {"input_blocks.900000000.x": [1], "input_blocks.0.0.weight": [4, 3, 3, 3]},
        {"input_blocks." + "9" * 5000: [1], "input_blocks.0.0.weight": [4, 3, 3, 3]},
        {"input_blocks.0.0.weight": [0, 0], "input_blocks.1.0.in_layers.2.weight": [5]},
        {
            "conv_in.weight": [2**40, 3, 1],
            "down.0.block.0.conv1.weight": [2**40],
            "conv_out.weight": [3],
        },
        {"conv_in.weight": [0, 3, 1], "down.0.block.0.conv1.weight": [4], "conv_out.weight": [3]},
    ],
)
def test_absurd_state_dicts_are_refused(shapes):
    with torch.device("meta"):
        state = {name: torch.empty(()).expand(shape) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=r"the state dict (does not fit|describes no)"):
        network_of_state(state)


# ------------------------------------------------------------------------------- a configuration


def write_config(folder: Path, name: str, args: dict[str, Any], training: str) -> str:
    path = folder / "config.py"
    path.write_text(TINY_CONFIG.format(name=name, args=args, training=training))
    return str(path)


def config_args(cls: str) -> tuple[str, dict[str, Any]]:
    left_out = {"in_channels", "out_channels", "out_ch", "resolution"}
    args = {k: v for k, v in TINY[cls.removesuffix("4Pretrained")].items() if k not in left_out}
    return ("ddpm_unet" if cls.startswith("Model") else "iddpm_unet"), args


CONFIG_CASES = [
    ("Model", {"out_ch": 3}, "pretrained", None),
    ("Model", {"out_ch": 6}, "joint", None),
    ("Model", {"in_channels": 1, "out_ch": 1}, "pretrained", None),
    ("Model", {"out_ch": 6}, "pretrained", r"conv_out\.weight \[6, .*instead of \[3, "),
    ("Model", {"attn_resolutions": []}, "pretrained", r"30 missing: down\.1\.attn\.0\.norm"),
    ("Model", {"ch_mult": [1, 2, 2], "resolution": 16}, "pretrained", r"extra: .*down\.2"),
    ("UNetModel", {"out_channels": 3}, "pretrained", None),
    ("UNetModel", {"out_channels": 3, "use_scale_shift_norm": True}, "pretrained", "another shape"),
    ("UNetModel", {"out_channels": 3, "num_classes": 2}, "pretrained", "1 extra: label_emb"),
    ("Model4Pretrained", {}, "pretrained", None),
    ("Model4Pretrained", {"mode": "complex"}, "pretrained", "extra: before_out"),
    ("Model4Pretrained", {"out_ch": 6}, "joint", "4 extra: norm_out2"),
    ("UNetModel4Pretrained", {"out_channels": 3}, "pretrained", None),
]


@pytest.mark.parametrize(("cls", "changes", "training", "message"), CONFIG_CASES)
def test_the_network_of_a_configuration(cls, changes, training, message, tmp_path, capsys):
    state = random_state(tiny(cls, **changes))
    torch.save(state, tmp_path / "x.pth")
    config = write_config(tmp_path, *config_args(cls), training)
    code = main([str(tmp_path / "x.pth"), str(tmp_path / "out.pth"), "--config", config])
    error = capsys.readouterr().err
    if message is None:
        assert code == 0, error
        assert_same(read_state(tmp_path / "out.pth"), state)
    else:
        assert code == 2
        assert error.count("\n") == 1
        assert re.search(message, error), error
        assert not (tmp_path / "out.pth").exists()


@pytest.mark.parametrize(
    ("ch_mult", "attn_resolutions", "attended"),
    [([1, 2, 2], [2], 0), ([1, 2], [8, 4], 1), ([1, 2], [], 1), ([1, 2, 2], [4, 2], 2)],
)
def test_attention_at_other_levels_is_told_by_name(ch_mult, attn_resolutions, attended, tmp_path):
    """Also where no size of images gives the configuration's network such levels."""
    changes = {"ch_mult": ch_mult, "resolution": 32, "attn_resolutions": [32 >> attended]}
    torch.save(random_state(tiny(**changes)), tmp_path / "x.pth")
    args = config_args("Model")[1] | {"ch_mult": ch_mult, "attn_resolutions": attn_resolutions}
    config = write_config(tmp_path, "ddpm_unet", args, "pretrained")
    with pytest.raises(ValueError, match=r"does not fit Model, .*down\.\d\.attn\.0\.norm"):
        convert(
            tmp_path / "x.pth",
            tmp_path / "out.pth",
            expected=partial(network_of_config, config),
        )


@pytest.mark.parametrize(
    ("arch", "config", "outputs"),
    [
        ("cifar10_eps", "cifar10.py:sn", None),
        ("cifar10_npr_sn_simple", "cifar10.py:npr", None),
        ("celeba64_eps", "celeba64.py:analytic", None),
        ("celeba64_npr_sn_simple", "celeba64.py:sn", None),
        ("lsun_bedroom_eps", "lsun_bedroom.py:npr", None),
        ("lsun_bedroom_sn_complex", "lsun_bedroom.py:sn", None),
        ("imagenet64_eps", "imagenet64.py:analytic", 3),
        ("imagenet64_npr_simple", "imagenet64.py:npr", 3),
        ("imagenet64_sn_complex", "imagenet64.py:sn", 3),
    ],
)
def test_published_weights_fit_their_configuration(arch, config, outputs, tmp_path):
    state = full_state(PUBLISHED[arch]["state"])
    source = save_sa_dpm_ema(tmp_path, {}, state)
    expected = partial(network_of_config, f"{ROOT}/configs/{config}")
    if outputs is not None:
        with pytest.raises(ValueError, match=r"out\.2\.weight \[6, 128, 3, 3\] instead of \[3,"):
            convert(source, tmp_path / "ours.pth", expected=expected)
    convert(source, tmp_path / "ours.pth", expected=expected, outputs=outputs)
    assert list(read_state(tmp_path / "ours.pth")) == list(state)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("x = (", "SyntaxError"),
        ("x = 1", "has no function get_config"),
        ("def get_config(): return {}", "must return a ConfigDict, got dict"),
        (TINY_CONFIG.format(name="vgg", args={}, training="joint"), "network.name must be one of"),
        (TINY_CONFIG.format(name="ddpm_unet", args={"a": 1}, training="joint"), "network.args"),
        (None, "there is no file"),
    ],
)
def test_a_bad_configuration(content, message, tmp_path, capsys):
    torch.save(random_state(tiny()), tmp_path / "x.pth")
    if content is not None:
        (tmp_path / "config.py").write_text(content)
    config = str(tmp_path / "config.py")
    assert main([str(tmp_path / "x.pth"), str(tmp_path / "out.pth"), "--config", config]) == 2
    one_line(capsys, message)
