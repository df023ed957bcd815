"""NPR, SN and OCM heads learn the exact optimal variances of Gaussian data."""

from itertools import pairwise

import pytest
import torch

from benchmarks.heads import Problem, errors, learnt


@pytest.mark.parametrize("reach", [0.0, 3.0])
def test_the_exact_variance_is_bayes(reach):
    """diag Cov[x_s | x_t] for x_t = sqrt(skip_alpha) x_s + noise of variance skip_beta."""
    problem = Problem.two_halves(reach)
    one = torch.eye(64, dtype=torch.float64)
    assert torch.allclose(problem.root @ problem.root.T, problem.S, rtol=1e-12)
    assert (problem.S.count_nonzero() > 64) == (reach > 0)
    steps = problem.steps()
    for (t, c), (s, _) in pairwise(steps):
        a_t, a_s = (torch.as_tensor(problem_cum_alpha(n)) for n in (t, s))
        skip_alpha = a_t / a_s
        prior = a_s * problem.S + (1 - a_s) * one
        of_x_t = skip_alpha * prior + (1 - skip_alpha) * one
        expected = prior - skip_alpha * prior @ torch.linalg.inv(of_x_t) @ prior
        assert torch.allclose(problem.exact(c).flatten(), expected.diagonal(), rtol=1e-9)


def problem_cum_alpha(n):
    """Of the linear schedule with 1000 steps."""
    return torch.prod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)[:n])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reach", "bounds"),
    [
        (0.0, {"NPR, joint": 0.1, "SN, joint": 0.1}),
        (0.0, {"NPR, complex head": 0.05, "SN, complex head": 0.1}),
        (3.0, {"NPR, complex head": 0.05, "SN, complex head": 0.1, "OCM, complex head": 0.05}),
    ],
    ids=["joint", "complex heads on a frozen network", "of correlated pixels"],
)
def test_learnt_variances_come_close_to_the_exact_ones(reach, bounds):
    """Mean of |log(variance / exact)| over pixels and steps; DDPM's own two are far off.

    A frozen noise network has learnt nothing of the second output; its features suffice.
    """
    found = errors(learnt(Problem.two_halves(reach), iterations=600, names=list(bounds)))
    means = {name: float(error[:-1].mean()) for name, error in found.items()}
    for name, bound in bounds.items():
        assert means[name] < bound, means
    assert min(means["DDPM small"], means["DDPM big"]) > 0.2, means
