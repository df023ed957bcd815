"""FID and Inception Score of 32x32 images in one pass against files: python -m benchmarks.metrics

In one run the ways take turns, round after round. Each way loads its network and compares with
statistics made beforehand. The weights are random, in the layout of the published file.

    one pass     ours without files: FID, and the score of the same pass (``is_inception``)
    both inputs  ours without files: FID, and the Inception Score of torch-fidelity's own input,
                 which needs a second pass (and gives a second distance)
    files        the images written as PNG files, then pytorch-fid and torch-fidelity in turn

The distance between two Gaussians costs the same for any number of images. It is measured
separately, so that the time for --at images follows from the time for a smaller number of images.
Use some hundreds, so that the passes take longer than the distances.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from unittest import mock

import torch
from torch import Tensor, nn

from adapters.measuring.evaluation import Summary, evaluate, statistics_summary, summarise
from adapters.measuring.features import build_extractors
from adapters.measuring.inception import WEIGHTS_VARIABLE
from adapters.sampling.sinks import encode_png
from benchmarks import machine
from sa_files.writing import write_atomically
from sa_plugin.metrics import Statistics, frechet_distance

NAME = "pt_inception-2015-12-05-6726825d.pth"
SPLITS = 10
FEATURES = {"one pass": ("inception",), "both inputs": ("inception", "inception_tf")}


def random_weights() -> dict[str, Tensor]:
    """Random tensors under the names and in the shapes of pytorch-fid's weights file.

    The convolutions have He's variance; otherwise no signal would reach the last layer.
    """
    from pytorch_fid import inception as package

    with (
        mock.patch.object(package, "load_state_dict_from_url", return_value={}),
        mock.patch.object(nn.Module, "load_state_dict", return_value=None),
    ):
        layers = package.fid_inception_v3()
    generator = torch.Generator().manual_seed(0)
    for name, value in layers.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        value.normal_(generator=generator)
        if value.ndim == 4:
            value.mul_((2 / value[0].numel()) ** 0.5)
        elif name.endswith(("bn.weight", "running_var")):
            value.mul_(0.1).add_(1)
        elif name.startswith("fc"):
            value.mul_(0.1)
        else:
            value.mul_(0.2)
    return layers.state_dict()


def random_images(count: int, channels: int = 3, size: int = 32, seed: int = 0) -> Tensor:
    """Smooth uint8 images [count, channels, size, size] that differ in colour and contrast."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, channels, 4, 4, generator=generator)
    contrast = torch.linspace(20, 90, count).reshape(-1, 1, 1, 1)
    smooth = nn.functional.interpolate(coarse * contrast, size=(size, size), mode="bicubic")
    return (smooth + 100).round().clamp(0, 255).to(torch.uint8)


class Comparison:
    """The ways to compute the same numbers; each returns (FID, Inception Score)."""

    def __init__(self, folder: Path, args: argparse.Namespace) -> None:
        self.folder, self.args = folder, args
        self.images = random_images(args.images)
        real = random_images(args.images, seed=1)
        names = FEATURES["both inputs"]
        extractors = build_extractors(names, device=args.device)
        moments = summarise(real.split(args.batch), extractors).moments
        for name in names:
            Statistics.of(moments[name], name).save(folder / f"{name}.npz")

    def ours(self, names: tuple[str, ...]) -> tuple[float, float]:
        """Feed batches to the metrics, as ``adapters.sample --format metrics`` does."""
        extractors = build_extractors(names, device=self.args.device)
        stored = {name: Statistics.load(self.folder / f"{name}.npz") for name in names}
        reference: Summary = statistics_summary(stored, extractors)
        metrics = evaluate(self.images.split(self.args.batch), reference, splits=SPLITS)
        score = "inception_score" if len(names) > 1 else "is_inception"
        return metrics["fid"], metrics[score]

    def files(self) -> tuple[float, float]:
        """Write PNG files and run the two packages on their folder."""
        import torch_fidelity
        from pytorch_fid import fid_score

        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            for i, image in enumerate(self.images.permute(0, 2, 3, 1).numpy()):
                write_atomically(Path(folder) / f"{i:08d}.png", encode_png(image))
            paths = [folder, str(self.folder / "inception.npz")]
            with mock.patch.object(fid_score, "tqdm", lambda batches: batches):
                fid = fid_score.calculate_fid_given_paths(
                    paths, self.args.batch, self.args.device, 2048, num_workers=0
                )
            score = torch_fidelity.calculate_metrics(
                input1=folder,
                isc=True,
                isc_splits=SPLITS,
                batch_size=self.args.batch,
                cuda=torch.device(self.args.device).type == "cuda",
                cache=False,
                verbose=False,
                save_cpu_ram=True,  # no workers: reading such small PNG files takes no time
                feature_extractor_weights_path=os.environ[WEIGHTS_VARIABLE],
            )
        return float(fid), score["inception_score_mean"]

    def distance(self, compute: Callable[..., float]) -> float:
        """The distance between the two Gaussians on disk."""
        one = Statistics.load(self.folder / "inception.npz")
        two = Statistics.load(self.folder / "inception_tf.npz")
        return float(compute(one.mu, one.sigma, two.mu, two.sigma))


