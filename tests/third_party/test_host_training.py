"""The ported hosts' training loop: average, logs, checkpoints, exact continuation, divergence."""

import logging
import os
import shutil

import numpy as np
import pytest
import torch
from torch import nn

from third_party.common import checkpoints, random_states
from third_party.common.checkpoints import DamagedCheckpoint
from third_party.common.criterion_base import Criterion
from third_party.common.data import BatchStream, to_unit_range
from third_party.common.ema import EMA
from third_party.common.schedule import NamedSchedule
from third_party.common.step_options import StepOptions
from third_party.common.training import Trainer, TrainingDiverged
from third_party.common.window import Window
from third_party.extended_analytic_dpm.methods import build_criterion

IMAGES = torch.arange(22 * 16, dtype=torch.int64).mul(37).remainder(256).to(torch.uint8)
IMAGES = IMAGES.reshape(22, 1, 4, 4)


class Net(nn.Module):
    """Small, with all that a step can draw from or write to: dropout and running statistics."""

    def __init__(self, width=4):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.SiLU(),
            nn.Dropout(0.3),
            nn.Conv2d(width, 2, 3, padding=1),
        )

    def forward(self, x, t):
        return self.layers(x + t.reshape(-1, 1, 1, 1) / 1000)


class Files(torch.utils.data.Dataset):
    def __len__(self):
        return len(IMAGES)

    def __getitem__(self, i):
        return to_unit_range(IMAGES[i])


class Interrupted(Exception):
    pass


def make_trainer(folder, *, n_iters=13, width=4, workers=None, **options):
    """A run with a learning rate that moves, checkpoints every 4 and logs every 3 steps."""
    torch.manual_seed(0)
    model = Net(width)
    criterion = build_criterion("pred_eps_eps2", NamedSchedule("linear", 1000), model, lr=1e-2)
    criterion.lr_schedulers["all"] = torch.optim.lr_scheduler.StepLR(
        criterion.optimizers["all"], step_size=5, gamma=0.5
    )
    data = BatchStream(IMAGES if workers is None else Files(), 5, 3, workers=workers)
    settings = {"ckpt_every": 4, "log_every": 3, "seed": 11, "progress": False} | options
    return Trainer(criterion, EMA(criterion.models, 0.9), data, folder, n_iters=n_iters, **settings)


def interrupt_at(trainer, iteration):
    """Let the run stop inside the step after `iteration` steps, with the random states used."""
    update = trainer.criterion.update

    def stop(data):
        if data.position >= iteration:
            next(data)
            torch.rand(7)
            raise Interrupted
        update(data)

    trainer.criterion.update = stop
    with pytest.raises(Interrupted):
        trainer.run()


def everything(trainer):
    """All that a run leaves, as bytes and numbers."""

    def flatten(value):
        if isinstance(value, torch.Tensor):
            return value.numpy().tobytes()
        if isinstance(value, dict):
            return {key: flatten(v) for key, v in value.items()}
        return [flatten(v) for v in value] if isinstance(value, list | tuple) else value

    state = {
        part: {name: flatten(owner.state_dict()) for name, owner in owners.items()}
        for part, owners in trainer._parts().items()
    }
    return state | {"random": flatten(random_states.capture()), "data": trainer.data.position}


def left_by(folder, **options):
    """All that the run leaves, from the newest checkpoint on."""
    trainer = make_trainer(folder, **options)
    trainer.run()
    return everything(trainer)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """What a run of 13 steps leaves that nobody stopped."""
    return left_by(tmp_path_factory.mktemp("unbroken"))


# -------------------------------------------------------------------------------------- EMA


def test_ema_follows_the_closed_form():
    torch.manual_seed(0)
    model = Net().double()
    rate = 0.8
    ema = EMA({"model": model}, rate)
    history = [[p.detach().clone() for p in model.parameters()]]
    for _ in range(6):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
            model.layers[1].running_mean.normal_()
            model.layers[1].num_batches_tracked.add_(1)
        history.append([p.detach().clone() for p in model.parameters()])
        ema.update()
    for j, average in enumerate(ema.models["model"].parameters()):
        expected = rate**6 * history[0][j]
        for k in range(1, 7):
            expected = expected + (1 - rate) * rate ** (6 - k) * history[k][j]
        torch.testing.assert_close(average.data, expected, rtol=1e-12, atol=1e-12)
        assert not average.requires_grad
    for kept, buffer in zip(ema.models["model"].buffers(), model.buffers(), strict=True):
        assert torch.equal(kept, buffer)
        assert kept is not buffer
    assert not ema.models["model"].training
    for p, last in zip(model.parameters(), history[-1], strict=True):
        assert torch.equal(p.data, last), "the network itself was averaged"


