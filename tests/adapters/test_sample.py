"""adapters.sample: the same bytes however the work is cut, shared, or interrupted."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from adapters.experiment.config import LOCK_FILE
from adapters.sample import main
from adapters.sampling.pipeline import cut, runs_of, slice_size
from adapters.sampling.sinks import NpzFile, PngFolder, TarShards, first_images, read_batches
from configs import digits
from tests.children import ROOT, command_of
from third_party.common.nets import UNetModel

CONFIG = ["--config", "configs/digits_sn_sa.py", "--config.network.args.model_channels=8"]


def tiny_network(**more):
    """That of the digits, smaller, with random weights, none of them zero."""
    config = digits.get_config("sn").network.args.to_dict() | {"model_channels": 8}
    torch.manual_seed(0)
    network = UNetModel(**config | more, in_channels=1, out_channels=1)
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    return network


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random weights of the tiny network, as a trained run would have left them."""
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    torch.save(tiny_network().state_dict(), path)
    return path


def arguments(out, weights, *more, n=150, batch=500, steps=3, form="png"):
    return [
        *CONFIG, "--device", "cpu", "--noprogress", "--out", str(out), "--weights", str(weights),
        "--process", "ddpm_small", "--steps", str(steps), "--format", form,
        f"--config.sample.n_images={n}", f"--config.sample.batch_size={batch}", *more,
    ]  # fmt: skip


def run(*args, **options):
    return main(["sample", *arguments(*args, **options)])


def contents(folder: Path) -> dict[str, bytes]:
    files = (p for p in folder.rglob("*") if p.is_file() and p.name != LOCK_FILE)
    return {p.name: p.read_bytes() for p in files}


@pytest.mark.parametrize("form", ["png", "npz", "tar"])
def test_bytes_do_not_depend_on_the_batch_and_a_run_continues(tmp_path, weights, form):
    assert run(tmp_path / "a", weights, form=form) == 0
    assert run(tmp_path / "b", weights, form=form, batch=64) == 0
    whole = contents(tmp_path / "a")
    assert contents(tmp_path / "b") == whole
    assert len(whole) == {"png": 152, "npz": 3, "tar": 3}[form]  # with config.json and its copy
    names = sorted(name for name in whole if "config" not in name)
    for name in names[:64:2]:
        next((tmp_path / "b").rglob(name)).unlink()
    for name in [*names[100:101], "config.json"]:  # of another unit
        next((tmp_path / "b").rglob(name)).write_bytes(b"")
    assert run(tmp_path / "b", weights, form=form, batch=1) == 0
    assert contents(tmp_path / "b") == whole


@pytest.mark.parametrize(
    ("option", "most"), [("precision=bf16", 40), ("channels_last=True", 1)], ids=str
)
def test_speed_options_change_rounding_alone_and_are_another_run(
    tmp_path, weights, capsys, option, most
):
    few = {"n": 64, "form": "npz"}
    option = f"--config.sample.{option}"
    assert run(tmp_path / "plain", weights, **few) == 0
    assert run(tmp_path / "fast", weights, option, **few) == 0
    plain, fast = (
        np.load(tmp_path / name / "samples.npz")["arr_0"].astype(int) for name in ("plain", "fast")
    )
    assert 0 < np.abs(plain - fast).max() <= most or most == 1
    capsys.readouterr()
    assert run(tmp_path / "plain", weights, option, **few) == 2
    assert "sample." in capsys.readouterr().err


@pytest.mark.slow
def test_compiled_bytes_do_not_depend_on_the_batch(tmp_path):
    """One graph, of a slice: it serves batches of any number of slices."""
    from torch._dynamo.utils import counters

    small = {"num_res_blocks": 1, "channel_mult": (1,), "attention_resolutions": (1,)}
    more = [f"--config.network.args.{key}={value}" for key, value in small.items()]
    weights = tmp_path / "weights.pth"
    torch.save(tiny_network(**small).state_dict(), weights)
    assert run(tmp_path / "plain", weights, *more, form="npz") == 0
    counters.clear()
    compiled = [*more, "--config.sample.compile=True"]
    assert run(tmp_path / "a", weights, *compiled, form="npz") == 0
    assert run(tmp_path / "b", weights, *compiled, form="npz", batch=64) == 0
    assert counters["stats"]["unique_graphs"] == 1
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    plain, fast = (
        np.load(tmp_path / name / "samples.npz")["arr_0"].astype(int) for name in ("plain", "a")
    )
    assert np.abs(plain - fast).max() <= 1


def test_another_run_is_refused_in_one_line(tmp_path, weights, capsys):
    assert run(tmp_path / "a", weights, n=3) == 0
    capsys.readouterr()
    assert run(tmp_path / "a", weights, n=3, steps=4) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "cell.steps is 3 there, 4 here" in error
    assert "--out" in error


