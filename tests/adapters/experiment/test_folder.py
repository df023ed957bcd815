"""A run's folder under another configuration, and after a loss of files."""

import json
import shutil

import pytest

from adapters import summary
from adapters.experiment import logs, stages
from adapters.experiment.run import run
from adapters.hosts import SN_DPM
from tests.commands import words

TINY = words(
    "digits_sn_sa.py",
    schedule={"N": 50},
    base={"ema": 0.0, "iterations": 2, "batch_size": 4, "log_every": 1, "ckpt_every": 1},
    head={"ema": 0.0, "iterations": 2, "batch_size": 4, "log_every": 1, "ckpt_every": 1},
    sample={"n_images": 4, "steps": (2,), "processes": ("ddim", "sn_ddim")},
    evaluate={"features": ("pixels",), "splits": 1},
)
FINAL_HEAD = "ckpts/2.ckpt"
FINAL = "base/ckpts/2.ckpt"
MODEL = "ema_models_states/model.pth"

pytestmark = pytest.mark.filterwarnings("ignore:.*singular.*:UserWarning")


def sn_dpm(workdir, *arguments):
    """The exit code of the tiny run in ``workdir``."""
    return run(SN_DPM, ["sn_dpm", *TINY, f"--workdir={workdir}", *arguments])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run; it is never changed."""
    workdir = tmp_path_factory.mktemp("runs") / "run"
    assert sn_dpm(workdir) == 0
    return workdir


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of it that a test may change."""
    return shutil.copytree(finished, tmp_path / "run")


