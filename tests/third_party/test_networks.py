"""The host networks: published shapes, golden forwards, frozen trunks, options, errors."""

import math
import zlib
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests import DATA
from tests.published import PUBLISHED, SMALL, TINY, build
from third_party.common.nets import common, ddpm_unet, iddpm_unet

HEAD_CLASSES = ["UNetModel4Pretrained", "Model4Pretrained"]
COMPLEX = {"mode": "complex"}
HEADS = ["iddpm_simple", "iddpm_complex", "ddpm_simple", "ddpm_complex"]
HEAD_NAMES = ("out2.", "before_out.", "norm_out2.", "conv_out2.")
WIDER = {  # than those of the checkpoints' tests
    "UNetModel": {"model_channels": 16, "out_channels": 3, "num_heads": 2, "num_groups": 8}
    | {"use_scale_shift_norm": True},
    "Model": {"ch": 16, "num_groups": 8},
}
ATTENTION = {"num_groups": 8, "use_checkpoint": False}


def golden_weight(name: str, shape: tuple[int, ...]) -> Tensor:
    """The recipe of the golden files: numbers that follow from the parameter's name."""
    w = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape) * 0.05
    if len(shape) == 1 and name.endswith("weight"):
        w = w + 1
    return torch.from_numpy(w).float()


def fill(net: nn.Module) -> nn.Module:
    net.load_state_dict({k: golden_weight(k, tuple(v.shape)) for k, v in net.state_dict().items()})
    return net.eval()


def randn(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape)).float()


def small_inputs() -> tuple[Tensor, Tensor]:
    return randn(8, 2, 3, 16, 16), torch.tensor([3, 700])


def tiny(cls: str, **changes: Any) -> nn.Module:
    family = "UNetModel" if cls.startswith("UNet") else "Model"
    return build({"cls": cls, "kwargs": TINY[family] | WIDER[family] | changes})


def tiny_inputs() -> tuple[Tensor, Tensor]:
    return randn(0, 2, 3, 8, 8), torch.tensor([5, 80])


def assert_close(actual: Tensor, expected: Tensor | np.ndarray, atol: float) -> None:
    torch.testing.assert_close(actual, torch.as_tensor(expected), atol=atol, rtol=0)


# ------------------------------------------------------------------- published checkpoints


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_checkpoints_load_strictly_and_have_these_parameters(name):
    case = PUBLISHED[name]
    with torch.device("meta"):
        net = build(case)
        state = {k: torch.empty(shape) for k, shape in case["state"].items()}
    net.load_state_dict(state, strict=True, assign=True)  # equal names and shapes
    parameters = dict(net.named_parameters())
    trained = {k: p.numel() for k, p in parameters.items() if p.requires_grad}
    assert sum(p.numel() for p in parameters.values()) == case["params"]
    assert sum(trained.values()) == case["trainable"]
    if "Pretrained" in case["cls"]:
        assert all(k.startswith(HEAD_NAMES) for k in trained)


# ------------------------------------------------------------------------- golden forwards


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", SMALL)
def test_small_forward_equals_the_original(name, channels_last):
    net, (x, t) = fill(build(SMALL[name])), small_inputs()
    assert {k: list(v.shape) for k, v in net.state_dict().items()} == SMALL[name]["state"]
    if channels_last:
        net = net.to(memory_format=torch.channels_last)
        x = x.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        assert_close(net(x, t), np.load(DATA / "models_small.npz")[name], 2e-4)


def test_cifar10_forward_equals_the_original():
    net = fill(build(PUBLISHED["cifar10_eps"]))
    with torch.no_grad():
        y = net(randn(9, 1, 3, 32, 32), torch.tensor([250]))
    assert_close(y, np.load(DATA / "models_cifar10_full.npz")["y"], 2e-4)


@pytest.mark.parametrize("name", SMALL)
def test_normalisations_have_the_eps_of_their_family(name):
    """A wrong eps moves the golden forwards by less than their tolerance."""
    wanted = 1e-6 if name.startswith("ddpm") else 1e-5
    norms = [m for m in build(SMALL[name]).modules() if isinstance(m, nn.GroupNorm)]
    assert len(norms) > 10
    assert {(m.eps, m.num_groups) for m in norms} == {(wanted, 32)}


