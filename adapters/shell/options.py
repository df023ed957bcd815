"""The options of commands that take a configuration, and their help. Loads no PyTorch."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from adapters.shell.command import OwnOptions
from configs.base import KEYS
from configs.keys import Keys, flat

EVERYWHERE = """\
as python -m adapters.sn_dpm --help explains:
  --config FILE.py, --workdir FOLDER, --dry_run, --device NAME, --noprogress
"""


def own_options(
    module: str,
    description: str,
    keys: Keys = KEYS,
    example: str = "--config configs/digits.py --dry_run",
) -> OwnOptions:
    """A parser of one command's own options; its help names those of all such commands too.

    ``parse_known_args(argv[1:])`` returns their values, and the rest for ``read_command_line``.
    """
    return _options(module, description, keys, example, EVERYWHERE)


def stage_options(module: str, keys: Keys = KEYS) -> OwnOptions:
    """Those of a command without options of its own."""
    description = "Run the stages of an experiment; a stage whose result exists is done."
    shared = shared_options(module).format_help().replace("options:", "with every configuration:")
    return _options(module, description, keys, "--config configs/digits.py --dry_run", shared)


def _options(module: str, description: str, keys: Keys, example: str, shared: str) -> OwnOptions:
    parser = OwnOptions(
        module,
        usage=f"python -m {module} --config FILE.py [--config.KEY=VALUE ...] [OPTIONS]",
        description=description,
        epilog=f"{shared}\nexample:\n  python -m {module} {example}",
    )
    parser.add_argument("--help_keys", action=_HelpKeys, keys=keys)
    return parser


def shared_options(module: str) -> OwnOptions:
    """Those of every command that takes a configuration; they have no help of their own."""
    parser = OwnOptions(module, add_help=False, usage=argparse.SUPPRESS)
    add = parser.add_argument
    add("--config", metavar="FILE.py", help="such as configs/digits.py, or configs/digits.py:npr")
    add("--workdir", metavar="FOLDER", help="output folder; default: named by the configuration")
    add("--stage", metavar="NAME,...", help="stages to run, of those that --dry_run lists")
    add("--dry_run", action="store_true", help="print the plan, write nothing")
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1, ...; default: cuda if available")
    add("--progress", action="store_true", default=True, help=argparse.SUPPRESS)
    add("--noprogress", action="store_false", dest="progress", help="show no progress")
    return parser


class _HelpKeys(argparse.Action):
    """Print all keys, and end."""

    def __init__(self, option_strings: Sequence[str], dest: str, keys: Keys) -> None:
        self.keys = keys
        super().__init__(option_strings, dest, nargs=0, help="show all keys and what they may be")

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(keys_text(self.keys))
        parser.exit()


def keys_text(keys: Keys) -> str:
    """Two lines for each key: its name, default, type and what it may be; and its meaning."""
    lines = []
    for name, key in flat(keys).items():
        facts = ", ".join(filter(None, [key.type_name, key.allowed()]))
        lines += [f"{name} = {key.default!r}: {facts}", f"    {key.meaning}"]
    return "\n".join(lines)


def whole_numbers(text: str) -> tuple[int, ...]:
    """The type of an option that is a list such as "5,10,25"."""
    try:
        values = tuple(map(int, text.split(",")))
    except ValueError:
        values = ()
    if min(values, default=0) < 1:
        raise argparse.ArgumentTypeError(f"must be whole numbers >= 1, got {text}")
    return values
