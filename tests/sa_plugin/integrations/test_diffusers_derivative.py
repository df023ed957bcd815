"""OptimalVarianceScheduler with "probes" and "lanczos": the derivative of a network it is given."""

import pytest
import torch
from diffusers import DDIMPipeline, DDPMPipeline, DDPMScheduler

from sa_plugin import Sampler
from sa_plugin.integrations.diffusers import OptimalVarianceScheduler, unet_model
from sa_plugin.integrations.diffusers.models import PREDICTION_TYPES
from sa_plugin.sampling.jacobian import Probed
from tests.refusals import refuses
from tests.sa_plugin.integrations.test_diffusers import T, as_images, images_of, unet
from tests.sa_plugin.integrations.test_diffusers_pipelines import (
    SIZE,
    embeddings,
    image_of,
    stable,
)

SHAPE = (2, 3, 8, 8)
PROCESSES = [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 0.5)]
VARIANCES = ["probes", "lanczos"]
# diffusers' own, of a network that is cast by ``to``.
pytestmark = pytest.mark.filterwarnings("ignore:.*should be kept in float32")


def scheduler_of(network, variance, forward="ddpm", eta=0.0, prediction_type="epsilon", **given):
    options = {"variance": variance, "forward": forward, "eta": eta, "probes": 2}
    scheduler = OptimalVarianceScheduler(T, prediction_type=prediction_type, **options)
    scheduler.set_model(network, **given)
    return scheduler


def ours(network, scheduler, steps, generator, dtype=torch.float32):
    """Our Sampler of this process; then x_N and the noise, drawn as by a pipeline."""
    config = scheduler.config
    model = unet_model(network, DDPMScheduler(T))  # its first output as it is
    options = {"predicts": PREDICTION_TYPES[config.prediction_type]}
    probes = config.probes if config.variance == "probes" else 0
    count = 1 + steps * (probes + 1)
    x, *draws = (torch.randn(SHAPE, generator=generator, dtype=dtype) for _ in range(count))
    noise = draws[probes :: probes + 1]
    if probes:
        signs = iter([draw.sign() for k, draw in enumerate(draws) if k % (probes + 1) < probes])
        probed = Probed(model, scheduler.schedule, probes=probes, **options)
        model = pair_of(probed, lambda: next(signs))
    sampler = Sampler(
        model,
        scheduler.schedule,
        steps=steps,
        forward=config.forward,
        eta=config.eta,
        variance="ocm" if probes else config.variance,
        **options,
    )
    return sampler, x, noise


def pair_of(probed, draw):
    """The network with its probed diagonal as a second output, of these signs."""

    def pair(x, n, **kwargs):
        return probed(x, n, draw=draw, **kwargs)

    pair.model = probed
    return pair


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize(("forward", "eta"), PROCESSES)
def test_the_pipeline_gives_the_samplers_images(forward, eta, variance, prediction_type, dtype):
    network = unet().to(dtype)
    scheduler = scheduler_of(network, variance, forward, eta, prediction_type)
    sampler, x, noise = ours(network, scheduler, 4, torch.Generator().manual_seed(0), dtype)
    expected = sampler.sample(SHAPE, x_init=x, noise=noise.__getitem__)
    found = images_of(DDPMPipeline(network, scheduler), 4)
    torch.testing.assert_close(found, as_images(expected), rtol=0, atol=8 * torch.finfo(dtype).eps)
    assert found.std() > 0.05


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize(("forward", "eta"), PROCESSES)
def test_a_bf16_step_is_the_samplers_rounded(forward, eta, variance):
    network = unet().bfloat16()
    scheduler = scheduler_of(network, variance, forward, eta)
    scheduler.set_timesteps(3)
    generator = torch.Generator().manual_seed(0)
    sampler, x, noise = ours(network, scheduler, 3, generator, torch.bfloat16)
    step = next(iter(sampler.iterate(SHAPE, x_init=x.float(), noise=noise.__getitem__)))
    generator.manual_seed(0)
    assert torch.equal(torch.randn(SHAPE, generator=generator, dtype=torch.bfloat16), x)
    with torch.no_grad():
        output = network(x, scheduler.timesteps[0]).sample
    found = scheduler.step(output, scheduler.timesteps[0], x, generator).prev_sample
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, step.x_s.bfloat16())


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_labels_go_to_every_call(mode, variance):
    network, labels = unet(num_class_embeds=10), {"class_labels": torch.tensor([3, 8])}
    scheduler = scheduler_of(network, variance, **labels)
    generator = torch.Generator().manual_seed(0)
    sampler, x, noise = ours(network, scheduler, 4, generator)
    expected = sampler.sample(SHAPE, x_init=x, noise=noise.__getitem__, **labels)
    generator.manual_seed(0)
    x = torch.randn(SHAPE, generator=generator)
    scheduler.set_timesteps(4)
    with mode():
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t, **labels).sample, t, x, generator).prev_sample
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-6)


def test_an_image_depends_on_its_own_generator_alone():
    network = unet()
    pipeline = DDPMPipeline(network, scheduler_of(network, "probes"))
    pipeline.set_progress_bar_config(disable=True)
    asked = {"num_inference_steps": 3, "output_type": "pt"}
    both = pipeline(2, [torch.Generator().manual_seed(k) for k in (4, 5)], **asked).images
    one = pipeline(1, torch.Generator().manual_seed(5), **asked).images
    torch.testing.assert_close(both[1:], one, rtol=0, atol=1e-5)


