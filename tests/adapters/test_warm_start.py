"""base.init_from: SA training and heads that start from a published checkpoint."""

import shutil

import pytest
import torch

from adapters.checkpoints.fitting import convert
from adapters.experiment.run import run
from adapters.hosts import SN_DPM
from tests.adapters.test_sn_dpm import DIGITS, read_log
from tests.commands import one_line

pytestmark = pytest.mark.filterwarnings("ignore:.*singular.*:UserWarning")

FOLDERS = {"model": "models_states", "ema": "ema_models_states"}


def sn_dpm(workdir, *arguments):
    """The exit code of the shrunk digits experiment in ``workdir``."""
    return run(SN_DPM, ["adapters.sn_dpm", *DIGITS, f"--workdir={workdir}", *arguments])


def weights(workdir, stage, which, iteration):
    """A state dict out of a run."""
    path = workdir / stage / f"ckpts/{iteration}.ckpt" / FOLDERS[which] / "model.pth"
    return torch.load(path, weights_only=True)


def equal(one, other):
    """Whether two state dicts are the same bytes."""
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.fixture(scope="module")
def baseline(tmp_path_factory):
    """A finished baseline, and its averaged weights as SA-DPM would publish them."""
    workdir = tmp_path_factory.mktemp("baseline") / "run"
    assert sn_dpm(workdir, "--config.sa.lam=0", "--stage=base,head") == 0
    published = workdir.parent / "model_7_ema.pth"
    convert(workdir / "base/ckpts/6.ckpt", published, to="sa_dpm")
    return workdir, published


def test_training_starts_from_the_published_weights(baseline, tmp_path):
    workdir, published = baseline
    start = weights(workdir, "base", "ema", 6)
    slow = ("--config.base.lr=1e-12", "--stage=base")
    assert sn_dpm(tmp_path / "still", f"--config.base.init_from={published}", *slow) == 0
    still = weights(tmp_path / "still", "base", "ema", 6)
    assert max((still[name] - start[name]).abs().max() for name in start) < 1e-9
    assert float(read_log(tmp_path / "still/base")[-1]["sa_loss"]) > 0
    assert sn_dpm(tmp_path / "tuned", f"--config.base.init_from={published}", "--stage=base") == 0
    assert not equal(weights(tmp_path / "tuned", "base", "model", 6), start)


def test_no_iterations_take_the_weights_as_they_are(baseline, tmp_path, capsys):
    workdir, published = baseline
    run_ = tmp_path / "run"
    asked = (f"--config.base.init_from={published}", "--config.base.iterations=0")
    assert sn_dpm(run_, *asked, "--dry_run") == 0
    assert f"pred_eps from {published}, unchanged" in capsys.readouterr().out
    assert sn_dpm(run_, *asked) == 0
    assert equal(weights(run_, "base", "ema", 0), weights(workdir, "base", "ema", 6))
    # The head is trained on it, the very head of the run whose base it was.
    assert equal(weights(run_, "head", "ema", 4), weights(workdir, "head", "ema", 4))
    assert (run_ / "metrics.json").exists()


def test_a_published_head_on_another_trunk(baseline, tmp_path):
    workdir, _ = baseline
    head = workdir / "head/ckpts/4.ckpt"
    run_ = tmp_path / "run"
    asked = (f"--config.head.init_from={head}", "--config.head.iterations=0", "--stage=base,head")
    assert sn_dpm(run_, *asked) == 0
    taken, theirs = weights(run_, "head", "ema", 0), weights(workdir, "head", "ema", 4)
    own = weights(run_, "base", "ema", 6)
    assert equal({name: taken[name] for name in own}, own)
    new = taken.keys() - own.keys()
    assert new
    assert equal({k: taken[k] for k in new}, {k: theirs[k] for k in new})


def test_an_interrupted_warm_start_continues_from_its_own_checkpoint(baseline, tmp_path):
    _, published = baseline
    asked = (f"--config.base.init_from={published}", "--stage=base", "--config.base.ckpt_every=3")
    assert sn_dpm(tmp_path / "whole", *asked) == 0
    assert sn_dpm(tmp_path / "cut", *asked) == 0
    shutil.rmtree(tmp_path / "cut/base/ckpts/6.ckpt")
    assert sn_dpm(tmp_path / "cut", *asked) == 0
    one, other = (weights(tmp_path / name, "base", "ema", 6) for name in ("whole", "cut"))
    assert equal(one, other)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--config.base.iterations=0",), "base.iterations must be >= 1, or 0 to use"),
        (("--config.head.iterations=0",), "head.iterations must be >= 1, or 0 to use"),
        (("--config.base.init_from=nowhere.pth",), "there is no checkpoint nowhere.pth"),
        (
            ("--config.base.init_from={published}", "--config.network.args.model_channels=24"),
            "does not fit",
        ),
        (("--config.head.init_from={published}",), "does not fit"),
    ],
)
def test_a_start_that_cannot_be_is_one_line(arguments, said, baseline, tmp_path, capsys):
    words = [word.format(published=baseline[1]) for word in arguments]
    assert sn_dpm(tmp_path / "run", *words) == 2
    one_line(capsys, said)
    assert not (tmp_path / "run").exists()


def test_an_unwritable_folder_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert sn_dpm(tmp_path / "file" / "run") == 2
    one_line(capsys)
