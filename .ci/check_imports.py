"""Imports run one way: adapters -> sa_plugin, adapters -> third_party, all -> sa_files.

Exits with 1, naming the others.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FORBIDDEN = {
    "sa_files": {"sa_plugin", "third_party", "adapters", "configs", "benchmarks", "tests"},
    "sa_plugin": {"third_party", "adapters", "configs", "benchmarks", "tests"},
    "third_party": {"sa_plugin", "adapters", "configs", "benchmarks", "tests"},
    "configs": {"sa_plugin", "third_party", "adapters", "benchmarks", "tests"},
    "adapters": {"benchmarks", "tests"},
}


def imported(tree: ast.AST) -> list[tuple[int, str]]:
    """(line, top package) of every absolute import, also those inside functions."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name.split(".")[0]) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.append((node.lineno, node.module.split(".")[0]))
    return found


def violations(root: Path) -> list[str]:
    """Every import against the direction, as ``file:line: text``."""
    return [
        f"{path.relative_to(root)}:{line}: {package} must not import {name}"
        for package, forbidden in FORBIDDEN.items()
        for path in sorted((root / package).rglob("*.py"))
        for line, name in imported(ast.parse(path.read_text()))
        if name in forbidden
    ]


if __name__ == "__main__":
    found = violations(ROOT)
    print("\n".join(found) or "imports run one way")
    sys.exit(bool(found))
