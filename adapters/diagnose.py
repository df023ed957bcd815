"""Does SA help this network? python -m adapters.diagnose --config FILE.py

Measures a trained network's errors by step, its bias given the image and the variance of its
samples, beside what the closed form predicts: ``sa_plugin.diagnose``. The network is that of the
configuration's run, or of ``--weights FILE`` (docs/checkpoints.md), or without a configuration a
diffusers folder: ``--diffusers FOLDER --images FOLDER``. Tables, CSV files and a picture go to
``--out``, by default to ``diagnosis/`` in the run's folder.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapters.checkpoints.fitting import read_fitting
from adapters.experiment.config import check_holds, read_command_line
from adapters.experiment.experiment import Experiment
from adapters.experiment.run import stages_of
from adapters.measuring.image_sources import open_images
from adapters.pictures.diagnosis_pictures import plot_diagnosis
from adapters.sample import adapter_of
from adapters.shell.command import OwnOptions, exit_code, keep_freed_memory
from adapters.shell.options import own_options, whole_numbers
from sa_plugin.diagnosis.measurement import diagnose
from sa_plugin.effect.spectrum import Spectrum
from sa_plugin.loss import SALoss
from third_party.common.data import ImageDataset, spread_images, spread_rows, to_unit_range
from third_party.extended_analytic_dpm.methods import get_method

MODULE = "adapters.diagnose"
FOLDER = "diagnosis"
BATCH = 500  # images of the spectrum that are read at once


@dataclass(frozen=True)
class Subject:
    """What is diagnosed: a network (x, n) -> eps, the SA loss meant, and images of its data."""

    model: Callable[..., Any]
    loss: SALoss
    images: ImageDataset
    clip_x0: bool = True
    progress: bool = False
    dry_run: bool = False
    out: Path | None = None
    given: dict[str, Tensor] = field(default_factory=dict)  # of the images, such as labels


def run(argv: Sequence[str]) -> None:
    """Print the tables; write them, their CSV files and the picture."""
    own, rest = _parser().parse_known_args(list(argv[1:]))
    least = {"n_images": 2, "batch_size": 1, "grid": 1, "noise_seed": 0, "probes": 0}
    for name, low in least.items():
        if getattr(own, name) < low:
            raise ValueError(f"--{name} must be >= {low}, got {getattr(own, name)}")
    subject = _of_diffusers(own, rest) if own.diffusers else _of_run(own, [argv[0], *rest])
    if subject.dry_run:
        calls = (
            own.grid * (subject.loss.K + 3 + 2 * own.probes)
            + 2 * sum(own.steps)
            + (own.gap_start or 0)
        )
        print(f"{own.n_images} images, {own.n_images * calls:.3g} network evaluations")
        return
    found = diagnose(
        subject.model,
        subject.loss.schedule,
        to_unit_range(spread_images(subject.images, own.n_images)).split(own.batch_size),
        loss=subject.loss,
        steps=own.grid,
        sampling_steps=own.steps,
        n_images=own.n_images,
        batch_size=own.batch_size,
        spectrum=Spectrum.of(subject.images.uint8_batches(BATCH)),
        gap_start=own.gap_start,
        probes=own.probes,
        clip_x0=subject.clip_x0,
        seed=own.noise_seed,
        progress=subject.progress,
        **subject.given,
    )
    print(found.table(), end="")
    out = own.out or subject.out
    if out is not None:
        paths = found.write(out)
        plot_diagnosis(out / "diagnosis.png", found)
        print("\n", *(f"{path}\n" for path in [*paths, out / "diagnosis.png"]), sep="", end="")


def _parser() -> OwnOptions:
    parser = own_options(MODULE, "Measure what the SA loss would change in a trained network.")
    add = parser.add_argument
    add("--weights", "--checkpoint", type=Path, help="checkpoint to use instead of the run's")
    add("--diffusers", type=Path, help="folder of a diffusers pipeline or UNet2DModel, no --config")
    add("--images", help="images instead of the configuration's: folder, npz, tar, data set")
    add("--out", type=Path, help="folder for the tables and the picture")
    add("--n_images", type=int, default=256, help="images and samples; default: 256")
    add("--grid", type=int, default=20, help="how many steps n of the forward process; default: 20")
    add("--steps", type=whole_numbers, default=(5, 10, 25), help="sampling steps; default: 5,10,25")
    add("--gap_start", type=int, help="also follow Theorem 1's gap from this step")
    add("--probes", type=int, default=0, help="also measure its derivative, by so many probes")
    add("--batch_size", type=int, default=64, help="images in a network call; default: 64")
    add("--noise_seed", type=int, default=0, help="seed of all noise; default: 0")
    return parser


def _of_run(own: argparse.Namespace, argv: Sequence[str]) -> Subject:
    """The noise network of a configuration's run, or of a checkpoint that fits it."""
    line = read_command_line(argv, (), MODULE)
    host = adapter_of(line.config)
    experiment = Experiment(host, line.config, line.workdir, line.device, line.progress)
    if own.weights is None:
        check_holds(line.workdir, host.recorded(line.config), host.module)
        network, typ = stages_of(experiment)["base"].average()
    else:
        method = experiment.base_method
        network, typ = experiment.network(method), get_method(method).typ
        network.load_state_dict(read_fitting(own.weights, network))
        network = network.to(experiment.device).eval()
    shape = experiment.image_shape
    images = experiment.dataset
    if own.images is not None:
        images = _images_of(own.images, shape, data_root=line.config.data.root)
    _check_shape(images, shape)
    return Subject(
        experiment.wrapper(network, typ),
        experiment.loss,
        images,
        clip_x0=line.config.sample.clip_x0,
        progress=line.progress,
        dry_run=line.dry_run,
        out=line.workdir / FOLDER if own.weights is None else None,
        given=experiment.labels_of(images, spread_rows(len(images), own.n_images)),
    )


