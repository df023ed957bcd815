"""Convert published checkpoints to our layout and back: python -m adapters.convert IN OUT

docs/checkpoints.md describes the layouts. IN is read as data: no code in it is ever run.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial

from adapters.checkpoints.architecture import network_of_config
from adapters.checkpoints.fitting import convert
from adapters.checkpoints.layouts import WHICH, WRITERS
from adapters.shell.command import OwnOptions, exit_code


def _parser() -> OwnOptions:
    parser = OwnOptions("adapters.convert", description=__doc__)
    add = parser.add_argument
    add("source", metavar="IN", help="a checkpoint file, or a checkpoint folder of the host")
    add("target", metavar="OUT", help="a new file; with --to host a new folder IT.ckpt")
    add("--to", choices=tuple(WRITERS), default="plain", help="the layout of OUT; default: plain")
    add("--which", choices=WHICH, help="if IN has both; default: ema, or with --to host both")
    add("--config", metavar="FILE", help="IN must fit the network of this configuration")
    add("--outputs", metavar="N", type=int, help="keep the first N channels of the output")
    add("--force", action="store_true", help="replace OUT")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0: done, 2: bad input, reported in one line, 130: interrupted."""
    return exit_code("adapters.convert", lambda: _run(argv), continues="")


def _run(argv: Sequence[str] | None) -> None:
    asked = vars(_parser().parse_args(argv))
    config = asked.pop("config")
    expected = None if config is None else partial(network_of_config, config)
    print(convert(**asked, expected=expected))


if __name__ == "__main__":
    sys.exit(main())
