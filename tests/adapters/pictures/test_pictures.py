"""Pictures: what is drawn where, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from adapters.pictures.pictures import plot_metric, save_grid, save_labelled_grids

GREY = (150, 150, 150)
TABLE = {
    "baseline": {50: 0.75, 5: 3.6, 10: 1.6},
    "SA-2": {5: 2.4, 10: 1.0, 50: 0.4},
}


def read(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture.convert("RGB"))


def flat_images(*levels: int, size: int = 8, channels: int = 1) -> torch.Tensor:
    return torch.stack(
        [torch.full((channels, size, size), level, dtype=torch.uint8) for level in levels]
    )


class TestSaveGrid:
    def test_places_and_grey_levels(self, tmp_path):
        images = flat_images(0, 50, 100, 200, 255)
        images[1, 0, 7, 7] = 60
        save_grid(tmp_path / "deep" / "grid.png", images, columns=3)
        picture = read(tmp_path / "deep" / "grid.png")
        # Cells of 8 * 8 pixels, 8 pixels around each.
        assert picture.shape == (2 * 72 + 8, 3 * 72 + 8, 3)
        for index, level in enumerate([0, 50, 100, 200, 255]):
            row, column = divmod(index, 3)
            top, left = 8 + 72 * row, 8 + 72 * column
            assert (picture[top : top + 56, left : left + 56] == level).all()
        assert (picture[64:72, 136:144] == 60).all()  # one pixel, eight by eight, no smoothing
        assert (picture[63, 136:144] == 50).all()
        assert tuple(picture[0, 0]) == tuple(picture[72, 72]) == GREY
        assert list((tmp_path / "deep").iterdir()) == [tmp_path / "deep" / "grid.png"]

    def test_colours(self, tmp_path):
        images = torch.tensor([[255, 0, 10], [1, 2, 3]], dtype=torch.uint8)
        images = images[:, :, None, None].expand(-1, -1, 64, 64)
        save_grid(tmp_path / "grid.png", images, columns=2)
        picture = read(tmp_path / "grid.png")
        assert picture.shape == (68, 134, 3)
        assert tuple(picture[2, 2]) == (255, 0, 10)
        assert tuple(picture[65, 131]) == (1, 2, 3)

    @pytest.mark.parametrize(
        ("size", "cell", "gap"),
        [(8, 64, 8), (16, 64, 4), (32, 64, 2), (64, 64, 2), (256, 256, 2)],
    )
    def test_cells_are_large_enough_to_see(self, tmp_path, size, cell, gap):
        save_grid(tmp_path / "grid.png", flat_images(0, 0, size=size), columns=2)
        assert read(tmp_path / "grid.png").shape[:2] == (cell + 2 * gap, 2 * cell + 3 * gap)

    @pytest.mark.parametrize(
        ("images", "options", "message"),
        [
            (torch.zeros(2, 1, 8, 8), {}, "images_uint8 must be uint8"),
            (torch.zeros(1, 8, 8).byte(), {}, "images_uint8 must be uint8"),
            (torch.zeros(1, 2, 8, 8).byte(), {}, r"\[B, 1 or 3, H, W\]"),
            (torch.zeros(0, 1, 8, 8).byte(), {}, "at least one image"),
            (torch.zeros(1, 1, 8, 8).byte(), {"columns": 0}, "columns must be positive, got 0"),
        ],
    )
    def test_refuses_bad_input(self, tmp_path, images, options, message):
        with pytest.raises(ValueError, match=message):
            save_grid(tmp_path / "grid.png", images, **{"columns": 4, **options})
        assert not list(tmp_path.iterdir())


class TestSaveLabelledGrids:
    def test_panels_are_drawn_pixel_by_pixel(self, tmp_path, figures):
        levels = torch.arange(128, dtype=torch.uint8).reshape(2, 1, 8, 8)
        panels = {"real": levels, "baseline": levels + 100, "SA-2": levels + 50}
        save_labelled_grids(
            tmp_path / "panels.png", panels, columns=2, panel_columns=2, heading="Samples"
        )
        (figure,) = figures
        assert {text.get_text() for text in figure.texts} == {"Samples", *panels}
        assert len(figure.axes) == 3
        picture = read(tmp_path / "panels.png")
        for axes, images in zip(figure.axes, panels.values(), strict=True):
            save_grid(tmp_path / "grid.png", images, columns=2)
            grid = read(tmp_path / "grid.png")
            box = axes.get_window_extent()
            top, left = round(picture.shape[0] - box.y1), round(box.x0)
            shown = picture[top : top + grid.shape[0], left : left + grid.shape[1]]
            np.testing.assert_array_equal(shown, grid)

    @pytest.mark.parametrize(
        ("size", "columns", "shown"),
        [(8, 10, (5, 5)), (8, 3, (5, 3)), (32, 10, (6, 6)), (256, 10, (2, 2))],
    )
    def test_a_panel_shows_as_many_images_as_are_seen(
        self, size, columns, shown, tmp_path, figures
    ):
        images = flat_images(*range(100), size=size)
        for every in (False, True):
            path = tmp_path / f"{every}.png"
            save_labelled_grids(path, {"real": images}, columns=columns, all_images=every)
        first, every = (figure.axes[0].images[0].get_array() for figure in figures)
        cell, gap = max(64, size), max(2, 64 // size)
        assert [(side - gap) / (cell + gap) for side in first.shape[:2]] == list(shown)
        rows = -(-100 // columns)
        assert [(side - gap) / (cell + gap) for side in every.shape[:2]] == [rows, columns]

    def test_rows_of_panels_are_even(self, tmp_path, figures):
        panels = {str(i): flat_images(0) for i in range(5)}
        save_labelled_grids(tmp_path / "a.png", panels)
        tops = [axes.get_position().y1 for axes in figures[0].axes]
        assert [tops.count(top) for top in dict.fromkeys(tops)] == [3, 2]

    def test_a_long_title_stays_over_its_panel(self, tmp_path, figures):
        title = "sequence-aware loss over two steps, Analytic-DDPM, trajectory linear, 10 steps"
        panels = {title: flat_images(0, 1, 2, 3), "other": flat_images(4, 5, 6, 7)}
        save_labelled_grids(tmp_path / "panels.png", panels, columns=4)
        (figure,) = figures
        first, second = figure.axes
        box = figure.texts[0].get_window_extent()
        assert figure.texts[0].get_text().replace("\n", " ") == title
        assert box.x1 <= second.get_window_extent().x0
        assert first.get_window_extent().y1 <= box.y0
        assert box.y1 <= figure.bbox.y1

    def test_refuses_bad_input(self, tmp_path):
        path = tmp_path / "panels.png"
        with pytest.raises(ValueError, match="at least one title"):
            save_labelled_grids(path, {})
        with pytest.raises(ValueError, match=r"panels\['b'\] must be uint8"):
            save_labelled_grids(path, {"a": flat_images(0), "b": torch.zeros(1, 1, 8, 8)})
        with pytest.raises(ValueError, match="panel_columns must be positive, got 0"):
            save_labelled_grids(path, {"a": flat_images(0)}, panel_columns=0)


class TestPlotMetric:
    def test_lines_axes_and_legend(self, tmp_path, figures):
        plot_metric(tmp_path / "metric.png", TABLE, metric="frechet_pixels", title="Digits")
        (figure,) = figures
        (axes,) = figure.axes
        assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
        assert axes.get_ylabel() == "Fréchet distance, pixels (lower is better)"
        assert [text.get_text() for text in figure.legends[0].get_texts()] == list(TABLE)
        assert list(axes.get_xticks()) == [5, 10, 50]
        baseline, sa = axes.lines
        np.testing.assert_array_equal(baseline.get_xydata(), [[5, 3.6], [10, 1.6], [50, 0.75]])
        np.testing.assert_array_equal(sa.get_xydata(), [[5, 2.4], [10, 1.0], [50, 0.4]])
        assert read(tmp_path / "metric.png").std() > 0

    def test_the_datas_own_value_is_a_line(self, tmp_path, figures):
        for reference in (12.5, None):
            plot_metric(tmp_path / "a.png", TABLE, metric="sample_variance", reference=reference)
        with_it, without = ([text.get_text() for text in f.legends[0].get_texts()] for f in figures)
        assert with_it == [*without, "data"] == [*TABLE, "data"]
        assert set(figures[0].axes[0].lines[-1].get_ydata()) == {12.5}

    def test_linear_axes_for_narrow_or_negative_values(self, tmp_path, figures):
        plot_metric(tmp_path / "a.png", {"a": {10: 9.1, 20: 9.5}}, metric="is")
        plot_metric(tmp_path / "b.png", {"a": {1: -0.1, 1000: 9.5}}, metric="is")
        plot_metric(tmp_path / "c.png", {"a": {10: 9.1, 20: 9.5}}, metric="is", log_x=True)
        scales = [(f.axes[0].get_xscale(), f.axes[0].get_yscale()) for f in figures]
        assert scales == [("linear", "linear"), ("log", "linear"), ("log", "linear")]

    def test_all_styles_differ(self, tmp_path, figures):
        plot_metric(tmp_path / "a.png", {str(i): {1: i} for i in range(28)}, metric="is")
        lines = figures[0].axes[0].lines
        assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 28

    @pytest.mark.parametrize(
        ("table", "message"),
        [
            ({}, "at least one method"),
            ({"a": {}}, r"table\['a'\] must hold at least one"),
            ({"a": {5: float("nan")}}, r"table\['a'\]\[5\] must be finite, got nan"),
        ],
    )
    def test_refuses_bad_input(self, tmp_path, table, message):
        with pytest.raises(ValueError, match=message):
            plot_metric(tmp_path / "metric.png", table, metric="is")
        assert not list(tmp_path.iterdir())
