"""The pictures of a comparison's report."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from adapters.comparison.grid import Cell, Grid, Part
from adapters.comparison.plan import Plan
from adapters.comparison.tables import Row, Table
from adapters.hosts import get_process
from adapters.measuring.metric_names import label
from adapters.pictures.gap_pictures import plot_gap
from adapters.pictures.pictures import (
    COLOURS,
    INK,
    MARKERS,
    draw_reference,
    label_log_values,
    label_steps,
    save_labelled_grids,
    write_figure,
)
from third_party.common.data import spread_images

PANELS_ACROSS = 3
LOG_FROM = 4  # a vertical axis that spans more than this factor is logarithmic
DODGE = 0.05  # decades to either side, so that intervals at one number of steps do not overlap


def plot_table(path: Path, one: Table) -> None:
    """A panel for each reverse process, a line for each training: mean and standard deviation."""
    heading = f"{label(one.metric)}; bands: standard deviation over the seeds"
    _plot_panels(path, one, heading, _draw_values)


def plot_differences(path: Path, one: Table) -> None:
    """The same panels with the paired differences from the reference and their intervals.

    They are in per cent of the reference's mean: at few steps they would else hide the others.
    """
    heading = f"{label(one.metric)}\n{one.caption}; in % of {one.reference}'s mean"
    _plot_panels(path, one, heading, _draw_differences)


def _plot_panels(
    path: Path, one: Table, heading: str, draw: Callable[[Axes, Table, list[Row]], None]
) -> None:
    processes = list(dict.fromkeys(row.process for row in one.rows))
    across = min(PANELS_ACROSS, len(processes))
    down = math.ceil(len(processes) / across)
    size = (3.6 * across + 0.6, 2.7 * down + 0.8)
    figure = Figure(figsize=size, dpi=130, layout="constrained")
    panels = figure.subplots(down, across, squeeze=False, sharex=True)
    for axes in panels.flat[len(processes) :]:
        axes.set_axis_off()
    for axes, process in zip(panels.flat, processes, strict=False):
        draw(axes, one, [row for row in one.rows if row.process == process])
        label_steps(axes, one.part.steps, log=True)
        axes.set_title(process, fontsize=10, color=INK)
        axes.tick_params(labelsize=8)
        axes.grid(True, color="#E4E4E4", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(heading, fontsize=11, color=INK, x=0.01, ha="left")
    for axes in panels[-1]:  # a label of the whole figure would lie on the legend
        axes.set_xlabel("sampling steps", loc="left", fontsize=9, color=INK)
    lines, labels = panels.flat[0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower right", ncols=4, frameon=False, fontsize=9)
    write_figure(path, figure)


def _style(index: int) -> dict[str, str]:
    return {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}


def _draw_values(axes: Axes, one: Table, rows: list[Row]) -> None:
    steps = np.array(one.part.steps)
    lowest, highest = np.inf, -np.inf
    for i, row in enumerate(rows):
        spreads = [entry.spread for entry in row.entries]
        mean = np.array([s.mean if s else np.nan for s in spreads])
        std = np.array([s.std if s and s.n > 1 else 0.0 for s in spreads])
        title = "B = baseline" if row.line == "B" else row.line
        axes.plot(steps, mean, label=title, markersize=4, linewidth=1.6, **_style(i))
        axes.fill_between(steps, mean - std, mean + std, color=_style(i)["color"], alpha=0.2, lw=0)
        lowest = np.nanmin([lowest, *(mean - std)])
        highest = np.nanmax([highest, *(mean + std)])
    if one.data_value is not None:
        draw_reference(axes, one.data_value)
    if lowest > 0 and highest > LOG_FROM * lowest:
        label_log_values(axes)


def _draw_differences(axes: Axes, one: Table, rows: list[Row]) -> None:
    steps = np.array(one.part.steps, dtype=float)
    reference = [entry.spread for entry in rows[0].entries]
    percent = np.array([100 / s.mean if s and s.mean > 0 else np.nan for s in reference])
    axes.axhline(0, color=INK, linewidth=1)
    wide = DODGE if len(rows) > 2 else 0.0
    for i, shift in enumerate(np.linspace(-wide, wide, len(rows) - 1), start=1):
        found = [entry.difference for entry in rows[i].entries]
        mean, low, high = (
            percent * [getattr(d, name) if d else np.nan for d in found]
            for name in ("mean", "low", "high")
        )
        axes.errorbar(
            steps * 10**shift, mean, yerr=(mean - low, high - mean), label=rows[i].line,
            markersize=4, linewidth=0, elinewidth=1.4, capsize=2, **_style(i),
        )  # fmt: skip


def draw_samples(path: Path, grid: Grid, plan: Plan, part: Part) -> bool:
    """Draw every reverse process and line side by side, from the same noise.

    Returns False, and draws nothing, where there are no images.
    """
    steps = sorted(part.steps)[len(part.steps) // 3]
    panels = {}
    for process in part.processes:
        for line in part.lines:
            task = plan.cells[Cell(line, grid.seeds[0], process, steps)]
            if task.is_done():
                title = f"{get_process(process).title}, {grid.title(line)}"
                panels[title] = task.first_images()
    if not panels:
        return False
    real = spread_images(plan.store.dataset, len(next(iter(panels.values()))))
    save_labelled_grids(
        path,
        {"real": real, **panels},
        heading=f"{part.title}: {steps} steps, seed {grid.seeds[0]}, one noise",
    )
    return True


def draw_gaps(folder: Path, grid: Grid, plan: Plan) -> list[Path]:
    """Figure 4: both forms of the gap curve."""
    curves: dict[str, list] = {}
    for (name, _), task in plan.gaps.items():
        if task.is_done():
            curves.setdefault(grid.training_title(name), []).append(task.result())
    paths = []
    for quantity in ("distance", "total") if curves else ():
        path = folder / f"gap_{quantity}.png"
        title = f"from x_{grid.config.gap.start}"
        plot_gap(path, curves, quantity=quantity, title=title)
        paths.append(path)
    return paths
