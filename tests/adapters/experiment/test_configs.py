"""The configuration files: each loads, and those of the papers' experiments hold known facts."""

import json
import re
from functools import cache
from typing import NamedTuple

import pytest
import torch
from ml_collections import FrozenConfigDict

from adapters.experiment.config import check_keys, claimed, read_command_line
from adapters.hosts import PROCESSES
from adapters.measuring.features import check_names
from configs import common
from configs.base import base_config
from tests import ROOT
from third_party.common.datasets import DATASETS
from third_party.common.nets.by_name import build_network

FILES = [p for p in (ROOT / "configs").glob("*.py") if "def get_config(method" in p.read_text()]
PUBLISHED = json.loads((ROOT / "tests/data/models.json").read_text())
METHODS = ("analytic", "npr", "sn", "ocm")


class Facts(NamedTuple):
    """What is known of a setting; the defaults are the hosts', and hold where nothing is known."""

    size: int  # of the images
    schedule: str
    shift1: bool
    clip_ddpm: float
    dropout: float
    network: str
    published: str  # its name in models.json
    heads: dict[str, str]  # method -> the same network with a head
    lam: float = 1.0
    lr: float = 1e-4
    batch: int = 128
    ema: float = 0.9999
    grad_clip: float = 0.0


IDDPM, DDPM = "iddpm_unet", "ddpm_unet"
CIFAR10_HEADS = dict.fromkeys(("npr", "sn"), "cifar10_npr_sn_simple")
CELEBA64_HEADS = dict.fromkeys(("npr", "sn"), "celeba64_npr_sn_simple")
IMAGENET64_HEADS = {"npr": "imagenet64_npr_simple", "sn": "imagenet64_sn_complex"}
LSUN_HEADS = {"sn": "lsun_bedroom_sn_complex"}
SA_DPM = {"lr": 2e-4, "grad_clip": 1.0}
SA_DPM_HQ = {"lam": 0.1, "lr": 2e-5, "grad_clip": 1.0, "batch": 24, "ema": 0.999}
FACTS = {
    "cifar10": Facts(32, "linear", False, 2.0, 0.3, IDDPM, "cifar10_eps", CIFAR10_HEADS),
    "cifar10_cosine": Facts(32, "cosine", False, 1.0, 0.3, IDDPM, "cifar10_eps", CIFAR10_HEADS),
    "celeba64": Facts(64, "linear", True, 2.0, 0.1, DDPM, "celeba64_eps", CELEBA64_HEADS, **SA_DPM),
    "imagenet64": Facts(64, "cosine", False, 1.0, 0.0, IDDPM, "imagenet64_eps", IMAGENET64_HEADS),
    "lsun_bedroom": Facts(256, "linear", True, 2.0, 0.0, DDPM, "lsun_bedroom_eps", LSUN_HEADS),
    # No network of CelebA-HQ's is known: that of the same image size is taken.
    "celebahq256": Facts(256, "linear", True, 2.0, 0.0, DDPM, "lsun_bedroom_eps", {}, **SA_DPM_HQ),
}
SETTINGS = [(name, method) for name in FACTS for method in METHODS]
ALL = [(path.stem, method) for path in sorted(FILES) for method in METHODS]


def read(chosen, *words):
    """FILE.py or FILE.py:METHOD as the command line reads it."""
    words = ["x", f"--config={ROOT}/configs/{chosen}", *words]
    return read_command_line(words, ("base",), "x").config


@cache
def load(name, method):
    return read(f"{name}.py:{method}")


def count(config, shape, trunk, head=0):
    with torch.device("meta"):
        network = build_network(
            config.network.name,
            config.network.args.to_dict(),
            shape,
            trunk_channels=trunk,
            head_channels=head,
            head_mode=config.head.mode,
        )
    return sum(p.numel() for p in network.parameters())


# ---------------------------------------------------------------------------------- every file


@pytest.mark.parametrize(("name", "method"), ALL)
def test_every_experiment_loads_and_its_names_resolve(name, method):
    config = load(name, method)
    check_keys(config)
    assert config.name == f"{name}_{method}"
    assert config.data.name in DATASETS
    rows = ("ddpm_small", "ddpm_big", f"{method}_ddpm", "ddim", f"{method}_ddim")
    assert config.sample.processes == rows
    assert set(rows) <= set(PROCESSES)
    check_names(config.evaluate.features)


def test_there_is_a_file_for_each_data():
    ours = {"digits", "digits_classes", "fashion", "folder"}
    assert {path.stem for path in FILES} == {*FACTS, *ours}


def test_the_names_of_the_first_release_are_the_default():
    assert read("cifar10_sn_sa.py") == read("cifar10.py") == load("cifar10", "sn")


@pytest.mark.parametrize("name", ["digits", "folder"])
def test_the_main_jobs_also_run_the_baseline(name):
    default = read(f"{name}.py")
    assert not default.baseline
    assert read(f"{name}_sn_sa.py").to_dict() == {**default.to_dict(), "baseline": True}


@pytest.mark.parametrize("chosen", ["celeba64.py:dpm", "cifar10_cosine.py:", "digits.py:sn:npr"])
def test_an_unknown_name_after_the_colon_is_one_line_with_the_choices(chosen):
    method = chosen.partition(":")[2]
    choices = re.escape("('analytic', 'npr', 'sn', 'ocm')")
    match = rf"^\S+/configs/\w+\.py:\d+: method must be one of {choices}, got '{method}'$"
    with pytest.raises(ValueError, match=match):
        read(chosen)


