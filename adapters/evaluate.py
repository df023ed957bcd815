"""Compute metrics of images against a reference, in one pass over each.

    python -m adapters.evaluate IMAGES --against REFERENCE --features inception,pixels --out FILE
    python -m adapters.evaluate IMAGES --features inception --save_stats FILE.npz

IMAGES: a folder of PNG or JPEG files, an .npz (uint8, NHWC), tar shards (a file, or their folder),
or a dataset (``cifar10``, ``cifar10:test``). REFERENCE: the same, or statistics (an npz file with
``mu`` and ``sigma``, like pytorch-fid's). The features "inception" give FID and, from the same
pass, the score ``is_inception``. The features "inception_tf" give torch-fidelity's Inception Score.

Image files are read as RGB, unless --channels is given or they are compared with a dataset or an
npz file of grey images.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from adapters.measuring.evaluation import (
    EXTRAS,
    Summary,
    check_extras,
    compare,
    statistics_summary,
    summarise,
)
from adapters.measuring.extractor import Extractor
from adapters.measuring.features import build_extractors
from adapters.measuring.image_sources import has_files, open_images
from adapters.shell.command import (
    OwnOptions,
    exit_code,
    keep_freed_memory,
    one_line_warnings,
)
from sa_files.writing import write_json
from sa_plugin.metrics import Statistics, is_statistics
from third_party.common.data import ImageDataset

MODULE = "adapters.evaluate"


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    usage = f"python -m {MODULE} IMAGES [--against REFERENCE] [--save_stats FILE] [OPTIONS]"
    parser = OwnOptions(MODULE, usage=usage, description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("images", metavar="IMAGES", help="a folder, an .npz, tar shards, or a dataset")
    add("--against", metavar="REFERENCE", help="images or statistics to compare with")
    add("--features", default="inception", help="feature spaces, separated by commas")
    add("--metrics", default="", help=f"besides the distance and the score: {','.join(EXTRAS)}")
    add("--save_stats", type=Path, metavar="FILE", help="write statistics of IMAGES to an .npz")
    add("--out", type=Path, metavar="FILE", help="write the metrics as JSON")
    add("--splits", type=int, default=10, help="splits of the Inception Score")
    add("--batch_size", type=int, default=256, help="images a pass")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, ...")
    add("--size", type=int, default=0, help="crop and resize image files to squares of this side")
    add("--channels", type=int, help="of image files: 3 is RGB, 1 is grey")
    add("--follow_links", action="store_true", help="read what links lead to outside a folder")
    add("--data_root", help="folder of the datasets; default: data")
    add("--cache_dir", default="runs/cache", help="folder of the feature networks' weights")
    args = parser.parse_args(list(argv[1:]))
    for name in ("splits", "batch_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be >= 1, got {getattr(args, name)}")
    if args.against is None and args.save_stats is None:
        parser.error("give --against REFERENCE, --save_stats FILE, or both")
    return args


def run(args: argparse.Namespace) -> dict[str, float]:
    """Compute the metrics, and write statistics if asked for; errors are raised."""
    names = [name for name in args.features.split(",") if name]
    extras = [name for name in args.metrics.split(",") if name]
    if args.save_stats is not None and len(names) != 1:
        raise ValueError(f"--save_stats takes one feature space at a time, got {names}")
    files = {"size": args.size, "follow_links": args.follow_links}
    images = open_images(args.images, data_root=args.data_root, channels=_channels(args), **files)
    extractors = build_extractors(
        names, cache_dir=args.cache_dir, device=args.device, data_root=args.data_root
    )
    reference = None
    if args.against is not None:
        shape = images.image_shape
        root = args.data_root
        reference = open_reference(args.against, shape, extractors, data_root=root, **files)
        if not isinstance(reference, Summary):
            batches = reference.uint8_batches(args.batch_size)
            reference = summarise(batches, extractors, keep_features=bool(extras))
        check_extras(extras, reference)  # before the pass over the images
    samples = summarise(
        images.uint8_batches(args.batch_size),
        extractors,
        image_shape=images.image_shape,
        keep_features=bool(extras),
    )
    if args.save_stats is not None:
        Statistics.of(samples.moments[names[0]], names[0]).save(args.save_stats)
    if reference is None:
        return {"n_images": float(samples.count)}
    return compare(samples, reference, splits=args.splits, extras=extras)


def _channels(args: argparse.Namespace) -> int:
    """In how many channels the image files of IMAGES are read."""
    against = args.against
    if args.channels is not None:
        return args.channels
    if against is None or _holds_statistics(against) or has_files(against):
        return 3
    return open_images(against, data_root=args.data_root).image_shape[0]


def _holds_statistics(against: str) -> bool:
    return is_statistics(against) or Path(against).suffix == ".npy"


def open_reference(
    against: str,
    image_shape: tuple[int, ...],
    extractors: Sequence[Extractor],
    *,
    data_root: str | Path | None = None,
    size: int = 0,
    follow_links: bool = False,
) -> Summary | ImageDataset:
    """Open the reference for images of ``image_shape``: a summary of statistics, or images.

    Image files are read in the channels of ``image_shape``; for the other options see
    ``open_images``.

    Raises:
        ValueError: ``against`` does not exist, or does not fit.
    """
    if _holds_statistics(against):
        if len(extractors) != 1:
            names = [extractor.name for extractor in extractors]
            raise ValueError(f"{against} holds statistics of one feature space, not {names}")
        (extractor,) = extractors
        probe = extractor.extract(torch.zeros(1, *image_shape)).features
        found = Statistics.load(against, features=extractor.name, dim=probe.shape[1])
        return statistics_summary({extractor.name: found}, extractors)
    real = open_images(
        against,
        data_root=data_root,
        size=size,
        channels=image_shape[0],
        follow_links=follow_links,
    )
    if real.image_shape != image_shape:
        raise ValueError(
            f"images must have the shape of the reference {against}, {real.image_shape}, "
            f"got {image_shape} (C, H, W)"
        )
    return real


def table(metrics: dict[str, float]) -> str:
    """A table in Markdown with one row for each metric."""
    rows = [f"| {name} | {value:.6g} |" for name, value in metrics.items()]
    return "\n".join(["| metric | value |", "|---|--:|", *rows])


def main(argv: Sequence[str]) -> int:
    """Run the command (program name first); return the code of ``exit_code``."""
    return exit_code(MODULE, lambda: _tell(parse(argv)), continues="")


def _tell(args: argparse.Namespace) -> None:
    with one_line_warnings(MODULE):
        try:
            metrics = run(args)
        except ImportError as error:  # of an optional package; its message names the way out
            raise ValueError(error) from error
        if args.out is not None:
            write_json(args.out, metrics)
    if args.save_stats is not None:
        print(f"statistics of {metrics['n_images']:.0f} images in {args.save_stats}")
    if args.against is not None:
        print(table(metrics))


if __name__ == "__main__":
    keep_freed_memory()
    sys.exit(main(sys.argv))
