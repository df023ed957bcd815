"""OptimalVarianceScheduler in place of diffusers' own: what it keeps, and what it refuses."""

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMInverseScheduler,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from sa_plugin import NoiseSchedule, SALoss
from sa_plugin.hooks.wrappers import EpsModel
from sa_plugin.integrations.diffusers import (
    DiffusersSALoss,
    OptimalVarianceScheduler,
    noise_schedule,
)
from tests.refusals import refuses
from tests.sa_plugin.integrations.test_diffusers import GAMMA, T, images_of, unet

NEAR = {"rtol": 1e-4, "atol": 1e-4}
ZERO_SNR = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}


KERNEL = torch.randn(3, 3, 3, 3, generator=torch.Generator().manual_seed(4)) / 5


def chain(scheduler, steps, channels=3, last=True, **options):
    """x after the steps, by a network that answers to x and to t."""
    generator = torch.Generator().manual_seed(5)
    scheduler.set_timesteps(steps)
    x = torch.randn(2, 3, 8, 8, generator=generator)
    for t in scheduler.timesteps if last else scheduler.timesteps[:-1]:
        out = torch.conv2d(x, KERNEL, padding=1).tanh() + 0.3 * x * (1 + t / 2 / len(scheduler))
        out = out.repeat(1, channels // 3, 1, 1)
        x = scheduler.step(out, t, x, generator=generator, **options).prev_sample
    return x


PREDICTIONS = ("epsilon", "sample", "v_prediction")
SPACINGS = ("leading", "linspace", "trailing")
DDIMS = [{"timestep_spacing": s, "prediction_type": p} for s in SPACINGS for p in PREDICTIONS]
DDIMS += [
    {"set_alpha_to_one": False},
    {"set_alpha_to_one": False, "steps_offset": 1, "clip_sample": False},
    {"clip_sample_range": 1.7},
    {"thresholding": True, "sample_max_value": 2.0, "dynamic_thresholding_ratio": 0.9},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {**ZERO_SNR, "timestep_spacing": "trailing"},
]


@pytest.mark.parametrize("eta", [0.0, 0.6])
@pytest.mark.parametrize("options", DDIMS, ids=str)
def test_it_does_what_ddim_did(options, eta):
    """To float32's 1e-4. With 7 of 1000 steps, DDIM steps by T // 7 past the visited timesteps."""
    ddim = DDIMScheduler(**options)
    ours = OptimalVarianceScheduler.from_config(ddim.config)
    clipped = {"eta": eta, "use_clipped_model_output": options == {"clip_sample_range": 1.7}}
    torch.testing.assert_close(chain(ours, 7, **clipped), chain(ddim, 7, **clipped), **NEAR)
    assert ours.previous_timestep(500) == 500 - 1000 // 7  # a timestep that is not visited
    x = torch.randn(1, 3, 8, 8)
    torch.testing.assert_close(*(each.step(x, 500, x).prev_sample for each in (ours, ddim)), **NEAR)


DDPMS = [{"timestep_spacing": s, "prediction_type": p} for s in SPACINGS for p in PREDICTIONS]
DDPMS += [{"variance_type": v} for v in ("fixed_small_log", "fixed_large", "learned_range")]
DDPMS += [{"steps_offset": 1}, {"clip_sample_range": 1.7}, {"thresholding": True}]


@pytest.mark.parametrize("options", DDPMS, ids=str)
def test_it_does_what_ddpm_did(options):
    """But for the last step, where DDPM adds noise unless its timestep is 0."""
    ddpm = DDPMScheduler(**options)
    ours = OptimalVarianceScheduler.from_config(ddpm.config)
    channels = 6 if options.get("variance_type") == "learned_range" else 3
    found, expected = (chain(each, 7, channels, last=False) for each in (ours, ddpm))
    torch.testing.assert_close(found, expected, **NEAR)
    t = ddpm.timesteps[3]
    assert ours.previous_timestep(t) == ddpm.previous_timestep(t) == ours.timesteps[4]
    assert ours.previous_timestep(t + 1) == t
    assert ours.previous_timestep(ours.timesteps[-1]) == -1
    x, noise = torch.randn(2, 2, 3, 8, 8)
    expected = ddpm.get_velocity(x, noise, torch.tensor([3, 40]))
    assert torch.equal(ours.get_velocity(x, noise, torch.tensor([3, 40])), expected)


# diffusers' own: it makes arrays in a way of which NumPy 2 warns.
array_warning = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
LAST = {"final_sigmas_type": "sigma_min", "timestep_spacing": "trailing", "thresholding": True}
TAKEN = [
    (PNDMScheduler, {"steps_offset": 1}, {"set_alpha_to_one": False, "steps_offset": 1}),
    (DPMSolverMultistepScheduler, {}, {"trajectory": "linear", "set_alpha_to_one": True}),
    (
        DPMSolverMultistepScheduler,
        LAST,
        {"set_alpha_to_one": False, "timestep_spacing": "trailing", "thresholding": True},
    ),
    (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}, {"forward": "ddpm"}),
    (DPMSolverMultistepScheduler, {"variance_type": "learned_range"}, {"variance": "small"}),
    (UniPCMultistepScheduler, {}, {"beta_schedule": "linear"}),
    (EulerDiscreteScheduler, {"prediction_type": "sample"}, {"prediction_type": "sample"}),
    (EulerAncestralDiscreteScheduler, {}, {"forward": "ddpm", "trajectory": "linear"}),
    (HeunDiscreteScheduler, {}, {"trajectory": "linear"}),
    (DDPMScheduler, {"variance_type": "learned_range"}, {"forward": "ddpm", "variance": "iddpm"}),
]