@pytest.mark.parametrize("name", SMALL)
def test_float64_agrees_with_float32_and_is_precise(name):
    net, (x, t) = fill(build(SMALL[name])), small_inputs()
    seen = []
    dense = net.time_embed if name.startswith("iddpm") else net.temb.dense[0]
    dense.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        single = net(x, t)
        double = net.double()(x.double(), t.double() + 0.1234567891234)
        again = net(x.double(), t)
    assert double.dtype == torch.float64
    assert_close(again, single.double(), 1e-4)
    iddpm = name.startswith("iddpm")
    expected = reference_embedding(t.numpy() + 0.1234567891234, 32, iddpm, not iddpm)
    assert_close(seen[1], expected, 1e-12)


# ---------------------------------------------------------------------------- time embedding


def reference_embedding(t: np.ndarray, width: int, cos_first: bool, endpoint: bool) -> np.ndarray:
    out = np.zeros((len(t), width))
    half = width // 2
    for i in range(half):
        period = 10000 ** (i / (half - 1 if endpoint else half))
        out[:, i], out[:, half + i] = np.sin(t / period), np.cos(t / period)
        if cos_first:
            out[:, i], out[:, half + i] = out[:, half + i].copy(), out[:, i].copy()
    return out


@settings(max_examples=25, deadline=None)
@given(
    t=st.lists(st.floats(0, 1000), min_size=1, max_size=4),
    width=st.integers(4, 33),
    cos_first=st.booleans(),
    endpoint=st.booleans(),
)
def test_timestep_embedding(t, width, cos_first, endpoint):
    steps = torch.tensor(t, dtype=torch.float64)
    actual = common.timestep_embedding(
        steps, width, cos_first=cos_first, endpoint=endpoint, dtype=torch.float64
    )
    assert_close(actual, reference_embedding(np.array(t), width, cos_first, endpoint), 1e-9)


def test_timestep_embedding_keeps_neighbours_apart_in_bfloat16():
    t = torch.tensor([999, 1000])
    e = common.timestep_embedding(t, 32, cos_first=True, endpoint=False, dtype=torch.bfloat16)
    assert e.dtype == torch.bfloat16
    assert_close(e.double(), reference_embedding(t.numpy(), 32, True, False), 8e-3)


@pytest.mark.parametrize("cls", ["UNetModel", "Model"])
def test_integer_and_float_timesteps_agree(cls):
    net, x = fill(tiny(cls)), randn(0, 2, 3, 8, 8)
    with torch.no_grad():
        y = net(x, torch.tensor([5, 80]))
        assert torch.equal(y, net(x, torch.tensor([5.0, 80.0])))
        assert torch.equal(y, net(x, torch.tensor([5.0, 80.0], dtype=torch.float64)))
        assert not torch.allclose(y[1:], net(x[1:], torch.tensor([80.5])), atol=1e-5)


# ----------------------------------------------------------------------------- frozen trunks


@pytest.mark.parametrize("name", HEADS)
def test_trunk_part_is_the_plain_network_bit_for_bit_even_in_training(name):
    plain, head = fill(build(SMALL[name.split("_")[0]])), fill(build(SMALL[name]))
    x, t = small_inputs()
    with torch.no_grad():
        expected = plain(x, t)
    assert torch.equal(head(x, t)[:, :3], expected)
    head.train()
    assert head.training
    assert torch.equal(head(x, t)[:, :3], expected)


@pytest.mark.parametrize("name", HEADS)
def test_trunk_is_in_eval_mode_from_the_start(name):
    net = build(SMALL[name])
    in_training = {k.split(".")[0] + "." for k, m in net.named_modules() if k and m.training}
    assert in_training
    assert in_training <= set(HEAD_NAMES)
    assert not any(m.training for m in net.eval().modules())


@pytest.mark.parametrize(
    ("cls", "changes"),
    [("UNetModel", {}), ("Model", {}), *product(HEAD_CLASSES, [{"mode": "simple"}, COMPLEX])],
)
def test_dropout_acts_in_training_and_in_the_complex_head_alone(cls, changes):
    net = fill(tiny(cls, dropout=0.5, **changes))
    x, t = tiny_inputs()
    with torch.no_grad():
        assert torch.equal(net(x, t), net(x, t))
        net.train()
        first, second = (net(x, t)[:, 3 if changes else 0 :] for _ in range(2))
    assert torch.equal(first, second) == (changes == {"mode": "simple"})


@pytest.mark.parametrize("name", HEADS)
def test_gradient_reaches_the_head_only(name):
    net, (x, t) = fill(build(SMALL[name])).train(), small_inputs()
    # Even where somebody has thawed the parameters, say while loading a checkpoint.
    net.requires_grad_(True)
    net(x, t).square().sum().backward()
    for k, p in net.named_parameters():
        assert (p.grad is not None) == k.startswith(HEAD_NAMES), k
        assert p.grad is None or p.grad.abs().sum() > 0, k


