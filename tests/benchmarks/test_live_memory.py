"""benchmarks.live_memory: what it counts, and that backprop="one" takes the plain step's memory."""

import pytest
import torch
from torch import nn

from benchmarks.live_memory import LiveMemory, main, step_peak
from benchmarks.training_steps import Variant


def test_storages_count_from_the_operator_to_their_release():
    with LiveMemory() as memory:
        a = torch.zeros(1000)  # 4,000 bytes
        b = a.view(10, 100)  # none of its own
        c = a + 1
        assert memory.peak == 8000
        del a, c
        b.add_(1)  # holds a's storage
        c = torch.zeros(500)
        assert memory.peak == 8000
        d = torch.zeros(1000)
        assert memory.peak == 10000
    assert len(b) + len(c) + len(d) == 1510


def test_a_graph_holds_what_its_backward_pass_needs():
    model = nn.Sequential(*[nn.Tanh() for _ in range(8)])
    x = torch.zeros(1000, device="meta", requires_grad=True)
    with LiveMemory() as kept:
        model(x).sum().backward()
    with LiveMemory() as none, torch.no_grad():
        model(x)
    assert none.peak == 2 * 4000
    assert 8 * 4000 <= kept.peak <= 11 * 4000


@pytest.mark.parametrize("K", [2, 4])
def test_one_backward_pass_takes_the_memory_of_the_plain_step(K):
    """The window's calls are made before the host's: they leave nothing behind but their errors."""
    plain = step_peak(Variant("plain"), "digits", 128)
    assert step_peak(Variant("one", K), "digits", 128) <= 1.05 * plain
    assert step_peak(Variant("all", K), "digits", 128) >= 0.8 * K * plain


def test_the_table(capsys):
    main(["--network=digits", "--batch=4", "--variants=plain,one:2"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [line.split("|")[1].strip() for line in lines] == ["step", "plain, ours", "SA-2 one"]
    assert lines[1].endswith("| 1.00 |")