def _of_diffusers(own: argparse.Namespace, rest: Sequence[str]) -> Subject:
    """A diffusers UNet2DModel with the scheduler that is saved beside it."""
    parser = OwnOptions(MODULE, add_help=False)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dry_run", action="store_true")
    parser.add_argument("--noprogress", action="store_false", dest="progress")
    given = parser.parse_args(list(rest))
    if own.images is None or own.weights is not None:
        raise ValueError("--diffusers needs --images, and its weights are its own")
    unet_folder, scheduler_folder = _folders(own.diffusers)
    try:  # an extra, which the other networks do not need
        from sa_plugin.integrations.diffusers import noise_schedule, unet_model
    except ModuleNotFoundError as error:
        raise ValueError(str(error)) from None
    from diffusers import DDPMScheduler, UNet2DModel

    local = {"local_files_only": True}
    unet = UNet2DModel.from_pretrained(unet_folder, use_safetensors=True, **local)
    scheduler = DDPMScheduler.from_pretrained(scheduler_folder, **local)
    size = unet.config.sample_size
    if isinstance(size, int):
        shape = (unet.config.in_channels, size, size)
        images = _images_of(own.images, shape)
        _check_shape(images, shape)
    else:
        images = open_images(own.images)
    model = unet_model(unet.to(given.device).eval(), scheduler)
    loss = SALoss(noise_schedule(scheduler))
    return Subject(model, loss, images, progress=given.progress, dry_run=given.dry_run)


def _folders(folder: Path) -> tuple[Path, Path]:
    """Where the UNet and its scheduler are: in a pipeline's folder, or the UNet's own."""
    unet = folder / "unet" if (folder / "unet").is_dir() else folder
    for scheduler in (unet, folder / "scheduler", folder.parent / "scheduler"):
        if (unet / "config.json").is_file() and (scheduler / "scheduler_config.json").is_file():
            return unet, scheduler
    raise ValueError(
        f"--diffusers must be a pipeline's folder, or a UNet2DModel's with scheduler_config.json "
        f"in it or in scheduler/ beside it, got {folder}"
    )


def _images_of(source: str, shape: tuple[int, ...], **where: Any) -> ImageDataset:
    """The images of a source; files are cropped and resized to a square network's shape."""
    channels, height, width = shape
    size = height if height == width else 0
    return open_images(source, size=size, channels=channels, **where)


def _check_shape(images: ImageDataset, shape: tuple[int, ...]) -> None:
    if tuple(images.image_shape) != tuple(shape):
        raise ValueError(
            f"images must have the network's shape {tuple(shape)}, got {images.image_shape}"
        )


def main(argv: Sequence[str]) -> int:
    """Run the command (program name first); return the code of ``exit_code``."""
    return exit_code(MODULE, lambda: run(argv), continues="")


if __name__ == "__main__":
    keep_freed_memory()
    sys.exit(main(sys.argv))