@pytest.mark.parametrize("cls", ["UNetModel", "Model"])
def test_gradient_reaches_every_parameter_of_a_plain_network(cls):
    net = fill(tiny(cls)).train()
    net(*tiny_inputs()).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


@pytest.mark.parametrize(
    ("head_cls", "trunk_cls", "key", "head_key"),
    [
        ("UNetModel4Pretrained", "UNetModel", "out_channels", "head_out_channels"),
        ("Model4Pretrained", "Model", "out_ch", "head_out_ch"),
    ],
)
def test_head_cuts_a_trunk_of_six_outputs(head_cls, trunk_cls, key, head_key):
    trunk, head = fill(tiny(trunk_cls, **{key: 6})), fill(tiny(head_cls, **{key: 6, head_key: 2}))
    x, t = tiny_inputs()
    with torch.no_grad():
        assert head(x, t).shape == (2, 5, 8, 8)
        assert torch.equal(head(x, t)[:, :3], trunk(x, t)[:, :3])


def test_three_out_channels_are_the_first_of_six():
    whole, cut = (fill(tiny(c, out_channels=6)) for c in ("UNetModel", "UNetModel3OutChannels"))
    x, t = tiny_inputs()
    with torch.no_grad():
        assert torch.equal(cut(x, t), whole(x, t)[:, :3])
        assert whole(x, t).shape[1] == 6


# ----------------------------------------------------------------------------- initial state


def test_iddpm_starts_at_zero_and_its_blocks_as_the_identity():
    net = tiny("UNetModel4Pretrained", mode="complex")
    x, t = tiny_inputs()
    assert not net(x, t).any()
    h, emb = randn(1, 2, 16, 4, 4), randn(2, 2, 64)
    assert torch.equal(net.input_blocks[1][0](h, emb), h)
    h = randn(1, 2, 32, 4, 4)
    assert torch.equal(net.middle_block[1](h), h)


# ----------------------------------------------------------------- options of the iDDPM UNet


def test_time_is_added_without_scale_shift_norm():
    block = iddpm_unet.ResBlock(
        16,
        16,
        emb_width=64,
        dropout=0.0,
        num_groups=8,
        use_scale_shift_norm=False,
        use_checkpoint=False,
    )
    fill(block)
    x, emb = randn(1, 2, 16, 4, 4), randn(2, 2, 64)
    time = F.linear(F.silu(emb), block.emb_layers[1].weight, block.emb_layers[1].bias)
    assert time.shape == (2, 16)
    h = block.in_layers(x) + time.reshape(2, 16, 1, 1)
    assert_close(block(x, emb), x + block.out_layers(h), 1e-6)


def test_resampling_without_convolutions():
    net, x = tiny("UNetModel", conv_resample=False), randn(1, 2, 16, 4, 4)
    assert not [k for k in net.state_dict() if ".op." in k or k.endswith("conv.weight")]
    means = x.reshape(2, 16, 2, 2, 2, 2).mean((3, 5))
    assert_close(iddpm_unet.Downsample(16, with_conv=False)(x), means, 1e-6)
    doubled = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.equal(common.Upsample(16, with_conv=False)(x), doubled)
    assert fill(net)(*tiny_inputs()).shape == (2, 3, 8, 8)


def test_heads_of_the_way_up():
    net = tiny("UNetModel", num_heads=2, num_heads_upsample=4)
    heads = {k.split(".")[0]: m.num_heads for k, m in net.named_modules() if hasattr(m, "qkv")}
    assert heads == {"input_blocks": 2, "middle_block": 2, "output_blocks": 4}
    x = randn(1, 2, 32, 4, 4)
    two, four = (fill(iddpm_unet.AttentionBlock(32, **ATTENTION, num_heads=n)) for n in (2, 4))
    assert not torch.allclose(two(x), four(x), atol=1e-5)


def reference_attention(net: iddpm_unet.AttentionBlock, x: Tensor) -> Tensor:
    """Head by head, with the scale 1/sqrt(sqrt(d)) on queries and keys."""
    b, c, height, width = x.shape
    qkv = net.qkv(net.norm(x).reshape(b, c, -1)).reshape(b * net.num_heads, -1, height * width)
    q, k, v = qkv.chunk(3, dim=1)
    scale = 1 / math.sqrt(math.sqrt(q.shape[1]))
    weights = torch.einsum("bdi,bdj->bij", q * scale, k * scale).softmax(-1)
    h = torch.einsum("bij,bdj->bdi", weights, v).reshape(b, c, -1)
    return x + net.proj_out(h).reshape(x.shape)