def test_a_method_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match=r"method must be one of .*'analytic'.*got 'dpm'"):
        common.experiment("cifar10", "dpm")


# --------------------------------------------------------------------------- facts of the papers


@pytest.mark.parametrize(("name", "method"), SETTINGS)
def test_settings_are_the_known_ones(name, method):
    config, facts = load(name, method), FACTS[name]
    assert config.schedule.name == facts.schedule
    assert config.time.shift1 == facts.shift1
    assert config.sample.clip_pixel_ddpm == facts.clip_ddpm
    assert config.sa.lam == facts.lam
    base = config.base
    found = base.lr, base.batch_size, base.ema, base.grad_clip
    assert found == (facts.lr, facts.batch, facts.ema, facts.grad_clip)
    assert config.network.name == facts.network
    assert config.network.args.dropout == facts.dropout


@pytest.mark.parametrize(("name", "method"), SETTINGS)
def test_what_all_settings_have_in_common(name, method):
    config = load(name, method)
    assert config.seed == 1234
    assert config.schedule.N == 1000
    assert config.time.rescale_timesteps
    assert (config.sa.K, config.sa.weighting, config.sa.window) == (2, "uniform", "down")
    assert config.sa.noise == "independent"
    assert config.base.iterations == config.head.iterations == 500_000
    assert (config.head.lr, config.head.ema, config.head.grad_clip) == (1e-4, 0.9999, 0.0)
    assert config.head.batch_size == (24 if name == "celebahq256" else 128)
    assert (config.head.training, config.head.ratio) == ("pretrained", 1.0)
    sample = config.sample
    assert (sample.n_images, sample.trajectory, sample.clip_x0) == (50_000, "linear", True)
    assert (sample.clip_sigma_idx, sample.clip_pixel_ddim) == (1, 1.0)
    assert sample.steps == (10, 25, 50, 100, 200, 1000)
    assert config.evaluate.features == ("inception", "inception_tf")
    assert config.data.name == name.removesuffix("_cosine")


@pytest.mark.parametrize("values", [(3, 0.3), (4, 0.2)])
def test_the_other_rows_of_table_4_are_overrides(values):
    K, lam = values
    words = [f"--config.sa.K={K}", f"--config.sa.lam={lam}"]
    text = (ROOT / "configs/cifar10.py").read_text()
    assert " ".join(words) in text
    config = read("cifar10.py", *words)
    assert (config.sa.K, config.sa.lam) == (K, lam)


# -------------------------------------------------------------------------------------- networks


@pytest.mark.parametrize(("name", "method"), SETTINGS)
def test_networks_are_the_published_ones(name, method):
    """All arguments, and with them the number of parameters."""
    config, facts = load(name, method), FACTS[name]
    shape = (3, facts.size, facts.size)
    case = PUBLISHED[facts.published]
    for key, value in config.network.args.to_dict().items():
        expected = 32 if key == "num_groups" else case["kwargs"][key]
        assert (list(value) if isinstance(value, tuple) else value) == expected, key
    # The published ImageNet network has outputs for variances beside those for eps.
    trunk = case["kwargs"]["out_channels" if facts.network == IDDPM else "out_ch"]
    assert count(config, shape, trunk) == case["params"]
    if method in facts.heads:
        head = PUBLISHED[facts.heads[method]]
        assert config.head.mode == head["kwargs"]["mode"]
        assert count(config, shape, trunk, head=3) == head["params"]
    else:
        assert config.head.mode == "simple"


def test_every_published_network_is_some_configurations():
    trunks = {facts.published for facts in FACTS.values()}
    heads = {head for facts in FACTS.values() for head in facts.heads.values()}
    assert trunks | heads | {"cifar10_eps_eps2_joint"} == set(PUBLISHED)


# --------------------------------------------------------------------------------------- Fashion


@pytest.mark.parametrize("method", METHODS)
def test_fashion_is_an_experiment_of_some_size(method):
    config = load("fashion", method)
    assert count(config, (1, 32, 32), 1) >= 10_000_000
    assert count(config, (1, 32, 32), 1, head=1) >= 10_000_000
    assert config.data.name == "fashion"
    assert "inception" not in config.evaluate.features, "nothing may have to be downloaded"


def test_the_shortenings_of_fashion_are_accepted():
    paragraphs = (ROOT / "configs/fashion.py").read_text().split('"""')[1].split("\n\n")
    commands = [part.split() for part in paragraphs if part.strip().startswith("--")]
    assert len(commands) == 2
    for words in commands:
        words = [word.replace('"', "") for word in words]
        config = read("fashion.py", *words)
        assert config.base.iterations < load("fashion", "sn").base.iterations
        assert count(config, (1, 32, 32), 1) > 0


def test_a_run_from_before_a_key_existed_goes_on(tmp_path):
    config = base_config()
    config.name = "old"
    here = FrozenConfigDict(config)
    old = here.to_dict()
    del old["sample"]["precision"]
    (tmp_path / "config.json").write_text(json.dumps(old))
    with claimed(tmp_path, here):
        pass
    config.sample.precision = "bf16"
    with pytest.raises(ValueError, match=r"sample\.precision is 'float32' there, 'bf16' here"):
        claimed(tmp_path, FrozenConfigDict(config)).__enter__()
