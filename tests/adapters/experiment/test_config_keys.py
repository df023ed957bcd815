"""Every key is refused by its name where its value is wrong, before anything is written."""

import math

import pytest
from ml_collections import FrozenConfigDict

from adapters import compare
from adapters.experiment.config import COMPARISON, EXPERIMENT, check_keys, read_command_line
from adapters.experiment.run import run
from adapters.hosts import SN_DPM
from adapters.shell.options import keys_text
from configs import base
from configs import comparison as grids
from tests import ROOT
from tests.commands import one_line, words

GRID_KEYS = {name: keys for name, keys in grids.KEYS.items() if name != "experiment"}
OWN = {name: key for name, key in COMPARISON.flat.items() if name.split(".")[0] in GRID_KEYS}
TEXTS = {int: "many", float: "many", bool: "maybe"}  # of no number and no truth


def wrong_items(key):
    """Values that the description excludes, and their neighbours that it allows, as (bad, good)."""
    unit = key.item_type(1) if key.item_type in (int, float) else None
    for limit, direction in ((key.at_least, -1), (key.at_most, 1)):
        if limit is not None:
            yield key.item_type(limit) + direction * unit, key.item_type(limit)
    for limit, direction in ((key.above, -1), (key.below, 1)):
        if limit is not None:
            inside = math.nextafter(limit, limit - direction)
            yield key.item_type(limit), key.item_type(inside)
    if key.item_type is float:
        for value in (math.nan, math.inf, -math.inf):
            yield value, None
    if key.choices:
        yield "no_such_name", key.choices[0]


def wrong_values(key):
    pairs = list(wrong_items(key))
    if key.type is tuple:
        pairs = [((bad,), None if good is None else (good,)) for bad, good in pairs]
    if key.filled:
        yield key.type()
    if key.distinct:
        item = (*key.choices, *key.default, "main")[0]
        yield (item, item)
    yield from (bad for bad, _ in pairs)
    yield from (TEXTS[key.type],) if key.type in TEXTS else ()


def right_values(key):
    for _, good in wrong_items(key):
        if good is not None:
            yield (good,) if key.type is tuple else good


def described(keys):
    return [pytest.param(name, key, id=name) for name, key in keys.items() if not key.free]


@pytest.mark.parametrize(("name", "key"), described(EXPERIMENT.flat))
def test_every_wrong_value_is_refused_by_name(name, key, tmp_path, capsys):
    start = ["sn_dpm", *words("digits_sn_sa.py"), f"--workdir={tmp_path / 'run'}"]
    for value in wrong_values(key):
        assert run(SN_DPM, [*start, f"--config.{name}={value}"]) == 2, value
        one_line(capsys, name)
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "key"), described(OWN))
def test_every_wrong_value_of_a_comparison_is_refused_by_name(name, key, tmp_path, capsys):
    start = ["compare", *words("digits_tables.py"), f"--workdir={tmp_path / 'store'}"]
    for value in wrong_values(key):
        assert compare.main([*start, f"--config.{name}={value}"]) == 2, value
        one_line(capsys, name)
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "key"), described(EXPERIMENT.flat))
def test_what_lies_just_inside_is_allowed_and_another_type_is_not(name, key):
    for value in right_values(key):
        key.check(name, value)
    with pytest.raises(ValueError, match=f"'{name}' must be a {key.type.__name__}, got "):
        key.check(name, object())


def test_a_key_that_is_missing_or_unknown_is_named():
    config = read_command_line(["x", *words("digits.py")], (), "x").config.to_dict()
    del config["sa"]["K"]
    with pytest.raises(ValueError, match=r"key 'sa\.K' is missing"):
        check_keys(FrozenConfigDict(config))
    config["sa"] |= {"K": 2, "lamda": 1.0}
    with pytest.raises(ValueError, match=r"unknown configuration key 'sa\.lamda'.*'sa\.lam'"):
        check_keys(FrozenConfigDict(config))