def test_the_loop_averages_after_every_step(tmp_path):
    trainer = make_trainer(tmp_path, n_iters=4, ckpt_every=1)
    average = {k: v.clone() for k, v in trainer.criterion.models["model"].state_dict().items()}
    trainer.run()
    for it in (1, 2, 3, 4):
        folder = tmp_path / "ckpts" / f"{it}.ckpt"
        weights = checkpoints.read_state(folder / "models_states" / "model.pth")
        saved = checkpoints.read_state(folder / "ema_models_states" / "model.pth")
        for name, _ in trainer.criterion.models["model"].named_parameters():
            average[name] = 0.9 * average[name] + 0.1 * weights[name]
            torch.testing.assert_close(saved[name], average[name])


def test_the_loop_trains_in_training_mode(tmp_path, unbroken):
    trainer = make_trainer(tmp_path)
    trainer.criterion.models["model"].eval()
    trainer.run()
    assert everything(trainer) == unbroken


@pytest.mark.parametrize("rate", [1.0, -0.1, float("nan")])
def test_ema_refuses_a_rate_outside_0_1(rate):
    with pytest.raises(ValueError, match="rate="):
        EMA({"model": Net()}, rate)


# --------------------------------------------------------------------- exact continuation


@pytest.mark.parametrize("stops", [(1,), (4,), (5,), (7,), (12,), (2, 6, 9, 10)])
def test_a_stopped_run_continues_to_the_same_bytes(tmp_path, unbroken, stops):
    for stop in stops:
        interrupt_at(make_trainer(tmp_path), stop)
        torch.rand(3)  # a new process has other random states
        np.random.rand(3)  # noqa: NPY002
    assert left_by(tmp_path) == unbroken


def test_a_run_with_loader_processes_continues_to_the_same_bytes(tmp_path, unbroken):
    interrupt_at(make_trainer(tmp_path, workers=1), 6)
    assert left_by(tmp_path, workers=1) == unbroken


def test_a_longer_run_continues_a_finished_one(tmp_path, unbroken):
    make_trainer(tmp_path, n_iters=7).run()
    assert left_by(tmp_path) == unbroken


def test_callbacks_do_not_disturb_the_run(tmp_path, unbroken):
    def draw(iteration, _):
        torch.rand(iteration)
        np.random.rand(iteration)  # noqa: NPY002
        trainer.criterion.models["model"].eval()

    trainer = make_trainer(tmp_path, on_log=draw, on_checkpoint=draw)
    trainer.run()
    assert everything(trainer) == unbroken


def test_a_step_is_announced_by_its_iteration(tmp_path):
    """Also in a continued run: what is set by it, such as lambda, is then as in an unbroken one."""
    announced = []
    interrupt_at(make_trainer(tmp_path, before_step=announced.append), 6)
    make_trainer(tmp_path, before_step=announced.append).run()
    assert announced == [*range(1, 8), *range(5, 14)]


def test_a_run_stopped_while_it_writes_continues_to_the_same_bytes(tmp_path, unbroken, monkeypatch):
    save = checkpoints._save

    def fail(value, path):
        if path.parent.name == "optimizers_states" and "8.ckpt" in str(path):
            path.write_bytes(b"half a f")
            raise Interrupted
        save(value, path)

    monkeypatch.setattr(checkpoints, "_save", fail)
    with pytest.raises(Interrupted):
        make_trainer(tmp_path).run()
    monkeypatch.undo()
    assert list(checkpoints.checkpoint_paths(tmp_path / "ckpts")) == [4]
    assert left_by(tmp_path) == unbroken
    names = {path.name for path in (tmp_path / "ckpts").iterdir()}
    assert names == {"4.ckpt", "8.ckpt", "12.ckpt", "13.ckpt"}


def test_a_finished_run_is_only_loaded(tmp_path, unbroken):
    make_trainer(tmp_path).run()
    trainer = make_trainer(tmp_path)
    trainer.criterion.update = None
    trainer.run()
    trainer.run()
    assert everything(trainer) == unbroken


def test_the_seed_governs_a_new_run(tmp_path, unbroken):
    assert left_by(tmp_path, seed=12)["models"] != unbroken["models"]


# ------------------------------------------------------------------------------ checkpoints


