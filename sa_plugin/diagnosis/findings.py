"""What ``diagnose`` found: tables, a text that says how they are read, and CSV files."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sa_files.writing import write_atomically
from sa_plugin.bounds.likelihood import MeanWithError
from sa_plugin.effect.predicted import Prediction
from sa_plugin.loss import SALoss
from sa_plugin.schedule import FloatArray

# What is measured at a step, and how it is read. The names are the columns of steps.csv.
MEASURED = {
    "error": "E|e_n|^2 per pixel, the plain loss at step n.",
    "bias": "E|b_n(x_0)|^2 per pixel, what SA penalises: the part of the error that is the same "
    "for all noises of one image. Zero within its error leaves SA nothing to penalise.",
    "correlation": "of the errors at n and n-1, independent noises, as in SA's windows: near "
    "bias / error where neighbouring steps are alike.",
    "same_noise": "the same with one noise for both steps: how alike the network is at neighbours.",
    "sa_ratio": "lambda L_sa / L_simple at step n: what the SA loss adds to the plain one.",
}
DERIVATIVE = {
    "derivative": "E|e_n|^2 as the network's own derivative says it. The variances of probes and "
    "OCM rest on it. It is the error if the network is exact; below the error they are too small.",
}
PREDICTED = {
    "error_B": "the least error of a linear network on data of this mean and these variances.",
    "bias_B": "the bias of that network.",
    "bias_SA": "the bias of the linear network that the SA loss trains.",
}


@dataclass(frozen=True, eq=False)
class SampleVariance:
    """Images of one reverse process and number of steps, beside the closed form's.

    Attributes:
        process: its title, of ``PROCESSES``.
        measured: variance of the samples, summed over an image's dimensions, with standard error.
        predicted: for the baseline B, for SA, and the best strength q.
    """

    process: str
    measured: MeanWithError
    predicted: Prediction


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """What ``diagnose`` found. Errors are standard errors over the images.

    Attributes:
        steps: int64 [T], the steps n that were measured.
        measured, stderr: the columns of ``MEASURED``, float64 [T] each; with probes also of
            ``DERIVATIVE``.
        predicted: the columns of ``PREDICTED``, float64 [T] each: the closed form for Gaussian
            data, without an error of its own.
        samples: by process and number of steps.
        data_variance: of the images, summed over the dimensions.
        gap: E|d(x_0)|, Theorem 1's total gap along real chains, an L2 norm; None if not asked for.
        n_images: the number of images, and of samples.
        directions: how many directions of the spectrum have a variance.
        loss: the SA loss that is meant.
    """

    steps: NDArray[np.int64]
    measured: dict[str, FloatArray]
    stderr: dict[str, FloatArray]
    predicted: dict[str, FloatArray]
    samples: tuple[SampleVariance, ...]
    data_variance: MeanWithError
    gap: MeanWithError | None
    n_images: int
    directions: int
    loss: SALoss

    def step_rows(self) -> list[list[Any]]:
        """The head and rows of steps.csv: n, every measured value and its error, the predicted."""
        head = ["n", *(f"{name}{end}" for name in self.measured for end in ("", "_stderr"))]
        columns = [table[name] for name in self.measured for table in (self.measured, self.stderr)]
        columns += list(self.predicted.values())
        rows = zip(self.steps.tolist(), *(c.tolist() for c in columns), strict=True)
        return [[*head, *self.predicted], *map(list, rows)]

    def sample_rows(self) -> list[list[Any]]:
        """The head and rows of samples.csv."""
        head = ["process", "steps", "variance", "variance_stderr", "variance_B", "variance_SA"]
        rows: list[list[Any]] = [[*head, "best_q"]]
        for one in self.samples:
            b, sa, _ = one.predicted.sample_variances
            rows.append([one.process, one.predicted.steps, *map(float, one.measured)])
            rows[-1] += [float(b), float(sa), one.predicted.best_q]
        return rows

    def table(self) -> str:
        """Both tables in Markdown, with a sentence on how each column is read."""
        loss, data = self.loss, self.data_variance
        measured = {
            name: text for name, text in (MEASURED | DERIVATIVE).items() if name in self.measured
        }
        names = measured | PREDICTED
        by_step = [
            [str(n)]
            + [f"{self.measured[m][i]:.3g} ± {self.stderr[m][i]:.1g}" for m in self.measured]
            + [f"{column[i]:.3g}" for column in self.predicted.values()]
            for i, n in enumerate(self.steps.tolist())
        ]
        of_samples = [
            [process, str(steps), f"{variance:.4g} ± {error:.1g}", *(f"{v:.3g}" for v in rest)]
            for process, steps, variance, error, *rest in self.sample_rows()[1:]
        ]
        gap = (
            ""
            if self.gap is None
            else (
                f"\nTheorem 1's total gap E|d(x_0)|: {self.gap.mean:.4g} ± {self.gap.stderr:.1g}. "
                "Compare it between networks, on the same images and seed.\n"
            )
        )
        return (
            f"{self.n_images} images, SA-{loss.K}, lambda {loss.lam:g}; ± one standard error\n\n"
            + _markdown(["n", *names], by_step)
            + "".join(f"\n- {name}: {text}" for name, text in names.items())
            + f"\n\nVariance of the data: {data.mean:.4g} ± {data.stderr:.1g}, "
            "summed over pixels\n\n"
            + _markdown(
                ["process", "steps", "variance", "variance_B", "variance_SA", "best_q"], of_samples
            )
            + "\n- variance: of this network's samples. Below the data's, wider samples may help: "
            "SA or a shift by q > 0. Above it, SA would widen them further."
            "\n- variance_B, variance_SA, best_q: predicted from the mean and variances of the "
            f"images along {self.directions} directions, for linear networks without clipping. "
            "best_q is the strength to try in ShiftedNoise.\n" + gap
        )

    def write(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Write steps.csv, samples.csv and diagnosis.md into ``folder``; return their paths."""
        texts = {"steps.csv": _csv(self.step_rows()), "samples.csv": _csv(self.sample_rows())}
        paths = []
        for name, text in {**texts, "diagnosis.md": self.table()}.items():
            paths.append(Path(folder) / name)
            write_atomically(paths[-1], text.encode())
        return paths


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["--:"] * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _csv(rows: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