TOGETHER = [
    ({"base": {"lr_decay": 7}}, "base.lr_decay must be <= base.iterations = 6, got 7"),
    ({"head": {"lr_decay": 7}}, "head.lr_decay must be <= head.iterations = 6, got 7"),
    ({"base": {"iterations": 0}}, "base.iterations must be >= 1, or 0 to use base.init_from"),
    ({"base": {"accumulate": 3}}, "accumulate=3"),
    ({"sample": {"n_images": 9}}, "evaluate.splits must be <= sample.n_images = 9, got 10"),
    ({"sample": {"n_images": 1}}, "sample.n_images must be >= 2, got 1"),
    ({"sample": {"steps": (1001,)}}, "steps"),
    ({"sample": {"clip_sigma_idx": 6}}, "clip_sigma_idx"),
    ({"sa": {"K": 1001}}, "K must be a whole number in 1..1000, got 1001"),
    ({"schedule": {"N": 20}}, "N=20"),
    ({"network": {"args": {"channel_mult": (1, 1, 1, 1, 1)}}}, "must fit images of (C, H, W) = "),
    ({"sample": {"processes": ("npr_ddpm",)}}, "sample.processes: 'npr_ddpm' needs 'epsc'"),
    ({"base": {"label_drop": 0.1}}, "base.label_drop needs data.labels = True, got False"),
    (
        {"base": {"input_perturbation": 0.1}, "head": {"training": "joint"}},
        "base.input_perturbation must be 0 with head.training = 'joint', whose second output is of "
        "x_n itself, got 0.1",
    ),
    ({"sample": {"classes": "even"}}, "sample.classes needs data.labels = True, got False"),
    (
        {"data": {"labels": True}, "sample": {"guidance": 1.0}},
        "sample.guidance needs base.label_drop > 0",
    ),
    (
        {"data": {"labels": True}, "sample": {"classes": "cat"}},
        "sample.classes must be data, even or a class's name, got 'cat'; the classes are 10: 0 (1",
    ),
    ({"data": {"crop": True}}, "data.crop takes data.name = 'folder' with data.size > 0"),
]


@pytest.mark.parametrize(("sections", "said"), TOGETHER, ids=[said for _, said in TOGETHER])
def test_keys_that_exclude_each_other_are_told_in_the_plan(sections, said, tmp_path, capsys):
    short = words("digits_sn_sa.py", base={"iterations": 6}, head={"iterations": 6})
    more = words("digits_sn_sa.py", sample={"steps": (3,)}) + words("digits_sn_sa.py", **sections)
    line = ["sn_dpm", *short, *more, f"--workdir={tmp_path / 'run'}", "--dry_run"]
    assert run(SN_DPM, line) == 2
    one_line(capsys, said)
    assert list(tmp_path.iterdir()) == []


def test_the_plan_warns_of_a_long_average_and_of_few_images(tmp_path, capsys):
    sections = {"base": {"iterations": 6, "ema": 0.9999}, "sample": {"n_images": 64}}
    sections["evaluate"] = {"features": ("pixels", "thumbnails")}
    line = ["sn_dpm", *words("digits.py", **sections), "--dry_run"]
    assert run(SN_DPM, [*line, f"--workdir={tmp_path / 'run'}"]) == 0
    said = [x.strip() for x in capsys.readouterr().out.splitlines() if "warning" in x]
    assert said == [
        "warning: base.ema = 0.9999 leaves 100% of the initial weights in the average after 6 "
        "iterations: lower it, or train longer",
        "warning: evaluate.features = pixels: images of 64 values need more than sample.n_images "
        "= 64; the distance of fewer is biased upwards",
        "warning: evaluate.features = thumbnails: images of 64 values need more than "
        "sample.n_images = 64; the distance of fewer is biased upwards",
    ]
    assert list(tmp_path.iterdir()) == []


def test_the_plan_refuses_a_root_that_is_not_there(tmp_path, capsys):
    line = ["sn_dpm", *words("cifar10.py", data={"root": tmp_path / "none"}), "--dry_run"]
    assert run(SN_DPM, [*line, f"--workdir={tmp_path / 'run'}"]) == 2
    one_line(capsys, "data.root must hold the images of cifar10, got", tmp_path / "none")
    assert list(tmp_path.iterdir()) == []


def test_the_page_of_the_keys_is_what_help_keys_shows():
    page = (ROOT / "docs/keys.md").read_text()
    found = [block.strip("\n") for block in page.split("```")[1::2]]
    assert found == [f"text\n{keys_text(keys)}" for keys in (base.KEYS, GRID_KEYS)]