def test_checkpoints_have_the_host_s_layout(tmp_path):
    paths = []
    trainer = make_trainer(tmp_path, on_checkpoint=lambda it, path: paths.append((it, path)))
    trainer.run()
    folders = {it: tmp_path / "ckpts" / f"{it}.ckpt" for it in (4, 8, 12, 13)}
    assert paths == list(folders.items())
    last = folders[13]
    assert sorted(str(p.relative_to(last)) for p in last.rglob("*.pth")) == [
        "best_val_loss.pth",
        "ema_models_states/model.pth",
        "it.pth",
        "lr_schedulers_states/all.pth",
        "models_states/model.pth",
        "optimizers_states/all.pth",
        "resume.pth",
    ]
    assert torch.load(last / "it.pth", weights_only=True) == 13
    for part in ("models", "ema_models"):
        state = checkpoints.read_state(last / f"{part}_states" / "model.pth")
        expected = trainer._parts()[part]["model"].state_dict()
        assert list(state) == list(expected)
        assert all(torch.equal(state[name], expected[name]) for name in state)


def cut(path):
    file = path / "ema_models_states" / "model.pth"
    file.write_bytes(file.read_bytes()[:-200])


def lose(path):
    (path / "optimizers_states" / "all.pth").unlink()


DAMAGE = {
    "cut": cut,
    "empty": lambda path: (path / "resume.pth").write_bytes(b""),
    "lost": lose,
    "mixed": lambda path: shutil.copy(path.parent / "8.ckpt" / "it.pth", path / "it.pth"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_told_and_the_one_before_used(tmp_path, unbroken, caplog, damage):
    interrupt_at(make_trainer(tmp_path), 12)
    DAMAGE[damage](tmp_path / "ckpts" / "12.ckpt")
    seen = []
    trainer = make_trainer(tmp_path, on_log=lambda it, _: seen.append(it))
    with caplog.at_level(logging.WARNING):
        trainer.run()
    assert seen == [9, 12]
    (record,) = caplog.records
    assert str(tmp_path / "ckpts" / "12.ckpt") in record.getMessage()
    assert "\n" not in record.getMessage()
    assert everything(trainer) == unbroken
    checkpoints.read_checkpoint(tmp_path / "ckpts" / "12.ckpt", trainer._parts())


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
@pytest.mark.parametrize("numbers", [1, 10**6])  # met when the file is closed, or inside torch.save
def test_a_full_disk_is_an_oserror(tmp_path, numbers):
    path = tmp_path / "state.pth"
    path.symlink_to("/dev/full")  # every write: no space left on device
    with pytest.raises(OSError, match=r"No space left|state\.pth cannot be written"):
        checkpoints._save({"weight": torch.zeros(numbers)}, path)


def test_torch_s_own_word_for_a_failed_write_is_an_oserror(tmp_path, monkeypatch):
    def fail(value, file):
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed\nat")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(
        OSError, match=r"it\.pth cannot be written; .* \(PytorchStreamWriter .* failed\)$"
    ):
        checkpoints.write_checkpoint(tmp_path, checkpoints.Checkpoint(3, {}))
    assert not list(tmp_path.iterdir())


def test_a_run_whose_checkpoints_are_all_damaged_is_not_started_anew(tmp_path):
    interrupt_at(make_trainer(tmp_path), 5)
    lose(tmp_path / "ckpts" / "4.ckpt")
    with pytest.raises(DamagedCheckpoint, match=r"none of the 1 checkpoints.*move them away"):
        make_trainer(tmp_path).run()
    assert (tmp_path / "ckpts" / "4.ckpt" / "it.pth").exists()


def test_only_the_newest_checkpoints_are_kept_where_asked(tmp_path):
    make_trainer(tmp_path, keep=2).run()
    assert list(checkpoints.checkpoint_paths(tmp_path / "ckpts")) == [13, 12]


def test_a_shorter_run_ends_where_it_was_told_to(tmp_path):
    make_trainer(tmp_path).run()
    short = left_by(tmp_path, n_iters=10, keep=3)
    assert short == left_by(tmp_path / "alone", n_iters=10)
    # those beyond its end are none of its business
    assert list(checkpoints.checkpoint_paths(tmp_path / "ckpts")) == [13, 12, 10, 8, 4]


def test_a_checkpoint_of_the_original_can_be_continued(tmp_path, caplog):
    interrupt_at(make_trainer(tmp_path), 5)
    (tmp_path / "ckpts" / "4.ckpt" / "resume.pth").unlink()
    trainer = make_trainer(tmp_path)
    with caplog.at_level(logging.WARNING):
        trainer.run()
    assert "no random states" in caplog.text
    assert trainer.data.position == 13


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    make_trainer(tmp_path, n_iters=4).run()
    with pytest.raises(ValueError, match=r"4\.ckpt is of another network"):
        make_trainer(tmp_path, width=8).run()


def test_random_states_come_back_exactly(tmp_path):
    random_states.seed_everything(5)
    np.random.standard_normal(3)  # noqa: NPY002 - an odd count leaves a cached number behind
    states = random_states.capture()
    first = torch.rand(3).tolist(), np.random.standard_normal(3).tolist()  # noqa: NPY002
    random_states.restore(states)
    assert (torch.rand(3).tolist(), np.random.standard_normal(3).tolist()) == first  # noqa: NPY002
    torch.save(states, tmp_path / "states.pth")
    random_states.restore(torch.load(tmp_path / "states.pth", weights_only=True))
    assert (torch.rand(3).tolist(), np.random.standard_normal(3).tolist()) == first  # noqa: NPY002


# ------------------------------------------------------------------------------------- logs


class Counting(Criterion):
    """The loss of step k is k; what the k-th step shall yield instead is in `instead`."""

    def __init__(self, instead=None):
        model = nn.Linear(1, 1)
        super().__init__({"model": model}, {"all": torch.optim.SGD(model.parameters(), lr=0.1)}, {})
        self.instead = instead or {}
        self.step = 0

    def objective(self, v):
        self.step += 1
        self.statistics["twice"] = torch.tensor(2.0 * self.step)
        self.statistics["plain"] = 3.0 * self.step  # hooks may leave plain numbers
        weight = self.models["model"].weight.sum()
        loss = torch.tensor(float(self.instead.get(self.step, self.step)))
        return (loss + 0 * weight).expand(len(v))


def counting_trainer(folder, criterion, **options):
    settings = {"n_iters": 20, "ckpt_every": 7, "log_every": 5, "progress": False} | options
    return Trainer(criterion, EMA(criterion.models), BatchStream(IMAGES, 2, 0), folder, **settings)


def test_logs_are_means_over_the_window(tmp_path):
    logs = {}
    counting_trainer(tmp_path, Counting(), on_log=logs.__setitem__).run()
    assert logs == {
        it: {"loss": it - 2.0, "twice": 2 * (it - 2.0), "plain": 3 * (it - 2.0), "grad_norm": 0.0}
        for it in (5, 10, 15, 20)
    }


def test_a_continued_run_logs_what_an_unbroken_one_logs(tmp_path):
    expected, logs = {}, {}
    make_trainer(tmp_path / "unbroken", on_log=expected.__setitem__).run()
    interrupt_at(make_trainer(tmp_path / "broken", on_log=logs.__setitem__), 11)
    make_trainer(tmp_path / "broken", on_log=logs.__setitem__).run()
    assert logs == expected  # steps 7 and 8 are of the window's first half, before the checkpoint
    assert list(expected) == [3, 6, 9, 12]


def test_the_loop_asks_the_device_only_where_it_must(tmp_path, monkeypatch):
    """A tensor turned into a number makes the processor wait for the device."""
    criterion = Counting()
    asked = []
    for name in ("item", "tolist", "__float__", "__bool__", "__int__"):
        original = getattr(torch.Tensor, name)

        def spy(self, *args, original=original):
            asked.append(criterion.step)
            return original(self, *args)

        monkeypatch.setattr(torch.Tensor, name, spy)
    counting_trainer(tmp_path, criterion).run()
    assert set(asked) - {0} == {5, 7, 10, 14, 15, 20}


def test_the_window_is_read_before_it_grows_without_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(Window, "CAPACITY", 3)
    logs = {}
    trainer = counting_trainer(tmp_path, Counting(), log_every=10, on_log=logs.__setitem__)
    reads, read = [], Window.read
    monkeypatch.setattr(Window, "read", lambda w, name: reads.append(w._steps) or read(w, name))
    trainer.run()
    assert max(reads) == 3
    assert [logs[it]["loss"] for it in (10, 20)] == [5.5, 15.5]


def test_the_progress_bar_shows_the_statistics(tmp_path, capsys):
    counting_trainer(tmp_path, Counting(), progress=True).run()
    shown = capsys.readouterr().err
    assert "20/20" in shown
    assert "loss=18" in shown


# ------------------------------------------------------------------------------- divergence


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, value):
    logs = {}
    # later losses are finite again: the first bad step is the one to be named
    trainer = counting_trainer(tmp_path, Counting({12: value, 13: value}), on_log=logs.__setitem__)
    with pytest.raises(TrainingDiverged) as error:
        trainer.run()
    last_good = tmp_path / "ckpts" / "7.ckpt"
    assert (error.value.iteration, error.value.last_good) == (12, last_good)
    assert "iteration 12" in str(error.value)
    assert str(last_good) in str(error.value)
    assert list(checkpoints.checkpoint_paths(tmp_path / "ckpts")) == [7]
    assert list(logs) == [5, 10]
    assert isinstance(error.value, ValueError)


