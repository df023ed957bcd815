"""What setup.py asks for, read from it: the only place where versions stand.

python .ci/requirements.py lowest [EXTRA ...]     the lowest versions allowed, for pip
"""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Iterable
from pathlib import Path
from unittest import mock

SETUP = Path(__file__).resolve().parent.parent / "setup.py"
LOWER = re.compile(r"([A-Za-z0-9._-]+)>=([0-9][0-9.]*)(,.*)?")


def requirements() -> dict[str, list[str]]:
    """Extra -> its requirements; "" -> those of the library itself."""
    with mock.patch("setuptools.setup") as setup:
        runpy.run_path(str(SETUP))
    given = setup.call_args.kwargs
    return {"": given["install_requires"], **given["extras_require"]}


def lowest(extras: Iterable[str]) -> list[str]:
    """NAME==VERSION of the library's requirements and of these extras', the lowest allowed."""
    found, known = {}, requirements()
    for extra in ("", *extras):
        for requirement in known[extra]:
            match = LOWER.fullmatch(requirement)
            if match is None:
                raise ValueError(f"{requirement!r} in {extra!r} has no lower bound")
            found[match[1]] = f"{match[1]}=={match[2]}"
    return list(found.values())


if __name__ == "__main__":
    if sys.argv[1:2] != ["lowest"]:
        sys.exit(__doc__)
    print("\n".join(lowest(sys.argv[2:])))