def fill_disk(monkeypatch, output):
    """Let the disk be full where the output's unit 1 is written."""
    write = output.write

    def full(self, unit, images):
        if unit == 1:
            raise OSError(28, "No space left on device")
        write(self, unit, images)

    monkeypatch.setattr(output, "write", full)


def test_a_full_disk_keeps_what_is_there(tmp_path, weights, monkeypatch, capsys):
    fill_disk(monkeypatch, PngFolder)
    assert run(tmp_path / "a", weights) == 1
    assert "No space left" in capsys.readouterr().err
    assert len(list((tmp_path / "a").glob("*.png"))) >= 64
    monkeypatch.undo()
    assert run(tmp_path / "a", weights) == 0
    assert len(list((tmp_path / "a").glob("*.png"))) == 150


@pytest.mark.parametrize(
    ("factor", "said"), [(1e30, "not finite, first at step n = 1000"), (np.nan, "is not finite")]
)
def test_a_network_that_breaks_is_told(tmp_path, weights, capsys, factor, said):
    state = {name: value * factor for name, value in torch.load(weights).items()}
    torch.save(state, tmp_path / "broken.pth")
    assert run(tmp_path / "a", tmp_path / "broken.pth") == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--steps=0"], "steps must be a whole number in 1..1000, got 0"),
        (["--steps=ten"], "argument --steps: invalid int value: 'ten'"),
        (["--process=npr_ddpm"], "--process 'npr_ddpm' needs 'epsc', which adapters.sn_dpm"),
        (["--process=sn_ddpm"], "does not fit"),  # the weights have no second output
        (["--process=none"], "'none'"),
        (["--config.sample.trajectory=dp_seg"], "trajectory 'dp_seg' needs gamma, got None"),
        (["--steps=1001"], "steps must be a whole number in 1..1000, got 1001"),
        (["--gamma=g.npz"], "--gamma goes with the rows of Analytic-DPM, got --process d"),
        (["--weights=no.pth"], "there is no file of weights no.pth"),
        (["--weights=README.md"], "README.md"),
        (["--pictures=3"], "[Uu]nknown command line flag 'pictures'"),
    ],
    ids=str,
)
def test_bad_input_is_one_line_and_nothing_is_written(tmp_path, weights, capsys, more, said):
    assert run(tmp_path / "a", weights, *more) == 2
    error = capsys.readouterr().err
    assert error.startswith("adapters.sample: ")
    assert error.count("\n") == 1
    assert re.search(said, error)
    assert not (tmp_path / "a").exists()


def test_a_dry_run_writes_nothing(tmp_path, weights, capsys):
    assert run(tmp_path / "a", weights, "--dry_run") == 0
    assert "150 images of ddpm_small, 3 steps, as png" in capsys.readouterr().out
    assert not (tmp_path / "a").exists()


def test_another_gamma_is_another_run(tmp_path, weights, capsys):
    for name, value in (("one", 0.5), ("two", 0.6)):
        np.savez(tmp_path / f"{name}.npz", values=np.r_[0, np.full(1000, value)])
    analytic = ["--config.sample.processes=('analytic_ddpm',)", "--process=analytic_ddpm"]
    one, two = ([*analytic, f"--gamma={tmp_path / name}.npz"] for name in ("one", "two"))
    assert run(tmp_path / "a", weights, *one, n=3) == 0
    assert run(tmp_path / "a", weights, *one, n=3) == 0
    assert run(tmp_path / "a", weights, *two, n=3) == 2
    assert "cell.gamma is" in capsys.readouterr().err
    np.savez(tmp_path / "two.npz", values=np.r_[0, np.full(10, 0.5)])
    assert run(tmp_path / "b", weights, *two, n=3) == 2
    assert r"gamma must have shape (1001,)" in capsys.readouterr().err
    assert run(tmp_path / "b", weights, *analytic, f"--workdir={tmp_path / 'run'}", n=3) == 2
    assert "the result of stage 'gamma' is needed first" in capsys.readouterr().err


def test_small_parts():
    assert runs_of([1, 2, 3, 7, 9, 10]) == [range(1, 4), range(7, 8), range(9, 11)]
    assert [slice_size((3, s, s)) for s in (8, 32, 64, 256)] == [64, 64, 16, 1]
    batches = [torch.full((n, 1, 2, 2), n, dtype=torch.uint8) for n in (5, 1, 7)]
    assert [len(part) for part in cut(iter(batches), 4)] == [4, 4, 4, 1]
    with pytest.raises(ValueError, match="unit must be a multiple of 64, got 65"):
        TarShards(Path("x"), 10, 65)


def test_npz_is_what_numpy_reads(tmp_path):
    images = np.arange(100 * 4, dtype=np.uint8).reshape(100, 2, 2, 1)
    output = NpzFile(tmp_path / "samples.npz", 100)
    output.write(1, images[64:])
    assert output.missing() == [0]
    output.write(0, images[:64])
    output.finish()
    assert not output.missing()
    with np.load(tmp_path / "samples.npz") as arrays:
        assert np.array_equal(arrays["arr_0"], images)


