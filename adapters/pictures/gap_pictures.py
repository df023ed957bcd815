"""Pictures of the gap along sampling chains (Figure 4 of arXiv 2312.12431), as PNG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from adapters.pictures.pictures import COLOURS, DASHES, add_legend, label_axes, write_figure
from sa_plugin.bounds.gap import GapCurve

QUANTITIES = {
    "total": ("mean", "stderr", "total gap so far, |Σ τ e|"),
    "distance": ("distance_mean", "distance_stderr", "distance from the true chain"),
}


def plot_gap(
    path: str | Path,
    curves: Mapping[str, Sequence[GapCurve]],
    *,
    quantity: str = "distance",
    title: str | None = None,
) -> None:
    """Plot the gap over the steps of the reverse chain, a line for each label, as a PNG.

    Args:
        curves: label (a training) -> the curves of its seeds. Several curves are shown as their
            mean with a band of one standard deviation either way, a single curve with its standard
            error.
        quantity: "distance" is the distance of x_{n-1} from the true chain's. "total" is what the
            steps so far add to the gap at x_1 (Theorem 1); its axis is logarithmic, because the
            last few steps add nearly all of it. Both end in the same number, the total gap.

    Raises:
        ValueError: there are no curves, the quantity is unknown, or curves have different steps.
    """
    if quantity not in QUANTITIES:
        raise ValueError(f"quantity must be one of {tuple(QUANTITIES)}, got {quantity!r}")
    if not curves:
        raise ValueError("curves must hold at least one label, got none")
    figure = Figure(figsize=(7.6, 4.4), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    handles = []
    for index, (label, runs) in enumerate(curves.items()):
        steps, mean, spread = _band(label, runs, *QUANTITIES[quantity][:2])
        colour = COLOURS[index % len(COLOURS)]
        dash = DASHES[index // len(COLOURS) % len(DASHES)]
        handles += axes.plot(steps, mean, color=colour, linestyle=dash, linewidth=1.8)
        axes.fill_between(steps, mean - spread, mean + spread, color=colour, alpha=0.2, linewidth=0)
    axes.invert_xaxis()  # n falls along the chain
    if quantity == "total":
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    label_axes(axes, "step n", QUANTITIES[quantity][2], title)
    add_legend(figure, handles, list(curves))
    write_figure(path, figure)


def _band(
    label: str, runs: Sequence[GapCurve], mean: str, stderr: str
) -> tuple[NDArray, NDArray, NDArray]:
    """Steps, the seeds' mean, and half the band's width."""
    if len(runs) == 0:
        raise ValueError(f"curves[{label!r}] must hold at least one curve, got none")
    steps = runs[0].timesteps
    if not all(np.array_equal(run.timesteps, steps) for run in runs):
        raise ValueError(f"curves[{label!r}] must be of the same steps")
    values = np.stack([getattr(run, mean) for run in runs])
    if len(runs) == 1:
        return steps, values[0], getattr(runs[0], stderr)
    return steps, values.mean(0), values.std(0, ddof=1)