@array_warning
@pytest.mark.parametrize(("kind", "options", "expected"), TAKEN)
def test_every_kind_of_scheduler_is_taken_over(kind, options, expected, tmp_path):
    """Also from a folder, whose configuration says its class and not its defaults."""
    theirs = kind(T, **options)
    expected = {"forward": "ddim", "num_train_timesteps": T} | expected
    if "clip_sample" not in theirs.config:
        expected["clip_sample"] = False
    memory = OptimalVarianceScheduler.from_config(theirs.config)
    theirs.save_pretrained(tmp_path)
    for ours in (memory, OptimalVarianceScheduler.from_pretrained(tmp_path)):
        assert {key: ours.config[key] for key in expected} == expected
        assert chain(ours, 5, channels=6).isfinite().all()


def test_what_a_scheduler_only_keeps_for_others_does_not_count():
    pndm = PNDMScheduler(T, skip_prk_steps=True, set_alpha_to_one=False)
    solver = DPMSolverMultistepScheduler.from_config(pndm.config)
    assert solver.config.set_alpha_to_one is False  # its steps do not look at it
    assert OptimalVarianceScheduler.from_config(solver.config).config.set_alpha_to_one


@pytest.mark.parametrize("other", [DDIMScheduler, PNDMScheduler, DPMSolverMultistepScheduler])
def test_other_schedulers_keep_its_configuration(other):
    ours = OptimalVarianceScheduler(T, variance="analytic", gamma=GAMMA, set_alpha_to_one=False)
    theirs = other.from_config(ours.config)
    assert theirs.config.num_train_timesteps == T
    back = OptimalVarianceScheduler.from_config(theirs.config)
    assert {key: back.config[key] for key in ours.config} == dict(ours.config)


