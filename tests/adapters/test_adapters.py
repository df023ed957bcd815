"""python -m adapters.analytic_dpm, npr_dpm, ocm_dpm: what differs from sn_dpm, end to end."""

import json
import shutil

import numpy as np
import pytest
import torch
from ml_collections import FrozenConfigDict

from adapters.experiment import gamma_stage, stages
from adapters.experiment.config import read_command_line
from adapters.experiment.experiment import Experiment
from adapters.experiment.run import run, stages_of
from adapters.hosts import ANALYTIC_DPM, NPR_DPM, OCM_DPM, SN_DPM
from sa_plugin.sampling.gamma import Gamma
from sa_plugin.sampling.sampler import Sampler
from tests.adapters.test_sn_dpm import DIGITS, read_log
from tests.commands import one_line, words
from third_party.analytic_dpm.criterions import DDPMDSM
from third_party.common.data import spread_rows, to_uint8

ADAPTERS = {"analytic": ANALYTIC_DPM, "npr": NPR_DPM, "ocm": OCM_DPM, "sn": SN_DPM}

# 40 images cannot fill the 64 pixels' covariance; the warning that says so is expected here.
pytestmark = pytest.mark.filterwarnings("ignore:.*singular.*:UserWarning")


def command(method, *arguments):
    """The command line of a method's digits, shrunk as those of sn_dpm, with 100 steps.

    A fast rate and no average: else six iterations would leave a network of zeros.
    """
    base, gamma = {"lr": 0.02, "ema": 0.0}, {"n_images": 20, "batch_size": 8}
    file, *changed = words(f"digits.py:{method}", schedule={"N": 100}, base=base, gamma=gamma)
    return ["adapters", file, *DIGITS[1:], *changed, *arguments]


def call(method, workdir, *arguments):
    """The exit code of a method's command in ``workdir``."""
    return run(ADAPTERS[method], command(method, f"--workdir={workdir}", *arguments))


