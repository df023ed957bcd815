"""In pipelines of diffusers, with tiny random networks: swapped in for DDIM, the image is the same.

Those of Stable Diffusion need transformers only to be imported; they get embeddings, no text.
"""

import diffusers
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    LDMPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)

from sa_plugin.integrations.diffusers import OptimalVarianceScheduler

T, SIZE = 100, 8
PROCESS = {"num_train_timesteps": T, "beta_start": 0.001, "beta_end": 0.1}
LATENT = {**PROCESS, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
BLOCKS = {"block_out_channels": (8, 16), "norm_num_groups": 4}
CONDITIONED = {
    **BLOCKS,
    "layers_per_block": 1,
    "cross_attention_dim": 8,
    "attention_head_dim": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
}


def made(network, **options):
    torch.manual_seed(0)
    return network(**options).eval()


def unet(channels):
    return made(
        UNet2DModel,
        sample_size=SIZE,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        **BLOCKS,
    )


def conditioned_unet():
    up = ("CrossAttnUpBlock2D", "UpBlock2D")
    return made(UNet2DConditionModel, sample_size=SIZE, up_block_types=up, **CONDITIONED)


def autoencoder(network=AutoencoderKL, channels=4):
    return made(
        network,
        latent_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        **BLOCKS,
    )


def stable(name, **more):
    return getattr(diffusers, name)(
        vae=autoencoder(),
        text_encoder=None,
        tokenizer=None,
        unet=conditioned_unet(),
        scheduler=DDIMScheduler(**LATENT),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **more,
    )


def embeddings():
    generator = torch.Generator().manual_seed(2)
    names = ("prompt_embeds", "negative_prompt_embeds")
    return {name: torch.randn(1, 4, 8, generator=generator) for name in names}


def picture():
    return torch.rand(1, 3, 2 * SIZE, 2 * SIZE, generator=torch.Generator().manual_seed(3))


def ddim():
    return DDIMPipeline(unet(3), DDIMScheduler(**PROCESS)), {}


def latent():
    return LDMPipeline(autoencoder(VQModel, 3), unet(3), DDIMScheduler(**LATENT)), {}


def dit():
    """Its transformer returns 2C channels; the pipeline keeps C."""
    transformer = made(
        DiTTransformer2DModel,
        sample_size=SIZE,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=4,
        out_channels=8,
        norm_num_groups=4,
        num_embeds_ada_norm=1000,  # the pipeline takes 1000 as no class
    )
    scheduler = DDIMScheduler(**PROCESS, clip_sample=False)
    return DiTPipeline(transformer, autoencoder(), scheduler), {"class_labels": [3]}


def text_to_image():
    size = {"height": 2 * SIZE, "width": 2 * SIZE}
    return stable("StableDiffusionPipeline"), {**embeddings(), **size}


def image_to_image():
    return stable("StableDiffusionImg2ImgPipeline"), {**embeddings(), "image": picture()}


def inpainting():
    mask = torch.zeros(1, 1, 2 * SIZE, 2 * SIZE)
    mask[..., :SIZE] = 1
    size = {"height": 2 * SIZE, "width": 2 * SIZE}
    asked = {**embeddings(), **size, "image": picture(), "mask_image": mask, "strength": 1.0}
    return stable("StableDiffusionInpaintPipeline"), asked


def controlled():
    net = made(ControlNetModel, conditioning_embedding_out_channels=(8, 16), **CONDITIONED)
    pipeline = stable("StableDiffusionControlNetPipeline", controlnet=net)
    return pipeline, {**embeddings(), "image": picture()}


def image_of(pipeline, asked, steps=6):
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(1)  # the latent pipeline does not hand its generator to the steps
    return torch.from_numpy(
        pipeline(**asked, generator=generator, num_inference_steps=steps, output_type="np").images
    )


@pytest.mark.parametrize(
    ("make", "eta"),
    [(ddim, 0.0), (ddim, 0.7), (latent, 0.7), (dit, 0.0)]
    + [(each, 0.7) for each in (text_to_image, image_to_image, inpainting, controlled)],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_in_place_of_ddim_the_image_is_the_same(make, eta):
    pipeline, asked = make()
    if make is not dit:  # its call has no eta
        asked["eta"] = eta
    before = image_of(pipeline, asked)
    assert before.std() > 0.01
    pipeline.scheduler = OptimalVarianceScheduler.from_config(pipeline.scheduler.config)
    torch.testing.assert_close(image_of(pipeline, asked), before, rtol=0, atol=1e-4)
    options = {"variance": "analytic", "gamma": torch.linspace(0.3, 0.99, T + 1).tolist()}
    pipeline.scheduler = OptimalVarianceScheduler.from_config(pipeline.scheduler.config, **options)
    after = image_of(pipeline, asked)
    assert (after - before).abs().max() > 3e-4


def test_ddim_pipelines_say_that_they_replace_the_scheduler():
    network, scheduler = unet(3), OptimalVarianceScheduler(**PROCESS)
    said = "samples with diffusers' DDIMScheduler .*set pipeline.scheduler = scheduler afterwards"
    with pytest.warns(UserWarning, match=said):
        DDIMPipeline(network, scheduler)
    DDPMPipeline(network, scheduler)