def test_the_term_that_is_not_finite_is_named(tmp_path):
    criterion = Counting({12: float("inf")})
    objective = criterion.objective

    def with_terms(v):
        loss = objective(v)
        criterion.statistics["sa_loss"] = loss.mean()
        return loss

    criterion.objective = with_terms
    expected = r"the loss \(by its term sa_loss\) is not finite at iteration 12; .*7\.ckpt"
    with pytest.raises(TrainingDiverged, match=expected):
        counting_trainer(tmp_path, criterion).run()


@pytest.mark.parametrize(("step", "clip"), [(9, 1.0), (14, None)])
def test_a_gradient_that_is_not_finite_is_told_at_its_own_step(tmp_path, step, clip):
    """By its norm, where it is clipped; else at the last step before a checkpoint, whose loss is
    finite. The loss that is not follows a step later."""
    criterion = Counting()
    objective = criterion.objective
    criterion.grad_clip = criterion.grad_clip if clip is None else clip

    def overflow(v):
        loss = objective(v)
        if criterion.step == step:
            weight = criterion.models["model"].weight.sum()
            loss = loss + torch.sqrt(0 * weight)  # 0, with an infinite slope
        return loss

    criterion.objective = overflow
    told = f"the gradient's norm is not finite at iteration {step}"
    with pytest.raises(TrainingDiverged, match=told):
        counting_trainer(tmp_path, criterion).run()
    assert list(checkpoints.checkpoint_paths(tmp_path / "ckpts")) == [7]


