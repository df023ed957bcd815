"""benchmarks.sampling: the same work in every way, a fair order, and intervals of the median."""

from __future__ import annotations

from argparse import Namespace
from collections import Counter

import pytest
import torch

from benchmarks import machine
from benchmarks.sampling import host_loop, measure, report
from sa_plugin import NoiseSchedule, Sampler
from tests.toys import normal


@pytest.mark.parametrize(
    ("n", "ranks"), [(6, (1, 6)), (15, (4, 12)), (20, (6, 15)), (30, (10, 21))]
)
def test_interval_of_the_median_is_that_of_the_tables(n, ranks):
    """Ranks of the usual tables of the sign test."""
    assert machine.median_interval(list(range(n, 0, -1))) == ranks


def test_few_values_have_spreads_too():
    assert machine.quartiles([3.0]) == "3.000 (3.000 to 3.000)"
    assert machine.quartiles([1.0, 2.0, 3.0, 4.0, 5.0], "{:.0f}") == "3 (2 to 4)"
    assert machine.median_interval([2.0, 1.0]) == (1.0, 2.0)


def test_each_way_is_as_often_in_each_place():
    made = []
    ways = {name: lambda name=name: made.append(name) for name in "abcdefg"}
    seconds, _ = measure(ways, Namespace(rounds=14, device="cpu", clock="cpu"))
    assert {name: len(times) for name, times in seconds.items()} == dict.fromkeys("abcdefg", 14)
    rounds = [made[i : i + 7] for i in range(7, len(made), 7)]  # the first is the warm-up
    assert Counter((name, place) for one in rounds for place, name in enumerate(one)) == Counter(
        {(name, place): 2 for name in "abcdefg" for place in range(7)}
    )


def test_the_hosts_loop_does_the_samplers_work():
    net, shape = machine.network("loop", "cpu")
    x, schedule = normal(0, 4, *shape).float(), NoiseSchedule.linear(1000)
    sampler = Sampler(net, schedule, forward="ddim", steps=10)
    expected = sampler.sample(x.shape, x_init=x)
    torch.testing.assert_close(host_loop(net, schedule, sampler.timesteps, x, "ddim"), expected)


def test_the_table_is_taken_within_a_round(capsys):
    seconds = {"sampler ddpm": [1.0, 10.0, 2.0], "sampler ddim": [2.0, 2.0, 2.0]}
    seconds |= {"host ddpm": [1.1, 12.0, 2.6], "calls": [0.5, 5.0, 1.0]}
    report(seconds, dict.fromkeys(seconds, 7.0), Namespace(batch=8, steps=4, device="cpu"))
    table = capsys.readouterr().out
    row = next(line for line in table.splitlines() if line.startswith("| host ddpm"))
    # 8 images in 2.6 s; ratios 1.1, 1.2, 1.3, where the medians' own is 1.3
    assert row.startswith("| host ddpm | 3.077 | 650.000 | 1.200 (1.150 to 1.250) | 1.100 to 1.300")
