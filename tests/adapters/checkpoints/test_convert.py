"""Published checkpoints into ours and back, the experiment's use of them, the command line."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.checkpoints.fitting import convert, load_published, read_fitting
from adapters.checkpoints.layouts import WRITERS, read_published
from adapters.convert import main
from tests import ROOT
from tests.published import (
    HOLDS_BOTH,
    LAYOUTS,
    PUBLISHED,
    TINY,
    State,
    adam,
    assert_same,
    build,
    full_state,
    out_path,
    prefixed,
    random_state,
    save_host,
    save_plain,
    save_sa_dpm_training,
    tiny,
)
from third_party.common.checkpoints import read_state
from third_party.common.ema import EMA
from third_party.common.schedule import NamedSchedule
from third_party.extended_analytic_dpm.methods import build_criterion


@pytest.mark.parametrize("arch", PUBLISHED)
def test_every_layout_with_full_names_and_shapes(arch, tmp_path):
    """Converts, loads strictly into the published network, and comes back equal.

    All layouts for a network of each family; for the others one layout each, in turn.
    """
    case, turn = PUBLISHED[arch], list(PUBLISHED).index(arch)
    layouts = list(LAYOUTS)
    if arch not in ("cifar10_npr_sn_simple", "celeba64_npr_sn_simple"):
        layouts = [layouts[turn % len(layouts)]]
    ema, model = full_state(case["state"]), full_state(case["state"], shift=1.0)
    with torch.device("meta"):
        network = build(case)
    for layout in layouts:
        ours = tmp_path / "ours" / f"{layout}.pth"
        convert(LAYOUTS[layout](tmp_path, model, ema), ours)
        state = read_state(ours)
        assert_same(state, ema)
        network.load_state_dict(state, strict=True, assign=True)
    for to in WRITERS:
        back = out_path(tmp_path, to)
        convert(ours, back, to=to, expected=lambda state: network)
        assert_same(read_published(back).state(), ema)


@settings(max_examples=15, deadline=None)
@given(
    chain=st.lists(st.sampled_from(sorted(WRITERS)), min_size=1, max_size=4),
    layout=st.sampled_from(sorted(LAYOUTS)),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
    cls=st.sampled_from(sorted(TINY)),
    seed=st.integers(0, 99),
)
def test_any_chain_of_layouts_gives_equal_tensors_in_order(
    chain, layout, dtype, cls, seed, tmp_path_factory
):
    state = {k: t.to(dtype) for k, t in random_state(tiny(cls), seed).items()}
    folder = tmp_path_factory.mktemp("chain")
    there = LAYOUTS[layout](folder, random_state(tiny(cls), seed + 1), state)
    for i, to in enumerate([*chain, "plain"]):
        (folder / str(i)).mkdir()
        there, before = out_path(folder / str(i), to), there
        convert(before, there, to=to)
    assert_same(read_state(there), state)


def test_layouts_on_disk(tmp_path):
    """Names, folders and prefixes as hosts.md has them, not only as our reader takes them."""
    ema, model = random_state(tiny(), 1), random_state(tiny(), 2)
    source = save_sa_dpm_training(tmp_path, model, ema)
    convert(source, tmp_path / "0.ckpt", to="host")
    convert(source, tmp_path / "model_1_ema.pth", to="sa_dpm")
    convert(source, tmp_path / "new" / "plain.pth")
    load = lambda name: torch.load(tmp_path / name, weights_only=True)  # noqa: E731
    assert load("0.ckpt/it.pth") == 0
    assert load("0.ckpt/best_val_loss.pth") == float("inf")
    assert_same(load("0.ckpt/models_states/model.pth"), model)
    assert_same(load("0.ckpt/ema_models_states/model.pth"), ema)
    assert_same(load("model_1_ema.pth"), prefixed(ema))
    assert_same(load("new/plain.pth"), ema)
    assert {p.name for p in (tmp_path / "0.ckpt").iterdir() if p.is_dir()} == {
        f"{part}_states" for part in ("models", "ema_models", "optimizers", "lr_schedulers")
    }
    left = [p.name for p in tmp_path.rglob("*") if "tmp" in p.name]
    assert left == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_saved_on_a_gpu_are_read_without_one(layout, tmp_path, monkeypatch):
    ema = random_state(tiny())
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda _: "cuda:7")
        source = LAYOUTS[layout](tmp_path, ema, ema)
    assert_same(read_published(source).state(), ema)


def test_a_view_is_saved_without_what_surrounds_it(tmp_path):
    state = random_state(tiny())
    big = {k: torch.cat([t.flatten(), torch.zeros(20_000)])[: t.numel()] for k, t in state.items()}
    torch.save({k: big[k].view(t.shape) for k, t in state.items()}, tmp_path / "views.pth")
    convert(tmp_path / "views.pth", tmp_path / "out.pth")
    assert_same(read_state(tmp_path / "out.pth"), state)
    size = sum(t.nbytes for t in state.values())
    assert size < (tmp_path / "out.pth").stat().st_size < 3 * size


# ------------------------------------------------------------------------------ which weights


@pytest.mark.parametrize("layout", HOLDS_BOTH)
def test_which(layout, tmp_path):
    ema, model = random_state(tiny(), 1), random_state(tiny(), 2)
    source = LAYOUTS[layout](tmp_path, model, ema)
    for which, expected in (("ema", ema), ("model", model)):
        convert(source, tmp_path / f"{which}.pth", which=which)
        assert_same(read_state(tmp_path / f"{which}.pth"), expected)
    convert(source, tmp_path / "1.ckpt", to="host", which="model")
    assert_same(read_published(tmp_path / "1.ckpt").state("ema"), model)


def without_average(layout: str, folder: Path, model: State) -> Path:
    if layout == "ddim":
        torch.save([prefixed(model), adam(model), 5, 7000], folder / "ckpt.pth")
        return folder / "ckpt.pth"
    if layout == "sa_dpm_training":
        return save_sa_dpm_training(folder, model, model, optimizer=adam(None))
    if layout == "named":
        torch.save({"state_dict": model, "epoch": 1}, folder / "named.pth")
        return folder / "named.pth"
    path = save_host(folder, model, model)
    (path / "ema_models_states" / "model.pth").unlink()
    return path


@pytest.mark.parametrize("to", WRITERS)
@pytest.mark.parametrize("layout", HOLDS_BOTH)
def test_the_model_is_not_given_for_a_missing_average(layout, to, tmp_path):
    model = random_state(tiny())
    source = without_average(layout, tmp_path, model)
    with pytest.raises(ValueError, match=r"holds no 'ema' weights, only 'model': .*--which"):
        convert(source, out_path(tmp_path, to), to=to)
    convert(source, out_path(tmp_path, to), to=to, which="model")
    assert_same(read_published(out_path(tmp_path, to)).state("model"), model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["state"][3].pop("ema"), "has no 'ema' in the optimizer"),
        (lambda s: s["state"].pop(3), "has no 'ema' in the optimizer"),
        (lambda s: s["state"][3].update(ema=torch.zeros(9)), r"'ema' for .* has another shape"),
        (lambda s: s["state"][3].update(ema=1.0), r"'ema' for .* has another shape"),
        (lambda s: s["param_groups"][0]["params"].pop(), "it is not clear which belong together"),
        (lambda s: s.pop("param_groups"), "has no 'ema' in the optimizer"),
        (lambda s: s.update(param_groups=7), "has no 'ema' in the optimizer"),
    ],
)
def test_averages_that_do_not_match_the_parameters(change, message, tmp_path):
    model = random_state(tiny())
    optimizer = adam(model)
    change(optimizer)
    source = save_sa_dpm_training(tmp_path, model, model, optimizer=optimizer)
    with pytest.raises(ValueError, match=message) as caught:
        load_published(source, tiny())
    assert str(source) in str(caught.value)
    load_published(source, tiny(), which="model")


def test_averages_are_matched_by_the_order_of_the_groups(tmp_path):
    """As PyTorch before 1.5 numbers parameters: by memory addresses, in any order."""
    model, ema = random_state(tiny(), 1), random_state(tiny(), 2)
    optimizer = adam(ema, first=9000)
    optimizer["state"] = dict(reversed(optimizer["state"].items()))
    source = save_sa_dpm_training(tmp_path, model, ema, optimizer=optimizer)
    assert_same(read_published(source).state("ema"), ema)


# ------------------------------------------------------------------------- using what was read


def test_a_learned_variance_is_cut_off(tmp_path):
    six = tiny("UNetModel").eval()
    six.load_state_dict(random_state(six))
    torch.save(six.state_dict(), tmp_path / "x.pth")
    assert main([str(tmp_path / "x.pth"), str(tmp_path / "out.pth"), "--outputs", "3"]) == 0
    three = tiny("UNetModel", out_channels=3).eval()
    load_published(tmp_path / "out.pth", three)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([1, 500])
    with torch.no_grad():
        torch.testing.assert_close(three(x, t), six(x, t)[:, :3])


@pytest.mark.parametrize(("cls", "layer"), [("Model", "conv_out"), ("UNetModel", "out.2")])
@pytest.mark.parametrize("outputs", [0, -1, 7, True, 2.0])
def test_outputs_that_are_not_there(cls, layer, outputs, tmp_path):
    torch.save(random_state(tiny(cls)), tmp_path / "x.pth")
    channels = len(random_state(tiny(cls))[f"{layer}.weight"])
    with pytest.raises(ValueError, match=rf"outputs=.*between 1 and .*{channels} output channels"):
        convert(tmp_path / "x.pth", tmp_path / "out.pth", outputs=outputs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_warm_start_and_a_head_on_top(layout, tmp_path):
    """The average starts at the loaded weights; the host takes the result as a head's trunk."""
    ema = random_state(tiny(), 1)
    source = LAYOUTS[layout](tmp_path, random_state(tiny(), 2), ema)
    network = tiny()
    load_published(source, network)
    assert_same(EMA({"model": network}).models["model"].state_dict(), ema)
    convert(source, tmp_path / "0.ckpt", to="host", expected=lambda state: network)
    whole = tiny("Model4Pretrained")
    build_criterion(
        "pred_eps_eps2_pretrained",
        NamedSchedule("linear", 50),
        whole,
        trunk=tmp_path / "0.ckpt" / "ema_models_states" / "model.pth",
    )
    assert_same({k: v for k, v in whole.state_dict().items() if k in ema}, ema)


