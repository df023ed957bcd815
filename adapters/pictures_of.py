"""Pictures of a finished run's chains: python -m adapters.pictures_of --config configs/FILE.py

The pictures are written to ``pictures/`` in the run's folder. ``strip_PROCESS_STEPS.png``, one for
every reverse process of the configuration, shows how some images develop from noise.
``variances_STEPS.png`` shows the variances of the DDPM reverse processes over n; with
``--probes=M`` also the one that the network's own derivative says.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from adapters.experiment.config import CommandLine, check_holds, read_command_line
from adapters.experiment.experiment import Experiment
from adapters.experiment.run import stages_of
from adapters.hosts import get_process
from adapters.pictures.strips import film_strip, plot_variances, reverse_variances, save_film_strip
from adapters.sample import adapter_of
from adapters.shell.command import exit_code, keep_freed_memory
from adapters.shell.options import own_options
from sa_plugin.sampling.sampler import Sampler

logger = logging.getLogger(__name__)

MODULE = "adapters.pictures_of"
FOLDER = "pictures"


def main(argv: Sequence[str]) -> int:
    """Run the command (program name first); return the code of ``exit_code``."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)

    def work() -> None:
        own, rest = _parser().parse_known_args(list(argv[1:]))
        for name, low in (("images", 1), ("columns", 2), ("variance_images", 1), ("probes", 0)):
            if getattr(own, name) < low:
                raise ValueError(f"--{name} must be >= {low}, got {getattr(own, name)}")
        line = read_command_line([argv[0], *rest], (), MODULE)
        experiment = _finished(line)
        if line.dry_run:
            print(f"pictures in {experiment.workdir / FOLDER}")
        else:
            _draw(experiment, own)

    return exit_code(MODULE, work)


def _parser() -> argparse.ArgumentParser:
    parser = own_options(MODULE, "Film strips of a finished run's chains, and its variances.")
    parser.add_argument("--help_pictures", action="help", help=argparse.SUPPRESS)  # older
    add = parser.add_argument
    add("--steps", type=int, help="sampling steps; default: the largest of sample.steps")
    add("--images", type=int, default=4, help="images in a strip; default: 4")
    add("--columns", type=int, default=10, help="steps shown in a strip; default: 10")
    add("--variance_images", type=int, default=200, help="images for the variances; default: 200")
    add("--probes", type=int, default=0, help="show the derivative's variance, by so many probes")
    return parser


def _finished(line: CommandLine) -> Experiment:
    """The finished experiment that the command line describes; its folder is not changed."""
    adapter = adapter_of(line.config)
    check_holds(line.workdir, adapter.recorded(line.config), adapter.module)
    return Experiment(adapter, line.config, line.workdir, line.device, line.progress)


def _draw(experiment: Experiment, own: argparse.Namespace) -> None:
    config, stage = experiment.config, stages_of(experiment)["sample"]
    steps = max(config.sample.steps) if own.steps is None else own.steps
    gamma = None if stage.gamma is None else stage.gamma()
    processes = config.sample.processes
    names = dict.fromkeys([*processes, "probes_ddpm"] if own.probes else processes)
    averages = {s: s.average() for s in {stage.stage_of(name) for name in names}}
    folder = experiment.workdir / FOLDER
    shape = (own.images, *experiment.image_shape)
    curves = {}
    for name in names:
        row = get_process(name)
        sampler = experiment.sampler(name, steps, *averages[stage.stage_of(name)], gamma)
        seed = config.sample.seed
        labels = experiment.labels_of_samples(0, own.images, seed)
        if name in processes:
            strip = film_strip(sampler, shape, columns=own.columns, seed=seed, **labels)
            path = folder / f"strip_{name}_{steps}.png"
            save_film_strip(path, strip, heading=f"{row.title}, {steps} steps")
            logger.info("%s", path)
        if row.forward == "ddpm" and row.variance != "lanczos":  # which has no diagonal
            curves[row.title] = _variances(experiment, sampler, row.variance, gamma, own)
    if len(curves) > 1 and steps > 1:
        path = folder / f"variances_{steps}.png"
        plot_variances(path, curves, title=f"{config.name}, {steps} steps")
        logger.info("%s", path)


def _variances(
    experiment: Experiment, sampler: Sampler, variance: str, gamma: object, own: argparse.Namespace
) -> dict[int, float]:
    """The variances of one reverse process, on training images of all parts."""
    sample = experiment.config.sample
    if len(sampler.timesteps) < 2:
        return {}
    x0, labels = experiment.examples(own.variance_images)
    return reverse_variances(
        sampler.model,
        experiment.schedule,
        x0,
        sampler.timesteps,
        variance=variance,
        gamma=None if gamma is None else gamma.values,
        clip_x0=sample.clip_x0,
        avg_cov=sample.avg_cov,
        probes=own.probes or sample.probes,
        seed=sample.seed,
        **labels,
    )


if __name__ == "__main__":
    keep_freed_memory()
    sys.exit(main(sys.argv))
