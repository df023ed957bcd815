"""The costs of all steps: negative_elbo's own terms, and the best of all trajectories."""

import itertools

import numpy as np
import pytest
import torch

from sa_plugin import NoiseSchedule, choose_timesteps, negative_elbo
from sa_plugin.bounds import pair_terms as module
from sa_plugin.bounds.pair_terms import pair_terms
from tests.gaussian import GaussianData
from tests.refusals import refuses
from tests.sa_plugin.bounds.test_likelihood import gray
from tests.toys import normal, toy_eps

N = 9
SCHEDULE = NoiseSchedule.from_betas(np.linspace(0.02, 0.5, N))
DATA = GaussianData([0.3, -0.5, 0.8], [0.04, 0.3, 0.2], SCHEDULE)
NOISE = normal(0, N + 1, 5, 3)
X0 = gray(5, 3)


def network(x, n):
    """Pairs, for every variance; not the exact ones."""
    eps = toy_eps(x, n * 100.0)
    return eps, eps**2 + 0.3 + 0.2 * torch.cos(x)


@pytest.mark.parametrize("at_once", [1, 40, 2**22])
@pytest.mark.parametrize("variance", ["small", "big", "analytic", "npr", "sn", "iddpm"])
def test_each_entry_is_a_term_of_the_bound(variance, at_once, monkeypatch):
    monkeypatch.setattr(module, "_AT_ONCE", at_once)
    options = {"variance": variance, "gamma": DATA.gamma, "avg_cov": variance == "npr"}
    terms = pair_terms(network, SCHEDULE, X0, noise=lambda t: NOISE[t], **options)
    for s, t in itertools.combinations(range(1, N + 1), 2):
        options |= {"trajectory": [s, t], "noise": lambda k, t=t: NOISE[t]}
        bound = negative_elbo(network, SCHEDULE, X0, **options)
        assert terms[s, t] == pytest.approx(bound.terms[1].mean().item(), rel=1e-10)
    assert np.count_nonzero(terms) == N * (N - 1) // 2


@pytest.mark.parametrize("steps", [2, 4, 6, N])
def test_dp_vb_has_the_least_bound_of_all_trajectories(steps):
    """Tried one by one, on the same noise for each timestep."""
    terms = pair_terms(network, SCHEDULE, X0, noise=lambda t: NOISE[t], variance="sn")

    def total(trajectory):
        options = {"variance": "sn", "trajectory": trajectory}
        options["noise"] = lambda k: NOISE[trajectory[-1 - k]]
        return negative_elbo(network, SCHEDULE, X0, **options).total.mean().item()

    every = [[1, *inner, N] for inner in itertools.combinations(range(2, N), steps - 2)]
    chosen = choose_timesteps(N, steps, "dp_vb", terms=terms)
    assert total(chosen) == pytest.approx(min(map(total, every)), rel=1e-12)


def test_the_noise_is_seeded_and_its_own_at_each_step():
    seen = []

    def model(x, n):
        seen.append(x / SCHEDULE.cum_betas[int(n[0])] ** 0.5)
        return x

    first = pair_terms(model, SCHEDULE, torch.zeros(4000, 1), seed=3)
    assert np.array_equal(pair_terms(model, SCHEDULE, torch.zeros(4000, 1), seed=3), first)
    assert not np.array_equal(pair_terms(model, SCHEDULE, torch.zeros(4000, 1), seed=4), first)
    draws = torch.cat(seen[: N - 1], dim=1)
    assert (draws.T.corrcoef() - torch.eye(N - 1)).abs().max() < 0.09
    assert (draws.var(0) - 1).abs().max() < 0.15


@refuses(
    ({"x0": torch.zeros(3)}, r"x0 must hold at least 1 floating-point images .*\(3,\)"),
    ({"x0": torch.zeros(2, 3, dtype=torch.uint8)}, "x0 must hold .*uint8"),
    ({"x0": [1.0]}, "x0 must hold .*list"),
    ({"variance": "exact"}, "variance must be one of .*'exact'"),
    ({"variance": "analytic"}, "'analytic' needs gamma"),
    ({"variance": "npr"}, "'npr' needs a network that returns the pair"),
    ({"predicts": "score"}, "predicts must be one of .*'score'"),
    ({"seed": -1}, "seed must be .*got -1"),
    ({"noise": lambda t: torch.zeros(1, 3)}, r"noise\(k\) must have shape \(5, 3\)"),
    ({"model": lambda x, n: x / (n[0] - 4)}, "not finite, first at step n = 4"),
)
def test_bad_arguments_are_refused(changed):
    arguments = {"model": toy_eps, "x0": X0, **changed}
    pair_terms(arguments.pop("model"), SCHEDULE, **arguments)
