"""The report's plots: what is drawn where."""

from types import SimpleNamespace

import matplotlib.figure
import numpy as np
import pytest
import torch

from adapters.comparison import figures
from adapters.comparison.tables import build_tables
from adapters.comparison.tasks import _kept
from tests.adapters.comparison.test_comparison_statistics import a_grid, results
from third_party.common.data import Images


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are made, in order."""
    made = []
    monkeypatch.setattr(
        figures, "Figure", lambda **keys: made.append(matplotlib.figure.Figure(**keys)) or made[-1]
    )
    return made


def tables_of(**keys):
    grid = a_grid(**keys)
    return build_tables(grid, results(grid))


def test_differences_are_intervals_around_a_zero_line(drawn, tmp_path):
    one = tables_of()[0]
    figures.plot_differences(tmp_path / "a.png", one)
    (figure,) = drawn
    assert figure.get_suptitle() == (
        "Fréchet distance, pixels (lower is better)\n"
        "Difference from B, 95 % interval paired by seed; in % of B's mean"
    )
    assert [axes.get_title() for axes in figure.axes] == ["DDPM small", "DDIM"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["SA-2"]
    for axes in figure.axes:
        assert set(axes.lines[0].get_ydata()) == {0}
        (line, _, (bars,)) = axes.containers[0]
        of_b = one.rows[0].entries[0].spread.mean
        np.testing.assert_allclose(line.get_xydata(), [[5, -1.1 / of_b * 100], [10, 0]], atol=1e-9)
        first, second = (segment[:, 1] for segment in bars.get_segments())
        difference = one.rows[1].entries[0].difference
        np.testing.assert_allclose(first, [difference.low * 20, difference.high * 20])
        assert second[0] < 0 < second[1]


def test_differences_of_one_seed_have_no_interval(drawn, tmp_path):
    figures.plot_differences(tmp_path / "a.png", tables_of(seeds=(0,))[0])
    (line, caps, (bars,)) = drawn[0].axes[0].containers[0]
    assert np.isfinite(line.get_ydata()).all()
    assert not any(np.isfinite(np.asarray(cap.get_ydata(), float)).any() for cap in caps)
    assert not any(segment.size and np.isfinite(segment).all() for segment in bars.get_segments())
    assert "one seed: no interval" in drawn[0].get_suptitle()


def test_values_have_the_datas_own_and_spell_out_b(drawn, tmp_path):
    distance, variance = tables_of()
    figures.plot_table(tmp_path / "a.png", distance)
    figures.plot_table(tmp_path / "b.png", variance)
    names = [[text.get_text() for text in f.legends[0].get_texts()] for f in drawn]
    assert names == [["B = baseline", "SA-2"], ["B = baseline", "SA-2", "data"]]
    for axes in drawn[1].axes:
        assert set(axes.lines[-1].get_ydata()) == {variance.data_value} == {11.0}


def test_samples_stand_beside_real_images_of_the_whole_data_set(monkeypatch):
    panels = {}
    monkeypatch.setattr(
        figures, "save_labelled_grids", lambda path, found, **_: panels.update(found)
    )
    of_class = Images(torch.arange(8, dtype=torch.uint8).reshape(8, 1, 1, 1))
    grid = a_grid()
    part, images = grid.parts[0], torch.zeros(2, 1, 1, 1, dtype=torch.uint8)
    cell = SimpleNamespace(is_done=lambda: True, first_images=lambda: images)
    plan = SimpleNamespace(cells=dict.fromkeys(grid.cells, cell))
    plan.store = SimpleNamespace(dataset=of_class)
    assert figures.draw_samples(None, grid, plan, part)
    assert panels.pop("real").flatten().tolist() == [0, 4]
    assert all(panel is images for panel in panels.values())


def test_a_cell_keeps_its_first_images_alone():
    images = torch.arange(180, dtype=torch.uint8).view(180, 1, 1, 1)
    first = []
    passed = list(_kept(iter(images.split(60)), first))
    assert torch.equal(torch.cat(passed), images)
    assert torch.equal(torch.stack(first), images[:100])