@array_warning
@refuses(
    ((FlowMatchEulerDiscreteScheduler, {}), "flow matching, EDM and others .*got .*'base_shift'"),
    ((EDMEulerScheduler, {}), "config must be of .*got .*'sigma_data'"),
    ((LCMScheduler, {}), "config must be of .*got .*'original_inference_steps'"),
    ((DDIMInverseScheduler, {}), "config must be of .*got .*'clip_sample'"),
    ((DDPMScheduler, {"variance_type": "learned"}), "variance_type must be one of .*'learned'"),
    (
        (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
        "use_karras_sigmas must be False in the config of DPMSolverMultistepScheduler, got True",
    ),
    ((UniPCMultistepScheduler, {"use_flow_sigmas": True}), "use_flow_sigmas must be False"),
    (
        (UniPCMultistepScheduler, {"prediction_type": "flow_prediction"}),
        "prediction_type must be one of .*got 'flow_prediction'",
    ),
    ((LMSDiscreteScheduler, {}), "forward must be 'ddpm' or 'ddim' for a config that may be of"),
)
def test_what_cannot_be_kept_is_refused_by_name(theirs):
    kind, options = theirs
    OptimalVarianceScheduler.from_config(kind(**options).config)


def test_what_the_user_gives_goes_before_the_config():
    solver = DPMSolverMultistepScheduler(T, use_karras_sigmas=True)
    given = {
        "use_karras_sigmas": False,
        "forward": "ddpm",
        "variance": "big",
        "trajectory": "power2",
    }
    ours = OptimalVarianceScheduler.from_config(solver.config, **given)
    assert {key: ours.config[key] for key in given} == given
    for config in (solver.config, ours.config, {"num_train_timesteps": T}):
        with pytest.raises(TypeError, match=r"has no argument 'varaince', it has .*variance"):
            OptimalVarianceScheduler.from_config(config, varaince="analytic", gamma=GAMMA)
    with pytest.raises(ValueError, match="from_pretrained reads a folder"):
        OptimalVarianceScheduler.from_config("folder")
    assert OptimalVarianceScheduler.from_config({"num_train_timesteps": T}).config.forward == "ddpm"


def test_eta_0_which_pipelines_always_pass_leaves_its_own():
    ours = OptimalVarianceScheduler(T, forward="ddim", eta=0.5)
    assert torch.equal(chain(ours, 5, eta=0.0), chain(ours, 5))
    assert torch.equal(
        chain(ours, 5, eta=0.7), chain(OptimalVarianceScheduler(T, forward="ddim", eta=0.7), 5)
    )


def test_a_product_that_float32_cannot_hold_is_no_other_process():
    scheduler = DDPMScheduler(beta_start=0.01, beta_end=0.2)
    assert scheduler.alphas_cumprod[-1] == 0
    schedule = noise_schedule(scheduler)
    assert 0 < schedule.cum_alphas[-1] < 1e-40
    images = []
    for variance in ("small", "analytic"):
        options = {"variance": variance, "gamma": np.linspace(0.5, 1, 1001)}
        ours = OptimalVarianceScheduler.from_config(scheduler.config, **options)
        images.append(images_of(DDPMPipeline(unet(), ours), 10))
        assert images[-1].isfinite().all()
    assert not torch.equal(*images)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod**1.01
    with pytest.raises(ValueError, match="is not the cumulative product"):
        noise_schedule(scheduler)


def test_a_zero_terminal_snr_is_the_limit_of_smaller_ones():
    """In the loss, whose last step has no gradient, and in the scheduler."""
    scheduler = DDPMScheduler(T, **ZERO_SNR)
    assert scheduler.betas[-1] == 1
    betas = scheduler.betas.double()
    betas[-1] = 1 - 1e-9
    near = NoiseSchedule.from_betas(betas)
    with pytest.warns(UserWarning, match=r"does not train its last step; keep your own v loss"):
        loss = DiffusersSALoss(scheduler, K=2)
    x, noise = torch.rand(4, 3, 8, 8) * 2 - 1, torch.randn(2, 4, 3, 8, 8)
    t = torch.tensor([3, 30, T - 2, T - 1])
    found = loss(unet(), x, noise[0], t, noises=noise[1:])
    model = EpsModel(lambda x, t: unet()(x, t).sample, near, index_from=0, predicts="v")
    expected = SALoss(near, reduction="mean")(model, x, n=t + 1, noise=noise)
    torch.testing.assert_close(found.simple_per_sample, expected.simple_per_sample)
    torch.testing.assert_close(found.sa_per_sample, expected.sa_per_sample)
    assert found.simple_per_sample[-1] < 1e-10 < 1e-3 < found.simple_per_sample[1]
    given = {"timestep_spacing": "trailing"}
    ours = OptimalVarianceScheduler.from_config(scheduler.config, **given)
    given |= {"trained_betas": betas.tolist(), "rescale_betas_zero_snr": False}
    smaller = OptimalVarianceScheduler.from_config(scheduler.config, **given)
    torch.testing.assert_close(chain(ours, 5), chain(smaller, 5), rtol=0, atol=1e-3)


def test_where_nothing_of_the_image_is_left_no_covariance_is_had():
    ddpm = DDPMScheduler(T, timestep_spacing="trailing", **ZERO_SNR)
    given = {"variance": "analytic", "gamma": GAMMA}
    analytic = OptimalVarianceScheduler.from_config(ddpm.config, **given)
    small = OptimalVarianceScheduler.from_config(ddpm.config)
    x, output, noise = torch.randn(3, 2, 3, 8, 8)
    for t, equal in ((T - 1, True), (T - 11, False)):
        steps = [
            each.step(output, t, x, variance_noise=noise).prev_sample for each in (analytic, small)
        ]
        assert torch.equal(*steps) == equal
    assert chain(analytic, 5).isfinite().all()


def test_a_zero_terminal_snr_needs_a_network_that_predicts_the_image():
    scheduler = DDPMScheduler(T, rescale_betas_zero_snr=True)
    for entrance in (noise_schedule, DiffusersSALoss):
        with pytest.raises(ValueError, match=r"DDPMScheduler has a zero terminal SNR: .*'epsilon'"):
            entrance(scheduler)
