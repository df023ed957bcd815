"""Several processes that train one network, and processes that are killed."""

import random
import time

import pytest
import torch

from tests.children import finish, start
from tests.commands import words
from third_party.common import distributed
from third_party.common.data import BatchStream
from third_party.common.training import Trainer

IMAGES = torch.arange(22).reshape(22, 1, 1, 1).to(torch.uint8)
TINY = words("digits_sn_sa.py", base={"batch_size": 16, "log_every": 3, "keep": 0})
TINY.append("--stage=base")


def train(workdir, *arguments, processes=1):
    return start(
        "-m", "adapters.sn_dpm", *TINY, f"--workdir={workdir}", *arguments, processes=processes
    )


def files(folder):
    """Every file of the checkpoints below a folder, as bytes."""
    found = folder.rglob("*.pth")
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(found)}


def test_two_processes_have_the_gradients_of_one(tmp_path):
    """And reduce them once a step, however many network calls the step makes."""
    for processes in (1, 2):
        target = str(tmp_path / f"{processes}.pth")
        finish(start("-m", "tests.parallel_gradients", target, processes=processes))
    (one,) = torch.load(tmp_path / "1.pth", weights_only=True)
    first, second = torch.load(tmp_path / "2.pth", weights_only=True)
    assert one["seed"] == first["seed"] == 7 != second["seed"]
    for name, expected in one["results"].items():
        scale = max(float(g.norm()) for g in expected["gradients"])
        for other in (first, second):
            assert other["results"][name]["reductions"] == 1
            pairs = zip(other["results"][name]["gradients"], expected["gradients"], strict=True)
            assert all(float((a - b).norm()) <= 1e-12 * scale for a, b in pairs), name


def test_a_wrapper_that_exchanges_in_every_call_does_not_wait_for_ever():
    finish(start("-m", "tests.equal_calls", processes=2))


def test_a_process_takes_its_own_gpu_before_it_meets_the_others(monkeypatch):
    """Objects are exchanged on the current device, which would be the first one for all."""
    done = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: done.append(str(device)))
    monkeypatch.setattr(
        torch.distributed, "init_process_group", lambda name, **_: done.append(name)
    )
    distributed.start(distributed.local_device("cuda"))
    distributed.start("cpu")
    assert done == ["cuda:1", "nccl", "gloo"]


@pytest.mark.parametrize("workers", [None, 0])
def test_parts_of_a_batch_make_up_the_batch(workers):
    class Files(torch.utils.data.Dataset):
        def __len__(self):
            return len(IMAGES)

        def __getitem__(self, i):
            return IMAGES[i]

    data = IMAGES if workers is None else Files()
    whole = BatchStream(data, 6, 3, workers=workers)
    parts = [BatchStream(data, 6, 3, workers=workers, part=(r, 3)) for r in range(3)]
    for position in range(9):
        if position == 5:
            for stream in (whole, *parts):
                stream.position = 7
        assert torch.equal(next(whole), torch.cat([next(part) for part in parts]))


def test_processes_that_do_not_divide_the_batch_are_refused():
    with pytest.raises(ValueError, match=r"batch_size=6: must be a multiple of .* processes, 4"):
        BatchStream(IMAGES, 6, 0, part=(0, 4))


def test_the_command_refuses_them_before_it_writes(tmp_path, monkeypatch, capsys):
    from adapters.experiment.run import run
    from adapters.hosts import SN_DPM

    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "0")
    assert run(SN_DPM, ["sn_dpm", *TINY, f"--workdir={tmp_path / 'run'}"]) == 2
    assert "multiple of the number of processes, 3" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_processes_continue_to_the_same_bytes(tmp_path):
    options = ["--config.base.iterations=7", "--config.base.ckpt_every=3"]
    for name in ("unbroken", "broken"):
        finish(train(tmp_path / name, *options, processes=2))
    expected = files(tmp_path / "unbroken")
    assert expected == files(tmp_path / "broken")
    for name in ("7.ckpt", "6.ckpt"):
        folder = tmp_path / "broken" / "base" / "ckpts" / name
        folder.rename(tmp_path / name)
    finish(train(tmp_path / "broken", *options, processes=2))
    assert files(tmp_path / "broken") == expected
    said = finish(train(tmp_path / "broken", "--config.base.iterations=7", options[1]))
    assert "done" in said


@pytest.mark.slow
def test_a_run_killed_ten_times_leaves_the_same_bytes(tmp_path):
    options = ["--config.base.iterations=300", "--config.base.ckpt_every=7"]
    began = time.monotonic()
    finish(train(tmp_path / "unbroken", *options))
    longest = time.monotonic() - began
    moments = random.Random(0)
    for _ in range(10):
        process = train(tmp_path / "killed", *options)
        time.sleep(moments.uniform(0.2, 0.8) * longest)
        process.kill()
        process.communicate()
    finish(train(tmp_path / "killed", *options))
    assert files(tmp_path / "killed") == files(tmp_path / "unbroken")
    logs = [tmp_path / name / "base" / "log.csv" for name in ("killed", "unbroken")]
    assert logs[0].read_text() == logs[1].read_text()


def test_a_checkpoint_of_other_processes_is_told(tmp_path, monkeypatch, caplog):
    from tests.third_party.test_host_training import interrupt_at, make_trainer

    interrupt_at(make_trainer(tmp_path), 5)
    path = tmp_path / "ckpts" / "4.ckpt" / "resume.pth"
    resume = torch.load(path, weights_only=True)
    torch.save(resume | {"others": [{"random": resume["random"]}]}, path)
    trainer: Trainer = make_trainer(tmp_path)
    trainer.run()
    assert "holds those of 2 processes: continuing with others" in caplog.text