def experiment(method, workdir, *arguments):
    """The experiment that the command describes."""
    line = read_command_line(command(method, *arguments), ADAPTERS[method].stages, "adapters")
    return Experiment(ADAPTERS[method], line.config, workdir)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Finished runs by method; tests that change one copy it first."""
    methods = ("analytic", "npr", "ocm")
    workdirs = {method: tmp_path_factory.mktemp(method) / "run" for method in methods}
    for method, workdir in workdirs.items():
        assert call(method, workdir) == 0
    return workdirs


@pytest.mark.parametrize(
    ("method", "title"), [("analytic", "Analytic"), ("npr", "NPR"), ("ocm", "OCM")]
)
def test_leaves_everything_that_it_promises(method, title, finished):
    workdir = finished[method]
    metrics = json.loads((workdir / "metrics.json").read_text())
    assert list(metrics) == ["ddpm_small", "ddpm_big", f"{method}_ddpm", "ddim", f"{method}_ddim"]
    for process, cells in metrics.items():
        for steps, cell in cells.items():
            assert cell["frechet_pixels"] > 0
            with np.load(workdir / "samples" / f"{process}_{steps}.npz") as arrays:
                assert arrays["arr_0"].shape == (40, 8, 8, 1)
    table = (workdir / "table.md").read_text()
    assert f"| {title}-DDPM" in table
    assert f"| {title}-DDIM" in table
    assert float(read_log(workdir / "base")[-1]["sa_loss"]) > 0


def test_analytic_trains_through_its_own_host(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(DDPMDSM, "_record", lambda self, *_: made.append(self))
    assert call("analytic", tmp_path / "run", "--stage=base") == 0
    assert len(made) == 6


def test_the_npr_head_learns_the_squared_error(finished, tmp_path):
    assert [float(row["ddm"]) > 0 for row in read_log(finished["npr"] / "head")] == [True, True]
    assert call("npr", tmp_path / "run", "--config.head.training=joint") == 0
    assert not (tmp_path / "run/head").exists()
    assert "ddm" in read_log(tmp_path / "run/base")[0]
    stages = stages_of(experiment("npr", finished["npr"]))
    assert list(stages) == ["base", "head", "sample", "evaluate"]
    _, typ = stages["head"].average()
    assert typ == "eps_epsc"


def test_the_ocm_head_learns_on_the_frozen_network_only(finished, tmp_path, capsys):
    assert [float(row["ddm"]) > 0 for row in read_log(finished["ocm"] / "head")] == [True, True]
    found = stages_of(experiment("ocm", finished["ocm"]))
    (network, typ), (trunk, _) = found["head"].average(), found["base"].average()
    assert typ == "eps_ocm"
    weights = network.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in trunk.state_dict().items())
    assert call("ocm", tmp_path / "run", "--config.head.training=joint") == 2
    one_line(capsys, "head.training must be 'pretrained' for adapters.ocm_dpm", "got 'joint'")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("process", "options"),
    [
        ("ocm_ddim", {"forward": "ddim", "variance": "ocm"}),
        ("probes_ddpm", {"variance": "probes", "probes": 2}),
        ("lanczos_ddim", {"forward": "ddim", "variance": "lanczos", "lanczos_steps": 2}),
    ],
)
def test_the_rows_of_the_derivative_are_those_of_a_sampler_made_by_hand(finished, process, options):
    """Also by the slices in which a grid calls the network; no row needs what the others need."""
    changed = [f"--config.sample.{key}={value}" for key, value in options.items() if key[-1] == "s"]
    host = experiment("ocm", finished["ocm"], *changed)
    network, typ = stages_of(host)["head" if process.startswith("ocm") else "base"].average()
    sampler = Sampler(
        host.wrapper(network, typ),
        host.schedule,
        steps=4,
        clip_sigma_idx=1,
        clip_pixel=1 if "ddim" in process else 2,
        **options,
    )
    batches = host.source(process, 4, network, typ, progress=False).batches(0, 40)
    images = torch.cat(list(batches))
    expected = to_uint8(sampler.sample((40, 1, 8, 8), seed=host.config.sample.seed))
    assert (images.int() - expected.int()).abs().max() <= 1
    assert (images == expected).float().mean() > 0.99


# -- Gamma


def test_gamma_is_left_with_its_errors_and_in_the_hosts_format(finished):
    folder = finished["analytic"] / "gamma"
    gamma = Gamma.load(folder / "gamma.npz")
    assert gamma.N == 100
    assert (gamma.stderr[1:] > 0).all()
    assert gamma.values[1:].min() > 0.01  # a network that has learnt something
    assert np.array_equal(Gamma.load(folder / "ms_eps.pth").values, gamma.values)
    assert not (finished["analytic"] / "head").exists()


def test_gamma_is_that_of_the_averaged_network_on_the_data(finished):
    """By hand, over all images with noise of its own: within its errors."""
    host = experiment("analytic", finished["analytic"])
    gamma = Gamma.load(finished["analytic"] / "gamma/gamma.npz")
    network, typ = stages_of(host)["base"].average()
    generator = torch.Generator().manual_seed(0)
    for n in (1, 50, 100):
        x0 = host.dataset.images
        a = float(host.schedule.cum_alphas[n])
        x = a**0.5 * x0 + (1 - a) ** 0.5 * torch.randn(x0.shape, generator=generator)
        with torch.no_grad():
            squares = host.wrapper(network, typ)(x, n).double().square()
        assert abs(squares.mean().item() - gamma.values[n]) < 5 * gamma.stderr[n]


def test_the_optimal_rows_are_sampled_with_gamma(finished):
    """The cells are those of a sampler made by hand; another Gamma gives other images."""
    host = experiment("analytic", finished["analytic"])
    wrapper = host.wrapper(*stages_of(host)["base"].average())
    gamma = Gamma.load(finished["analytic"] / "gamma/gamma.npz")
    for forward, clip_pixel in (("ddpm", 2), ("ddim", 1)):
        options = {"forward": forward, "variance": "analytic", "steps": 6}
        clip = {"clip_sigma_idx": 1, "clip_pixel": clip_pixel}
        ours, other = (
            Sampler(wrapper, host.schedule, gamma=values, **options, **clip)
            for values in (gamma, np.ones(101))
        )
        with np.load(finished["analytic"] / f"samples/analytic_{forward}_6.npz") as arrays:
            images = torch.from_numpy(arrays["arr_0"]).permute(0, 3, 1, 2)
        assert torch.equal(next(ours.stream(40, (1, 8, 8), batch_size=500)), images)
        assert not torch.equal(next(other.stream(40, (1, 8, 8), batch_size=500)), images)


def test_the_noise_of_the_optimal_rows_is_clipped(finished):
    host = experiment("analytic", finished["analytic"])
    gamma = np.full(101, 0.5)
    for process, row in {"analytic_ddpm": 2.0, "analytic_ddim": 1.0}.items():
        limit = host.sampler(process, 6, torch.nn.Identity(), "eps", gamma).coefficients.limit
        assert np.isfinite(limit[-2:]).all()  # the steps that end at timesteps[1] and at 0
        assert np.isinf(limit[:-2]).all()
        np.testing.assert_allclose(limit[-1], (row * 2 / 255) ** 2 * np.pi / 2)
    limit = host.sampler("ddpm_small", 6, torch.nn.Identity(), "eps").coefficients.limit
    assert np.isinf(limit[:-1]).all()


def test_all_images_are_taken_where_there_are_fewer(tmp_path, capsys):
    arguments = ["--config.gamma.n_images=5000", "--config.gamma.noises=3"]
    assert stages_of(experiment("analytic", tmp_path))["gamma"].n_images == 20
    assert stages_of(experiment("analytic", tmp_path, *arguments))["gamma"].n_images == 1797
    assert call("analytic", tmp_path / "none", "--dry_run", *arguments) == 0
    assert "up to 5000 images x 3 noises x 100 steps, 1.5e+06" in capsys.readouterr().out


def test_a_plan_needs_no_data_but_a_run_does(tmp_path, capsys):
    """Nothing is written either way."""
    for dry_run, code in ((["--dry_run"], 0), ([], 2)):
        words = ["--config=configs/cifar10.py:analytic", f"--config.data.root={tmp_path}"]
        words += [f"--workdir={tmp_path / 'run'}", "--device=cpu", *dry_run]
        assert run(ADAPTERS["analytic"], ["analytic_dpm", *words]) == code
        assert not (tmp_path / "run").exists()
    assert "cifar-10-python.tar.gz" in capsys.readouterr().err


def test_an_interrupted_estimate_continues(finished, tmp_path, monkeypatch):
    """What is in state.pth is not done again."""
    shutil.copytree(finished["analytic"], tmp_path / "run")
    path = tmp_path / "run/gamma/gamma.npz"
    before = path.read_bytes()
    path.unlink()
    wrapper = Experiment.wrapper

    def forbidden(*_):
        raise AssertionError("nothing is left to evaluate")

    monkeypatch.setattr(Experiment, "wrapper", lambda self, *a: (wrapper(self, *a), forbidden)[1])
    assert call("analytic", tmp_path / "run", "--stage=gamma") == 0
    assert path.read_bytes() == before


def test_stages_by_name(finished, tmp_path, capsys):
    workdir = tmp_path / "run"
    assert call("analytic", workdir, "--stage=gamma") == 2
    assert "stage 'gamma' needs the result of stage 'base'" in capsys.readouterr().err
    assert call("analytic", workdir, "--stage=base") == 0
    assert call("analytic", workdir, "--stage=sample") == 2
    assert "result of stage 'gamma' is needed first" in capsys.readouterr().err
    assert call("analytic", workdir, "--stage=gamma,sample,evaluate") == 0
    for name in ("metrics.json", "gamma/gamma.npz"):
        assert (workdir / name).read_bytes() == (finished["analytic"] / name).read_bytes()
    assert call("analytic", workdir, "--stage=head") == 2
    assert "--stage must be some of base,gamma,sample,evaluate" in capsys.readouterr().err


def test_a_second_run_changes_nothing(finished, monkeypatch):
    monkeypatch.setattr(gamma_stage, "estimate_gamma", None)
    before = {p: p.stat().st_mtime_ns for p in finished["analytic"].rglob("*.npz")}
    assert call("analytic", finished["analytic"]) == 0
    assert {p: p.stat().st_mtime_ns for p in finished["analytic"].rglob("*.npz")} == before


def test_the_trajectory_of_analytic_dpm_runs(tmp_path):
    """dp_seg takes Gamma, in all rows."""
    arguments = ["--config.sample.trajectory=dp_seg", "--stage=base,gamma,sample"]
    assert call("analytic", tmp_path / "run", *arguments) == 0
    assert len(list((tmp_path / "run/samples").glob("*.npz"))) == 10


# -- configurations


def test_only_the_sections_that_a_host_has_are_recorded(finished):
    """So that adding a stage for one host leaves the folders of the others valid."""
    kept = {m: json.loads((w / "config.json").read_text()) for m, w in finished.items()}
    assert "gamma" in kept["analytic"]
    assert "head" not in kept["analytic"]
    assert "head" in kept["npr"]
    assert "gamma" not in kept["npr"]
    everything = FrozenConfigDict({"head": {"a": 1}, "gamma": {"a": 1}, "steps": (1, 2)})
    assert SN_DPM.recorded(everything).to_dict() == {"head": {"a": 1}, "steps": (1, 2)}


@pytest.mark.parametrize("method", ADAPTERS)
def test_the_digits_configurations_differ_by_their_rows_alone(method):
    line = read_command_line(["x", f"--config=configs/digits.py:{method}"], (), "x")
    config = line.config.to_dict()
    assert not config.pop("baseline")
    assert config.pop("name") == f"digits_{method}"
    rows = ("ddpm_small", "ddpm_big", f"{method}_ddpm", "ddim", f"{method}_ddim")
    assert config["sample"].pop("processes") == rows
    other = read_command_line(["x", "--config=configs/digits_sn_sa.py"], (), "x").config.to_dict()
    assert other.pop("baseline")
    del other["name"], other["sample"]["processes"]
    assert config == other


@pytest.mark.parametrize(
    ("method", "arguments", "said"),
    [
        (
            "analytic",
            ["--config.sample.processes=('sn_ddpm',)"],
            "'sn_ddpm' needs 'eps2', which adapters.analytic_dpm does not provide",
        ),
        ("npr", ["--config.sample.processes=('analytic_ddim',)"], "'analytic_ddim' needs 'gamma'"),
        ("npr", ["--config.sample.processes=('sn_ddim',)"], "'sn_ddim' needs 'eps2'"),
        ("npr", ["--config.sample.trajectory=dp_seg"], "'dp_seg' needs gamma"),
        ("analytic", ["--config.gamma.images=5"], "unknown configuration key 'images'"),
        ("npr", ["--stage=gamma"], "--stage must be some of base,head,sample,evaluate"),
    ],
    ids=str,
)
def test_bad_input_is_one_line_and_exit_code_2(method, arguments, said, tmp_path, capsys):
    assert call(method, tmp_path / "run", *arguments) == 2
    one_line(capsys, said)
    assert not (tmp_path / "run").exists()


def test_another_gamma_replaces_what_rests_on_it(finished, capsys):
    before = {p: p.read_bytes() for p in finished["analytic"].rglob("*.npz")}
    assert call("analytic", finished["analytic"], "--config.gamma.noises=2", "--dry_run") == 0
    said = capsys.readouterr().out
    assert "replaced  gamma, " in said
    assert "samples.png, metrics.json, table.md, frechet_pixels.png" in said
    assert "base      done" in said
    assert "sample    to do  4 cells of 40 images" in said
    assert {p: p.read_bytes() for p in finished["analytic"].rglob("*.npz")} == before


def test_the_overview_shows_real_images_of_the_whole_data_set(finished, monkeypatch):
    panels = {}
    monkeypatch.setattr(
        stages, "save_labelled_grids", lambda path, found, **_: panels.update(found)
    )
    one = experiment("npr", finished["npr"])
    stages_of(one)["sample"]._draw_overview()
    expected = to_uint8(one.dataset.images[spread_rows(1797, stages.GRID_IMAGES)])
    torch.testing.assert_close(panels["real"], expected)
