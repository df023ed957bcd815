"""python -m adapters.sn_dpm: the stages end to end on shrunk configurations, and its refusals."""

import csv
import json
import pickle
import resource
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from adapters import summary
from adapters.experiment import stages
from adapters.experiment.config import read_command_line
from adapters.experiment.run import _with_baseline, run
from adapters.hosts import SN_DPM
from adapters.measuring.inception import WEIGHTS_VARIABLE
from benchmarks.metrics import random_weights
from tests.commands import one_line, words
from third_party.extended_analytic_dpm.criterions import DTDSM

DIGITS = words(
    "digits_sn_sa.py",
    base={"iterations": 6, "batch_size": 16, "log_every": 2, "ckpt_every": 4},
    head={"iterations": 4, "batch_size": 16, "log_every": 2},
    sample={"n_images": 40, "steps": (3, 6)},
    evaluate={"features": ("pixels",)},
)

# 40 images cannot fill the 64 pixels' covariance; the warning that says so is expected here.
pytestmark = pytest.mark.filterwarnings("ignore:.*singular.*:UserWarning")


def sn_dpm(workdir, *arguments):
    """The exit code of the command in ``workdir``."""
    return run(SN_DPM, ["sn_dpm", *DIGITS, f"--workdir={workdir}", *arguments])