def test_a_run_in_fp16_continues_to_the_same_bytes(tmp_path):
    """With the scale of the gradients, which changes where one overflows."""

    def trainer(folder):
        new = make_trainer(folder)
        new.criterion.configure(StepOptions(precision="fp16"))
        new.criterion.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30, growth_interval=3)
        return new

    unbroken = trainer(tmp_path / "unbroken")
    unbroken.run()
    for stop in (5, 9):
        interrupt_at(trainer(tmp_path / "broken"), stop)
    broken = trainer(tmp_path / "broken")
    broken.run()
    assert everything(broken) == everything(unbroken)
    assert broken.criterion.scaler.state_dict() == unbroken.criterion.scaler.state_dict()


def test_divergence_before_the_first_checkpoint(tmp_path):
    with pytest.raises(TrainingDiverged, match="iteration 1; no checkpoint"):
        counting_trainer(tmp_path, Counting({1: float("nan")})).run()
    assert not (tmp_path / "ckpts").exists()


def test_divergence_after_a_continuation_names_the_checkpoint_continued_from(tmp_path):
    counting_trainer(tmp_path, Counting(), n_iters=7).run()
    with pytest.raises(TrainingDiverged, match=r"7\.ckpt") as error:
        counting_trainer(tmp_path, Counting({2: float("nan")})).run()
    assert error.value.iteration == 9


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    """Loss and gradient are finite in every step, the weights are not after the last one."""
    criterion = Counting()
    update = criterion.update

    def overflow(data):
        update(data)
        if criterion.step == 14:
            criterion.models["model"].weight.data.fill_(float("inf"))

    criterion.update = overflow
    with pytest.raises(TrainingDiverged, match="a weight is not finite at iteration 14"):
        counting_trainer(tmp_path, criterion).run()
    assert list(checkpoints.checkpoint_paths(tmp_path / "ckpts")) == [7]


# -------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("name", ["n_iters", "ckpt_every", "log_every", "keep"])
def test_counts_below_one_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name}=0"):
        counting_trainer(tmp_path, Counting(), **{name: 0})


def test_a_criterion_without_a_loss_is_refused(tmp_path):
    criterion = Counting()
    criterion.update = lambda data: None
    criterion.statistics["dsm"] = torch.tensor(1.0)
    with pytest.raises(ValueError, match="statistics hold no 'loss'"):
        counting_trainer(tmp_path, criterion).run()
