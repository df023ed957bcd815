"""Imports run one way: a module uses only the layers listed for its own, and none form a circle.

A layer is a package, a room of it, or one module that stands for itself. Nothing outside a package
imports its underscore modules. Exits with 1, naming what breaks this.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

LIBRARY = (
    "sa_files",
    "sa_plugin",  # the modules that are in no room
    "sa_plugin.sampling",
    "sa_plugin.bounds",
    "sa_plugin.effect",
    "sa_plugin.hooks",
    "sa_plugin.metrics",
    "sa_plugin.formulas",
    "sa_plugin.diagnosis",
    "sa_plugin.integrations",
)
# Each room of the laboratory uses the library, the hosts, and the rooms before it.
ROOMS = (
    "adapters.hosts",
    "adapters.shell",
    "adapters.checkpoints",
    "adapters.measuring",
    "adapters.pictures",
    "adapters.sampling",
    "adapters.experiment",
    "adapters.comparison",
)
BELOW = (*LIBRARY, "sa_plugin.__init__", "third_party", "configs")
EVERYTHING = (*BELOW, *ROOMS, "adapters")
ALLOWED: dict[str, tuple[str, ...]] = {
    "sa_files": (),
    "sa_plugin": ("sa_files",),
    "sa_plugin.sampling": ("sa_files", "sa_plugin"),
    "sa_plugin.bounds": ("sa_files", "sa_plugin", "sa_plugin.sampling"),
    "sa_plugin.effect": ("sa_files", "sa_plugin", "sa_plugin.sampling"),
    "sa_plugin.hooks": ("sa_files", "sa_plugin"),
    "sa_plugin.metrics": ("sa_files",),
    "sa_plugin.formulas": ("sa_plugin", "sa_plugin.sampling"),
    "sa_plugin.diagnosis": (
        "sa_files",
        "sa_plugin",
        "sa_plugin.sampling",
        "sa_plugin.bounds",
        "sa_plugin.effect",
    ),
    "sa_plugin.integrations": LIBRARY,
    "sa_plugin.__init__": LIBRARY,
    "third_party": ("sa_files",),
    "configs": (),
    **{room: (*BELOW, *ROOMS[:i]) for i, room in enumerate(ROOMS)},
    "adapters": EVERYTHING,
    "benchmarks": (*EVERYTHING, "tests"),
    "examples": EVERYTHING,
}
PACKAGES = {name.split(".")[0] for name in ALLOWED} | {"tests"}


def layer_of(module: str) -> str:
    """The longest entry of the table that the module is in."""
    names = module.split(".")
    prefixes = (".".join(names[:i]) for i in range(len(names), 0, -1))
    return next((prefix for prefix in prefixes if prefix in ALLOWED), names[0])


def modules_of(root: Path) -> dict[str, Path]:
    """The modules of all packages by dotted name; a package's own is ``PACKAGE.__init__``."""
    paths = (path for name in sorted(PACKAGES) for path in sorted((root / name).rglob("*.py")))
    return {".".join(path.relative_to(root).with_suffix("").parts): path for path in paths}


def imported(module: str, path: Path, modules: dict[str, Path]) -> Iterator[tuple[int, str]]:
    """(line, module) of every import of ours, also those inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".")[: -node.level] if node.level else []
            start = ".".join([*package, *([node.module] if node.module else [])])
            names = [f"{start}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] in PACKAGES:
                yield node.lineno, _module_named(name, modules)


def _module_named(name: str, modules: dict[str, Path]) -> str:
    """The module that an import of ``name``, perhaps a name inside a module, loads."""
    for candidate in (name, f"{name}.__init__", name.rpartition(".")[0]):
        if candidate in modules:
            return candidate
    package = name.rpartition(".")[0] or name
    return f"{package}.__init__" if f"{package}.__init__" in modules else package


def violations(root: Path) -> list[str]:
    """Every import against the table, as ``file:line: text``, and a circle if there is one."""
    modules, found, graph = modules_of(root), [], {}
    for module, path in modules.items():
        if module.startswith("tests."):
            continue
        layer, needs = layer_of(module), list(imported(module, path, modules))
        graph[module] = {name for _, name in needs}
        for line, name in needs:
            here, private = f"{path.relative_to(root)}:{line}", "._" in name.replace(".__", "")
            if private and name.split(".")[0] != module.split(".")[0]:
                found.append(f"{here}: {name} is private to its package")
            elif layer_of(name) not in (layer, *ALLOWED[layer]):
                found.append(f"{here}: {layer} must not import {name}")
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found.append(f"a circle of imports: {' -> '.join(error.args[1])}")
    return found


if __name__ == "__main__":
    found = violations(ROOT)
    print("\n".join(found) or "imports run one way")
    sys.exit(bool(found))
