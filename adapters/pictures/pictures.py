"""Pictures of samples and of metrics, as PNG files.

Only matplotlib's object-oriented interface is used. No display is needed, and no global state, such
as pyplot's current figure, is changed.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from adapters.measuring.metric_names import label
from sa_files.writing import written_atomically

_CELL = 64  # pixels a side, about, of an enlarged image
_PANEL = 400  # pixels a side, at most, of a panel that shows the first images alone
_ACROSS = 4  # panels in a row of a picture, at most
_GAP = 2  # pixels between images, at least
_GAP_GREY = 150  # stands out from black images and from white ones
_DPI = 100
INK = "#222222"
# Okabe & Ito's colours, which are distinct also for the colour-blind, without yellow (too pale).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = "osD^vPX"
DASHES = ("-", "--", ":", "-.")


def save_grid(path: str | Path, images_uint8: Tensor, *, columns: int) -> None:
    """Save images [B, C, H, W], uint8, C = 1 (grey) or 3, row by row as a PNG.

    A small image is enlarged to about 64 pixels. Between images is a gap of one enlarged pixel.
    """
    grid = _grid("images_uint8", images_uint8, columns)
    with written_atomically(path) as file:
        Image.fromarray(grid).save(file, format="PNG")


def save_labelled_grids(
    path: str | Path,
    panels: Mapping[str, Tensor],
    *,
    columns: int = 8,
    all_images: bool = False,
    panel_columns: int | None = None,
    heading: str | None = None,
) -> None:
    """Save one grid of images for each title, side by side, as a PNG.

    ``columns``: images in a row of a panel. ``all_images``: show all, however large the picture; by
    default a panel shows the first ones, at most ``columns`` in a row, so many as fit in 400 by 400
    pixels, but at least two by two. ``panel_columns``: panels in a row of the picture; by default
    at most four, in even rows.
    """
    if not panels:
        raise ValueError("panels must hold at least one title and its images, got none")
    rows = math.ceil(len(panels) / _ACROSS)
    across = math.ceil(len(panels) / rows) if panel_columns is None else panel_columns
    if across < 1:
        raise ValueError(f"panel_columns must be positive, got {panel_columns}")
    most = None if all_images else _PANEL
    grids = {
        title: _grid(f"panels[{title!r}]", images, columns, most)
        for title, images in panels.items()
    }
    write_figure(path, _panel_figure(grids, across, heading))


def plot_metric(
    path: str | Path,
    table: Mapping[str, Mapping[int, float]],
    *,
    metric: str,
    title: str | None = None,
    x_label: str = "sampling steps",
    log_x: bool = False,
    reference: float | None = None,
) -> None:
    """Plot a metric over the number of steps, a line for each method, as a PNG.

    ``table``: method -> steps -> value. ``metric``: its name, which the y axis gives in words, with
    the better direction; or another label. ``reference``: the data's own value, a horizontal line.
    An axis is logarithmic where its values are positive and span more than a factor of 4 (x) or 8
    (y), x also with ``log_x``. Up to 28 lines all differ.
    """
    _check(table)
    steps = sorted({step for row in table.values() for step in row})
    values = [value for row in table.values() for value in row.values()]
    figure = Figure(figsize=(7.6, 4.4), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    lines = {}
    for index, (method, row) in enumerate(table.items()):
        dash, colour = divmod(index, len(COLOURS))
        style = {"color": COLOURS[colour], "marker": MARKERS[colour], "markersize": 5}
        line = {"linestyle": DASHES[dash % len(DASHES)], "linewidth": 1.8, "zorder": 2.1}
        (lines[method],) = axes.plot(*zip(*sorted(row.items()), strict=True), **style, **line)
    if reference is not None:
        lines["data"] = draw_reference(axes, reference)
    label_steps(axes, steps, log=log_x or _is_wide(steps, 4))
    if _is_wide(values, 8):
        label_log_values(axes)
    label_axes(axes, x_label, label(metric), title)
    add_legend(figure, list(lines.values()), list(lines))
    write_figure(path, figure)


# ----------------------------------------------------------------------------------------- grids


def _grid(name: str, images: Tensor, columns: int, most: int | None = None) -> np.ndarray:
    """The images side by side, enlarged without smoothing: uint8 [H, W, 3].

    ``most``: show the first images alone, so many as fit in a square of so many pixels.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(
            f"{name} must be uint8 [B, 1 or 3, H, W], got {images.dtype} of shape "
            f"{tuple(images.shape)}"
        )
    if len(images) == 0:
        raise ValueError(f"{name} must hold at least one image, got none")
    if columns < 1:
        raise ValueError(f"columns must be positive, got {columns}")
    scale = max(1, round(_CELL / max(images.shape[2:])))
    gap = max(_GAP, scale)
    if most is not None:
        down, across = (max(2, (most - gap) // (side * scale + gap)) for side in images.shape[2:])
        columns = min(columns, across)
        images = images[: columns * down]
    large = images.detach().cpu().repeat_interleave(scale, dim=2).repeat_interleave(scale, dim=3)
    grid = make_grid(large.expand(-1, 3, -1, -1), nrow=columns, padding=gap, pad_value=_GAP_GREY)
    return grid.permute(1, 2, 0).contiguous().numpy()


def _panel_figure(grids: Mapping[str, np.ndarray], across: int, heading: str | None) -> Figure:
    """Lay the grids out in whole pixels, so that no image is resampled."""
    margin, line, font = 14, 18, 10  # pixels, pixels, points
    wide = max(grid.shape[1] for grid in grids.values())
    high = max(grid.shape[0] for grid in grids.values())
    # A letter of this size is about 7.5 pixels wide.
    titles = [textwrap.fill(title, max(8, int(wide / 7.5))) for title in grids]
    title_high = line * max(title.count("\n") + 1 for title in titles) + 6
    down = math.ceil(len(grids) / across)
    top = 2 * line + margin if heading else margin
    width = margin + across * (wide + margin)
    height = top + down * (title_high + high + margin)
    figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI, facecolor="white")
    if heading:
        figure.text(
            margin / width, 1 - (margin + line / 2) / height, heading,
            fontsize=font + 3, fontweight="bold", va="center", color=INK,
        )  # fmt: skip
    for index, (title, grid) in enumerate(zip(titles, grids.values(), strict=True)):
        row, column = divmod(index, across)
        left = margin + column * (wide + margin)
        upper = top + row * (title_high + high + margin) + title_high
        rows, columns = grid.shape[:2]
        box = (left / width, 1 - (upper + rows) / height, columns / width, rows / height)
        axes = figure.add_axes(box)
        axes.imshow(grid, interpolation="none", aspect="auto")
        axes.set_axis_off()
        figure.text(
            left / width, 1 - (upper - 6) / height, title, fontsize=font, va="bottom", color=INK
        )
    return figure


# ----------------------------------------------------------------------------------------- lines


def _check(table: Mapping[str, Mapping[int, float]]) -> None:
    if not table:
        raise ValueError("table must hold at least one method, got none")
    for method, row in table.items():
        if not row:
            raise ValueError(f"table[{method!r}] must hold at least one number of steps, got none")
        for steps, value in row.items():
            if not math.isfinite(value):
                raise ValueError(f"table[{method!r}][{steps}] must be finite, got {value!r}")


def _is_wide(values: Sequence[float], factor: float) -> bool:
    return min(values) > 0 and max(values) > factor * min(values)


def label_axes(axes: Axes, x_label: str, y_label: str, title: str | None) -> None:
    """Add labels, a title and a light grid; remove the frame's top and right side."""
    axes.set_xlabel(x_label, color=INK)
    axes.set_ylabel(y_label, color=INK)
    if title:
        axes.set_title(title, loc="left", fontsize=12, pad=10, color=INK)
    axes.grid(True, color="#E4E4E4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def add_legend(figure: Figure, lines: Sequence[Line2D], labels: Sequence[str]) -> None:
    """Add a legend beside the axes, with lines long enough to show the dashes."""
    style = {"frameon": False, "fontsize": 9, "labelcolor": INK, "handlelength": 3.5}
    figure.legend(lines, labels, loc="outside right upper", **style)


def draw_reference(axes: Axes, value: float) -> Line2D:
    """Draw the data's own value as a horizontal line; return it, for the legend."""
    return axes.axhline(value, color=INK, linestyle=":", linewidth=1.4, label="data")


def label_steps(axes: Axes, steps: Sequence[int], *, log: bool) -> None:
    """Put ticks at the numbers of steps that were run, if they are few."""
    if log:
        axes.set_xscale("log")
    if len(steps) <= 12:
        axes.xaxis.set_major_locator(FixedLocator(list(steps)))
        axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def label_log_values(axes: Axes) -> None:
    """Label a logarithmic y axis with 1, 2, 5, 10, …: values mostly span one or two decades."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def write_figure(path: str | Path, figure: Figure) -> None:
    """Write a figure as a PNG file."""
    with written_atomically(path) as file:
        FigureCanvasAgg(figure).print_png(file)
