"""diffusers' solvers in our sampler: the exact ODE's solution, and what diffusers itself draws."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from sa_plugin import NoiseSchedule, Sampler
from sa_plugin.integrations.diffusers.solvers import SOLVERS, SolverSampler
from tests.gaussian import GaussianData
from tests.refusals import refuses

# diffusers' own: it mixes arrays and tensors in a way of which NumPy 2 warns.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")
LINEAR, COSINE = NoiseSchedule.linear(1000), NoiseSchedule.cosine(1000)
EVEN = NoiseSchedule.from_alphas_cumprod(1 / (1 + np.exp(np.linspace(-8, 8, 961))))  # in log SNR
SHAPE = (8, 1, 2, 2)


def gaussian(schedule):
    mu = torch.tensor([[[0.2, -0.3], [0.0, 0.5]]])
    return GaussianData(mu, torch.tensor([[[0.02, 0.2], [0.6, 1.5]]]), schedule)


def start(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(SHAPE, generator=generator, dtype=torch.float64).to(dtype)


def chain(sampler, x):
    return list(sampler.iterate(x.shape, x_init=x))


def error(solver, steps):
    """From the solution of the probability-flow ODE at step 1."""
    data, x = gaussian(EVEN), start()
    trajectory = list(range(1, 962, 960 // steps))
    sampler = SolverSampler(
        data.network(), EVEN, solver=solver, trajectory=trajectory, clip_x0=False
    )
    (from_mean, from_variance), (mean, variance) = data.marginal(961), data.marginal(1)
    exact = mean + (variance / from_variance).sqrt() * (x - from_mean)
    return float((chain(sampler, x)[-1].x_t - exact).abs().mean())


@pytest.mark.parametrize(
    ("solver", "order"),
    [("ddim", 1), ("dpm_solver", 2), ("unipc", 3.5), ("deis", 3.5), ("ipndm", 2)],
)
def test_the_error_falls_with_the_solvers_order(solver, order):
    """Halving the steps divides it by 2^order; the solvers of order 3 lie between 3 and 4 here.

    iPNDM's first step is of order 1 and its weights are for steps of one length: order 2 remains.
    """
    ratio = error(solver, 40) / error(solver, 80)
    assert np.log2(ratio) == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_first_and_the_last_step_are_ddims(solver):
    """The last one goes to the predicted x_0; all steps of "ddim" are; DPM-Solver is float32."""
    options = {"trajectory": [7, *range(100, 800, 50), 1000], "clip_x0": False}
    network, x = gaussian(LINEAR).network(), start()
    ours = chain(SolverSampler(network, LINEAR, solver=solver, **options), x)
    ddim = chain(Sampler(network, LINEAR, forward="ddim", **options), x)
    assert [(step.t, step.s) for step in ours] == [(step.t, step.s) for step in ddim]
    near = {"rtol": 1e-5, "atol": 1e-5}
    for step, expected in zip(ours, ddim if solver == "ddim" else ddim[:1], strict=False):
        for name in ("x_s", "x0", "eps"):
            torch.testing.assert_close(getattr(step, name), getattr(expected, name), **near)
    if solver != "ipndm":
        torch.testing.assert_close(ours[-1].x_s, ours[-1].x0, **near)


def draw_by_diffusers(made, network, x):
    """As its pipelines draw: the network is called at timestep + 1."""
    states = [x]
    for t in made.timesteps:
        n = torch.full((len(x),), int(t) + 1)
        states.append(made.step(network(states[-1], n), t, states[-1]).prev_sample)
    return states


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("schedule", [LINEAR, COSINE], ids=["linear", "cosine"])
@pytest.mark.parametrize("steps", [5, 25])
@pytest.mark.parametrize("solver", ["dpm_solver", "unipc", "deis"])
def test_it_draws_what_diffusers_draws(solver, steps, schedule, clip):
    """From our betas and eps, with its own spacing and clipping, which is float32.

    DEIS ends at the noise level of step 1 there, with order 3 from 15 steps on: its last step is
    not compared.
    """
    betas = schedule.betas[1:].tolist()
    options = {"prediction_type": "epsilon", "thresholding": clip}
    made = SOLVERS[solver](num_train_timesteps=1000, trained_betas=betas, **options)
    made.set_timesteps(steps)
    network = gaussian(schedule).network()
    theirs = draw_by_diffusers(made, network, start(torch.float32))
    sampler = SolverSampler(network, schedule, solver=solver, steps=steps, clip_x0=clip)
    assert sampler.timesteps[::-1] == [int(t) + 1 for t in made.timesteps]
    steps_taken = chain(sampler, start())
    ours = [step.x_t for step in steps_taken] + [steps_taken[-1].x_s]
    compared = slice(-1 if solver == "deis" else None)
    for mine, other in zip(ours[compared], theirs[compared], strict=True):
        torch.testing.assert_close(mine.float(), other, rtol=2e-3, atol=2e-3)


def test_ddim_is_that_of_diffusers():
    """With the steps of the DDIM paper's "linear", diffusers' "leading"; to float32."""
    options = {"set_alpha_to_one": True, "timestep_spacing": "leading", "clip_sample": True}
    made = DDIMScheduler(1000, trained_betas=LINEAR.betas[1:].tolist(), **options)
    made.set_timesteps(10)
    network = gaussian(LINEAR).network()
    theirs = draw_by_diffusers(made, network, start(torch.float32))[-1]
    ours = Sampler(network, LINEAR, forward="ddim", steps=10, trajectory="linear_ddim")
    image = ours.sample(SHAPE, x_init=start())
    torch.testing.assert_close(image.float(), theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("steps", [1, 5, 25])
@pytest.mark.parametrize("solver", SOLVERS)
def test_each_step_is_one_call_and_an_image_belongs_to_its_number(solver, steps):
    calls, network = [], gaussian(LINEAR).network()

    def counted(x, n, shift):
        calls.append(int(n[0]))
        return network(x - shift, n)

    sampler = SolverSampler(counted, LINEAR, solver=solver, steps=steps)
    shift = torch.linspace(0, 0.1, 8).reshape(8, 1, 1, 1)
    images = sampler.sample(SHAPE, seed=3, first=60, shift=shift)
    assert calls == sampler.timesteps[::-1]
    assert len(calls) == steps
    assert images.isfinite().all()
    parts = sampler.stream(8, SHAPE[1:], seed=3, first=60, batch_size=3, shift=shift)
    whole = next(sampler.stream(8, SHAPE[1:], seed=3, first=60, batch_size=8, shift=shift))
    assert torch.equal(torch.cat(list(parts)), whole)


def test_the_predicted_x0_is_cut_and_makes_xt_with_eps():
    network = gaussian(LINEAR).network()
    sampler = SolverSampler(network, LINEAR, solver="ipndm", steps=5)
    for step in chain(sampler, 3 * start()):
        a, b = LINEAR.cum_alphas[step.t] ** 0.5, LINEAR.cum_betas[step.t] ** 0.5
        assert step.x0.abs().max() <= 1
        torch.testing.assert_close(a * step.x0 + b * step.eps, step.x_t)


@refuses(
    ({"solver": "euler"}, "solver must be one of .*'euler'"),
    ({"steps": 1000}, "steps must be .*999.*1000"),
    ({"steps": None}, "steps must be .*None"),
    ({"trajectory": "quad_ddim_host"}, "trajectory must not repeat steps"),
    ({"trajectory": [1, 5, 5], "steps": 3}, "trajectory must rise strictly"),
    ({"predicts": "score"}, "predicts must be"),
)
def test_what_it_cannot_do_is_refused(bad):
    options = {"solver": "deis", "steps": 50} | bad
    SolverSampler(gaussian(LINEAR).network(), LINEAR, **options)


def test_an_output_that_is_not_finite_is_told():
    sampler = SolverSampler(lambda x, n: x / (n[0] > 500), LINEAR, solver="ipndm", steps=4)
    with pytest.raises(ValueError, match="not finite, first at step n = 500"):
        sampler.sample(SHAPE)