@pytest.mark.parametrize("num_heads", [1, 2, 8])
def test_attention_equals_its_definition(num_heads):
    """With large weights, so that the softmax is far from uniform."""
    net = fill(iddpm_unet.AttentionBlock(32, **ATTENTION, num_heads=num_heads))
    net.qkv.weight.data *= 10
    x = randn(1, 2, 32, 3, 5)
    expected = reference_attention(net, x)
    assert_close(net(x), expected, 1e-4)
    assert_close(net(x.contiguous(memory_format=torch.channels_last)), expected, 1e-4)


def test_single_head_attention_equals_its_definition():
    net = fill(ddpm_unet.AttnBlock(32, 8))
    for conv in (net.q, net.k):
        conv.weight.data *= 10
    x = randn(1, 2, 32, 3, 5)
    q, k, v = (conv(net.norm(x)).flatten(2) for conv in (net.q, net.k, net.v))
    weights = (q.transpose(1, 2) @ k / math.sqrt(32)).softmax(-1)  # [B, query, key]
    h = (v @ weights.transpose(1, 2)).reshape(x.shape)
    assert_close(net(x), x + net.proj_out(h), 1e-4)


LABELLED = [("UNetModel", "UNetModel4Pretrained"), ("Model", "Model4Pretrained")]


@pytest.mark.parametrize(("cls", "_"), LABELLED)
def test_labels_are_embedded_and_added(cls, _):
    plain, net = fill(tiny(cls)), fill(tiny(cls, num_classes=5))
    assert set(net.state_dict()) - set(plain.state_dict()) == {"label_emb.weight"}
    x, t = randn(0, 1, 3, 8, 8).repeat(2, 1, 1, 1), torch.tensor([5, 5])
    with torch.no_grad():
        y = net(x, t, torch.tensor([1, 4]))
        assert not torch.allclose(y[0], y[1], atol=1e-5)
        net.label_emb.weight[4] = 0
        assert_close(net(x, t, torch.tensor([1, 4]))[1], plain(x, t)[1], 1e-6)
        # An embedding added to the time's: the last layer's bias does the same.
        last = plain.time_embed[2] if cls == "UNetModel" else plain.temb.dense[1]
        last.bias += net.label_emb.weight[1]
        assert_close(net(x, t, torch.tensor([1, 1])), plain(x, t), 1e-5)


@pytest.mark.parametrize(("cls", "head_cls"), LABELLED)
def test_labels_reach_the_trunk_of_a_head_network(cls, head_cls):
    trunk = fill(tiny(cls, num_classes=5))
    head = fill(tiny(head_cls, num_classes=5))
    assert not head.label_emb.weight.requires_grad
    x, t, y = randn(0, 2, 3, 8, 8), torch.tensor([5, 80]), torch.tensor([1, 4])
    with torch.no_grad():
        assert torch.equal(head(x, t, y)[:, :3], trunk(x, t, y))


def gradients(net: nn.Module) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(0)  # the same dropout
    y = net(*tiny_inputs())
    return y, list(torch.autograd.grad(y.square().sum(), list(net.parameters())))


def test_activation_checkpointing_changes_nothing_but_what_is_kept():
    kept, recomputed = (
        fill(tiny("UNetModel", dropout=0.3, use_checkpoint=flag)).train() for flag in (False, True)
    )
    flags = [m.use_checkpoint for m in recomputed.modules() if hasattr(m, "use_checkpoint")]
    assert flags == [True] * 12  # 8 residual blocks, 4 of attention
    (y, expected), (y2, actual) = gradients(kept), gradients(recomputed)
    assert torch.equal(y, y2)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)
    saved = [0, 0]
    for i, net in enumerate((kept, recomputed)):

        def count(tensor: Tensor, i: int = i) -> Tensor:
            saved[i] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            net(*tiny_inputs())
    assert saved[1] < saved[0] / 2


# ------------------------------------------------------------------ devices, types, formats


