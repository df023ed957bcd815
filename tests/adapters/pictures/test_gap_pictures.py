"""The gap's picture: what is drawn where, and what is refused."""

import numpy as np
import pytest
from PIL import Image

from adapters.pictures.gap_pictures import plot_gap
from sa_plugin.bounds.gap import GapCurve

STEPS = np.arange(6, 1, -1)


def curve(scale, start=6):
    """One whose every number is known."""
    steps = np.arange(start, 1, -1)
    rise = scale * np.arange(1.0, len(steps) + 1)
    return GapCurve(steps, rise, rise / 10, 2 * rise, rise / 5, rise[-1:], rise[-1:])


@pytest.mark.parametrize(("quantity", "factor"), [("total", 1), ("distance", 2)])
def test_lines_and_bands(quantity, factor, tmp_path, figures):
    curves = {"B": [curve(1.0), curve(3.0)], "SA-2": [curve(0.5)]}
    plot_gap(tmp_path / "gap.png", curves, quantity=quantity, title="Digits")
    with Image.open(tmp_path / "gap.png") as picture:
        assert np.asarray(picture.convert("RGB")).std() > 0
    (axes,) = figures[0].axes
    assert axes.xaxis_inverted()
    assert axes.get_yscale() == {"total": "log", "distance": "linear"}[quantity]
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["B", "SA-2"]
    rise = factor * np.arange(1.0, 6)
    lines = [line.get_xydata() for line in axes.lines]
    np.testing.assert_allclose(lines[0], np.stack([STEPS, 2 * rise], 1))
    np.testing.assert_allclose(lines[1], np.stack([STEPS, rise / 2], 1))
    seeds, images = (band.get_paths()[0].vertices for band in axes.collections)
    assert seeds[:, 1].max() == pytest.approx((2 + 2**0.5) * rise[-1])
    assert images[:, 1].max() == pytest.approx(rise[-1] / 2 * 1.1)


@pytest.mark.parametrize(
    ("curves", "options", "said"),
    [
        ({}, {}, "at least one label"),
        ({"B": []}, {}, r"curves\['B'\] must hold at least one curve"),
        ({"B": [curve(1.0), curve(1.0, start=5)]}, {}, r"curves\['B'\] must be of the same steps"),
        ({"B": [curve(1.0)]}, {"quantity": "end"}, "quantity must be one of .*, got 'end'"),
    ],
)
def test_bad_input_is_refused(curves, options, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        plot_gap(tmp_path / "gap.png", curves, **options)
    assert not list(tmp_path.iterdir())