def read_log(folder):
    """The rows of a training's log."""
    with (folder / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished SA run; tests that change it copy it first."""
    workdir = tmp_path_factory.mktemp("runs") / "sa"
    assert sn_dpm(workdir) == 0
    return workdir


def test_the_baseline_is_run_beside_it_once_and_compared(finished, tmp_path, capsys):
    workdir = tmp_path / "sa"
    shutil.copytree(finished, workdir, copy_function=shutil.copy2)
    assert sn_dpm(workdir, "--config.baseline=True", "--dry_run") == 0
    plan = capsys.readouterr().out
    assert plan.count("to do") == 4  # of the baseline
    assert sn_dpm(workdir, "--config.baseline=True") == 0
    said = capsys.readouterr().out
    baseline = tmp_path / "sa_baseline"
    config = json.loads((baseline / "config.json").read_text())
    assert config["sa"]["lam"] == 0
    metrics = [json.loads((run / "metrics.json").read_text()) for run in (baseline, workdir)]
    before, after = (found["sn_ddim"]["6"]["frechet_pixels"] for found in metrics)
    assert f"{before:.2f} → {after:.2f} ({after - before:+.2f})" in said
    assert "one seed: nothing is told apart from chance alone" in said
    assert str(baseline / "samples.png") in said
    assert "adapters.predict" in said
    assert "**frechet_pixels" not in said  # the tables of each run are in its folder
    times = [(run / "metrics.json").stat().st_mtime_ns for run in (baseline, workdir)]
    assert sn_dpm(workdir, "--config.baseline=True") == 0  # both are there: only said again
    assert [(run / "metrics.json").stat().st_mtime_ns for run in (baseline, workdir)] == times
    assert f"{before:.2f} → {after:.2f}" in capsys.readouterr().out


def test_the_baseline_has_its_own_default_folder():
    line = read_command_line(["x", "--config=configs/digits_sn_sa.py"], (), "x")
    plain, sa = _with_baseline(line)
    assert plain.workdir == Path("runs/digits_sn/baseline_seed0").absolute()
    assert (sa, plain.config.sa.lam) == (line, 0)
    without = replace(line, config=plain.config)
    assert _with_baseline(without) == [without]


def test_leaves_everything_that_it_promises(finished):
    config = json.loads((finished / "config.json").read_text())
    assert config["sa"]["K"] == 2
    assert config["base"]["iterations"] == 6
    for stage, term, iterations in (("base", "sa_loss", [2, 4, 6]), ("head", "ddm", [2, 4])):
        assert any((finished / stage / "ckpts").iterdir())
        assert any((finished / stage / "tensorboard").iterdir())
        rows = read_log(finished / stage)
        assert [int(row["iteration"]) for row in rows] == iterations
        assert all(float(row[term]) > 0 for row in rows)
    for process in ("ddpm_small", "ddpm_big", "sn_ddpm", "ddim", "sn_ddim"):
        for steps in (3, 6):
            with np.load(finished / "samples" / f"{process}_{steps}.npz") as arrays:
                assert arrays["arr_0"].shape == (40, 8, 8, 1)
                assert arrays["arr_0"].dtype == np.uint8
            assert (finished / "samples" / f"{process}_{steps}.png").stat().st_size > 0
    metrics = json.loads((finished / "metrics.json").read_text())
    assert metrics["sn_ddim"]["6"]["n_images"] == 40
    assert metrics["sn_ddim"]["6"]["frechet_pixels"] > 0
    assert "| SN-DDIM" in (finished / "table.md").read_text()
    for picture in ("samples.png", "frechet_pixels.png"):
        with Image.open(finished / picture) as image:
            assert min(image.size) > 100


def test_prints_one_table_a_metric_with_steps_as_columns(finished, capsys):
    assert sn_dpm(finished) == 0
    lines = capsys.readouterr().out.splitlines()
    heads = [line.split() for line in lines if line.startswith("| steps")]
    assert heads == 2 * [["|", "steps", "|", "3", "|", "6", "|"]]
    titles = [line.split("|")[1].strip() for line in lines if line.startswith("| ")][1:6]
    assert titles == ["DDPM small", "DDPM big", "SN-DDPM", "DDIM", "SN-DDIM"]


def test_a_second_run_changes_nothing(finished):
    def state():
        return {p: p.stat().st_mtime_ns for p in finished.rglob("*.npz")} | {
            p: p.stat().st_mtime_ns for p in finished.rglob("*.pth")
        }

    before = state()
    assert sn_dpm(finished) == 0
    assert state() == before


def test_one_seed_gives_the_same_numbers(finished, tmp_path):
    assert sn_dpm(tmp_path / "again") == 0
    for name in ("metrics.json", "base/log.csv", "head/log.csv"):
        assert (tmp_path / "again" / name).read_bytes() == (finished / name).read_bytes()


def test_another_seed_gives_other_numbers(finished, tmp_path):
    assert sn_dpm(tmp_path / "other", "--config.seed=1") == 0
    assert (tmp_path / "other/metrics.json").read_bytes() != (
        finished / "metrics.json"
    ).read_bytes()
    text = summary.summarise_runs([finished, tmp_path / "other"])
    assert "Seeds: sa: 2" in text
    values = [
        json.loads((run / "metrics.json").read_text())["sn_ddim"]["6"]["frechet_pixels"]
        for run in (finished, tmp_path / "other")
    ]
    assert f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}" in text
    with pytest.raises(ValueError, match="runs with the same seed, 0"):
        summary.summarise_runs([finished, finished])


def test_lambda_rises_and_steps_are_stratified_where_asked(tmp_path, monkeypatch):
    lams, update = [], DTDSM.update

    def note(criterion, data):
        lams.append(criterion.objective.loss.lam)
        assert criterion.schedule.stratified
        update(criterion, data)

    monkeypatch.setattr(DTDSM, "update", note)
    options = ["--config.sa.lam=0.8", "--config.sa.lam_warmup=4", "--stage=base"]
    options.append("--config.base.stratified")
    assert sn_dpm(tmp_path / "run", *options) == 0
    assert lams == [0.2, 0.4, pytest.approx(0.6), 0.8, 0.8, 0.8]


def test_a_full_disk_is_told_in_one_line_and_the_run_can_go_on(
    finished, tmp_path, monkeypatch, capsys
):
    """A limit on the size of files stands in for it: torch.save fails, small files do not."""
    limits, update, left = resource.getrlimit(resource.RLIMIT_FSIZE), DTDSM.update, []

    def fill(criterion, data):
        update(criterion, data)
        left.append(data.position)
        if len(left) == 5:  # in the first run alone
            resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))

    monkeypatch.setattr(DTDSM, "update", fill)
    try:
        assert sn_dpm(tmp_path / "run", "--stage=base") == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    *_, plan, line = capsys.readouterr().err.splitlines()
    assert plan.startswith("base: ")
    assert line.startswith(f"adapters.sn_dpm: {tmp_path}/run/base/ckpts/6.ckpt.tmp/")
    assert "cannot be written; is the disk full?" in line
    assert line.endswith("the same command continues it")
    ckpts = tmp_path / "run/base/ckpts"
    assert [path.name for path in ckpts.iterdir()] == ["4.ckpt"]
    assert sn_dpm(tmp_path / "run", "--stage=base") == 0
    assert left == [1, 2, 3, 4, 5, 6, 5, 6]
    for path in sorted((finished / "base/ckpts").rglob("*.pth")):
        again = ckpts / path.relative_to(finished / "base/ckpts")
        assert again.read_bytes() == path.read_bytes()


def test_stages_by_name_continue_each_other(finished, tmp_path, capsys):
    for chosen in ("base", "head", "sample", "evaluate"):
        assert sn_dpm(tmp_path / "run", f"--stage={chosen}") == 0
    assert (tmp_path / "run/metrics.json").read_bytes() == (finished / "metrics.json").read_bytes()


def test_a_lost_cell_is_sampled_again_to_the_same_bytes(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    cell = tmp_path / "run/samples/sn_ddpm_3.npz"
    with np.load(cell) as arrays:
        before = arrays["arr_0"]
    cell.unlink()
    assert sn_dpm(tmp_path / "run", "--stage=sample") == 0
    with np.load(cell) as arrays:
        assert np.array_equal(arrays["arr_0"], before)


def test_a_stage_whose_input_is_missing_says_so(tmp_path, capsys):
    assert sn_dpm(tmp_path / "run", "--stage=head") == 2
    assert "stage 'head' needs the result of stage 'base'" in capsys.readouterr().err
    assert sn_dpm(tmp_path / "run", "--stage=sample") == 2
    assert "result of stage" in capsys.readouterr().err
    assert sn_dpm(tmp_path / "run", "--stage=evaluate") == 2
    assert "run stage 'sample'" in capsys.readouterr().err


def test_dry_run_writes_nothing_and_tells_what_is_done(finished, tmp_path, capsys):
    assert sn_dpm(tmp_path / "run", "--dry_run") == 0
    assert not (tmp_path / "run").exists()
    out = capsys.readouterr().out
    assert "base      to do  pred_eps, 6 x 16 images, SA-2 with lambda 1" in out
    assert "10 cells of 40 images, 1.8e+03 network evaluations" in out
    assert sn_dpm(finished, "--dry_run") == 0
    assert capsys.readouterr().out.count("done ") == 4


def test_the_baseline_is_the_host_alone(tmp_path, monkeypatch):
    """lam = 0 attaches nothing: the losses are those of the host's own objective."""

    def forbidden(*_):
        raise AssertionError("the baseline must not be hooked")

    monkeypatch.setattr(stages, "attach", forbidden)
    assert sn_dpm(tmp_path / "run", "--config.sa.lam=0", "--stage=base") == 0
    rows = read_log(tmp_path / "run/base")
    assert set(rows[0]) == {"iteration", "dsm", "loss", "grad_norm"}


def test_joint_training_has_no_head_stage(tmp_path):
    assert sn_dpm(tmp_path / "run", "--config.head.training=joint") == 0
    assert not (tmp_path / "run/head").exists()
    rows = read_log(tmp_path / "run/base")
    assert {"simple_loss", "sa_loss"} < set(rows[0])
    assert len(list((tmp_path / "run/samples").glob("*.npz"))) == 10


def test_head_is_trained_on_the_averaged_trunk(finished):
    """The head network's trunk is the base stage's average, untouched by the head's training."""
    base = torch.load(finished / "base/ckpts/6.ckpt/ema_models_states/model.pth", weights_only=True)
    head = torch.load(finished / "head/ckpts/4.ckpt/ema_models_states/model.pth", weights_only=True)
    assert set(head) > set(base)
    assert all(torch.equal(head[name], base[name]) for name in base)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--config.sa.lamda=1"], "unknown configuration key 'lamda'"),
        (["--config.network.args.num_groups=5"], "num_groups"),
        (["--stage=train"], "--stage must be some of base,head,sample,evaluate, got 'train'"),
        (["--colour"], "Unknown command line flag 'colour'"),
        (["--device=abacus"], "abacus"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, said, tmp_path, capsys):
    assert sn_dpm(tmp_path / "run", *arguments) == 2
    one_line(capsys, said)
    assert not (tmp_path / "run").exists()


def test_a_folder_of_another_configuration_is_refused(finished, capsys):
    before = (finished / "config.json").read_bytes()
    assert sn_dpm(finished, "--config.sa.lam=0.5") == 2
    err = capsys.readouterr().err
    assert "sa.lam is 1.0 there, 0.5 here" in err
    assert (finished / "config.json").read_bytes() == before


def test_a_folder_of_something_else_is_refused(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("dear")
    assert sn_dpm(tmp_path) == 2
    assert "is not empty and holds no config.json" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_no_configuration_and_no_file(capsys):
    assert run(SN_DPM, ["sn_dpm"]) == 2
    assert "--config configs/FILE.py" in capsys.readouterr().err
    assert run(SN_DPM, ["sn_dpm", "--config", "configs/none.py"]) == 2
    assert "there is no file 'configs/none.py'" in capsys.readouterr().err


def test_misspelled_keys_in_a_file_are_refused(tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text(
        "from configs.base import base_config\n\n\ndef get_config():\n"
        "    config = base_config()\n    config.sa.lamda = 1.0\n    return config\n"
    )
    assert run(SN_DPM, ["sn_dpm", f"--config={file}"]) == 2
    one_line(capsys, "mine.py:6:", "lamda")


# -- CIFAR10


NETWORK = {"model_channels": 8, "num_groups": 4, "num_res_blocks": 1}
CIFAR10 = words(
    "cifar10_sn_sa.py",
    data={"check_md5": False},
    network={"args": NETWORK | {"channel_mult": (1, 2), "attention_resolutions": (2,)}},
    base={"iterations": 2, "batch_size": 4},
    head={"iterations": 2, "batch_size": 4},
    sample={"n_images": 12, "batch_size": 8, "steps": (3,), "processes": ("sn_ddpm", "ddim")},
)


def write_cifar10(root, images_a_file=4):
    """A tiny archive in the original's format: pickled dictionaries by file."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        batch = {
            "data": rng.integers(0, 256, (images_a_file, 3072), dtype=np.uint8),
            "labels": rng.integers(0, 10, images_a_file).tolist(),
        }
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))


def test_the_cifar10_experiment_runs_on_an_archive_of_the_right_format(tmp_path, monkeypatch):
    """Shrunk in size alone: training, head, samples, and FID with random Inception weights."""
    write_cifar10(tmp_path / "data")
    torch.save(random_weights(), tmp_path / "inception.pth")
    monkeypatch.setenv(WEIGHTS_VARIABLE, str(tmp_path / "inception.pth"))
    arguments = [f"--config.data.root={tmp_path / 'data'}", f"--workdir={tmp_path / 'run'}"]
    assert run(SN_DPM, ["sn_dpm", *CIFAR10, *arguments]) == 0
    with np.load(tmp_path / "run/samples/sn_ddpm_3.npz") as arrays:
        assert arrays["arr_0"].shape == (12, 32, 32, 3)
    table = (tmp_path / "run/table.md").read_text()
    assert "**fid (lower is better), 12 images**" in table
    assert "**inception_score (higher is better), 12 images**" in table


def test_missing_cifar10_is_one_line_that_says_where_and_how(tmp_path, capsys):
    arguments = [f"--config.data.root={tmp_path / 'data'}", f"--workdir={tmp_path / 'run'}"]
    assert run(SN_DPM, ["sn_dpm", "--config=configs/cifar10_sn_sa.py", *arguments]) == 2
    one_line(capsys, tmp_path / "data" / "cifar-10-batches-py", "https://")