@pytest.mark.parametrize(
    "cls",
    ["UNetModel", "UNetModel3OutChannels", "UNetModel4Pretrained", "Model", "Model4Pretrained"],
)
def test_forward_never_asks_a_device_for_a_value(cls):
    """A meta tensor holds no values: whatever would wait for a GPU fails here."""
    with torch.device("meta"):
        net = tiny(cls)
        y = net(torch.empty(2, 3, 8, 8), torch.empty(2, dtype=torch.int64))
    assert y.shape == (2, 6 if "Pretrained" in cls else 3, 8, 8)


@pytest.mark.parametrize("name", SMALL)
def test_autocast_agrees_to_bfloat16(name):
    net, (x, t) = fill(build(SMALL[name])), small_inputs()
    with torch.no_grad():
        expected = net(x, t)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = net(x, t)
    assert y.dtype == torch.bfloat16
    # bfloat16 rounds by 0.2 %, some thirty layers in a row.
    assert (y.float() - expected).square().mean().sqrt() < 0.05 * expected.std()


@pytest.mark.parametrize(
    ("cls", "backend", "autocast", "tolerance"),
    [
        *product(["UNetModel", "Model"], ["eager"], [False, True], [0]),
        # Traced and run operation by operation; what is generated from it is PyTorch's affair.
        *product(HEAD_CLASSES, ["aot_eager"], [True], [0.05]),
    ],
)
def test_compiles_to_one_graph(cls, backend, autocast, tolerance):
    torch.compiler.reset()
    net = fill(tiny(cls))
    compiled = torch.compile(net, backend=backend, fullgraph=True)  # an error where it breaks
    x, t = randn(0, 2, 3, 8, 8), torch.tensor([5, 999])
    with (
        torch.set_grad_enabled(backend == "eager"),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast),
    ):
        if tolerance:
            assert_close(compiled(x, t).float(), net(x, t).float(), tolerance)
        else:
            torch.testing.assert_close(compiled(x, t), net(x, t))


@pytest.mark.parametrize("cls", ["UNetModel", "Model"])
def test_bfloat16_parameters(cls):
    net = fill(tiny(cls))
    x, t = randn(0, 2, 3, 8, 8), torch.tensor([5, 999])
    with torch.no_grad():
        expected = net(x, t)
        y = net.bfloat16()(x.bfloat16(), t)
    assert y.dtype == torch.bfloat16
    assert (y.float() - expected).square().mean().sqrt() < 0.05 * expected.std()


@pytest.mark.parametrize("cls", ["UNetModel", "Model"])
def test_samples_of_a_batch_do_not_mix(cls):
    net = fill(tiny(cls))
    x, t = randn(0, 3, 3, 8, 8), torch.tensor([5, 80, 999])
    with torch.no_grad():
        alone = torch.cat([net(x[i : i + 1], t[i : i + 1]) for i in range(3)])
        assert_close(net(x, t), alone, 1e-5)


def test_iddpm_takes_images_of_other_sizes():
    net = fill(tiny("UNetModel"))
    assert net(randn(0, 1, 3, 6, 10), torch.tensor([3])).shape == (1, 3, 6, 10)