def test_a_ddim_pipeline_takes_it():
    network = unet()
    pipeline = DDIMPipeline(network, DDPMScheduler(T))
    images = []
    for variance in ("small", *VARIANCES):
        pipeline.scheduler = scheduler_of(network, variance, "ddim")
        images.append(images_of(pipeline, 4))
        assert all((images[-1] - other).abs().max() > 1e-3 for other in images[:-1])


def test_a_saved_pipeline_needs_its_network_again(tmp_path):
    network = unet()
    saved = DDPMPipeline(network, scheduler_of(network, "lanczos"))
    bare = OptimalVarianceScheduler(T, variance="lanczos", probes=2)
    assert dict(saved.scheduler.config) == dict(bare.config)
    saved.save_pretrained(tmp_path)
    back = DDPMPipeline.from_pretrained(tmp_path)
    again = OptimalVarianceScheduler.from_config(saved.scheduler.config)
    said = r"variance 'lanczos' needs the network's derivative: call scheduler.set_model\(unet\)"
    for pipeline in (back, DDPMPipeline(network, again)):
        with pytest.raises(ValueError, match=said):
            images_of(pipeline, 4)
        pipeline.scheduler.set_model(pipeline.unet)
        torch.testing.assert_close(images_of(pipeline, 4), images_of(saved, 4), rtol=0, atol=1e-5)


def test_guidance_is_differentiated_where_the_network_has_it():
    """The latents are our Sampler's of the guided network. The bare network is refused."""
    pipeline, scale = stable("StableDiffusionPipeline"), 3.0
    empty, prompt = embeddings()["negative_prompt_embeds"], embeddings()["prompt_embeds"]

    def guided(x, t):
        both = pipeline.unet(
            torch.cat([x, x]), t[0], encoder_hidden_states=torch.cat([empty, prompt])
        )
        without, within = both.sample.chunk(2)
        return without + scale * (within - without)

    size = {"height": 2 * SIZE, "width": 2 * SIZE, "guidance_scale": scale}
    options = {"variance": "lanczos", "clip_sample": True, "trajectory": "linear"}
    options |= {"set_alpha_to_one": True, "forward": "ddpm"}
    scheduler = OptimalVarianceScheduler.from_config(pipeline.scheduler.config, **options)
    pipeline.scheduler = scheduler
    scheduler.set_model(guided)
    pipeline.set_progress_bar_config(disable=True)
    found = pipeline(
        **embeddings(),
        **size,
        generator=torch.Generator().manual_seed(1),
        num_inference_steps=4,
        output_type="latent",
    ).images
    generator = torch.Generator().manual_seed(1)
    x, *noise = (torch.randn(1, 4, SIZE, SIZE, generator=generator) for _ in range(5))
    sampler = Sampler(
        lambda x, n: guided(x, n - 1), scheduler.schedule, steps=4, variance="lanczos"
    )
    expected = sampler.sample(x.shape, x_init=x, noise=noise.__getitem__)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    scheduler.set_model(pipeline.unet, encoder_hidden_states=prompt)
    with pytest.raises(
        ValueError, match=r"with the pipeline's arguments and guidance: at timestep"
    ):
        image_of(pipeline, {**embeddings(), **size}, 4)
    unguided = {**embeddings(), **size, "guidance_scale": 1.0}
    assert image_of(pipeline, unguided, 4).std() > 0


@pytest.mark.parametrize("variance", VARIANCES)
def test_where_nothing_of_the_image_is_left_nothing_is_differentiated(variance):
    zero = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    derived, small = (OptimalVarianceScheduler(T, variance=v, **zero) for v in (variance, "small"))
    x, output, z = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    for t in (T - 1, 0):  # nor where x_0 is next
        found = [each.step(output, t, x, variance_noise=z).prev_sample for each in (derived, small)]
        assert torch.equal(*found)


class Odd(torch.nn.Module):
    """A network that has another output than the pipeline's, or dropout."""

    def __init__(self, factor, drops):
        super().__init__()
        self.factor, self.dropout = factor, torch.nn.Dropout(drops)

    def forward(self, x, t):
        return self.factor * self.dropout(x)


@pytest.mark.parametrize(("way", "calls"), [("auto", 1), ("jvp", 3), ("difference", 7)])
def test_the_network_is_differentiated_in_the_way_that_is_asked_for(way, calls):
    """Three products: in one graph, one call each, two calls each and one for the output."""
    network, called = Odd(0.5, 0.0), []
    network.register_forward_hook(lambda *_: called.append(1))
    scheduler, x = scheduler_of(network, "lanczos", way=way), torch.ones(SHAPE)
    scheduler.step(0.5 * x, 30, x)
    assert len(called) == calls


@refuses(
    ({"network": Odd(0.52, 0.0)}, "guidance: at timestep 30 it differs from model_output by 0.04 "),
    ({"network": Odd(0.5, 0.1)}, "Dropout 'dropout' is in training mode"),
    ({"way": "exact"}, "way must be one of .*got 'exact'"),
)
def test_what_cannot_be_differentiated_is_refused(given):
    network = given.pop("network", Odd(0.5, 0.0))
    scheduler, x = scheduler_of(network, "probes", **given), torch.ones(SHAPE)
    scheduler.step(0.5 * x, 30, x)


@refuses(
    ({"variance": "probes", "probes": 0}, "probes must be a whole number in 1"),
    ({"variance": "lanczos", "lanczos_steps": 0}, "lanczos_steps must be a whole number in 1"),
    ({"variance": "lanczos", "avg_cov": True}, "avg_cov must be False for variance 'lanczos'"),
)
def test_impossible_options_are_refused(options):
    OptimalVarianceScheduler(T, **options)
