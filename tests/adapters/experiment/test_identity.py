"""Names of stored results stay as they are, and tell what decides the numbers."""

import pytest
from ml_collections import FrozenConfigDict

from adapters.comparison.grid import Cell, Grid, Line
from adapters.experiment.config import COMPARISON, read_command_line
from adapters.experiment.identity import (
    cell_name,
    digest,
    goes_on_from,
    identity_of,
    second_name,
    training_name,
)
from configs.base import base_config

# As 0.1.0 and the stores of the documented results have them.
NAMES = {
    ("digits_tables", "b"): ("baseline_seed0_7740be6de6", "sn_3f68e570ab", "analytic_3eb17ca5ae",
                             "sn_ddpm_10_c9fb9fed63"),
    ("digits_tables", "sa"): ("sa2_lam1_seed0_00f9ed8af1", "sn_3f68e570ab", "analytic_3eb17ca5ae",
                              "sn_ddpm_10_c9fb9fed63"),
    ("table1_cifar10", "b"): ("baseline_seed0_a8e833b7f6", "sn_874477ba25", "analytic_0ece633b63",
                              "sn_ddpm_10_ae327402f0"),
    ("table1_cifar10", "sa_one"): ("sa2_lam1_one_seed0_a5a492f189", "sn_874477ba25",
                                   "analytic_0ece633b63", "sn_ddpm_10_ae327402f0"),
}  # fmt: skip


@pytest.mark.parametrize(("file", "training"), NAMES)
def test_stored_results_keep_their_names(file, training):
    """A new key must be in LATER."""
    words = ["x", f"--config=configs/{file}.py", "--device=cpu"]
    grid, line = Grid(read_command_line(words, (), "x", COMPARISON).config), Line(training)
    config = grid.experiment(line, 0, "sn_ddpm")
    seconds = [second_name(config, needs) for needs in ("eps2", "gamma")]
    cell = cell_name(config, Cell(line, 0, "sn_ddpm", 10), 1.0)
    assert (training_name(config), *seconds, cell) == NAMES[file, training]


def a_config(**changes):
    config = base_config()
    config.name, config.sample.processes = "x", ("ddim", "sn_ddim")
    for key, value in changes.items():
        section, name = key.split("__")
        config[section][name] = value
    return FrozenConfigDict(config)


@pytest.mark.parametrize(
    ("key", "value", "differing"),
    [
        ("base__keep", 3, ""),
        ("data__root", "elsewhere", ""),
        ("gamma__batch_size", 7, ""),
        ("base__lr", 0.5, "base second plain optimal"),
        ("head__lr", 0.5, "second optimal"),
        ("gamma__seed", 5, "second optimal"),
        ("sample__seed", 5, "plain optimal"),
        ("evaluate__splits", 5, "metrics"),
        ("sample__steps", (5,), "overview"),
    ],
)
def test_a_key_decides_what_rests_on_it(key, value, differing):
    def parts(identity):
        images = {"plain": identity.images["ddim"], "optimal": identity.images["sn_ddim"]}
        trainings = {"base": digest(identity.base), "second": digest(identity.second)}
        return {**vars(identity), **trainings, **images}

    before, after = (
        parts(identity_of(config)) for config in (a_config(), a_config(**{key: value}))
    )
    names = ("base", "second", "plain", "optimal", "metrics", "overview")
    found = {name for name in names if before[name] != after[name]}
    assert found == set(differing.split())


def test_a_training_goes_on_unless_its_rate_had_fallen():
    short, long = a_config(base__iterations=5), a_config(base__iterations=9)
    assert goes_on_from(long, short)
    assert not goes_on_from(short, long)
    assert not goes_on_from(long, long)
    falling = [a_config(base__iterations=i, base__lr_decay=2) for i in (5, 9)]
    assert not goes_on_from(falling[1], falling[0])
    assert not goes_on_from(long, a_config(base__iterations=5, base__lr=0.5))
