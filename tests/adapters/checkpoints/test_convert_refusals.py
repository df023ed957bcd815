"""Malicious, damaged and unknown checkpoint files: refused by name, with nothing executed."""

import argparse
import io
import os
import pickle
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.checkpoints.files import read_file
from adapters.checkpoints.fitting import load_published
from adapters.checkpoints.layouts import read_published
from adapters.convert import main
from tests.commands import one_line
from tests.published import (
    LAYOUTS,
    assert_same,
    random_state,
    save_host,
    save_plain,
    save_sa_dpm_training,
    settings_like_sa_dpm,
    tiny,
)

# ---------------------------------------------------------------------------- malicious files


class Reduced:
    """Pickles as a call of ``function(*args)``."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


def attacks(trace: Path) -> dict[str, Any]:
    code = f"open({str(trace)!r}, 'w')"
    return {
        "os.system": Reduced(os.system, f"touch {trace}"),
        "eval": Reduced(eval, code),
        "exec": Reduced(exec, code),
        "open": Reduced(open, str(trace), "w"),
        "subprocess": Reduced(subprocess.call, ["touch", str(trace)]),
        "import": Reduced(__import__, "this"),
        "getattr": Reduced(getattr, argparse.Namespace, "__init__"),
        "torch.load": Reduced(torch.load, str(trace)),
    }


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("place", ["alone", "state", "namespace", "nested", "folder"])
@pytest.mark.parametrize("attack", attacks(Path("x")))
def test_a_malicious_pickle_is_refused_and_not_run(attack, place, legacy, tmp_path, capsys):
    trace, model = tmp_path / "trace", random_state(tiny())
    evil = attacks(trace)[attack]
    content = {
        "alone": evil,
        "state": model | {"x": evil},
        "namespace": {"model_dict": model, "args": argparse.Namespace(x=evil)},
        "nested": {"model_dict": model, "args": settings_like_sa_dpm(x=[{"y": evil}])},
        "folder": evil,
    }[place]
    path = tmp_path / "evil.pth"
    if place == "folder":
        path = save_host(tmp_path, model, model) / "ema_models_states" / "model.pth"
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    source = path.parent.parent if place == "folder" else path
    assert main([str(source), str(tmp_path / "out.pth"), "--which", "ema"]) == 2
    error = one_line(capsys, path, "which is no data; nothing of it was run")
    assert "weights_only" not in error
    assert not trace.exists()
    assert not (tmp_path / "out.pth").exists()


def test_the_attacks_would_leave_a_trace(tmp_path):
    """Else their absence above would show nothing."""
    trace = tmp_path / "trace"
    torch.save(attacks(trace)["os.system"], tmp_path / "evil.pth")
    torch.load(tmp_path / "evil.pth", weights_only=False)
    assert trace.exists()


def test_a_namespace_is_read_and_dropped(tmp_path):
    """Its attributes could shadow methods, as here a second BUILD would call ``__setstate__``."""
    pickled = (
        b"\x80\x02cargparse\nNamespace\n)\x81}X\x0c\x00\x00\x00__setstate__c_codecs\nencode\nsb}b."
    )
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
        for name, content in (("data.pkl", pickled), ("version", b"3"), ("byteorder", b"little")):
            archive.writestr(f"x/{name}", content)
    content = read_file(tmp_path / "x.pth")
    assert type(content).__name__ == "Settings"
    assert vars(content) == {}


def test_the_permission_for_a_namespace_ends_with_the_reading(tmp_path):
    before = set(torch.serialization.get_safe_globals())
    model = random_state(tiny())
    source = save_sa_dpm_training(tmp_path, model, model)
    assert_same(read_published(source).state(), model)
    assert set(torch.serialization.get_safe_globals()) == before
    with pytest.raises(pickle.UnpicklingError, match=r"argparse\.Namespace"):
        torch.load(source, weights_only=True)


def test_other_formats_are_refused_before_pytorch_sees_them(tmp_path, monkeypatch):
    start = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("storages"), io.BytesIO())
    content = bytearray((tmp_path / "a.tar").read_bytes())
    content[: len(start)] = start  # a tar file may begin with any file's name
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content[:512])
    (tmp_path / "disguised.tar").write_bytes(content)
    assert tarfile.is_tarfile(tmp_path / "disguised.tar")
    (tmp_path / "text.pth").write_text("<html>404</html>")
    (tmp_path / "pickle.pth").write_bytes(b"\x80\x04N.")
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("reached PyTorch"))
    for name in ("a.tar", "disguised.tar", "text.pth", "pickle.pth"):
        with pytest.raises(ValueError, match=rf"{name} is .*it is not a file of torch\.save"):
            read_published(tmp_path / name)


def test_torchscript_is_refused(tmp_path):
    path = tmp_path / "script.pth"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("constants.pkl", "data.pkl", "version"):
            archive.writestr(f"script/{name}", b"\x80\x02).")
    with pytest.raises(ValueError, match=r"script\.pth is damaged or not a checkpoint"):
        read_published(path)


# ------------------------------------------------------------------------------ damaged files


@pytest.mark.parametrize("layout", ["plain", "legacy", "host", "sa_dpm_training", "ddim"])
@pytest.mark.parametrize("tenths", [*range(10), 9.99])
def test_a_truncated_file_is_refused_by_name(layout, tenths, tmp_path, capsys):
    state = random_state(tiny())
    source = LAYOUTS[layout](tmp_path, state, state)
    file = source / "ema_models_states" / "model.pth" if layout == "host" else source
    content = file.read_bytes()
    file.write_bytes(content[: min(int(len(content) * tenths / 10), len(content) - 1)])
    assert main([str(source), str(tmp_path / "out.pth")]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert f"{file} is damaged or not a checkpoint: " in captured.err
    assert ("it is empty" in captured.err) == (tenths == 0)
    assert captured.out == ""
    assert not (tmp_path / "out.pth").exists()


def test_a_hole_in_a_file_of_full_length_is_seen(tmp_path):
    """PyTorch itself reads it as weights of zero."""
    state = random_state(tiny())
    path = save_plain(tmp_path, state, state)
    content = bytearray(path.read_bytes())
    middle = content.index(state["conv_in.weight"].numpy().tobytes())
    content[middle + 8 : middle + 40] = bytes(32)
    path.write_bytes(content)
    assert not torch.load(path, weights_only=True)["conv_in.weight"].flatten()[2:10].any()
    with pytest.raises(ValueError, match=r"plain\.pth is .*: the checksum of its part"):
        read_published(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (3, "holds a int"),
        (torch.zeros(3), "holds a Tensor"),
        ({}, "holds the entries none"),
        ([], "a list with 0 state dicts"),
        ([{"a": torch.zeros(1)}] * 3, "a list with 3 state dicts"),
        ([5, {"a": torch.zeros(1)}], "must begin with the model's"),
        ({"a": 1, "b": {"c": 2}}, "the entries 'a', 'b', 0 of them state dicts"),
        ({"x": {"a": torch.zeros(1)}, "y": {"a": torch.zeros(1)}}, "2 of them state dicts"),
        ({"ema1": {"a": torch.zeros(1)}, "ema2": {"a": torch.zeros(1)}}, "2 of them state dicts"),
        ({1: torch.zeros(1)}, "holds the entries 1"),
        ({"args": argparse.Namespace(a=1)}, "holds the entries 'args'"),
        ({"model_dict": 5}, "holds the entries 'model_dict'"),
    ],
)
def test_an_unknown_layout_is_refused(content, message, tmp_path):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=message) as caught:
        read_published(tmp_path / "x.pth")
    assert str(tmp_path / "x.pth") in str(caught.value)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.tensor([1.0, float("nan"), 2.0, 3.0]), "not finite"),
        (torch.tensor([1.0, float("-inf"), 2.0, 3.0]), "not finite"),
        (torch.zeros(4, dtype=torch.int64), r"torch\.int64: must be a dense floating-point"),
        (torch.zeros(4, device="meta"), "without data"),
    ],
)
def test_tensors_that_are_no_weights(tensor, message, tmp_path):
    torch.save(random_state(tiny()) | {"conv_in.bias": tensor}, tmp_path / "x.pth")
    network = tiny()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    with pytest.raises(ValueError, match=rf"x\.pth: 'conv_in\.bias' is .*{message}"):
        load_published(tmp_path / "x.pth", network)
    assert_same(network.state_dict(), before)


@pytest.mark.parametrize("count", [0, 2])
def test_a_folder_without_one_network(count, tmp_path):
    folder = tmp_path / "7.ckpt" / "ema_models_states"
    folder.mkdir(parents=True)
    for i in range(count):
        torch.save(random_state(tiny()), folder / f"{i}.pth")
    message = "holds 2 networks" if count else "is not a checkpoint folder of the host"
    with pytest.raises(ValueError, match=message):
        read_published(tmp_path / "7.ckpt")
    torch.save(random_state(tiny()), folder / "model.pth")
    assert_same(read_published(tmp_path / "7.ckpt").state(), random_state(tiny()))
    torch.save([random_state(tiny())], folder / "model.pth")
    with pytest.raises(ValueError, match=r"ema_models_states/model\.pth must hold a state dict"):
        read_published(tmp_path / "7.ckpt").state()
