"""python -m adapters.compare on real digits: continued, grown, failing; and its refusals."""

import csv
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import distributed
import numpy as np
import pytest
import torch
from ml_collections import FrozenConfigDict

from adapters.compare import main
from adapters.comparison.corrections import corrected as corrected_by
from adapters.comparison.grid import Cell, Grid, Line
from adapters.comparison.plan import Plan
from adapters.comparison.store import Store
from adapters.comparison.tasks import CellTask, EpsScaleTask, StageTask
from adapters.experiment.config import COMPARISON, LOCK_FILE, check_keys, read_command_line
from adapters.experiment.experiment import Experiment
from adapters.experiment.identity import cell_name, digest, second_name, training_name
from adapters.experiment.stages import TrainStage
from adapters.measuring import inception
from adapters.measuring.extractor import Extracted
from adapters.measuring.inception import WEIGHTS_VARIABLE
from adapters.shell.locks import locked
from configs import digits_tables
from configs.comparison import training
from sa_plugin.bounds.gap import gap_along_chain
from tests import ROOT
from tests.adapters.comparison.test_comparison_statistics import a_grid
from tests.commands import one_line
from third_party.common.data import to_uint8, to_unit_range
from third_party.common.datasets import get_dataset

TABLES = sorted(
    path for pattern in ("*table*.py", "figure*.py") for path in (ROOT / "configs").glob(pattern)
)
# 30 images cannot fill the 64 pixels' covariance; the warning that says so is expected here.
pytestmark = pytest.mark.filterwarnings("ignore:.*singular.*:UserWarning")

SMALL = [
    "--config=configs/digits_tables.py",
    "--config.seeds=(0,1)",
    "--config.experiment.schedule.N=50",
    "--config.experiment.base.iterations=4",
    "--config.experiment.base.batch_size=8",
    "--config.experiment.head.iterations=3",
    "--config.experiment.head.batch_size=8",
    "--config.experiment.gamma.n_images=4",
    "--config.experiment.sample.n_images=30",
    "--config.experiment.evaluate.features=('pixels',)",
    "--config.gap.start=6",
    "--config.gap.n_images=4",
    "--config.eps_scale.n_images=30",
    "--config.eps_scale.steps=2",
    "--config.eps_scale.evaluations=4",
    "--config.tables=('main','scaled')",
    "--config.parts.main.processes=('ddpm_small','npr_ddpm','sn_ddim','analytic_ddpm')",
    "--config.parts.main.steps=(2,)",
    "--config.parts.scaled.steps=(2,)",
    "--device=cpu",
    "--noprogress",
]


def with_changes(*arguments):
    """SMALL with other values: a tuple that is given twice would be one that has grown."""
    given = {argument.split("=")[0] for argument in arguments}
    return [*(word for word in SMALL if word.split("=")[0] not in given), *arguments]


def options(workdir, *arguments):
    """The words of a command that computes it."""
    given = {argument.split("=")[0] for argument in arguments}
    workers = [] if given & {"--workers", "--scheduler"} else ["--workers=1"]
    return [*with_changes(*arguments), f"--workdir={workdir}", *workers]


def compare(workdir, *arguments):
    """The exit code of the command in ``workdir``."""
    return main(["compare", *options(workdir, *arguments)])


def written(folder, pattern="**/*"):
    """Files and when they were written, but for reports and locks."""
    there = (path for path in folder.glob(pattern) if path.is_file())
    skipped = {"reports", ".lock"}
    return {p: p.stat().st_mtime_ns for p in there if not skipped & set(p.parts)}


