"""Timesteps: the published code's lists, brute force, limits, refusals."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sa_plugin.sampling.trajectory import (
    TRAJECTORIES,
    choose_timesteps,
    least_cost_path,
    resolve_trajectory,
)
from sa_plugin.schedule import NoiseSchedule
from tests.refusals import refuses
from tests.toys import read_json, schedule_of

GOLDEN = read_json("trajectories")
RISING = [kind for kind in TRAJECTORIES if kind != "quad_ddim_host"]


def gamma_of(N, bad=False):
    """The Gamma of the reference numbers."""
    gamma = 1 - 0.9 * np.exp(-1000 * np.arange(N + 1) / N / 200)
    gamma[0] = 0
    if bad:
        gamma[int(0.95 * N) :] = 1.01
    return gamma


def cheapest(cost, first, last, nodes):
    """The least sum over every path, tried one by one."""
    inner = itertools.combinations(range(first + 1, last), nodes - 2)
    return min(total(cost, [first, *middle, last]) for middle in inner)


def total(cost, path):
    return sum(cost[s, t] for s, t in itertools.pairwise(path))


@pytest.mark.parametrize("key", GOLDEN)
def test_equals_the_published_code(key):
    name, kind, steps = key.split("/")
    schedule = schedule_of(name)
    gamma = gamma_of(schedule.N, bad=kind == "dp_seg_bad")
    kind = kind.removesuffix("_bad")
    chosen = choose_timesteps(schedule.N, int(steps), kind, gamma=gamma, betas=schedule.betas)
    expected = list(GOLDEN[key])
    for k in range(1, len(expected)):  # where the original repeats timesteps: pushed up by one
        expected[k] = max(expected[k], expected[k - 1] + 1)
    assert chosen == expected


@pytest.mark.parametrize("key", [key for key in GOLDEN if "/quad_ddim/" in key])
def test_quad_ddim_host_repeats_steps_as_the_published_code(key):
    """49 different ones of 50 steps, and 96 of 100."""
    name, kind, steps = key.split("/")
    chosen = choose_timesteps(schedule_of(name).N, int(steps), f"{kind}_host")
    assert chosen == GOLDEN[key]
    assert len(chosen) - len(set(chosen)) == {50: 1, 100: 4}.get(len(chosen), 0)


@given(st.integers(1, 300), st.data(), st.sampled_from(RISING))
@settings(max_examples=150, deadline=None)
def test_every_trajectory_rises_strictly_inside_the_range(N, data, kind):
    steps = data.draw(st.integers(1, N))
    first_bad = data.draw(st.integers(N // 2 + 2, N + 1))
    rng = np.random.default_rng(N)
    gamma = rng.uniform(0, 1, N + 1)
    gamma[first_bad:] = 1.02
    tables = {"gamma": gamma, "betas": rng.uniform(1e-4, 0.5, N)}
    chosen = choose_timesteps(N, steps, kind, **tables, terms=rng.normal(size=(N + 1, N + 1)))
    assert len(chosen) == steps
    assert all(isinstance(t, int) for t in chosen)
    assert np.all(np.diff(chosen) > 0)
    assert chosen[0] >= 1
    assert chosen[-1] <= N
    if kind in ("linear", "power2", "dp_seg", "dp_vb") and steps > 1:
        assert (chosen[0], chosen[-1]) == (1, N)


@pytest.mark.parametrize("kind", RISING)
def test_limits(kind):
    N = 40
    schedule = NoiseSchedule.linear(N)
    tables = {"gamma": gamma_of(N), "betas": schedule.betas, "terms": np.zeros((N + 1, N + 1))}
    assert choose_timesteps(N, 1, kind, **tables) == [N]
    assert choose_timesteps(N, N, kind, **tables) == list(range(1, N + 1))
    assert choose_timesteps(1, 1, kind, gamma=[0, 0.5], betas=[0.1], terms=np.zeros((2, 2))) == [1]


@given(st.integers(3, 9), st.data())
@settings(max_examples=60, deadline=None)
def test_least_cost_path_equals_brute_force(N, data):
    cost = np.random.default_rng(data.draw(st.integers(0, 10**6))).normal(size=(N + 1, N + 1))
    first = data.draw(st.integers(0, N - 2))
    last = data.draw(st.integers(first + 1, N))
    nodes = data.draw(st.integers(2, last - first + 1))
    path = least_cost_path(cost, first, last, nodes)
    assert (path[0], path[-1], len(path)) == (first, last, nodes)
    assert np.all(np.diff(path) > 0)
    assert total(cost, path) == pytest.approx(cheapest(cost, first, last, nodes), rel=1e-12)


@pytest.mark.parametrize("steps", range(2, 13))
def test_dp_seg_is_the_cheapest_by_its_published_cost(steps):
    schedule, gamma = NoiseSchedule.cosine(12), gamma_of(12)
    cost = np.full((13, 13), np.nan)
    for t in range(2, 13):
        for s in range(1, t):
            ratio = schedule.skip_beta(s, t) * gamma[t] / schedule.cum_betas[t]
            cost[s, t] = np.log(1 - ratio)
    path = choose_timesteps(12, steps, "dp_seg", gamma=gamma, betas=schedule.betas)
    assert total(cost, path) == pytest.approx(cheapest(cost, 1, 12, steps), rel=1e-12)


@pytest.mark.parametrize("steps", range(2, 9))
def test_dp_vb_is_the_cheapest_and_reads_only_what_it_needs(steps):
    terms = np.random.default_rng(steps).normal(size=(9, 9))
    used = np.triu(np.ones((9, 9), bool), k=1)
    used[0] = False
    path = choose_timesteps(8, steps, "dp_vb", terms=np.where(used, terms, np.nan))
    assert total(terms, path) == pytest.approx(cheapest(terms, 1, 8, steps), rel=1e-12)


def test_dp_seg_where_skip_beta_rounds_to_cum_beta():
    """Gamma = 1 at large t of a cosine schedule: a plain 1 - ratio would be log 0."""
    betas = NoiseSchedule.cosine(60).betas
    path = choose_timesteps(60, 10, "dp_seg", gamma=np.ones(61), betas=betas)
    assert (path[0], path[-1], len(path)) == (1, 60, 10)


def test_dp_seg_gives_the_part_cut_off_four_fifths_of_its_share():
    """bad = 102 of 1000 steps: ceil((1 - 0.8 * 0.102) 100) = 92 timesteps to 1..898, 8 after.

    A short one leaves no share to the part that was cut off; N is visited all the same.
    """
    betas = NoiseSchedule.linear(1000).betas

    def path(steps):
        return choose_timesteps(1000, steps, "dp_seg", gamma=gamma_of(1000, True), betas=betas)

    assert path(100)[91:] == [898, 911, 924, 936, 949, 962, 974, 987, 1000]
    clean = choose_timesteps(898, 92, "dp_seg", gamma=gamma_of(1000)[:899], betas=betas[:899])
    assert path(100)[:92] == clean
    for steps in (2, 3, 10):
        assert path(steps)[0] == 1
        assert path(steps)[-1] == 1000
        assert path(steps)[-2] <= 898


def test_linear_ddim_where_steps_do_not_divide():
    """Evenly over the whole range, and as many as were asked for."""
    assert choose_timesteps(10, 4, "linear_ddim") == [1, 3, 6, 8]
    assert choose_timesteps(10, 6, "linear_ddim") == [1, 2, 4, 6, 7, 9]


def test_betas_with_and_without_the_leading_zero():
    schedule, gamma = NoiseSchedule.linear(50), gamma_of(50)
    plain = choose_timesteps(50, 7, "dp_seg", gamma=gamma, betas=schedule.betas[1:])
    assert plain == choose_timesteps(50, 7, "dp_seg", gamma=gamma, betas=schedule.betas)


GOOD = {"gamma": gamma_of(10), "betas": np.full(10, 0.1), "terms": np.zeros((11, 11))}


@refuses(
    ((10, 5, "cubic"), "trajectory must be one of .*power2.*'cubic'"),
    ((10, 5, None), "trajectory must be one of"),
    ((0, 1, "linear"), "N must be a whole number"),
    ((10, 0, "linear"), r"steps must be a whole number in 1\.\.10, got 0"),
    ((10, 11, "quad_ddim"), r"steps must be a whole number in 1\.\.10, got 11"),
    ((10, 2.5, "linear"), "steps must be a whole number"),
    ((10, True, "linear"), "steps must be a whole number"),
    ((10, None, "linear"), "steps must be a whole number"),
)
def test_bad_arguments_are_refused(arguments):
    choose_timesteps(*arguments, **GOOD)


@refuses(
    (("dp_seg", {"gamma": None}), "needs gamma"),
    (("dp_seg", {"betas": None}), "needs betas"),
    (("dp_vb", {"terms": None}), "needs terms"),
    (("dp_seg", {"gamma": np.ones(10)}), r"gamma must have shape \(11,\).*\(10,\)"),
    (("dp_seg", {"gamma": [0.5] * 10 + [np.nan]}), r"gamma\[10\] = nan"),
    (("dp_seg", {"gamma": [0.5, -0.1] + [0.5] * 9}), r"gamma\[1\] = -0.1"),
    (("dp_seg", {"gamma": [0.5] * 4 + [1.1] * 7}), r"gamma\[4\] = 1.1"),
    (("dp_seg", {"betas": np.full(9, 0.1)}), r"betas must hold .*\(9,\)"),
    (("dp_seg", {"betas": np.full(11, 0.1)}), r"betas must hold .*\(11,\)"),
    (("dp_seg", {"betas": np.full(10, np.inf)}), r"inside \(0, 1\)"),
    (("dp_vb", {"terms": np.zeros((10, 10))}), r"terms must have shape \(11, 11\)"),
    (("dp_vb", {"terms": np.full((11, 11), np.nan)}), r"terms\[1, 2\]"),
)
def test_bad_tables_are_refused(case):
    kind, table = case
    choose_timesteps(10, 5, kind, **GOOD | table)


def test_a_list_is_taken_as_it_is():
    schedule = NoiseSchedule.cosine(10)
    assert resolve_trajectory(schedule, None, [2, 5, 9]) == [2, 5, 9]
    assert resolve_trajectory(schedule, 3, np.array([1, 2, 10])) == [1, 2, 10]
    assert resolve_trajectory(schedule, 3, "linear") == [1, 6, 10]


@refuses(
    ((None, []), "list of whole numbers"),
    ((None, [1.5, 2]), "list of whole numbers"),
    ((None, 7), "list of whole numbers"),
    ((None, [0, 1]), r"rise strictly inside 1\.\.10"),
    ((None, [1, 11]), r"rise strictly inside 1\.\.10"),
    ((None, [5, 3]), r"rise strictly"),
    ((None, [3, 3]), r"rise strictly"),
    ((4, [1, 2, 3]), "3 entries, but steps = 4"),
    ((None, "linear"), "steps must be a whole number"),
)
def test_bad_lists_are_refused(steps_and_trajectory):
    resolve_trajectory(NoiseSchedule.cosine(10), *steps_and_trajectory)
