"""The host's NPR and SN heads learn the exact optimal variances of Gaussian data."""

from itertools import pairwise

import pytest
import torch

from benchmarks.heads import Problem, errors, learnt


def test_the_exact_variance_is_bayes():
    """Var[x_s | x_t] for x_t = sqrt(skip_alpha) x_s + noise of variance skip_beta."""
    problem = Problem.two_halves()
    steps = problem.steps()
    for (t, c), (s, _) in pairwise(steps):
        a_t, a_s = (torch.as_tensor(problem_cum_alpha(n)) for n in (t, s))
        skip_alpha = a_t / a_s
        prior = a_s * problem.S + 1 - a_s
        expected = prior * (1 - skip_alpha) / (skip_alpha * prior + 1 - skip_alpha)
        assert torch.allclose(problem.exact(c), expected, rtol=1e-9)


def problem_cum_alpha(n):
    """Of the linear schedule with 1000 steps."""
    return torch.prod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)[:n])


@pytest.mark.slow
def test_jointly_learnt_variances_come_close_to_the_exact_ones():
    """Mean of |log(variance / exact)| over pixels and steps; DDPM's own two are far off."""
    found = errors(learnt(Problem.two_halves(), iterations=600, names=["NPR, joint", "SN, joint"]))
    means = {name: float(error[:-1].mean()) for name, error in found.items()}
    assert max(means["NPR, joint"], means["SN, joint"]) < 0.1, means
    assert min(means["DDPM small"], means["DDPM big"]) > 0.2, means


@pytest.mark.slow
def test_complex_heads_on_a_frozen_network_come_close_to_the_exact_variances():
    """The noise network has learnt nothing of the second output; its features suffice."""
    names = ["NPR, complex head", "SN, complex head"]
    found = errors(learnt(Problem.two_halves(), iterations=600, names=names))
    means = {name: float(error[:-1].mean()) for name, error in found.items()}
    assert means["NPR, complex head"] < 0.05, means
    assert means["SN, complex head"] < 0.1, means
    assert min(means["DDPM small"], means["DDPM big"]) > 0.2, means