def numbers(folder):
    """The report's cells."""
    with (folder / "reports/digits/cells.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished grid; tests that change it copy it first."""
    folder = tmp_path_factory.mktemp("compare") / "grid"
    assert compare(folder) == 0
    return folder


def test_leaves_a_report_with_everything(finished):
    rows = numbers(finished)
    # main: 4 processes x 2 trainings; scaled adds B scaled in two, B and SA in DDIM; 2 seeds
    assert len(rows) == 2 * (8 + 4)
    assert {row["eps_scale"] != "1.0" for row in rows if row["sampling"] == "scaled"} == {True}
    assert all(float(row["frechet_pixels"]) > 0 for row in rows)
    folder = finished / "reports/digits"
    text = (folder / "report.md").read_text()
    for word in ("NPR-DDPM", "SN-DDIM", "Analytic-DDPM", "SA-2", "±", "paired by seed"):
        assert word in text
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png;base64,") == len(list(folder.glob("*.png"))) > 5
    text = re.sub(r"base64,[A-Za-z0-9+/=]*", "", page)  # a picture may hold any letters
    assert "http" not in text.replace("http://www.w3.org", "")
    assert r"\toprule" in (folder / "tables.tex").read_text()
    assert "gap_distance.png" in {path.name for path in folder.glob("*.png")}


def test_the_report_has_the_gap_in_numbers(finished):
    gaps = {"b": [], "sa": []}
    for (name, _), task in plan_of(finished, SMALL).gaps.items():
        gaps[name].append(task.result().mean[-1])
    text = (finished / "reports/digits/report.md").read_text()
    means = {name: sum(values) / len(values) for name, values in gaps.items()}
    assert f"total gap from x_6, SA-2: {means['sa']:.3f} ± " in text
    assert f"its difference, SA-2 less B: {means['sa'] - means['b']:+.3f} [" in text


def test_the_gap_is_that_of_images_of_all_parts_of_the_data(finished):
    """In a folder sorted by class, the first images would be of one class."""
    task = next(iter(plan_of(finished, SMALL).gaps.values()))
    experiment = task.store.experiment(task.line, task.seed, None)
    wanted = gap_along_chain(
        experiment.wrapper(*task.store.network(task.base.stage)),
        experiment.schedule,
        to_unit_range(to_uint8(get_dataset("digits").images[[0, 898, 449, 1347]])),
        start=6,
        seed=task.seed,
        batch_size=256,
    )
    assert np.array_equal(task.result().end, wanted.end)


def test_one_noise_network_stands_behind_all_rows(finished):
    trainings = [path.name for path in (finished / "trainings").iterdir()]
    assert len(trainings) == 4  # B and SA-2, two seeds
    below = {path.name.split("_")[0] for path in (finished / "trainings" / trainings[0]).iterdir()}
    assert {"base", "npr", "sn", "analytic"} <= below
    assert len(list((finished / "trainings").rglob("base/ckpts"))) == 4


def test_again_computes_nothing(finished):
    before = written(finished)
    assert compare(finished) == 0
    assert written(finished) == before


def test_what_a_cell_lost_is_made_again(finished, tmp_path):
    folder = tmp_path / "grid"
    shutil.copytree(finished, folder, copy_function=shutil.copy2)
    first, second, third = sorted((folder / "cells").rglob("ddim_*.json"))[:3]
    lost = [first.with_suffix(".grid.png"), second.with_suffix(".npz"), third]
    before = {path: path.read_bytes() for path in lost}
    lost[0].unlink()
    for path in lost[1:]:
        path.write_bytes(before[path][:-9] if path.suffix == ".npz" else b"")
    cells = {task.path: task for task in plan_of(folder, SMALL).cells.values()}
    assert [cells[path].is_done() for path in (first, second, third)] == 3 * [False]
    for path in (first, second, third):
        cells[path].run()
        assert cells[path].is_done()
    assert [path.read_bytes() == before[path] for path in lost[:2]] == [True, True]
    assert json.loads(third.read_text())["metrics"] == json.loads(before[third])["metrics"]


def test_what_a_done_training_lost_besides_its_result_is_restored(finished, tmp_path):
    folder = tmp_path / "grid"
    shutil.copytree(finished, folder, copy_function=shutil.copy2)
    lost = sorted((folder / "trainings").rglob("config.json"))
    before = {path: path.read_bytes() for path in lost}
    for path in lost:
        path.unlink()
    ckpts = next((folder / "trainings").rglob("base/ckpts"))
    shutil.copytree(next(ckpts.iterdir()), ckpts / "1.ckpt.tmp")
    (folder / "cells" / ".cell.json.0123456789abcdef.tmp").touch()
    assert compare(folder) == 0
    assert {path: path.read_bytes() for path in lost} == before
    assert not list(folder.rglob("*.tmp"))


def test_a_grown_grid_reuses_what_is_there(finished, tmp_path):
    folder = tmp_path / "grid"
    shutil.copytree(finished, folder, copy_function=shutil.copy2)
    before = written(folder)
    assert compare(folder, "--config.parts.main.steps=(2,3)") == 0
    after = written(folder)
    assert {path: after[path] for path in before} == before
    new = [path for path in after if path not in before and path.suffix == ".json"]
    assert len(new) == 2 * 8


def test_a_comparison_of_one_store_shares_cells_with_another(finished):
    before = written(finished)
    assert compare(finished, "--config.name=other", "--config.tables=('scaled',)") == 0
    assert written(finished) == before
    assert (finished / "reports/other/report.html").exists()


def test_the_plan_is_shown_and_nothing_written(tmp_path, capsys):
    assert compare(tmp_path / "grid", "--dry_run") == 0
    assert not (tmp_path / "grid").exists()
    text = capsys.readouterr().out
    assert "noise networks" in text
    assert "PFLOP" in text
    cells = next(line for line in text.splitlines() if line.startswith("| cells"))
    # 24 cells of 30 images in 2 steps
    assert [word.strip() for word in cells.split("|")[2:5]] == ["24", "24", "1.44e+03"]


BY_CLASS = ["--config.experiment.data.labels=True", "--config.experiment.base.label_drop=0.1"]


def test_the_plan_counts_guidances_second_call(tmp_path):
    def cost(*words):
        tasks = plan_of(tmp_path, [*SMALL, *BY_CLASS, *words]).in_order()
        return {kind: sum(t.evaluations for t in tasks if type(t) is kind) for kind in kinds}

    kinds = (CellTask, EpsScaleTask, StageTask)
    plain, guided = cost(), cost("--config.experiment.sample.guidance=1.0")
    assert plain[CellTask] == 24 * 30 * 2
    assert guided == {kind: plain[kind] * (1 if kind is StageTask else 2) for kind in kinds}


def test_the_plan_of_a_network_with_classes_warns_of_a_long_average(tmp_path, capsys):
    long = "--config.experiment.base.ema=0.9999"
    assert compare(tmp_path / "grid", "--dry_run", *BY_CLASS, long) == 0
    warning = "warning: base.ema = 0.9999 leaves 100% of the initial weights"
    assert warning in capsys.readouterr().out


def test_the_plan_refuses_a_root_that_is_not_there(tmp_path, capsys):
    line = [
        "--config=configs/table1_cifar10.py",
        f"--config.experiment.data.root={tmp_path / 'no'}",
    ]
    assert main(["compare", *line, "--dry_run", f"--workdir={tmp_path / 'grid'}"]) == 2
    one_line(capsys, "data.root must hold the images of cifar10, got", tmp_path / "no")


class FourPixels(torch.nn.Module):
    """In Inception's place."""

    def forward(self, x):
        return Extracted(x.flatten(1)[:, 20:24], x.flatten(1)[:, 20:23])


def test_what_fails_is_shown_and_tried_again(tmp_path, capsys, monkeypatch):
    """Inception's weights are missing: every cell fails, trainings and gap curves do not."""
    monkeypatch.setenv(WEIGHTS_VARIABLE, str(tmp_path / "absent.pth"))
    few = ["--config.seeds=(0,)", "--config.tables=('main',)"]
    few += ["--config.parts.main.processes=('ddpm_small',)"]
    features = "--config.experiment.evaluate.features=('inception',)"
    assert compare(tmp_path / "grid", *few, features) == 1
    captured = capsys.readouterr()
    assert "2 tasks are not done" in captured.err
    report = (tmp_path / "grid/reports/digits/report.md").read_text()
    assert "absent.pth" in report
    assert "2 failed" in report
    page = (tmp_path / "grid/reports/digits/report.html").read_text()
    for text in (report, page):  # the log too
        assert text.count("in find_weights") == 2
    assert (tmp_path / "grid/reports/digits/gap_total.png").exists()
    weights = tmp_path / "weights.pth"
    weights.touch()
    monkeypatch.setenv(WEIGHTS_VARIABLE, str(weights))
    monkeypatch.setattr(inception, "load_inception", lambda path, tensorflow=False: FourPixels())
    assert compare(tmp_path / "grid", *few, features) == 0
    report = (tmp_path / "grid/reports/digits/report.md").read_text()
    assert "failed" not in report
    assert "**fid (lower is better)" in report


def test_a_failed_training_shows_in_every_cell_that_rests_on_it(tmp_path, monkeypatch):
    """B at equal compute goes on from B's training: its cells need what needs the failed one."""
    run = TrainStage.run

    def broken(stage):
        if not stage.experiment.config.sa.lam:
            raise ValueError("no such training")
        run(stage)

    monkeypatch.setattr(TrainStage, "run", broken)
    few = ["--config.seeds=(0,)", "--config.tables=('compute',)", "--config.gap.trainings=()"]
    few += ["--config.parts.compute.lines=('b','b_equal','sa')"]
    few += ["--config.parts.compute.processes=('ddpm_small',)", "--config.parts.compute.steps=(2,)"]
    assert compare(tmp_path / "grid", *few) == 1
    report = (tmp_path / "grid/reports/digits/report.md").read_text()
    rows = [line.split("|")[2:4] for line in report.splitlines() if line.startswith("| DDPM")]
    found = {line.strip(): number.strip() for line, number in rows[:3]}
    assert found.pop("SA-2") not in ("failed", "-")
    assert found == {"B": "failed", "B, equal compute": "failed"}
    assert "1 failed" in report


def results(folder):
    """All that a grid has made, by name: weights and images in bytes, and the cells' metrics."""
    found = {}
    for pattern in ("cells/**/*", "trainings/**/model.pth", "gap/*", "trainings/**/gamma.npz"):
        for path in (path for path in folder.glob(pattern) if path.is_file()):
            content = path.read_bytes()
            if path.suffix == ".json":
                content = json.loads(content)["metrics"]  # the seconds differ
            found[path.relative_to(folder).as_posix()] = content
    return found


@pytest.mark.parametrize(
    ("name", "q", "kind"),
    [
        ("shifted", 0.5, "ShiftedNoise"),
        ("spectral", 0.0, "SpectralShrinkage"),
        ("norms", 0.0, "EpsilonScaling"),
    ],
)
def test_cells_corrected_at_sampling_time_are_other_cells(
    finished, tmp_path, monkeypatch, name, q, kind
):
    """In the networks that are there; q = 0 is the best for the row and its steps."""
    folder = tmp_path / "grid"
    shutil.copytree(finished, folder, copy_function=shutil.copy2)
    before = set(folder.glob("cells/*/*.json"))
    words = ["--config.tables=('unclipped',)", "--config.gap.trainings=()", "--config.seeds=(0,)"]
    words += ["--config.parts.unclipped.lines=('b','b/unclipped')"]
    words += ["--config.parts.unclipped.processes=('ddpm_small','sn_ddim','npr_ddpm')"]
    words += ["--config.parts.unclipped.steps=(2,)"]
    words += ["--config.samplings.unclipped.set.clip_x0=True"]
    words += [f"--config.samplings.unclipped.correction={name}"]
    words += [f"--config.samplings.unclipped.q={q}"]
    asked, examples = [], Experiment.examples
    monkeypatch.setattr(Experiment, "examples", lambda *a: (asked.append(a[1]), examples(*a))[1])
    assert compare(folder, *words) == 0
    assert asked == ([500] * 3 if name == "norms" else [])  # images of all parts of the data
    new = [json.loads(path.read_text()) for path in set(folder.glob("cells/*/*.json")) - before]
    if name == "norms":
        factors = [cell["factors"] for cell in new if "factors" in cell]
        assert len(factors) == 3
        assert all(len(found) == 2 for found in factors)  # one for each step
    else:
        corrected = [cell["q"] for cell in new if "q" in cell]
        assert len(corrected) == 3
        assert all(found == q for found in corrected) if q else max(corrected) > 1
    plan = plan_of(folder, [w for w in options(folder, *words) if not w.startswith("--workers")])
    for cell, task in plan.cells.items():
        if plan.store.grid.correction(cell.line) is None:
            continue
        experiment = plan.store.experiment(cell.line, 0, cell.process)
        found = task.network()
        wrap, _ = corrected_by(plan.store, experiment, cell, found)
        network = wrap(experiment.wrapper(found.network, found.typ))
        assert type(network).__name__ == kind
        assert network._second_is == {"sn_ddim": "eps2", "npr_ddpm": "epsc"}.get(cell.process)
        calls = 2 if name == "shifted" and network._second_is else 1  # a step
        assert task.evaluations == 30 * cell.steps * calls


def test_a_training_starts_from_anothers_average(finished, tmp_path):
    """Its first weights are that average, and its name depends on the training it starts from."""
    folder = tmp_path / "grid"
    shutil.copytree(finished, folder, copy_function=shutil.copy2)
    words = ["--config.tables=('unclipped',)", "--config.gap.trainings=()", "--config.seeds=(0,)"]
    words += ["--config.parts.unclipped.lines=('b','sa')"]
    words += ["--config.parts.unclipped.processes=('ddpm_small',)"]
    words += ["--config.parts.unclipped.steps=(2,)", "--config.trainings.sa.init=b"]
    rate = "--config.experiment.base.lr=1e-9"  # it stays where it starts
    assert compare(folder, *words, rate) == 0
    plan = plan_of(folder, [*(w for w in options(folder, *words, rate) if "workers" not in w)])
    b, tuned = (plan.store.network(plan._base(name, 0).stage)[0] for name in ("b", "sa"))
    for ours, theirs in zip(tuned.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    grid = plan.store.grid
    name = training_name(grid.experiment(Line("sa"), 0))
    assert name != training_name(Grid(_without_init(grid.config)).experiment(Line("sa"), 0))
    other = grid.config.to_dict()
    other["trainings"]["b"]["set"] = {"sa": {"lam": 0.0}, "base": {"ema": 0.5}}
    assert name != training_name(Grid(FrozenConfigDict(other)).experiment(Line("sa"), 0))
    other["trainings"]["sa"]["init"] = "c"
    with pytest.raises(ValueError, match=r"trainings must be among .*, got 'c'"):
        Grid(FrozenConfigDict(other))


def _without_init(config):
    changed = config.to_dict()
    del changed["trainings"]["sa"]["init"]  # as in configurations from before this key
    return FrozenConfigDict(changed)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["workers", "scheduler"])
def test_processes_make_the_same_bytes_as_one(tmp_path, way):
    """In processes of their own, as a user starts them; each with one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    few = ["--config.seeds=(0,)"]

    def run(folder, *words):
        command = [sys.executable, "-m", "adapters.compare", *options(folder, *few, *words)]
        subprocess.run(command, check=True, cwd=ROOT, env=environment, capture_output=True)
        return results(folder)

    one = run(tmp_path / "one")
    assert len(one) > 30
    if way == "workers":
        assert run(tmp_path / "two", "--workers=2") == one
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        with distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=":0", silence_logs=50
        ) as cluster:
            assert run(tmp_path / "two", f"--scheduler={cluster.scheduler_address}") == one


def test_a_second_command_is_refused_in_one_line(finished, capsys, monkeypatch):
    monkeypatch.setattr("adapters.compare.PATIENCE", 0.1)
    with locked(finished / LOCK_FILE):
        assert compare(finished) == 2
    error = capsys.readouterr().err
    assert "another command is at work" in error
    assert len(error.splitlines()) == 1


def test_the_plan_is_told_first_and_then_each_task(tmp_path, capsys):
    few = ["--config.seeds=(0,)", "--config.tables=('main',)", "--config.gap.trainings=()"]
    few += ["--config.parts.main.processes=('ddpm_small',)"]
    assert compare(tmp_path / "grid", *few) == 0
    told = capsys.readouterr()
    assert told.out.splitlines()[2].split("|")[2:4] == [" tasks ", " to do "]
    said = re.findall(r"^\[(\d)/4\] .* elapsed(, (?:about|more than) .* left)?$", told.err, re.M)
    assert [number for number, _ in said] == list("1234")
    assert [bool(left) for _, left in said] == [False, False, True, True]  # cells were timed


def test_the_fitted_constant_is_the_best_that_was_tried(finished):
    paths = list(finished.glob("trainings/*/eps_scale_*.json"))
    assert len(paths) == 2  # B, two seeds
    for path in paths:
        found = json.loads(path.read_text())
        best = min(found["tried"], key=lambda one: one["frechet_pixels"])
        assert found["eps_scale"] == best["eps_scale"]
        assert 0.9 < found["eps_scale"] < 1.05


def test_the_fitted_line_is_the_best_that_was_tried(tmp_path):
    of_others = ("--config=", "--config.parts", "--config.tables", "--config.trainings")
    words = [word for word in SMALL if not word.startswith((*of_others, "--config.seeds"))]
    words += ["--config=configs/digits_rivals_tables.py", "--config.seeds=(0,)"]
    words += ["--config.parts.rivals.lines=('b','b/line')", "--config.parts.rivals.steps=(2,)"]
    words += ["--config.parts.rivals.processes=('ddpm_small',)"]
    assert main(["compare", *words, f"--workdir={tmp_path}", "--workers=1"]) == 0
    plan = plan_of(tmp_path, words)
    (fit,) = (task for task in plan.in_order() if isinstance(task, EpsScaleTask))
    tried = json.loads(fit.path.read_text())["tried"]
    best = min(tried, key=lambda one: one["frechet_pixels"])
    (k, c_0), N = best["eps_line"], 50
    assert 3 < len(tried) <= 8
    assert fit.evaluations == 8 * 2 * 30
    assert k != 0
    assert all(1 / 1.05 <= c <= 1 / 0.9 for c in (c_0, k * N + c_0))
    fitted, without = map(fit._metrics, (fit.result(), {"eps_scale": 1.0}))
    assert fitted["frechet_pixels"] == best["frechet_pixels"] < without["frechet_pixels"]
    found = {cell.line.sampling: task.result() for cell, task in plan.cells.items()}
    assert found["line"]["eps_line"] == [k, c_0]
    assert found["line"]["metrics"] != found["default"]["metrics"]
    folder, divisor = tmp_path / "reports/digits_rivals", f"{k:.3g} n + {c_0:.4f}"
    report = (folder / "report.md").read_text()
    assert f"fitted line, seed 0, is divided by: {divisor}" in report
    assert f"b,line,0,ddpm_small,2,1 / ({divisor})," in (folder / "cells.csv").read_text()


# ------------------------------------------------------------------------------------ identities


def config_of(**keys):
    grid = a_grid()
    experiment = grid.config.experiment.to_dict()
    for name, value in keys.items():
        section, key = name.split("__")
        experiment[section][key] = value
    return Grid(FrozenConfigDict({**grid.config.to_dict(), "experiment": experiment}))


def names(grid, training="b", process="sn_ddpm"):
    line = Line(training)
    config = grid.experiment(line, 0, process)
    cell = Cell(line, 0, process, 5)
    return training_name(config), second_name(config, "eps2"), cell_name(config, cell, 1.0)


@pytest.mark.parametrize(
    ("key", "value", "changed"),
    [
        ("base__lr_decay", 1, (True, False, False)),
        ("data__split", "train", (True, False, False)),
        ("evaluate__reference", "test", (False, False, True)),
        ("base__log_every", 7, (False, False, False)),
        ("data__root", "elsewhere", (False, False, False)),
        ("sample__batch_size", 3, (False, False, False)),
        ("sa__K", 3, (False, False, False)),  # the baseline has no SA term
        ("base__lr", 0.5, (True, False, False)),
        ("schedule__N", 500, (True, False, False)),
        ("head__lr", 0.5, (False, True, True)),
        ("sample__n_images", 7, (False, False, True)),
        ("sample__precision", "bf16", (False, False, True)),
        ("evaluate__features", ("pixels",), (False, False, True)),
    ],
)
def test_a_name_tells_what_decides_the_numbers(key, value, changed):
    before, after = names(config_of()), names(config_of(**{key: value}))
    assert tuple(a != b for a, b in zip(before, after, strict=True)) == changed


def test_a_key_that_came_later_renames_no_cell_at_its_default():
    before = {"n_images": 5, "batch_size": 3}
    later = {"channels_last": False, "compile": False, "precision": "float32"}
    assert digest({"sample": before | later}) == digest({"sample": before})
    assert digest({"sample": before | later | {"compile": True}}) != digest({"sample": before})


def test_a_comparison_of_nothing_is_refused():
    with pytest.raises(ValueError, match="must not both be empty"):
        a_grid(tables=())


def test_sa_keys_change_the_name_of_an_sa_training():
    assert names(config_of(), "sa")[0] != names(config_of(sa__window="paper"), "sa")[0]


def test_each_seed_is_a_training_of_its_own_and_draws_its_own_noise():
    grid = a_grid()
    configs = [grid.experiment(Line("sa"), seed, "ddim") for seed in (0, 1)]
    assert [(c.seed, c.sample.seed) for c in configs] == [(0, 0), (1, 1)]
    assert training_name(configs[0]) != training_name(configs[1])


# --------------------------------------------------------------------------------- configurations


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_every_comparison_can_be_read(path):
    line = read_command_line(["c", f"--config={path}"], (), "adapters.compare", COMPARISON)
    grid = Grid(line.config)
    assert line.workdir.name == grid.config.store
    for name in grid.config.trainings:
        check_keys(grid.experiment(Line(name), grid.seeds[0]))
    assert grid.cells or grid.config.gap.trainings


def test_there_is_a_comparison_for_every_table():
    expected = [
        "digits_ablations_tables",
        "digits_converged_tables",
        "digits_covariances_tables",
        "digits_effect_tables",
        "digits_one_tables",
        "digits_options_tables",
        "digits_rivals_tables",
        "digits_solvers_tables",
        "digits_tables",
        "fashion_tables",
        "figure4_gap",
        "folder_tables",
        "table1_celeba64",
    ]
    expected += ["table1_cifar10", "table2_celeba64", "table2_cifar10", "table3_celebahq256"]
    assert [path.stem for path in TABLES] == [*expected, "table4_lambda"]


def test_tables_1_and_2_have_the_papers_rows_and_columns():
    for name in ("table1_cifar10", "table2_celeba64"):
        path = ROOT / f"configs/{name}.py"
        line = read_command_line(["c", f"--config={path}"], (), "adapters.compare", COMPARISON)
        main_part = Grid(line.config).parts[0]
        assert main_part.steps == (10, 25, 50, 100, 200, 1000)
        assert [one.training for one in main_part.lines] == ["b", "sa"]
        assert {row.split("_")[0] for row in main_part.processes} >= {"analytic", "npr", "sn"}


BAD = [
    ("--config.tables=('nothing',)", "tables must be among"),
    ("--config.gap.trainings=('nobody',)", "trainings must be among"),
    ("--config.parts.main.lines=('nobody',)", "trainings must be among"),
    ("--config.parts.main.lines=('b/nohow',)", "samplings must be among"),
    ("--config.parts.main.processes=('magic',)", "sample.processes must be among"),
    ("--config.parts.main.steps=(51,)", "steps"),
    ("--config.parts.main.steps=(2,2)", "parts.main.steps must hold each once, got (2, 2)"),
    ("--config.parts.main.steps=2,abc", "parts.main.steps must be whole numbers, got ('2,abc',)"),
    ("--config.tables=main,main", "tables must hold each value once"),
    ("--config.experiment.sa.lam=0.0", "got 'B' for two lines, of b and sa"),
    ("-config.experiment.seed=7", "changes nothing in a comparison: set seeds"),
    ("--config.parts.main.lines=b,sa,b", "parts.main.lines must hold each once"),
    ("--config.metrics=fid", "metrics must be among ['frechet_pixels', 'is_pixels', 'sample"),
    ("--config.experiment.seed=7", "changes nothing in a comparison: set seeds"),
    ("--config.experiment.sample.seed 7", "changes nothing in a comparison: set seeds"),
    ("--config.experiment.sample.steps=7", "in a comparison: set parts.NAME.steps"),
    ("--config.experiment.sample.processes=ddim", "set parts.NAME.processes"),
    ("--config.seeds=(1,1)", "seeds must hold each value once"),
    ("--config.name=a/b", "name must be a name without /"),
    ("--config.experiment.sa.K=0", "sa.K must be >= 1"),
    ("--config.experiment.base.iterations=0", "base.iterations must be >= 1"),
    ("--config.experiment.head.training=joint", "experiment.head.training must be 'pretrained'"),
    ("--config.sedes=(1,)", "unknown configuration key"),
    ("--workers=0", "--workers must be >= 1"),
    ("--workers=many", "--workers"),
    ("--workers=2 --scheduler=tcp://127.0.0.1:9", "exclude each other"),
    ("--config.gap.start=51", "gap.start"),
    ("--config.eps_scale.low=1.2", "eps_scale"),
    ("--config.samplings.scaled.correction=none", "samplings.scaled.correction must be one of"),
    (
        "--config.samplings.scaled.correction=norms --config.samplings.scaled.eps_scale=1.0"
        " --config.experiment.data.labels=True",
        "samplings.scaled.correction must not be 'norms' with data.labels",
    ),
    (
        "--config.samplings.scaled.correction=shifted --config.samplings.scaled.eps_scale=1.0"
        " --config.parts.scaled.processes=('ocm_ddpm',)",
        "samplings.scaled.q must be > 0 for 'ocm_ddpm'",
    ),
    (
        "--config.samplings.scaled.correction=shifted",
        "samplings.scaled.eps_scale must be > 0 with a correction, got 0.0",
    ),
    ("--config.samplings.scaled.q=-0.5", "samplings.scaled.q must be >= 0"),
    ("--config.samplings.scaled.eps_scale=-0.5", "eps_scale must be >= 0 or 'line', got -0.5"),
]


@pytest.mark.parametrize(("argument", "said"), BAD, ids=[argument for argument, _ in BAD])
def test_bad_input_is_refused_in_one_line_before_anything_is_written(
    argument, said, tmp_path, capsys
):
    assert compare(tmp_path / "grid", *argument.split()) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "grid").exists()


@pytest.mark.slow
def test_a_grid_killed_again_and_again_loses_at_most_the_task_under_way(finished, tmp_path):
    """Kills of the command with both workers, at random moments; then it is left to finish."""
    folder = tmp_path / "grid"
    command = [sys.executable, "-m", "adapters.compare", *options(folder, "--workers=2")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    chance = random.Random(0)
    done: set[Path] = set()
    for _ in range(6):
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(chance.uniform(6, 14))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        now = set(written(folder, "cells/**/*.json"))
        assert done <= now
        done = now
    times = written(folder, "cells/**/*.json")
    subprocess.run(command, check=True, cwd=ROOT, env=environment, capture_output=True)
    after = written(folder, "cells/**/*.json")
    assert {path: after[path] for path in times} == times  # none was computed again
    for a, b in zip(numbers(folder), numbers(finished), strict=True):
        assert float(a["frechet_pixels"]) == pytest.approx(float(b["frechet_pixels"]), rel=1e-4)


def test_all_experiments_of_a_grid_share_one_copy_of_the_images(tmp_path):
    line = read_command_line(["c", *SMALL], (), "adapters.compare", COMPARISON)
    store = Store(Grid(line.config), tmp_path, "cpu", False)
    one = store.experiment(Line("b"), 0, None)
    other = store.experiment(Line("sa"), 1, "npr_ddpm")
    assert one is not other
    assert one.dataset is other.dataset is store.dataset


@pytest.mark.parametrize(("K", "lam", "title"), [(2, 1.0, "SA-2"), (3, 0.3, "SA-3, lambda 0.3")])
def test_titles_and_equal_compute_follow_the_experiment(K, lam, title, tmp_path):
    words = [f"--config.experiment.sa.{key}={value}" for key, value in (("K", K), ("lam", lam))]
    plan = plan_of(tmp_path, with_changes(*words, "--config.tables=main,compute"))
    grid = plan.store.grid
    assert [grid.title(Line(name)) for name in ("b", "sa", "b_equal")] == [
        "B",
        title,
        "B, equal compute",
    ]
    iterations = [grid.experiment(Line(name), 0).base.iterations for name in ("sa", "b_equal")]
    assert iterations == [4, 4 * K]


def test_a_value_of_another_type_is_told_with_its_key():
    with pytest.raises(ValueError, match=r"trainings\.sa\.set\.sa\.lam must be a float, got '1'"):
        a_grid(trainings={"b": training("B"), "sa": training("{loss}", sa={"lam": "1"})})


def test_a_training_s_own_images_are_told_too(tmp_path):
    held = training("held", data={"split": "test"})
    grid = a_grid(trainings={"b": training("B"), "sa": held})
    found = Store(grid, tmp_path, "cpu", False).datasets()
    assert [(data.split, len(images)) for data, images in found] == [("", 1797), ("test", 599)]


@pytest.mark.parametrize(
    "times", [{"lr": 2.0}, {"iterations": 0}, {"iterations": float("inf")}, {"batch_size": "2"}]
)
def test_factors_of_other_keys_and_values_are_refused(times):
    grid = a_grid(trainings={"b": training("B", times=times), "sa": training("SA")})
    with pytest.raises(ValueError, match=r"trainings\.b\.times must hold iterations or batch_size"):
        grid.experiment(Line("b"), 0)


def test_a_constant_is_fitted_in_its_own_way_to_sample(tmp_path):
    words = ["--config.samplings.unclipped.eps_scale=0", "--config.tables=scaled,unclipped"]
    words += ["--config.parts.unclipped.steps=2"]
    plan = plan_of(tmp_path, with_changes(*words))
    fits = {cell.line: task.fit for cell, task in plan.cells.items() if cell.line.training == "b"}
    clipped, unclipped = fits[Line("b", "scaled")], fits[Line("b", "unclipped")]
    assert clipped.path != unclipped.path
    sections = [plan.store.grid.experiment(fit.line, 0).sample for fit in (clipped, unclipped)]
    assert [sample.clip_x0 for sample in sections] == [True, False]


def plan_of(folder, words):
    line = read_command_line(["c", *words], (), "adapters.compare", COMPARISON)
    return Plan(Store(Grid(line.config), folder, "cpu", False))


def test_metrics_compare_with_the_images_of_another_split(tmp_path):
    words = [*SMALL, "--config.experiment.data.split=train"]
    words += ["--config.experiment.evaluate.reference=test"]
    store = plan_of(tmp_path, words).store
    experiment = store.experiment(Line("b"), 0, None)
    assert (len(experiment.dataset), len(experiment.reference)) == (1198, 599)
    summary = store.reference(experiment.config)
    held_out = next(experiment.reference.uint8_batches(599)).double() / 127.5 - 1
    assert summary.count == 599
    assert summary.variance == pytest.approx(float(held_out.var(0).sum()))


def test_a_training_with_other_images_is_compared_with_them(tmp_path):
    """Whatever its name and its place in the grid."""
    config = digits_tables.get_config()
    config.trainings["a_part"] = training("B, a part", data={"split": "train"})
    config.parts.main.lines = ("b", "a_part")
    config.experiment.evaluate.features = ("pixels",)
    store = Store(Grid(FrozenConfigDict(config)), tmp_path, "cpu", False)
    for name, count in (("a_part", 1198), ("b", 1797)):
        experiment = store.experiment(Line(name), 0, None)
        assert store.reference(experiment.config).count == count
        assert store.spectrum(experiment.config.data).count == count
        assert len(experiment.dataset) == count


def test_a_training_whose_rate_falls_is_no_first_part_of_a_longer_one(tmp_path):
    words = [*SMALL, "--config.tables=('compute',)", "--config.parts.compute.lines=('b','b_equal')"]
    falling = [*words, "--config.experiment.base.lr_decay=2"]
    for given, continues in ((words, True), (falling, False)):
        plan = plan_of(tmp_path, given)
        assert (plan._base("b_equal", 0).start is not None) == continues


def test_a_plan_names_every_task_once(tmp_path):
    plan = plan_of(tmp_path, SMALL)
    order = [task.name for task in plan.in_order()]
    assert len(order) == len(set(order)) == len(plan.tasks)
    for task in plan.in_order():
        for need in task.needs:
            assert order.index(need.name) < order.index(task.name)
    assert sum(isinstance(task, EpsScaleTask) for task in plan.in_order()) == 2


def test_a_longer_training_goes_on_from_the_shorter_one(tmp_path):
    """Their common part is made once, and the weights are those of a training of its own."""
    tables = [
        "--config.tables=('compute',)",
        "--config.parts.compute.processes=('ddim',)",
        "--config.parts.compute.steps=(2,)",
        "--config.gap.trainings=()",
        "--config.seeds=(0,)",
        "--config.experiment.base.log_every=2",
    ]
    lines = {"both": ("b", "b_equal"), "alone": ("b_equal",)}
    found = []
    for name, chosen in lines.items():
        assert compare(tmp_path / name, *tables, f"--config.parts.compute.lines={chosen}") == 0
        (weights,) = (tmp_path / name / "trainings").rglob("8.ckpt/ema_models_states/model.pth")
        found.append((weights.read_bytes(), (weights.parents[3] / "log.csv").read_text()))
        # Its own run has no checkpoint half way: that one is the shorter training's.
        assert (weights.parents[2] / "4.ckpt").is_dir() == (name == "both")
    assert found[0] == found[1]
    words = options(tmp_path / "new", *tables, f"--config.parts.compute.lines={lines['both']}")
    plan = plan_of(tmp_path / "new", [word for word in words if not word.startswith("--workers")])
    short, long = (task for task in plan.in_order() if task.name.endswith("/base"))
    assert long.needs == (short,)
    assert long.evaluations == short.evaluations