def ways_of(comparison: Comparison) -> dict[str, Callable[[], object]]:
    """The functions that are timed."""
    from pytorch_fid import fid_score

    theirs = fid_score.calculate_frechet_distance
    ways: dict[str, Callable[[], object]] = {
        name: lambda names=names: comparison.ours(names) for name, names in FEATURES.items()
    }
    ways["files"] = comparison.files
    ways["distance, ours"] = lambda: comparison.distance(frechet_distance)
    ways["distance, pytorch-fid"] = lambda: comparison.distance(theirs)
    return ways


def measure(
    ways: dict[str, Callable[[], object]], args: argparse.Namespace
) -> tuple[dict[str, list[float]], dict[str, object]]:
    """Seconds by way and round, and the result of each way."""
    results: dict[str, object] = {}
    kept = {name: lambda n=name: results.update({n: ways[n]()}) for name in ways}
    return machine.in_turns(kept, args.rounds, args.device, args.clock, warmup=0), results


def report(seconds: dict[str, list[float]], results: dict, args: argparse.Namespace) -> None:
    """A table in Markdown; times are medians with quartiles, ratios are taken within a round."""
    print("| way | seconds | images/s | time of files / its time | FID, score |")
    print("|---|---:|---:|---:|---|")
    for name in (*FEATURES, "files"):
        times = seconds[name]
        ratios = machine.ratios(seconds["files"], times)
        fid, score = results[name]
        print(f"| {name} | {machine.quartiles(times, '{:.1f}')} ", end="")
        print(f"| {args.images / median(times):.2f} ", end="")
        print(f"| {machine.quartiles(ratios, '{:.2f}')} | {fid:.6g}, {score:.6g} |")
    fixed = {n.split(", ")[1]: median(t) for n, t in seconds.items() if n.startswith("distance")}
    print(f"\nThe distance alone: ours {fixed['ours']:.1f} s, ", end="")
    print(f"pytorch-fid's {fixed['pytorch-fid']:.1f} s, for any number of images.")

    def scaled(name: str, apart: float) -> float:
        return apart + (median(seconds[name]) - apart) * args.at / args.images

    slow = scaled("files", fixed["pytorch-fid"])
    once, twice = scaled("one pass", fixed["ours"]), scaled("both inputs", 2 * fixed["ours"])
    print(f"At {args.at:,} images, if the rest grows in proportion: ", end="")
    print(f"files / one pass {slow / once:.2f}, files / both inputs {slow / twice:.2f}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    machine.add_clock(parser)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--at", type=int, default=10_000, help="number of images to extrapolate to")
    args = parser.parse_args()
    if args.images < SPLITS or args.rounds < 1 or args.batch < 1:
        parser.error(f"--images must be at least {SPLITS}, --rounds and --batch at least 1")
    print(
        f"{machine.describe(args.device)}\n{args.images} images of 32x32, {args.rounds} rounds, "
        f"{args.clock} time\n"
    )
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few images give singular covariances: expected here
        folder = Path(name)
        path = folder / "hub" / "checkpoints" / NAME  # where pytorch-fid looks
        path.parent.mkdir(parents=True)
        torch.save(random_weights(), path)
        with (
            mock.patch.dict(os.environ, {"TORCH_HOME": name, WEIGHTS_VARIABLE: str(path)}),
            mock.patch.object(torch.hub, "_hub_dir", None),
            mock.patch("pytorch_fid.fid_score.linalg.sqrtm", sqrtm_of_old(), create=False),
        ):
            report(*measure(ways_of(Comparison(folder, args)), args), args)


def sqrtm_of_old() -> Callable[..., object]:
    """SciPy's ``sqrtm`` with ``disp``, which pytorch-fid passes and SciPy 1.18 removed."""
    import scipy.linalg

    current = scipy.linalg.sqrtm

    def sqrtm(matrix: object, disp: bool = True) -> object:
        root = current(matrix)
        return root if disp else (root, float("nan"))

    return sqrtm


if __name__ == "__main__":
    main()