@pytest.mark.parametrize("size", [1, 64, 1000])
def test_stored_images_are_read_in_batches(tmp_path, size):
    images = np.arange(100 * 12, dtype=np.uint8).reshape(100, 2, 2, 3)
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "a.npz", images)
        parts = list(read_batches(tmp_path / "a.npz", size))
        assert {len(part) for part in parts[:-1]} <= {size}
        assert torch.equal(torch.cat(parts).permute(0, 2, 3, 1), torch.from_numpy(images))
    assert torch.equal(first_images(tmp_path / "a.npz", 7), torch.cat(parts)[:7])


def test_other_files_are_no_images(tmp_path):
    path = tmp_path / "a.npz"
    images = np.zeros((10, 2, 2, 3), np.uint8)
    for content in (images.astype(float), images[0], np.asfortranarray(images)):
        np.savez(path, content)
        with pytest.raises(ValueError, match="holds no images"):
            list(read_batches(path, 5))
    np.savez(path, images)
    damaged = bytearray(path.read_bytes())
    damaged[200] ^= 1  # a pixel: the checksum differs
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match="holds no images"):
        list(read_batches(path, 5))


def command(*args, processes=1, **options):
    return command_of("-m", "adapters.sample", *arguments(*args, **options), processes=processes)


@pytest.mark.slow
@pytest.mark.parametrize(("form", "most"), [("npz", 12), ("tar", 12), ("metrics", 40)])
def test_memory_does_not_grow_with_the_number_of_images(tmp_path, form, most):
    """50,000 images take 132 MiB more than 5,000 where they are all kept."""
    peaks = []
    for n in (5_000, 50_000):
        script = [
            sys.executable,
            "-m",
            "tests.streamed_memory",
            form,
            str(n),
            str(tmp_path / f"{n}"),
        ]
        done = subprocess.run(script, cwd=ROOT, check=True, capture_output=True, text=True)
        peaks.append(float(done.stdout))
    print(f"{form}: {peaks[0]:.1f} and {peaks[1]:.1f} MiB")
    assert peaks[1] - peaks[0] < most


class Command:
    """A run of the command in processes of its own, that can be watched and killed."""

    def __init__(self, folder, *args, **options):
        self.folder = folder
        self.before = self.images()
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.began = time.monotonic()
        self.process = subprocess.Popen(
            command(folder, *args, **options), cwd=ROOT, env=env, text=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip

    def images(self):
        return sum(1 for _ in self.folder.glob("*.png"))

    def wait_for_images(self):
        """Until a new image is there; the seconds since the start."""
        while self.images() == self.before and self.process.poll() is None:
            time.sleep(0.02)
        return time.monotonic() - self.began

    def finish(self):
        _, error = self.process.communicate()
        assert self.process.returncode == 0, error
        return time.monotonic() - self.began

    def kill(self):
        """SIGKILL to all its processes at once; whether it was still at work."""
        if self.process.poll() is not None:
            self.finish()
            return False
        os.kill(self.process.pid, signal.SIGSTOP)  # torchrun does not see its children die
        for pid in [self.process.pid, *descendants(self.process.pid)]:
            os.kill(pid, signal.SIGKILL)
        self.process.stderr.close()
        return self.process.wait() == -signal.SIGKILL


def descendants(pid):
    """Children and theirs, of Linux's /proc."""
    path = Path(f"/proc/{pid}/task/{pid}/children")
    found = [int(word) for word in path.read_text().split()]
    return [one for child in found for one in (child, *descendants(child))]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")
def test_two_processes_and_ten_kills(tmp_path, weights):
    """One process and two in turn, each killed at work; every fifth before its first image."""
    options = {"n": 3000, "steps": 10}
    one = Command(tmp_path / "one", weights, batch=500, **options)
    start = one.wait_for_images()
    per_unit = (one.finish() - start) / (options["n"] / 64)
    whole = contents(tmp_path / "one")
    assert len(whole) == options["n"] + 2  # config.json and its copy
    Command(tmp_path / "two", weights, processes=2, batch=64, **options).finish()
    assert contents(tmp_path / "two") == whole
    moments, hits, progress = random.Random(0), 0, set()
    for k in range(10):
        batch = (64, 128)[k // 2 % 2]  # small, so that ten kills fall within the work
        run = Command(tmp_path / "killed", weights, processes=1 + k % 2, batch=batch, **options)
        if k % 5 == 4:
            time.sleep(moments.uniform(0.2, 1) * start)
        else:
            run.wait_for_images()
            time.sleep(moments.uniform(0, 1.5) * per_unit)
        hits += run.kill()
        progress.add(run.images())
    print(f"{hits} kills, images after each: {sorted(progress)}")
    assert hits >= 8  # a machine whose speed has changed may be done before it is killed
    assert len(progress) >= 6
    Command(tmp_path / "killed", weights, processes=2, batch=64, **options).finish()
    assert contents(tmp_path / "killed") == whole
