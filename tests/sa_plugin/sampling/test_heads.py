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
@pytest.mark.parametrize(
    "bounds",
    [
        {"NPR, joint": 0.1, "SN, joint": 0.1},
        {"NPR, complex head": 0.05, "SN, complex head": 0.1},
    ],
    ids=["joint", "complex heads on a frozen network"],
)
def test_learnt_variances_come_close_to_the_exact_ones(bounds):
    """Mean of |log(variance / exact)| over pixels and steps; DDPM's own two are far off.

    A frozen noise network has learnt nothing of the second output; its features suffice.
    """
    found = errors(learnt(Problem.two_halves(), iterations=600, names=list(bounds)))
    means = {name: float(error[:-1].mean()) for name, error in found.items()}
    for name, bound in bounds.items():
        assert means[name] < bound, means
    assert min(means["DDPM small"], means["DDPM big"]) > 0.2, means
