"""The pictures of a comparison's report."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from adapters.comparison.grid import Cell, Grid, Part
from adapters.comparison.plan import Plan
from adapters.comparison.tables import Table
from adapters.hosts import get_process
from adapters.pictures.gap_pictures import plot_gap
from adapters.pictures.pictures import (
    COLOURS,
    INK,
    MARKERS,
    label_log_values,
    save_labelled_grids,
    write_figure,
)

PANELS_ACROSS = 3
LOG_FROM = 4  # a vertical axis that spans more than this factor is logarithmic
SHOWN_IMAGES, SHOWN_COLUMNS = 40, 10


def plot_table(path: Path, one: Table) -> None:
    """A panel for each reverse process, a line for each training: mean and standard deviation."""
    processes = list(dict.fromkeys(row.process for row in one.rows))
    across = min(PANELS_ACROSS, len(processes))
    down = math.ceil(len(processes) / across)
    size = (3.6 * across + 0.6, 2.7 * down + 0.8)
    figure = Figure(figsize=size, dpi=130, layout="constrained")
    panels = figure.subplots(down, across, squeeze=False, sharex=True)
    for axes in panels.flat[len(processes) :]:
        axes.set_axis_off()
    for axes, process in zip(panels.flat, processes, strict=False):
        _draw_panel(axes, one, process)
    figure.suptitle(one.heading, fontsize=11, color=INK, x=0.01, ha="left")
    figure.supxlabel("sampling steps", x=0.01, ha="left", fontsize=9, color=INK)
    lines, labels = panels.flat[0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower right", ncols=4, frameon=False, fontsize=9)
    write_figure(path, figure)


def _draw_panel(axes: Axes, one: Table, process: str) -> None:
    steps = np.array(one.part.steps)
    lowest, highest = np.inf, -np.inf
    for i, row in enumerate(row for row in one.rows if row.process == process):
        spreads = [entry.spread for entry in row.entries]
        mean = np.array([s.mean if s else np.nan for s in spreads])
        std = np.array([s.std if s and s.n > 1 else 0.0 for s in spreads])
        style = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
        axes.plot(steps, mean, label=row.line, markersize=4, linewidth=1.6, **style)
        axes.fill_between(steps, mean - std, mean + std, color=style["color"], alpha=0.2, lw=0)
        lowest = np.nanmin([lowest, *(mean - std)])
        highest = np.nanmax([highest, *(mean + std)])
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(list(steps)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    if lowest > 0 and highest > LOG_FROM * lowest:
        label_log_values(axes)
    axes.set_title(process, fontsize=10, color=INK)
    axes.tick_params(labelsize=8)
    axes.grid(True, color="#E4E4E4", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)


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
                panels[title] = task.first_images()[:SHOWN_IMAGES]
    if not panels:
        return False
    real = next(plan.store.dataset.uint8_batches(SHOWN_IMAGES))
    save_labelled_grids(
        path,
        {"real": real, **panels},
        columns=SHOWN_COLUMNS,
        heading=f"{part.title}: {steps} steps, seed {grid.seeds[0]}, one noise",
    )
    return True


def draw_gaps(folder: Path, grid: Grid, plan: Plan) -> list[Path]:
    """Figure 4: both forms of the gap curve."""
    curves: dict[str, list] = {}
    for (name, _), task in plan.gaps.items():
        if task.is_done():
            curves.setdefault(grid.config.trainings[name].title, []).append(task.result())
    paths = []
    for quantity in ("distance", "total") if curves else ():
        path = folder / f"gap_{quantity}.png"
        title = f"from x_{grid.config.gap.start}"
        plot_gap(path, curves, quantity=quantity, title=title)
        paths.append(path)
    return paths
