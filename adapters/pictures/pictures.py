"""Pictures of samples and of metrics, as PNG files.

Only matplotlib's object-oriented interface is used. No display is needed, and no global state, such
as pyplot's current figure, is changed.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from sa_files.writing import write_atomically

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

Table = Mapping[str, Mapping[int, float | Sequence[float]]]


def save_grid(
    path: str | Path, images_uint8: Tensor, *, columns: int, scale: int | None = None
) -> None:
    """Save images [B, C, H, W], uint8, C = 1 (grey) or 3, row by row as a PNG.

    ``scale``: factor of enlargement; by default an image becomes about 64 pixels large. Between
    images is a gap of one enlarged pixel.
    """
    buffer = io.BytesIO()
    Image.fromarray(_grid("images_uint8", images_uint8, columns, scale)).save(buffer, format="PNG")
    write_atomically(path, buffer.getvalue())


def save_labelled_grids(
    path: str | Path,
    panels: Mapping[str, Tensor],
    *,
    columns: int = 8,
    all_images: bool = False,
    panel_columns: int | None = None,
    scale: int | None = None,
    heading: str | None = None,
) -> None:
    """Save one grid of images for each title, side by side, as a PNG.

    ``columns``: images in a row of a panel. ``all_images``: show all, however large the picture; by
    default a panel shows the first ones, at most ``columns`` in a row, so many as fit in 400 by 400
    pixels, but at least two by two. ``panel_columns``: panels in a row of the picture; by default
    at most four, in even rows. ``scale``: see ``save_grid``.
    """
    if not panels:
        raise ValueError("panels must hold at least one title and its images, got none")
    rows = math.ceil(len(panels) / _ACROSS)
    across = math.ceil(len(panels) / rows) if panel_columns is None else panel_columns
    if across < 1:
        raise ValueError(f"panel_columns must be positive, got {panel_columns}")
    most = None if all_images else _PANEL
    grids = {
        title: _grid(f"panels[{title!r}]", images, columns, scale, most)
        for title, images in panels.items()
    }
    write_figure(path, _panel_figure(grids, across, heading))


def plot_metric(
    path: str | Path,
    table: Table,
    *,
    metric: str,
    title: str | None = None,
    x_label: str = "sampling steps",
    groups: Mapping[str, str] | None = None,
    log_x: bool | None = None,
    log_y: bool | None = None,
    reference: float | None = None,
) -> None:
    """Plot a metric over the number of steps, a line for each method, as a PNG.

    ``table``: method -> steps -> a value, or the values of several seeds, which are shown as their
    mean with a bar of one standard deviation either way. ``metric``: its name, which the y axis
    gives in words, with the better direction; or another label. ``reference``: the data's own
    value, a horizontal line. ``groups``: method -> group; lines of a group share a colour and
    differ in their dashes. ``log_x``, ``log_y``: logarithmic axes; by default where the values are
    positive and span more than a factor of 4 (x) or 8 (y).
    """
    points = {method: _mean_and_deviation(method, row) for method, row in table.items()}
    if not points:
        raise ValueError("table must hold at least one method, got none")
    steps = sorted({step for rows in points.values() for step, _, _ in rows})
    means = [mean for rows in points.values() for _, mean, _ in rows]
    figure = Figure(figsize=(7.6, 4.4), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    lines = {
        method: _draw_line(axes, points[method], **style)
        for method, style in _styles(points, groups)
    }
    if reference is not None:
        lines["data"] = draw_reference(axes, reference)
    label_steps(axes, steps, log=_wants_log("log_x", log_x, steps, factor=4))
    if _wants_log("log_y", log_y, means, factor=8):
        label_log_values(axes)
    label_axes(axes, x_label, label(metric), title)
    add_legend(figure, list(lines.values()), list(lines))
    write_figure(path, figure)


# ----------------------------------------------------------------------------------------- grids


def _grid(
    name: str, images: Tensor, columns: int, scale: int | None, most: int | None = None
) -> np.ndarray:
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
    if columns < 1 or (scale is not None and scale < 1):
        raise ValueError(f"columns and scale must be positive, got {columns} and {scale}")
    scale = scale or max(1, round(_CELL / max(images.shape[2:])))
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


def _mean_and_deviation(
    method: str, row: Mapping[int, float | Sequence[float]]
) -> list[tuple[int, float, float]]:
    """(steps, mean, standard deviation over the seeds), by ascending number of steps."""
    if not row:
        raise ValueError(f"table[{method!r}] must hold at least one number of steps, got none")
    points = []
    for steps, value in sorted(row.items()):
        values = np.atleast_1d(np.asarray(value, dtype=np.float64))
        if values.ndim > 1 or values.size == 0 or not np.isfinite(values).all():
            raise ValueError(f"table[{method!r}][{steps}] must be finite numbers, got {value!r}")
        deviation = float(values.std(ddof=1)) if values.size > 1 else 0.0
        points.append((steps, float(values.mean()), deviation))
    return points


def _styles(
    methods: Iterable[str], groups: Mapping[str, str] | None
) -> Iterator[tuple[str, dict[str, str]]]:
    """Each method with its line's style; up to 28 lines all differ."""
    members: dict[str, int] = {}
    for index, method in enumerate(methods):
        if groups is None:
            colour, dash = index % len(COLOURS), index // len(COLOURS)
        elif method in groups:
            group = groups[method]
            dash = members[group] = members.get(group, -1) + 1
            colour = list(members).index(group) % len(COLOURS)
        else:
            raise ValueError(f"groups must name every method of the table, {method!r} is missing")
        marker, line = MARKERS[colour], DASHES[dash % len(DASHES)]
        yield method, {"color": COLOURS[colour], "marker": marker, "linestyle": line}


def _draw_line(axes: Axes, rows: list[tuple[int, float, float]], **style: str) -> Line2D:
    """Draw one method's line with its bars; return the line, for the legend."""
    steps, means, deviations = zip(*rows, strict=True)
    bars = deviations if any(deviations) else None
    container = axes.errorbar(
        steps, means, yerr=bars, markersize=5, linewidth=1.8, capsize=3, elinewidth=1.0, **style
    )
    return container.lines[0]


def _wants_log(name: str, asked: bool | None, values: Sequence[float], *, factor: float) -> bool:
    positive = min(values) > 0
    if asked and not positive:
        raise ValueError(f"{name} must be False where values are not positive, got {min(values)}")
    return positive and max(values) > factor * min(values) if asked is None else asked


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
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    write_atomically(path, buffer.getvalue())
