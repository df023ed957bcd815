"""benchmarks.training: its rows, and that variants of a memory layout share their weights."""

import argparse

import pytest
import torch
from torch import nn

from benchmarks import training
from benchmarks.training import main, parse_variants, variants

FEW = ["--network=digits", "--batch=2", "--repeats=2", "--warmup=0"]


@pytest.fixture
def tiny(monkeypatch):
    """A convolution in the network's place."""

    class Net(nn.Conv2d):
        def forward(self, x, t):
            return super().forward(x)

    monkeypatch.setattr(training, "make_network", lambda *_: Net(1, 1, 3, padding=1))


def options(text, **more):
    given = {"bf16": False, "channels_last": True, "compile": False, "K": [2, 4]}
    given |= {"network": "digits", "device": "cpu", "variants": parse_variants(text)}
    return argparse.Namespace(**given | more)


def test_rows_are_those_asked_for(tiny, capsys):
    main([*FEW, "--variants=host,all:2,one", "--K", "2", "4", "--channels_last"])
    said = capsys.readouterr().out
    rows = [line.split("|")[1].strip() for line in said.splitlines() if line.startswith("| ")]
    assert rows[1:] == [
        "plain, ours",
        "plain, host-style",
        "SA-2 all, stacked",
        "SA-2 one",
        "SA-4 one",
    ]
    assert "| 1.00 |" in said
    assert "peak memory of this process" in said


def test_a_memory_layout_has_one_network_and_every_row_trains_it(tiny):
    rows, everything = variants(options("plain,host,official,series,all,one"))
    assert len(rows) == 10
    assert len(everything) == 3  # channels_last, the official style's, the host-style's
    for step, weights in rows.values():
        before = [p.detach().clone() for p in weights.model.parameters()]
        step(torch.rand(2, 1, 8, 8))
        assert not any(map(torch.equal, before, weights.model.parameters()))
        numbers = sum(p.numel() for p in weights.model.parameters())
        counted = weights.nbytes() / 4 - 5 * numbers  # weight, gradient, average, two moments
        assert 0 <= counted <= len(before)  # Adam's counters
    assert len(variants(options("official", channels_last=False))[1]) == 1


@pytest.mark.parametrize("text", ["plain,two", "plain:2", "one:0", "one:x", ""])
def test_unknown_variants_are_refused(text, capsys):
    with pytest.raises(SystemExit):
        main([*FEW, f"--variants={text}"])
    assert "must be some of plain, host, official[:K]" in capsys.readouterr().err
