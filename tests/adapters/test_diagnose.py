"""python -m adapters.diagnose: its numbers, where its networks come from, what it refuses."""

import csv
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from adapters.diagnose import main
from adapters.experiment.run import stages_of
from sa_plugin import NoiseSchedule, SALoss, diagnose
from sa_plugin.effect.spectrum import Spectrum
from tests.adapters.test_adapters import command, experiment
from tests.commands import one_line
from third_party.common.data import spread_rows, to_unit_range

OWN = ["--n_images=12", "--batch_size=8", "--grid=3", "--steps=2,3"]
FILES = ["diagnosis.md", "diagnosis.png", "samples.csv", "steps.csv"]


def run(workdir, *arguments):
    """The exit code of the command on SN-DPM's shrunk digits."""
    return main(command("sn", f"--workdir={workdir}", *OWN, *arguments))


@pytest.fixture
def workdir(trained, tmp_path):
    return shutil.copytree(trained["sn"], tmp_path / "run")


def column_of(folder, name):
    rows = csv.DictReader((folder / "steps.csv").read_text().splitlines())
    return [float(row[name]) for row in rows]


def errors_of(folder):
    return column_of(folder, "error")


def test_the_numbers_are_those_of_diagnose(workdir, capsys):
    assert run(workdir, "--gap_start=4", "--probes=2") == 0
    host = experiment("sn", workdir)
    x0 = to_unit_range(host.dataset.images[spread_rows(1797, 12)])
    expected = diagnose(
        host.wrapper(*stages_of(host)["base"].average()),
        host.schedule,
        [x0],
        loss=host.loss,
        steps=3,
        sampling_steps=(2, 3),
        n_images=12,
        spectrum=Spectrum.of(host.dataset.uint8_batches(500)),
        gap_start=4,
        probes=2,
    )
    for name in ("error", "derivative"):
        found = column_of(workdir / "diagnosis", name)
        np.testing.assert_allclose(found, expected.measured[name], rtol=1e-4)
    assert sorted(path.name for path in (workdir / "diagnosis").iterdir()) == FILES
    said = capsys.readouterr().out
    assert said.startswith((workdir / "diagnosis/diagnosis.md").read_text())
    assert all(str(workdir / "diagnosis" / name) in said for name in FILES)
    assert (workdir / "diagnosis/diagnosis.png").read_bytes()[:4] == b"\x89PNG"


def test_a_checkpoint_and_other_images(workdir, tmp_path, capsys):
    """The run's own average as a file, without the run; nothing is written where no folder is."""
    weights = stages_of(experiment("sn", workdir))["base"].average_path
    shutil.copy(weights, tmp_path / "network.pth")
    other = f"--checkpoint={tmp_path / 'network.pth'}"
    few = ["--grid=1", "--steps=2"]
    assert run(workdir, *few) == 0
    assert run(tmp_path / "nowhere", *few, other, f"--out={tmp_path / 'same'}") == 0
    assert errors_of(tmp_path / "same") == errors_of(workdir / "diagnosis")
    pictures = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 1), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", pictures)
    images = f"--images={tmp_path / 'images.npz'}"
    assert run(tmp_path / "nowhere", *few, other, images, f"--out={tmp_path / 'other'}") == 0
    assert errors_of(tmp_path / "other") != errors_of(tmp_path / "same")
    assert run(tmp_path / "nowhere", *few, other) == 0
    assert not (tmp_path / "nowhere").exists()


def test_the_plan_writes_nothing(workdir, capsys):
    assert run(workdir, "--dry_run") == 0
    assert "12 images, 300 network evaluations" in capsys.readouterr().out  # 12 (3 5 + 2 5)
    assert run(workdir, "--dry_run", "--probes=2") == 0
    assert "12 images, 444 network evaluations" in capsys.readouterr().out  # 12 (3 (5 + 4) + 2 5)
    assert not (workdir / "diagnosis").exists()


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A diffusers pipeline's folder, its UNet, and a file of images."""
    import diffusers

    folder = tmp_path_factory.mktemp("diffusers")
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    ).eval()
    scheduler = diffusers.DDPMScheduler(50, beta_schedule="squaredcos_cap_v2")
    diffusers.DDPMPipeline(unet, scheduler).save_pretrained(folder / "pipeline")
    pictures = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 1), dtype=np.uint8)
    np.savez(folder / "images.npz", pictures)
    return folder, unet, pictures


@pytest.mark.parametrize("part", ["pipeline", "pipeline/unet"])
def test_a_diffusers_network(part, pipeline, tmp_path):
    folder, unet, pictures = pipeline
    own = [*OWN, f"--diffusers={folder / part}", f"--images={folder / 'images.npz'}"]
    assert main(["diagnose", *own, f"--out={tmp_path}", "--device=cpu"]) == 0
    x0 = torch.from_numpy(pictures[spread_rows(20, 12)]).permute(0, 3, 1, 2) / 127.5 - 1
    schedule = NoiseSchedule.cosine(50)
    expected = diagnose(
        lambda x, n: unet(x, n - 1).sample,
        schedule,
        [x0],
        loss=SALoss(schedule),
        steps=3,
        sampling_steps=(2,),
        n_images=12,
    )
    np.testing.assert_allclose(errors_of(tmp_path), expected.measured["error"], rtol=1e-4)


def test_a_folder_is_read_in_the_networks_shape(pipeline, tmp_path, capsys):
    """Colour files of mixed sizes, for a grey network of 8x8; the plan of it writes nothing."""
    (tmp_path / "photos").mkdir()
    for i in range(12):
        Image.new("RGB", (20 + i, 30), (9 * i, 80, 7)).save(tmp_path / f"photos/{i}.png")
    own = [*OWN, f"--diffusers={pipeline[0]}/pipeline", f"--images={tmp_path / 'photos'}"]
    own += [f"--out={tmp_path / 'out'}", "--device=cpu"]
    assert main(["diagnose", *own, "--dry_run"]) == 0
    assert "network evaluations" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    assert main(["diagnose", *own, "--noprogress"]) == 0
    assert len(errors_of(tmp_path / "out")) == 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--diffusers={folder}/pipeline"], "--diffusers needs --images"),
        (["--diffusers={folder}", "--images={folder}/images.npz"], "must be a pipeline's folder"),
        (["--diffusers={folder}/pipeline", "--images=digits", "--what=1"], "--what=1"),
    ],
)
def test_bad_diffusers_input_is_one_line(arguments, said, pipeline, capsys):
    words = [word.format(folder=pipeline[0]) for word in arguments]
    assert main(["diagnose", *words]) == 2
    one_line(capsys, "adapters.diagnose: ", said)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--n_images=1"], "--n_images must be >= 2, got 1"),
        (["--steps=2,x"], "--steps: must be whole numbers >= 1, got 2,x"),
        (["--steps=101"], "steps"),
        (["--images=nowhere"], "images must be a folder"),
        (["--weights=nowhere.pth"], "nowhere.pth"),
    ],
)
def test_bad_input_is_one_line(arguments, said, workdir, capsys):
    assert run(workdir, *arguments) == 2
    one_line(capsys, "adapters.diagnose: ", said)


def test_a_run_that_is_not_there_is_named(tmp_path, capsys):
    assert run(tmp_path / "nowhere") == 2
    one_line(capsys, "holds no run: run python -m adapters.sn_dpm first")