def contents(folder):
    """The bytes of all results; of an image archive, the images."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for kind in ("*.npz", "*.pth", "*.json", "*.png")
        for path in folder.rglob(kind)
        if path.name not in ("config.json", ".config.json")
    }


def config(folder):
    return json.loads((folder / "config.json").read_text())


# -------------------------------------------------------------------------- another configuration


def test_what_decides_no_number_may_change(finished, copy, tmp_path):
    changes = ["base.keep=1", "base.log_every=7", "head.ckpt_every=9", "sample.batch_size=3"]
    changes += [f"data.root={tmp_path}", "name=other", "gamma.batch_size=3"]
    assert sn_dpm(copy, *(f"--config.{change}" for change in changes)) == 0
    assert contents(copy) == contents(finished)
    assert config(copy)["sample"]["batch_size"] == 3


def test_more_iterations_go_on_and_what_rests_on_them_is_made_again(
    finished, copy, tmp_path, capsys
):
    longer = "--config.base.iterations=4"
    (copy / "likelihood.json").write_text("{}")  # of the shorter training, by another command
    assert sn_dpm(copy, longer, "--dry_run") == 0
    plan = capsys.readouterr().out
    assert "replaced  head, likelihood.json, samples.png, metrics.json, table.md" in plan
    assert "4 files of samples" in plan
    assert "done" not in plan
    before = contents(finished) | {"likelihood.json": b"{}"}
    assert contents(copy) == before
    assert sn_dpm(copy, longer) == 0
    assert sn_dpm(tmp_path / "straight", longer) == 0
    (replaced,) = (copy / "replaced").iterdir()
    assert config(replaced)["base"]["iterations"] == 2
    assert contents(replaced) == {k: v for k, v in before.items() if not k.startswith("base/")}
    shutil.rmtree(copy / "replaced")
    straight, here = contents(tmp_path / "straight"), contents(copy)
    assert here.pop("samples.png")  # its heading is the folder's name
    assert straight.pop("samples.png")
    assert here == straight


def test_a_rate_that_fell_cannot_go_on(tmp_path, capsys):
    folder, decay = tmp_path / "run", "--config.base.lr_decay=1"
    assert sn_dpm(folder, decay, "--stage=base") == 0
    capsys.readouterr()
    for more in ([], ["--dry_run"]):
        assert sn_dpm(folder, decay, "--config.base.iterations=4", *more) == 2
        said = capsys.readouterr().err
        assert "(base.iterations is 2 there, 4 here); with base.lr_decay > 0 a training" in said


@pytest.mark.parametrize("change", ["base.lr=0.5", "sa.K=3", "seed=9", "base.iterations=1"])
def test_another_noise_network_is_refused_by_name(finished, change, capsys):
    before = contents(finished)
    assert sn_dpm(finished, f"--config.{change}") == 2
    key, _, value = change.partition("=")
    said = capsys.readouterr().err
    assert f"holds a run of another configuration ({key} is " in said
    assert f" there, {value} here); give another --workdir" in said
    assert contents(finished) == before


def test_more_steps_add_their_cells_alone(finished, copy):
    assert sn_dpm(copy, "--config.sample.steps=(2,3)") == 0
    before, after = contents(finished), contents(copy)
    assert after.keys() - before.keys() == {
        *(
            f"samples/{process}_3.{kind}"
            for process in ("ddim", "sn_ddim")
            for kind in ("npz", "png")
        ),
        *(name for name in after if name.startswith("replaced/")),
    }
    there, here = (json.loads(c["metrics.json"]) for c in (before, after))
    assert [list(cells) for cells in here.values()] == [["2", "3"], ["2", "3"]]
    assert all(here[process]["2"] == there[process]["2"] for process in there)
    assert sn_dpm(copy) == 0  # the table shows what is asked for; the others stay
    assert json.loads((copy / "metrics.json").read_text()) == here
    assert "| steps   |      2 |\n" in (copy / "table.md").read_text()
    assert sn_dpm(copy, "--config.sample.processes=('ddim',)") == 0
    assert (copy / "samples.png").read_bytes() != before["samples.png"]
    assert f"head/{FINAL_HEAD}/{MODEL}" in contents(copy)


def test_only_what_rests_on_a_change_is_made_again(finished, copy, monkeypatch):
    assert sn_dpm(copy, "--config.head.lr=0.01") == 0
    before, after = contents(finished), contents(copy)
    moved = {name.split("/", 2)[2] for name in after if name.startswith("replaced/")}
    assert {f"head/{FINAL_HEAD}/{MODEL}", "samples/sn_ddim_2.npz", "metrics.json"} < moved
    assert not [name for name in moved if name.startswith(("base/", "samples/ddim"))]
    assert all(after[name] == before[name] for name in before if name not in moved)
    assert after[f"head/{FINAL_HEAD}/{MODEL}"] != before[f"head/{FINAL_HEAD}/{MODEL}"]

    def forbidden(*_):
        raise AssertionError("the images have not changed")

    monkeypatch.setattr(stages.SampleStage, "_sample", forbidden)
    (copy / "metrics.json").write_text((copy / "metrics.json").read_text().replace("4.0", "5.0"))
    assert sn_dpm(copy, "--config.head.lr=0.01", "--config.evaluate.splits=2") == 0
    assert contents(copy)["metrics.json"] == after["metrics.json"]


def test_a_change_that_was_interrupted_is_finished(finished, copy, monkeypatch):
    """Between two moves: the folder still says what made its results."""
    from pathlib import Path

    replace, moved = Path.replace, []

    def stop_at_second(path, target):
        if "replaced" in Path(target).parts and path.suffix != ".tmp":
            moved.append(path.name)
            if len(moved) == 2:
                raise KeyboardInterrupt
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", stop_at_second)
    assert sn_dpm(copy, "--config.sample.seed=5") == 130
    monkeypatch.undo()
    assert config(copy)["sample"]["seed"] == 0
    assert sn_dpm(copy, "--config.sample.seed=5") == 0
    (replaced,) = (copy / "replaced").iterdir()
    for name in ("samples/ddim_2.npz", "samples/sn_ddim_2.npz", "metrics.json"):
        assert contents(replaced)[name] == contents(finished)[name]
        assert contents(copy)[name] != contents(finished)[name]


def test_a_start_that_failed_blocks_nothing(tmp_path):
    folder = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages.TrainStage, "run", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            sn_dpm(folder)
    for name in ("config.json", ".config.json"):  # killed while it wrote its first file
        (folder / name).replace(folder / f".{name}.0123456789abcdef.tmp")
    assert sn_dpm(folder, "--stage=base", "--dry_run") == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages.TrainStage, "run", lambda self: None)
        assert sn_dpm(folder, "--stage=base") == 0
    (folder / "base").mkdir()
    (folder / "base" / "log.csv").write_text("iteration,loss\n1,0.5\n")
    assert sn_dpm(folder, "--config.base.lr=0.01", "--stage=base") == 0
    assert config(folder)["base"]["lr"] == 0.01
    assert "\n1,0.5\n" not in (folder / "base" / "log.csv").read_text()


def test_a_folder_from_before_the_newer_keys_is_recognised(finished, copy, capsys):
    old = config(copy)
    for section, key in (("data", "split"), ("base", "lr_decay"), ("evaluate", "reference")):
        del old[section][key]
    (copy / "config.json").write_text(json.dumps(old))
    (copy / ".config.json").unlink()
    assert sn_dpm(copy) == 0
    assert contents(copy) == contents(finished)
    assert config(copy) == config(finished)


def test_a_folder_of_another_command_is_not_a_run(finished, tmp_path, capsys):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config(finished) | {"cell": {"steps": 3}}))
    assert sn_dpm(folder, "--dry_run") == 2
    assert "cell.steps is 3 there, None here" in capsys.readouterr().err


# ------------------------------------------------------------------------------ files that are lost


def lose(path):
    path.unlink()


def cut(path):
    path.write_bytes(path.read_bytes()[:-9])


def empty(path):
    path.write_bytes(b"")


LOST = {
    "samples.png": "sample",
    "samples/ddim_2.png": "sample",
    "samples/ddim_2.npz": "sample",
    "metrics.json": "evaluate",
    "frechet_pixels.png": "evaluate",
}


@pytest.mark.parametrize("damage", [lose, cut, empty])
def test_a_file_that_is_lost_is_made_again(finished, copy, damage, capsys):
    for name, stage in LOST.items():  # each alone is missed
        damage(copy / name)
        assert sn_dpm(copy, "--dry_run") == 0
        todo = [line for line in capsys.readouterr().out.splitlines() if " to do " in line]
        assert [line.split()[0] for line in todo] == [stage]
        shutil.copy(finished / name, copy / name)
    for name in LOST:
        damage(copy / name)
    assert sn_dpm(copy) == 0
    assert contents(copy) == contents(finished)


def test_a_number_that_is_none_is_measured_again(finished, copy):
    metrics = json.loads((copy / "metrics.json").read_text())
    metrics["ddim"]["2"]["frechet_pixels"] = float("nan")
    (copy / "metrics.json").write_text(json.dumps(metrics))
    assert sn_dpm(copy) == 0
    assert contents(copy) == contents(finished)


def test_a_stop_between_the_images_and_the_end_of_their_parts(finished, copy):
    (copy / "samples/ddim_2.parts").mkdir()
    assert sn_dpm(copy) == 0
    assert contents(copy).keys() == contents(finished).keys()
    assert not (copy / "samples/ddim_2.parts").exists()


@pytest.mark.parametrize(
    ("name", "rests"),
    [
        ("samples/ddim_2.npz", "metrics.json"),
        (f"{FINAL}/{MODEL}", "samples/ddim_2.npz"),
    ],
)
def test_a_result_with_a_hole_is_named_with_the_way_out(copy, name, rests, capsys):
    content = bytearray((copy / name).read_bytes())
    content[200:230] = bytes(30)
    (copy / name).write_bytes(content)
    lose(copy / rests)
    assert sn_dpm(copy) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert name in said
    assert "makes it again" in said


def test_a_summary_reads_the_copy_of_a_lost_configuration(copy):
    lose(copy / "config.json")
    assert "SN-DDIM" in summary.summarise_runs([copy])


def test_a_picture_is_made_again_without_its_images(finished, copy, monkeypatch):
    lose(copy / "samples/ddim_2.png")
    monkeypatch.setattr(stages.SampleStage, "_sample", None)
    assert sn_dpm(copy) == 0
    assert contents(copy) == contents(finished)


def hollow(path):
    shutil.rmtree(path)
    path.mkdir()


@pytest.mark.parametrize(
    "damage",
    [
        hollow,
        lambda path: cut(path / MODEL),
        lambda path: empty(path / "resume.pth"),
        *(
            (lambda path, name=name: lose(path / name))
            for name in (
                *("it.pth", "best_val_loss.pth", "models_states/model.pth", MODEL),
                *("optimizers_states/all.pth", "lr_schedulers_states/all.pth"),
            )
        ),
    ],
)
def test_a_damaged_last_checkpoint_falls_back_to_the_one_before(finished, copy, damage, capsys):
    damage(copy / FINAL)
    assert sn_dpm(copy) == 0
    assert "set aside as 2.ckpt.damaged, going on from 1.ckpt" in capsys.readouterr().err
    shutil.rmtree(copy / (FINAL + ".damaged"))
    assert contents(copy) == contents(finished)


def test_weights_alone_are_enough_for_images(finished, copy):
    """Somebody who needs the space may keep the averages only."""
    for name in ("base", "head"):
        shutil.rmtree(copy / name / FINAL_HEAD / "models_states")
    lose(copy / "samples/ddim_2.npz")
    assert sn_dpm(copy, "--stage=sample,evaluate") == 0
    name = "samples/ddim_2.npz"
    assert contents(copy)[name] == contents(finished)[name]


def test_what_a_killed_command_left_behind_is_removed(finished, copy):
    left = [copy / "base/ckpts/0.ckpt", copy / "base/ckpts/1.ckpt.tmp"]
    for path in left:
        shutil.copytree(copy / "base/ckpts/1.ckpt", path)
    (left[0] / "interim").touch()
    left.append(copy / ".metrics.json.0123456789abcdef.tmp")
    left[-1].touch()
    assert sn_dpm(copy) == 0
    assert not any(path.exists() for path in left)
    assert contents(copy) == contents(finished)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("iteration,loss\n" + "1,2\n" * 50, "it has more than 64 numbers"),
        ("iteration" + "," * 5000 + "\n", "invalid literal for int"),  # one row, cut in two
        ("iteration,loss\n1\n", "the columns of a row differ from the header"),
    ],
)
def test_a_log_is_read_up_to_a_bound(tmp_path, monkeypatch, text, said):
    monkeypatch.setattr(logs, "MOST_NUMBERS", 64)
    monkeypatch.setattr(logs, "LONGEST_ROW", 1000)
    (tmp_path / "log.csv").write_text(text)
    with pytest.raises(ValueError, match=f"log.csv is damaged: .*{said}"):
        logs.read_rows(tmp_path / "log.csv")
    (tmp_path / "log.csv").write_text("iteration,loss\n1,0.5\n")
    assert logs.read_rows(tmp_path / "log.csv") == [{"iteration": "1", "loss": "0.5"}]


def test_an_only_checkpoint_that_is_damaged_is_told(copy, capsys):
    hollow(copy / FINAL)
    shutil.rmtree(copy / "base/ckpts/1.ckpt")
    assert sn_dpm(copy) == 2
    assert "move them away to train from the start" in capsys.readouterr().err


@pytest.mark.parametrize("damage", [lose, cut, empty])
def test_a_lost_configuration_comes_back_from_its_copy(finished, copy, damage, capsys):
    damage(copy / "config.json")
    assert sn_dpm(copy) == 0
    assert "config.json was lost or damaged: taken from its copy" in capsys.readouterr().err
    assert config(copy) == config(finished)
    assert contents(copy) == contents(finished)
    assert sn_dpm(copy, "--config.sa.K=3") == 2


def test_without_a_copy_one_line_tells_the_way_out(finished, copy, tmp_path, capsys):
    empty(copy / "config.json")
    (copy / ".config.json").unlink()
    assert sn_dpm(copy) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "begin the same command with another --workdir and copy its config.json here" in said
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages.TrainStage, "run", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            sn_dpm(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "config.json", copy)
    assert sn_dpm(copy) == 0
    assert contents(copy) == contents(finished)
