"""The picture of a diagnosis: errors over the steps, and the samples' variance, as one PNG."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from adapters.pictures.pictures import COLOURS, INK, label_axes, label_log_values, write_figure
from sa_plugin.diagnosis.findings import Diagnosis

LINES = {
    "error": ("error, E|e|²", ("B",)),
    "bias": ("bias, E|b|²", ("B", "SA")),
    "derivative": ("error, as its derivative says", ()),
}
DASHES = {"B": "--", "SA": ":"}


def plot_diagnosis(path: str | Path, found: Diagnosis) -> None:
    """Measured points with two standard errors; predictions dashed (B) and dotted (SA)."""
    figure = Figure(figsize=(10, 5), dpi=150, layout="constrained")
    by_step, of_samples = figure.subplots(1, 2)
    _draw_steps(by_step, found)
    _draw_samples(of_samples, found)
    for axes in (by_step, of_samples):
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.13), "ncols": 3}
        axes.legend(frameon=False, fontsize=8, labelcolor=INK, **below)
    write_figure(path, figure)


def _draw_steps(axes: Axes, found: Diagnosis) -> None:
    lines = {name: line for name, line in LINES.items() if name in found.measured}
    for colour, (name, (label, predicted)) in zip(COLOURS, lines.items(), strict=False):
        _points(axes, found.steps, found.measured[name], found.stderr[name], colour, label)
        for of in predicted:
            values = found.predicted[f"{name}_{of}"]
            label = f"{name}, {of}, predicted"
            axes.plot(found.steps, values, DASHES[of], color=colour, label=label)
    label_log_values(axes)
    label_axes(axes, "step n", "per pixel", "Errors by step")


def _draw_samples(axes: Axes, found: Diagnosis) -> None:
    processes = dict.fromkeys(one.process for one in found.samples)
    for colour, process in zip(COLOURS, processes, strict=False):
        of = [one for one in found.samples if one.process == process]
        steps = [one.predicted.steps for one in of]
        means, errors = zip(*((float(v) for v in one.measured) for one in of), strict=True)
        _points(axes, steps, means, errors, colour, process)
        for i, (name, dash) in enumerate(DASHES.items()):
            values = [one.predicted.sample_variances[i] for one in of]
            axes.plot(steps, values, dash, color=colour, label=f"{process}, {name}, predicted")
    axes.axhline(float(found.data_variance.mean), color=INK, linewidth=1, label="data")
    axes.set_ylim(bottom=0)
    label_axes(axes, "sampling steps", "variance, summed over pixels", "Samples")


def _points(axes: Axes, x: object, y: object, stderr: object, colour: str, label: str) -> None:
    twice = [2 * value for value in stderr]
    axes.errorbar(x, y, twice, fmt="o", color=colour, markersize=4, capsize=2, label=label)
