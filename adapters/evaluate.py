"""Compute metrics of images against a reference, in one pass over each:

    python -m adapters.evaluate IMAGES --against REFERENCE --features inception,pixels --out FILE
    python -m adapters.evaluate IMAGES --features inception --save_stats FILE.npz

IMAGES: a folder of PNG or JPEG files, an .npz (uint8, NHWC), tar shards (a file, or their folder),
or a dataset (``cifar10``, ``cifar10:test``). REFERENCE: the same, or statistics (an npz file with
``mu`` and ``sigma``, like pytorch-fid's). The features "inception" give FID and, from the same
pass, the score ``is_inception``. The features "inception_tf" give torch-fidelity's Inception Score.
"""

from __future__ import annotations

import argparse
import json
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
from adapters.measuring.image_sources import open_images
from adapters.shell.command import keep_freed_memory, one_line_warnings
from sa_files.writing import write_atomically
from sa_plugin.metrics import Statistics, is_statistics
from third_party.common.data import ImageDataset

MODULE = "adapters.evaluate"
EXIT_BAD_INPUT = 2


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {MODULE}",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("images", metavar="IMAGES")
    add("--against", metavar="REFERENCE", help="images or statistics to compare with")
    add("--features", default="inception", help="feature spaces, separated by commas")
    add("--metrics", default="", help=f"besides the distance and the score: {','.join(EXTRAS)}")
    add("--save_stats", type=Path, metavar="FILE", help="write statistics of IMAGES to an .npz")
    add("--out", type=Path, metavar="FILE", help="write the metrics as JSON")
    add("--splits", type=int, default=10, help="splits of the Inception Score")
    add("--batch_size", type=int, default=256)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--data_root", help="folder of the datasets; default: data")
    add("--cache_dir", default="runs/cache", help="folder of the feature networks' weights")
    args = parser.parse_args(list(argv[1:]))
    if args.against is None and args.save_stats is None:
        parser.error("give --against REFERENCE, --save_stats FILE, or both")
    return args


def run(args: argparse.Namespace) -> dict[str, float]:
    """Compute the metrics, and write statistics if asked for; errors are raised."""
    names = [name for name in args.features.split(",") if name]
    extras = [name for name in args.metrics.split(",") if name]
    if args.save_stats is not None and len(names) != 1:
        raise ValueError(f"--save_stats takes one feature space at a time, got {names}")
    images = open_images(args.images, data_root=args.data_root)
    extractors = build_extractors(
        names, cache_dir=args.cache_dir, device=args.device, data_root=args.data_root
    )
    reference = None
    if args.against is not None:
        shape = images.image_shape
        reference = open_reference(args.against, shape, extractors, data_root=args.data_root)
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


def open_reference(
    against: str,
    image_shape: tuple[int, ...],
    extractors: Sequence[Extractor],
    *,
    data_root: str | Path | None = None,
) -> Summary | ImageDataset:
    """Open the reference for images of ``image_shape``: a summary of statistics, or images.

    Raises:
        ValueError: ``against`` does not exist, or does not fit.
    """
    if is_statistics(against) or Path(against).suffix == ".npy":
        if len(extractors) != 1:
            names = [extractor.name for extractor in extractors]
            raise ValueError(f"{against} holds statistics of one feature space, not {names}")
        (extractor,) = extractors
        probe = extractor.extract(torch.zeros(1, *image_shape)).features
        found = Statistics.load(against, features=extractor.name, dim=probe.shape[1])
        return statistics_summary({extractor.name: found}, extractors)
    real = open_images(against, data_root=data_root)
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
    """0: done; 2: bad input, or a missing file or package, reported in one line."""
    args = parse(argv)
    with one_line_warnings(MODULE):
        try:
            metrics = run(args)
            if args.out is not None:
                write_atomically(args.out, (json.dumps(metrics, indent=2) + "\n").encode())
        except (ValueError, OSError, ImportError) as error:
            print(f"{MODULE}: {' '.join(str(error).split())}", file=sys.stderr)
            return EXIT_BAD_INPUT
    if args.save_stats is not None:
        print(f"statistics of {metrics['n_images']:.0f} images in {args.save_stats}")
    if args.against is not None:
        print(table(metrics))
    return 0


if __name__ == "__main__":
    keep_freed_memory()
    sys.exit(main(sys.argv))