def test_loading_takes_the_networks_precision_and_refuses_as_a_whole(tmp_path):
    state = {k: t.half() for k, t in random_state(tiny()).items()}
    torch.save(state, tmp_path / "x.pth")
    network = tiny()
    load_published(tmp_path / "x.pth", network)
    assert_same(network.state_dict(), {k: t.float() for k, t in state.items()})
    with torch.device("meta"):
        assert_same(read_fitting(str(tmp_path / "x.pth"), tiny()), state)
    other = tiny(ch_mult=[1, 1])
    before = {k: v.clone() for k, v in other.state_dict().items()}
    with pytest.raises(ValueError, match=r"x\.pth does not fit Model"):
        load_published(tmp_path / "x.pth", other)
    assert_same(other.state_dict(), before)
    with pytest.raises(ValueError, match="which must be one of"):
        load_published(tmp_path / "x.pth", network, which="best")


# -------------------------------------------------------------------------------- command line


def saved(folder: Path) -> str:
    return str(save_plain(folder, {}, random_state(tiny())))


def test_what_was_done_is_told(tmp_path, capsys):
    ema, model = random_state(tiny("Model4Pretrained"), 1), random_state(tiny("Model4Pretrained"))
    source, target = save_host(tmp_path, model, ema), tmp_path / "1.ckpt"
    assert main([str(source), str(target), "--to", "host"]) == 0
    assert capsys.readouterr().out == (
        f"{target}: ema and model ({len(ema)} parameters, Model4Pretrained) of {source}, "
        "a checkpoint folder of the host\n"
    )