# --------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("cls", "changes", "message"),
    [
        ("UNetModel", {"dims": 3}, r"dims must be one of \[2\], got 3"),
        ("UNetModel", {"num_groups": 5}, r"num_groups must divide .* num_groups=5 .* 16 channels"),
        ("UNetModel", {"num_groups": 0}, "num_groups must be an integer of at least 1, got 0"),
        ("UNetModel", {"num_heads": 3}, r"num_heads must divide .* num_heads=3 .* 32 channels"),
        (
            "UNetModel",
            {"num_heads_upsample": 5},
            r"num_heads_upsample must .* num_heads_upsample=5",
        ),
        ("UNetModel", {"num_heads_upsample": 0}, "num_heads_upsample must be .* got 0"),
        ("UNetModel", {"attention_resolutions": [16]}, r"attention_resolutions .*\[1, 2\], got 16"),
        ("UNetModel", {"dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1.0"),
        ("UNetModel", {"channel_mult": []}, r"channel_mult must hold at least one .* got \(\)"),
        ("UNetModel", {"channel_mult": [1, 0]}, r"channel_mult\[1\] must be .* got 0"),
        ("UNetModel", {"num_res_blocks": 0}, "num_res_blocks must be .* got 0"),
        ("UNetModel", {"model_channels": 16.0}, "model_channels must be an integer .* got 16.0"),
        ("UNetModel", {"num_classes": 0}, "num_classes must be .* got 0"),
        ("Model", {"num_classes": 0}, "num_classes must be .* got 0"),
        (
            "UNetModel3OutChannels",
            {"out_channels": 2},
            "out_channels must be at least in_channels=3",
        ),
        ("UNetModel4Pretrained", {"out_channels": 2}, "out_channels must be .* got out_channels=2"),
        (
            "UNetModel4Pretrained",
            {"mode": "big"},
            r"mode must be .*'simple', 'complex'.* got 'big'",
        ),
        ("UNetModel4Pretrained", {"head_out_channels": 0}, "head_out_channels must be .* got 0"),
        ("Model", {"num_groups": 6}, r"num_groups must divide .* num_groups=6 .* 16 channels"),
        ("Model", {"attn_resolutions": [16]}, r"attn_resolutions .* among \[8, 4\], got 16"),
        ("Model", {"resolution": 9}, "resolution must be a multiple of 2 .* got 9"),
        ("Model", {"dropout": -0.1}, r"dropout must lie in \[0, 1\), got -0.1"),
        ("Model", {"ch_mult": []}, r"ch_mult must hold at least one multiplier, got \[\]"),
        ("Model4Pretrained", {"out_ch": 2}, "out_ch must be at least in_channels=3, got out_ch=2"),
        ("Model4Pretrained", {"mode": ""}, "mode must be one of .* got ''"),
        ("Model4Pretrained", {"head_out_ch": True}, "head_out_ch must be an integer .* got True"),
    ],
)
def test_bad_arguments(cls, changes, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        tiny(cls, **changes)


@pytest.mark.parametrize(
    ("cls", "shape", "t_shape", "message"),
    [
        ("UNetModel", (2, 3, 8, 8), (), r"timesteps must have shape \[B\] = \[2\], got \[\]"),
        ("UNetModel", (2, 3, 8, 8), (1,), r"timesteps must have shape \[B\] = \[2\], got \[1\]"),
        ("UNetModel", (2, 1, 8, 8), (2,), r"x must have shape \[B, 3, H, W\], got \[2, 1, 8, 8\]"),
        ("UNetModel", (2, 3, 8), (2,), r"x must have shape \[B, 3, H, W\], got \[2, 3, 8\]"),
        ("UNetModel", (2, 3, 9, 8), (2,), r"multiples of 2, got \[9, 8\]"),
        ("UNetModel4Pretrained", (2, 3, 8, 7), (2,), r"multiples of 2, got \[8, 7\]"),
        ("Model", (2, 3, 8, 8), (2, 1), r"timesteps must have shape \[B\] = \[2\], got \[2, 1\]"),
        ("Model", (2, 3, 16, 16), (2,), r"resolution=8, got \[16, 16\]"),
        ("Model4Pretrained", (2, 3, 8, 4), (2,), r"resolution=8, got \[8, 4\]"),
    ],
)
def test_bad_inputs(cls, shape, t_shape, message):
    with torch.device("meta"):
        net = tiny(cls)
        with pytest.raises(ValueError, match=message):
            net(torch.empty(shape), torch.empty(t_shape))


@pytest.mark.parametrize(
    ("num_classes", "labels", "message"),
    [
        (None, 2, "num_classes=None and a y"),
        (5, None, "num_classes=5 and no y"),
        (5, 3, r"y must have shape \[B\] = \[2\], got \[3\]"),
    ],
)
@pytest.mark.parametrize("cls", ["UNetModel", "Model"])
def test_bad_labels(cls, num_classes, labels, message):
    with torch.device("meta"):
        net = tiny(cls, num_classes=num_classes)
        y = None if labels is None else torch.empty(labels, dtype=torch.int64)
        with pytest.raises(ValueError, match=message):
            net(torch.empty(2, 3, 8, 8), torch.empty(2), y)


@pytest.mark.parametrize("cls", ["UNetModel", "Model"])
def test_normalisations_keep_the_precision_they_are_given(cls, monkeypatch):
    """Autocast would have CUDA's GroupNorm take and give float32: it must be off there."""
    seen = []
    group_norm = torch.nn.functional.group_norm

    def noted(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        enabled = torch.is_autocast_enabled("cpu")
        seen.append((enabled, x.dtype, weight.dtype, bias.dtype))
        return group_norm(x, groups, weight, bias, eps)

    monkeypatch.setattr(torch.nn.functional, "group_norm", noted)
    net = fill(tiny(cls))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        net(randn(0, 2, 3, 8, 8), torch.tensor([5, 999]))
    assert len(seen) > 10
    assert set(seen) == {(False, *[torch.bfloat16] * 3)}
