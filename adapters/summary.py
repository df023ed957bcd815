"""Mean and standard deviation over seeds: python -m adapters.summary RUN_FOLDER [RUN_FOLDER ...]

Folders whose configurations differ only in the seed form one training. The tables show the
trainings side by side.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adapters.experiment import tables as report
from adapters.experiment.config import config_path
from adapters.experiment.stages import METRICS_FILE
from adapters.shell.command import OwnOptions, exit_code
from sa_files.stored import read_json

MODULE = "adapters.summary"


def group_runs(folders: Sequence[Path]) -> dict[str, list[Path]]:
    """Group folders by their configuration without its seed; folders' names give a group's name.

    Raises:
        ValueError: a folder has no finished run, or a group has two runs with the same seed.
    """
    groups: dict[str, dict[int, Path]] = {}
    for folder in folders:
        seed, config = read_json(
            config_path(folder), "is not a run's configuration", _seed_and_rest
        )
        group = groups.setdefault(json.dumps(config, sort_keys=True), {})
        if seed in group:
            raise ValueError(f"{folder} and {group[seed]} are runs with the same seed, {seed}")
        group[seed] = folder
    named: dict[str, list[Path]] = {}
    for group in groups.values():
        runs = list(group.values())
        named[str(runs[0]) if _name(runs) in named else _name(runs)] = runs
    return named


def _seed_and_rest(config: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    return int(config["seed"]), {key: value for key, value in config.items() if key != "seed"}


def summarise_runs(folders: Sequence[Path]) -> str:
    """Markdown: the number of seeds of each training, and a table for each metric."""
    groups = {
        name: [report.read_metrics(folder / METRICS_FILE) for folder in group]
        for name, group in group_runs(folders).items()
    }
    seeds = ", ".join(f"{name}: {len(runs)}" for name, runs in groups.items())
    return f"Seeds: {seeds}; mean ± standard deviation.\n\n{report.compare(groups)}"


def _name(folders: Sequence[Path]) -> str:
    names = [folder.resolve().name for folder in folders]
    first = names[0]
    return first.rsplit("_seed", 1)[0] if "_seed" in first else first


def main(argv: Sequence[str]) -> int:
    """Run the command; return the code of ``exit_code``."""
    return exit_code(MODULE, lambda: _tell(argv), continues="")


def _tell(argv: Sequence[str]) -> None:
    parser = OwnOptions(MODULE, description=__doc__)
    parser.add_argument("folders", metavar="RUN_FOLDER", nargs="+", type=Path, help="of a run")
    print(summarise_runs(parser.parse_args(argv).folders))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
