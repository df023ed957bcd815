"""benchmarks.correction: every correction acts, and the ratio is taken within a round."""

from __future__ import annotations

import torch

from benchmarks.correction import ALONE, report, ways_of


def test_every_way_calls_the_network_and_every_correction_acts():
    torch.manual_seed(0)
    found = {title: way() for title, way in ways_of("loop", 4, "cpu").items()}
    assert len(found) == 5
    for title, eps in found.items():
        assert eps.shape == (4, 1, 8, 8)
        assert torch.equal(eps, found[ALONE]) == (title == ALONE)


def test_the_ratio_is_taken_within_a_round(capsys):
    report({ALONE: [0.001, 0.010, 0.002], "other": [0.0011, 0.0120, 0.0026]})
    row = capsys.readouterr().out.splitlines()[-1]
    assert row.startswith("| other | 2.600 (1.850 to 7.300) | 1.200 (1.150 to 1.250) | 1.100 to")
