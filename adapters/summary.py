"""Mean and standard deviation over seeds: python -m adapters.summary RUN_FOLDER [RUN_FOLDER ...]

Folders whose configurations differ by the seed alone form one group; each group gets its tables.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from adapters import report
from adapters.config import CONFIG_FILE
from adapters.stages import METRICS_FILE


def group_runs(folders: Sequence[Path]) -> dict[str, list[Path]]:
    """Folders by configuration without its seed; a group is named after its folders.

    Raises:
        ValueError: a folder without a finished run, or two runs of one seed in a group.
    """
    groups: dict[str, dict[int, Path]] = {}
    for folder in folders:
        try:
            config = json.loads((folder / CONFIG_FILE).read_text())
            seed = config.pop("seed")
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{folder} holds no run: {error}") from error
        group = groups.setdefault(json.dumps(config, sort_keys=True), {})
        if seed in group:
            raise ValueError(f"{folder} and {group[seed]} are runs of one seed, {seed}")
        group[seed] = folder
    return {_name(list(group.values())): list(group.values()) for group in groups.values()}


def summarise_runs(folders: Sequence[Path]) -> str:
    """Markdown with the tables of every group."""
    text = []
    for name, group in group_runs(folders).items():
        runs = [report.read_metrics(folder / METRICS_FILE) for folder in group]
        seeds = "1 seed" if len(runs) == 1 else f"{len(runs)} seeds, mean ± standard deviation"
        text.append(f"### {name} ({seeds})\n\n{report.over_seeds(runs)}")
    return "\n".join(text)


def _name(folders: Sequence[Path]) -> str:
    names = [folder.resolve().name for folder in folders]
    first = names[0]
    return first.rsplit("_seed", 1)[0] if "_seed" in first else first


def main(argv: Sequence[str]) -> int:
    """The command; 0, or 2 with one line for bad input."""
    if not argv:
        print(__doc__.splitlines()[0], file=sys.stderr)
        return 2
    try:
        print(summarise_runs([Path(name) for name in argv]))
    except ValueError as error:
        print(f"adapters.summary: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
