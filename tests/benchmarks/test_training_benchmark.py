"""benchmarks.training: its rows, and that variants of a memory layout share their weights."""

import argparse
import re

import pytest
import torch
from torch import nn

from benchmarks import machine, training_steps
from benchmarks.gradients import BLOCKS, Sums, gradient_table
from benchmarks.machine import make_network
from benchmarks.training import chosen_variants, main, parse_variants, table
from benchmarks.training_steps import HOST, Variant, build_steps

FEW = ["--network=digits", "--batch=2", "--repeats=2", "--warmup=0"]


@pytest.fixture
def tiny(monkeypatch):
    """A convolution in the network's place."""

    class Net(nn.Conv2d):
        def forward(self, x, t):
            return super().forward(x)

    monkeypatch.setattr(training_steps, "make_network", lambda *_: Net(1, 1, 3, padding=1))


def options(text, **more):
    given = {"bf16": False, "channels_last": True, "compile": False, "K": [2, 4]}
    given |= {"network": "digits", "device": "cpu", "variants": parse_variants(text)}
    return argparse.Namespace(**given | more)


def steps_of(text, **more):
    args = options(text, **more)
    return build_steps(chosen_variants(args), args.network, args.device)


def test_rows_are_those_asked_for(tiny, capsys):
    main([*FEW, "--variants=host,all:2,one", "--K", "2", "4", "--channels_last"])
    said = capsys.readouterr().out
    rows = [line.split("|")[1].strip() for line in said.splitlines() if line.startswith("| ")]
    assert rows[1:] == [
        "plain, ours, channels_last",
        "plain, host-style",
        "SA-2 all, stacked, channels_last",
        "SA-2 one, channels_last",
        "SA-4 one, channels_last",
    ]
    assert "| 1.00 |" in said
    assert "peak memory of this process" in said


def test_ratios_are_of_medians_and_their_interval_of_rounds():
    rows = {Variant("plain"): [1.0, 2.0, 4.0, 8.0], Variant("all", 2): [2.0, 2.0, 12.0, 8.0]}
    said = table({row: (seconds, 0.0) for row, seconds in rows.items()}).splitlines()
    assert said[-2].endswith("| 3000 (1750 to 5000) | 1.00 |")
    # Medians 5 and 3; the rounds' ratios are 2, 1, 3, 1: too few for an interval within them.
    assert said[-1].endswith("| 5000 (2000 to 9000) | 1.67 [1.00, 3.00] |")


def test_a_memory_layout_has_one_network_and_every_row_trains_it(tiny):
    rows = steps_of("plain,host,official,series,all,one,one_series")
    assert len(rows) == 12
    everything = {id(weights): weights for _, weights in rows.values()}
    assert len(everything) == 3  # channels_last, the official style's, the host-style's
    for step, weights in rows.values():
        before = [p.detach().clone() for p in weights.model.parameters()]
        step(torch.rand(2, 1, 8, 8) * 2 - 1)
        assert not any(map(torch.equal, before, weights.model.parameters()))
        numbers = sum(p.numel() for p in weights.model.parameters())
        counted = weights.nbytes() / 4 - 5 * numbers  # weight, gradient, average, two moments
        assert 0 <= counted <= len(before)  # Adam's counters
    alike = steps_of("official", channels_last=False).values()
    assert len({id(weights) for _, weights in alike}) == 1


def test_a_variant_can_have_options_of_its_own(tiny):
    rows = steps_of("host,official:2,one:2+bf16,one:2+compile+bf16,one:2", channels_last=False)
    assert [row.title for row in rows] == [
        "plain, ours",
        "plain, host-style",
        "SA-2, official style",
        "SA-2 one, bf16",
        "SA-2 one, compile, bf16",
        "SA-2 one",
    ]
    by_title = {row.title: weights.model for row, (_, weights) in rows.items()}
    assert by_title["SA-2 one"] is by_title["SA-2 one, bf16"]
    assert by_title["SA-2 one, compile, bf16"]._compiled_call_impl is not None
    assert by_title["SA-2 one"]._compiled_call_impl is None


