"""diffusers' unconditional training on scikit-learn's digits, with the SA loss instead of its own.

    accelerate launch examples/diffusers_unconditional.py    or torchrun, or just python

Writes a pipeline and a grid of images for each of the variances "small" and "analytic".
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.utils import make_image_grid
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DataLoader

from sa_plugin.integrations.diffusers import (
    DiffusersSALoss,
    OptimalVarianceScheduler,
    noise_schedule,
    unet_model,
)
from sa_plugin.sampling.gamma import estimate_gamma

SIZE = 8  # large enough for the two resolutions of the UNet


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output_dir", type=Path, default=Path("runs/diffusers_digits"))
    parser.add_argument("--iterations", type=int, default=1500)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--channels", type=int, default=16, help="a multiple of 8")
    parser.add_argument("--train_timesteps", type=int, default=1000)
    parser.add_argument("--K", type=int, default=2, help="number of steps in a window")
    parser.add_argument("--lam", type=float, default=1.0, help="0: the plain loss")
    parser.add_argument("--gamma_images", type=int, default=32)
    parser.add_argument("--inference_steps", type=int, default=50)
    parser.add_argument("--images", type=int, default=32, help="a multiple of 8")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def load_images() -> Tensor:
    """[1797, 1, 8, 8] in [-1, 1]."""
    return torch.tensor(load_digits().images / 8 - 1, dtype=torch.float32)[:, None]


def make_unet(channels: int) -> UNet2DModel:
    return UNet2DModel(
        sample_size=SIZE,
        in_channels=1,
        out_channels=1,
        block_out_channels=(channels, 2 * channels),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )


def train(
    args: argparse.Namespace, accelerator: Accelerator, scheduler: DDPMScheduler, images: Tensor
) -> UNet2DModel:
    model = make_unet(args.channels)
    optimizer = torch.optim.AdamW(model.parameters(), args.learning_rate)
    loader = DataLoader(images, args.batch_size, shuffle=True, drop_last=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    sa_loss = DiffusersSALoss(scheduler, K=args.K, lam=args.lam)
    iteration = 0
    while iteration < args.iterations:
        for clean_images in loader:
            noise = torch.randn_like(clean_images)
            shape, steps = (len(clean_images),), scheduler.config.num_train_timesteps
            timesteps = torch.randint(steps, shape, device=clean_images.device)
            # Was: noisy_images = scheduler.add_noise(clean_images, noise, timesteps)
            #      model_output = model(noisy_images, timesteps).sample
            #      loss = F.mse_loss(model_output, noise)
            loss = sa_loss(model, clean_images, noise, timesteps).total
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            iteration += 1
            if iteration % 100 == 0 or iteration == args.iterations:
                accelerator.print(f"iteration {iteration}: loss {loss.item():.4f}", flush=True)
            if iteration == args.iterations:
                break
    return accelerator.unwrap_model(model).eval()


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    # Without GPUs several processes know of each other only if they are told to use the CPU.
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    # Each process draws its own timesteps and noise. Accelerate gives all the first one's weights,
    # and divides one order of the images among them.
    set_seed(args.seed, device_specific=True)
    images, ddpm = load_images(), DDPMScheduler(num_train_timesteps=args.train_timesteps)
    unet = train(args, accelerator, ddpm, images)
    if not accelerator.is_main_process:
        return
    some = images[torch.randperm(len(images))[: args.gamma_images]].to(unet.device)
    gamma = estimate_gamma(unet_model(unet, ddpm), noise_schedule(ddpm), [some])
    for variance, options in (("small", {}), ("analytic", {"gamma": gamma.values})):
        scheduler = OptimalVarianceScheduler.from_config(
            ddpm.config, variance=variance, trajectory="linear", **options
        )
        pipeline = DDPMPipeline(unet, scheduler)
        generator = torch.Generator().manual_seed(args.seed)
        pictures = pipeline(args.images, generator, num_inference_steps=args.inference_steps).images
        pipeline.save_pretrained(args.output_dir / variance)
        grid = make_image_grid(pictures, args.images // 8, 8, resize=4 * SIZE)
        grid.save(args.output_dir / f"{variance}.png")
    print(f"images and pipelines: {args.output_dir}")


if __name__ == "__main__":
    main()
