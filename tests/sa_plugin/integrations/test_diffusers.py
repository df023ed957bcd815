"""diffusers: its pipeline gives our Sampler's images, its loop our SALoss; files are kept."""

from itertools import product

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from sklearn.datasets import load_digits

from sa_plugin import NoiseSchedule, SALoss, Sampler
from sa_plugin.integrations.diffusers import (
    DiffusersSALoss,
    OptimalVarianceScheduler,
    noise_schedule,
    unet_model,
)
from sa_plugin.sampling.reverse import ReverseCoefficients, reverse_moments
from sa_plugin.sampling.variance import NEEDS_SECOND
from tests.refusals import refuses

T = 50
GAMMA = np.linspace(0.3, 0.99, T + 1)
VARIANCES = ["small", "big", "analytic", "npr", "sn", "iddpm", "heuristic", "ocm"]


def unet(channels=3, out=3, **options):
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        in_channels=channels,
        out_channels=out,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        **options,
    ).eval()


def draws(steps, batch, dtype=torch.float32):
    """What DDPMPipeline draws from a generator of seed 0: x_T, then one a step."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, 3, 8, 8, generator=generator, dtype=dtype) for _ in range(steps)]


def images_of(pipeline, steps, batch=2):
    """The pipeline's images in [0, 1]."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline(batch, generator, num_inference_steps=steps, output_type="pt").images


def as_images(x):
    return (x / 2 + 0.5).clamp(0, 1)


PROCESSES = [
    (forward, eta, variance)
    for forward, eta in (("ddpm", 0.0), ("ddim", 0.0), ("ddim", 0.5))
    for variance in VARIANCES
    if forward == "ddpm" or variance not in ("big", "iddpm")
]


@pytest.mark.parametrize("variance", ["big", "iddpm"])
def test_variances_of_ddpm_alone(variance):
    with pytest.raises(ValueError, match="defined for forward 'ddpm' only"):
        OptimalVarianceScheduler(T, forward="ddim", variance=variance)


@pytest.mark.parametrize(
    ("forward", "eta", "variance", "prediction_type"),
    [
        *((*process, "epsilon") for process in PROCESSES),
        # What a network predicts is translated before the process is looked at.
        *product(["ddim"], [0.5], ["small", "sn"], ["sample", "v_prediction"]),
    ],
)
def test_the_pipeline_gives_the_samplers_images(forward, eta, variance, prediction_type):
    pair = variance in NEEDS_SECOND
    network = unet(out=6 if pair else 3)
    options = {"forward": forward, "eta": eta, "variance": variance, "gamma": GAMMA}
    scheduler = OptimalVarianceScheduler(T, prediction_type=prediction_type, **options)
    ours = images_of(DDPMPipeline(network, scheduler), 7)
    x_T, *noise = draws(8, 2)
    model = unet_model(network, scheduler, second=pair)
    sampler = Sampler(model, noise_schedule(scheduler), steps=7, **options)
    expected = sampler.sample(x_T.shape, x_init=x_T, noise=lambda k: noise[k])
    torch.testing.assert_close(ours, as_images(expected), rtol=0, atol=1e-5)
    assert ours.std() > 0.05


@pytest.mark.parametrize(
    ("forward", "eta", "variance", "channels"),
    [
        (*process, channels)
        for process in PROCESSES
        if process[1] or process[0] == "ddpm"
        for channels in (3, 6)
        if channels == 6 or process[2] not in NEEDS_SECOND
    ],
)
def test_a_bf16_pipeline_is_the_samplers_process_rounded_at_each_step(
    forward, eta, variance, channels
):
    """Of a bf16 network: the steps themselves are taken in float32."""
    network = unet(out=channels).bfloat16()
    options = {"forward": forward, "eta": eta, "variance": variance, "gamma": GAMMA}
    scheduler = OptimalVarianceScheduler(T, **options)
    ours = images_of(DDPMPipeline(network, scheduler), 5)
    x, *noise = draws(6, 2, torch.bfloat16)
    sampler = Sampler(network, scheduler.schedule, steps=5, **options)
    tables = torch.from_numpy(sampler.coefficients.stack()).float()
    for k, n in enumerate(sampler.timesteps[::-1]):
        with torch.no_grad():
            output = network(x, n - 1).sample.float()
        first, second = output[:, :3], output[:, 3:]
        c = ReverseCoefficients.unstack(tables[:, k].unbind())
        moments = reverse_moments(c, x.float(), first, second, variance=variance)
        fresh = noise[k].float() if k < 4 else torch.zeros(())
        x = (moments.mean + moments.variance.sqrt() * fresh).bfloat16()
    torch.testing.assert_close(ours, as_images(x), rtol=0, atol=1e-5)