def test_a_variant_s_loss_is_what_its_name_says():
    expected = {
        "official": ("all", False),
        "series": ("all", False),
        "all": ("all", True),
        "one": ("one", True),
        "one_series": ("one", False),
    }
    for name, found in expected.items():
        loss = Variant(name, 3).loss()
        assert (loss.K, loss.backprop, loss.stack) == (3, *found)
    assert Variant("plain").loss() is None


def test_the_price_of_a_plain_step_is_as_many_network_calls():
    row, images = Variant("price", 2), torch.zeros(6, 1, 8, 8)
    loss = row.loss()
    assert (loss.K, loss.reuse) == (2, True)
    assert len(row.images(images)) == 3
    assert len(Variant("all", 2).images(images)) == 6
    with pytest.raises(ValueError, match="--batch must be a multiple of 4 for price, got 6"):
        Variant("price", 4).images(images)


@pytest.mark.slow
def test_memory_on_the_cpu_is_of_a_process_of_its_own(capsys):
    held = torch.ones(2**28)  # 1 GiB that no row may count
    main([*FEW, "--variants=one:2", "--memory"])
    said = capsys.readouterr().out
    peaks = [float(x) for x in re.findall(r"\| (\d+), \d\.\d\d \|", said)]
    assert len(peaks) == 2
    assert all(100 < peak < machine.peak_memory("cpu") - held.nbytes / 2**20 / 2 for peak in peaks)


@pytest.mark.parametrize("text", ["plain,two", "plain:2", "one:0", "one:x", ""])
def test_unknown_variants_are_refused(text, capsys):
    with pytest.raises(SystemExit):
        main([*FEW, f"--variants={text}"])
    assert "must be some of plain, host, official[:K]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("one:2+fp8", "one takes channels_last, compile, bf16 after +, got 'one:2+fp8'"),
        ("host+bf16", "host takes nothing after +, got 'host+bf16'"),
    ],
)
def test_unknown_options_are_refused(text, said, capsys):
    with pytest.raises(SystemExit):
        main([*FEW, f"--variants={text}"])
    assert said in capsys.readouterr().err


# ------------------------------------------------------------------------- gradient variance


def test_variance_is_of_digits_alone(capsys):
    with pytest.raises(SystemExit):
        main(["--network=cifar10", "--variance"])
    assert "--variance needs --network digits, got 'cifar10'" in capsys.readouterr().err
    with pytest.raises(ValueError, match=f"draws must be at least {2 * BLOCKS}, got 7"):
        gradient_table(nn.Identity(), HOST, 7)


def test_moments_of_draws_are_unbiased():
    """Mean over many samples of two draws, against the law that they are drawn from."""
    generator = torch.Generator().manual_seed(0)
    mu = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    sigma = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    found = []
    for _ in range(4000):
        sums = Sums()
        for _ in range(2):
            reference = torch.randn(3, generator=generator, dtype=torch.float64)
            gradient = torch.randn(3, generator=generator, dtype=torch.float64) * sigma + mu
            sums.add(gradient, reference)
        moments = sums.moments()
        found.append([moments.variance, moments.squared_mean, moments.squared_bias])
    found = torch.tensor(found)
    expected = torch.tensor([sigma.square().sum(), mu.square().sum(), mu.square().sum()])
    assert ((found.mean(0) - expected).abs() < 5 * found.std(0) / 4000**0.5).all()


@pytest.mark.slow
def test_the_table_of_gradients_has_every_row(monkeypatch):
    monkeypatch.setattr("benchmarks.gradients.TRAINED", 2)
    monkeypatch.setattr("benchmarks.gradients.BATCH", 4)
    table = gradient_table(make_network("digits", "cpu"), HOST, 20, bf16=False).splitlines()
    names = [line.split("|")[1].strip() for line in table[2:]]
    assert {"SA-2 all", "reuse", "one", "stratified steps", "antithetic steps"} <= set(names)
    assert names.count("reuse") == names.count("one") == 2
    assert table[2].startswith("| SA-2 all | 1.000 ± 0.000 | 0.0000 ± 0.0000 | 1.00 |")