@pytest.mark.parametrize("to", WRITERS)
def test_an_existing_target_needs_force(to, tmp_path, capsys):
    source, target = saved(tmp_path), out_path(tmp_path / "new", to)
    assert main([source, str(target), "--to", to]) == 0
    torch.save(random_state(tiny(), 5), source)
    there = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert main([source, str(target), "--to", to]) == 2
    assert f"OUT={str(target)!r} exists" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == there
    assert main([source, str(target), "--to", to, "--force"]) == 0
    assert_same(read_published(target).state(), random_state(tiny(), 5))


@pytest.mark.parametrize("to", WRITERS)
def test_force_replaces_nothing_of_another_kind(to, tmp_path):
    source, target = saved(tmp_path), out_path(tmp_path, to)
    if to == "host":
        (target / "it.pth").parent.mkdir()
        (target / "thesis.tex").touch()
    else:
        target.mkdir()
    with pytest.raises(ValueError, match=r"is not a (checkpoint folder|file): it is not replaced"):
        convert(source, target, to=to, force=True)
    assert target.is_dir()


def test_a_failed_conversion_leaves_the_target(tmp_path, monkeypatch):
    source, target = saved(tmp_path), tmp_path / "out.pth"
    target.write_bytes(b"precious")

    def fail(state: object, file: Any) -> None:
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        convert(source, target, force=True)
    assert target.read_bytes() == b"precious"
    assert {p.name for p in tmp_path.iterdir()} == {"plain.pth", "out.pth"}