def test_six_channels_serve_a_variance_of_three():
    scheduler = OptimalVarianceScheduler(T)
    x, output = torch.randn(2, 3, 8, 8), torch.randn(2, 6, 8, 8)
    whole, three = (
        scheduler.step(out, 20, x, variance_noise=torch.zeros_like(x), return_dict=False)[0]
        for out in (output, output[:, :3])
    )
    assert torch.equal(whole, three)


def test_the_last_step_adds_no_noise():
    scheduler = OptimalVarianceScheduler(T, variance="big")
    x, output = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    results = [scheduler.step(output, 0, x).prev_sample for _ in range(2)]
    assert torch.equal(*results)
    assert not torch.equal(*(scheduler.step(output, 1, x).prev_sample for _ in range(2)))


def test_a_saved_pipeline_comes_back(tmp_path):
    given = {"variance": "analytic", "gamma": GAMMA, "forward": "ddim", "trajectory": "quad_ddim"}
    saved = DDPMPipeline(unet(), OptimalVarianceScheduler(T, **given))
    saved.save_pretrained(tmp_path)
    pipeline = DDPMPipeline.from_pretrained(tmp_path)
    assert isinstance(pipeline.scheduler, OptimalVarianceScheduler)
    assert pipeline.scheduler.config.gamma[1:] == GAMMA[1:].tolist()
    images = [images_of(each, 4, batch=1) for each in (saved, pipeline)]
    torch.testing.assert_close(*images, rtol=0, atol=1e-5)  # the loaded weights lie elsewhere


def test_a_config_of_diffusers_is_taken_over(tmp_path):
    ddpm = DDPMScheduler(
        num_train_timesteps=T, beta_schedule="squaredcos_cap_v2", prediction_type="sample"
    )
    scheduler = OptimalVarianceScheduler.from_config(ddpm.config, variance="big")
    assert np.array_equal(scheduler.schedule.betas, noise_schedule(ddpm).betas)
    assert scheduler.config.prediction_type == "sample"
    betas = NoiseSchedule.cosine(T).betas[1:]
    OptimalVarianceScheduler(trained_betas=betas, trajectory=[3, 9, 50]).save_pretrained(tmp_path)
    back = OptimalVarianceScheduler.from_pretrained(tmp_path)
    assert np.array_equal(back.schedule.betas[1:], betas)
    assert back.timesteps.tolist() == [49, 8, 2]


@refuses(
    ({"variance": "analytic"}, "needs gamma"),
    ({"variance": "best"}, "variance must be one of .*got 'best'"),
    ({"prediction_type": "flow"}, "prediction_type must be one of .*got 'flow'"),
    ({"clip_sample_range": 0.0}, "clip_sample_range must be a finite number > 0, got 0.0"),
    ({"timestep_spacing": "even"}, "timestep_spacing must be one of .*got 'even'"),
    ({"trajectory": [3, 2]}, "rise strictly"),
    ({"rescale_betas_zero_snr": True}, "must be 'v_prediction' or 'sample', got 'epsilon'"),
)
def test_bad_options_are_refused(options):
    OptimalVarianceScheduler(T, **options)


def test_bad_steps_are_refused():
    scheduler = OptimalVarianceScheduler(T, variance="sn")
    x = torch.zeros(1, 3, 8, 8)
    with pytest.raises(ValueError, match="must have 6 channels with variance 'sn', got 3"):
        scheduler.step(x, 3, x)
    with pytest.raises(ValueError, match=r"timestep must be a whole number in 0..49, got 50"):
        scheduler.step(torch.zeros(1, 6, 8, 8), 50, x)
    with pytest.raises(ValueError, match=r"eta belongs to forward 'ddim'.*got 0.5"):
        scheduler.step(torch.zeros(1, 6, 8, 8), 3, x, eta=0.5)
    for timesteps in ([10, 30], [50, 3], []):
        with pytest.raises(ValueError, match=r"timesteps must fall strictly inside 0..49"):
            scheduler.set_timesteps(timesteps=timesteps)
    for options in ({}, {"timestep_spacing": "leading"}):
        with pytest.raises(ValueError, match="num_inference_steps must be a whole number"):
            OptimalVarianceScheduler(T, **options).set_timesteps()
    with pytest.raises(ValueError, match=r"steps_offset must be a whole number in 0..1, got 2"):
        OptimalVarianceScheduler(T, timestep_spacing="leading", steps_offset=2).set_timesteps(25)