def test_a_target_must_not_hold_its_source(tmp_path):
    state = random_state(tiny())
    folder = save_host(tmp_path, state, state)
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "link.pth").symlink_to(save_plain(tmp_path, state, state))
    inside = folder / "ema_models_states" / "model.pth"
    for source, target, to in (
        (folder, folder, "host"),
        (inside, folder, "host"),
        (inside, tmp_path / "link" / "20000.ckpt", "host"),
        (inside, inside, "plain"),
        (tmp_path / "plain.pth", tmp_path / "link.pth", "plain"),
    ):
        with pytest.raises(ValueError, match="is IN or holds it"):
            convert(source, target, to=to, force=True)
    assert_same(read_published(folder).state(), state)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: IN, OUT"),
        (["IN"], "the following arguments are required: OUT"),
        (["IN", "OUT", "--to", "x"], "argument --to: invalid choice: 'x'"),
        (["IN", "OUT", "--which", "x"], "argument --which: invalid choice: 'x'"),
        (["IN", "OUT", "--outputs", "x"], "argument --outputs: invalid int value: 'x'"),
        (["IN", "OUT", "--outputs", "9"], "between 1 and the checkpoint's 3 output channels"),
        (["IN", "OUT", "--what"], "unrecognized arguments: --what"),
        (["NONE", "OUT"], "there is no checkpoint NONE"),
        (["IN", "x.ckpt", "--to", "host"], "must be called IT.ckpt"),
        (["IN", "007.ckpt", "--to", "host"], "must be called IT.ckpt"),
        (["IN", "IN/x.pth"], "plain.pth cannot be used (File exists): move it away"),
        (["IN", "/proc/none/x.pth"], "No such file or directory: '/proc/none'"),
        (["OTHER\x1b[2J", "OUT"], "no checkpoint OTHER?[2J"),
    ],
)
def test_bad_arguments_are_told_in_one_line(arguments, message, tmp_path, capsys):
    source = saved(tmp_path)
    here = {"IN": source, "OUT": str(tmp_path / "out.pth"), "IN/x.pth": f"{source}/x.pth"}
    assert main([here.get(word, word) for word in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert [p.name for p in tmp_path.iterdir()] == ["plain.pth"]


def test_an_interrupted_conversion(tmp_path, monkeypatch, capsys):
    def interrupt(state: object, file: Any) -> None:
        raise KeyboardInterrupt

    source = saved(tmp_path)
    monkeypatch.setattr(torch, "save", interrupt)
    assert main([source, str(tmp_path / "out.pth")]) == 130
    assert capsys.readouterr().err == "adapters.convert: interrupted\n"
    assert [p.name for p in tmp_path.iterdir()] == ["plain.pth"]


def test_a_process_of_its_own(tmp_path):
    """Exit codes and one line, with nothing from the imports beside it."""
    command = [sys.executable, "-m", "adapters.convert"]
    (tmp_path / "empty.pth").touch()
    for source, code in ((saved(tmp_path), 0), (str(tmp_path / "empty.pth"), 2)):
        done = subprocess.run(
            [*command, source, str(tmp_path / f"{code}.pth")],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stderr.count("\n")) == (code, int(code == 2))
    said = f"{source} is damaged or not a checkpoint: it is empty"
    assert done.stderr == f"adapters.convert: {said}\n"


@pytest.mark.slow
def test_a_full_sized_training_checkpoint(tmp_path):
    """CelebA64's network with its average, 0.3 GB in half precision: there and back."""
    case = PUBLISHED["celeba64_eps"]
    with torch.device("meta"):
        network = build(case)
    ema = {k: torch.randn(shape).half() for k, shape in case["state"].items()}
    model = {k: t.flip(0) for k, t in ema.items()}
    source = save_sa_dpm_training(tmp_path, model, ema)
    convert(source, tmp_path / "ours.pth", expected=lambda state: network)
    convert(tmp_path / "ours.pth", tmp_path / "back.pth", to="sa_dpm")
    assert_same(read_published(tmp_path / "back.pth").state(), ema)