def test_the_schedule_keeps_its_digits():
    found, exact = noise_schedule(DDPMScheduler()), NoiseSchedule.linear(1000)
    for name in ("betas", "cum_alphas", "cum_betas"):
        expected = getattr(exact, name)
        np.testing.assert_allclose(getattr(found, name), expected, rtol=2e-6, atol=0)
    np.testing.assert_allclose(found.cum_betas[1:20], exact.cum_betas[1:20], rtol=2e-7, atol=0)


def train(prediction_type, iterations, out=1):
    """Losses of the usual loop with one line changed, and of SALoss, with the same draws."""
    digits = torch.tensor(load_digits().images / 8 - 1, dtype=torch.float32)[:, None]
    scheduler = DDPMScheduler(T, prediction_type=prediction_type)
    curves = []
    for kind in ("diffusers", "diffusers, called inside", "ours"):
        network = unet(1, out, num_class_embeds=10).train()
        optimizer = torch.optim.Adam(network.parameters(), 1e-3)
        sa_loss = DiffusersSALoss(scheduler, K=3)
        plain = SALoss(noise_schedule(scheduler), K=3, reduction="mean")
        generator = torch.Generator().manual_seed(1)
        curve = []
        for _ in range(iterations):
            index = torch.randint(len(digits), (8,), generator=generator)
            t = torch.randint(T, (8,), generator=generator)
            noise = torch.randn(3, 8, 1, 8, 8, generator=generator)
            x, labels = digits[index], {"class_labels": index % 10}
            if kind == "ours":
                model = unet_model(network, scheduler)
                result = plain(model, x, n=t + 1, noise=noise, **labels)
            else:
                output = None
                if kind == "diffusers":
                    noisy = scheduler.add_noise(x, noise[0], t)
                    output = network(noisy, t, **labels).sample
                result = sa_loss(network, x, noise[0], t, output, noises=noise[1:], **labels)
            optimizer.zero_grad()
            result.total.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            curve.append([result.total.item(), result.sa.item()])
        curves.append(torch.tensor(curve))
    return curves


@pytest.mark.parametrize("out", [1, 2])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_training_on_digits_has_the_losses_of_our_own_loop(prediction_type, out):
    *theirs, ours = train(prediction_type, 3, out)
    for host in theirs:
        torch.testing.assert_close(host, ours, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "sizes"),
    [({}, [12]), ({"stack": False}, [4, 4, 4]), ({"backprop": "one"}, [8, 4]), ({"lam": 0}, [4])],
)
def test_all_calls_are_made_at_once_where_none_was_made_before(options, sizes):
    """With the same loss and gradient as where the loop has made its own."""
    scheduler, network = DDPMScheduler(T), unet()
    x, t = torch.rand(4, 3, 8, 8) * 2 - 1, torch.tensor([5, 10, 15, T - 4])
    noise = torch.randn(3, 4, 3, 8, 8)
    found = []
    for handed_in in (True, False):
        seen = []
        output = network(scheduler.add_noise(x, noise[0], t), t).sample if handed_in else None
        handle = network.register_forward_pre_hook(lambda _, x, seen=seen: seen.append(len(x[0])))
        torch.manual_seed(0)  # the windows' positions
        loss = DiffusersSALoss(scheduler, K=3, **options)
        total = loss(network, x, noise[0], t, output, noises=noise[1:]).total
        handle.remove()
        network.zero_grad()
        total.backward()
        found.append((total.detach(), [p.grad.clone() for p in network.parameters()]))
    assert seen == sizes
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_training_longer_on_digits_has_the_losses_of_our_own_loop():
    host, _, ours = train("epsilon", 300)
    torch.testing.assert_close(host, ours, rtol=0, atol=1e-5)
    assert ours[-50:, 0].mean() < ours[:50, 0].mean()
