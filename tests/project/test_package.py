"""What a user of the library meets first: the wheel, imports, absent extras, types."""

import importlib
import re
import runpy
import shutil
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Iterable
from importlib import metadata

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import sa_plugin
from tests import ROOT


def test_importing_brings_nothing_heavy():
    """Import time, without a clock: no module beyond torch and NumPy's own is loaded."""
    program = textwrap.dedent("""
        import sys, torch, numpy
        before = set(sys.modules)
        import sa_plugin, sa_plugin.hooks.hook, sa_plugin.sampling.sampler, sa_plugin.metrics
        new = {name.split(".")[0] for name in set(sys.modules) - before}
        heavy = {"scipy", "torchvision", "sklearn", "matplotlib", "pandas", "absl", "PIL"}
        print(sorted(new & heavy), sorted(new & {"third_party", "adapters", "configs"}))
    """)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[] []"


violations = runpy.run_path(str(ROOT / ".ci" / "check_imports.py"))["violations"]


def test_imports_run_one_way():
    assert violations(ROOT) == []


def test_the_import_check_sees_what_it_should(tmp_path):
    (tmp_path / "sa_plugin").mkdir()
    (tmp_path / "sa_plugin" / "x.py").write_text("def f():\n    from adapters.config import run\n")
    (tmp_path / "third_party" / "host").mkdir(parents=True)
    (tmp_path / "third_party" / "host" / "y.py").write_text("import torch\nimport sa_plugin.x\n")
    (tmp_path / "adapters" / "shell").mkdir(parents=True)
    (tmp_path / "adapters" / "config.py").write_text("from .shell import a\n")
    (tmp_path / "adapters" / "shell" / "a.py").write_text(
        "from adapters.config import run\nfrom sa_plugin._b import c\n"
    )
    (tmp_path / "sa_plugin" / "_b.py").write_text("")
    *found, circle = violations(tmp_path)
    assert sorted(found) == [
        "adapters/shell/a.py:1: adapters.shell must not import adapters.config",
        "adapters/shell/a.py:2: sa_plugin._b is private to its package",
        "sa_plugin/x.py:2: sa_plugin must not import adapters.config",
        "third_party/host/y.py:2: third_party must not import sa_plugin.x",
    ]
    assert circle.startswith("a circle of imports: adapters.")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("sampler", "sampling.sampler"),
        ("gamma", "sampling.gamma"),
        ("reverse", "sampling.reverse"),
        ("trajectory", "sampling.trajectory"),
        ("variance", "sampling.variance"),
        ("hook", "hooks.hook"),
        ("hosts", "hooks.hosts"),
        ("wrappers", "hooks.wrappers"),
        ("gap", "bounds.gap"),
        ("likelihood", "bounds.likelihood"),
        ("pair_terms", "bounds.pair_terms"),
    ],
)
def test_module_paths_of_0_1_0_still_import(old, new):
    assert importlib.import_module(f"sa_plugin.{old}") is importlib.import_module(
        f"sa_plugin.{new}"
    )
    assert getattr(sa_plugin, old) is importlib.import_module(f"sa_plugin.{new}")


# Without the modules named in argv: each is absent to the import system. Then argv's program.
WITHOUT = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

blocked, program = set(sys.argv[1].split(",")), sys.argv[2]
sys.meta_path.insert(0, Absent())
exec(program)
"""


def run_without(blocked: set[str], program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WITHOUT, ",".join(blocked), textwrap.dedent(program)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def required(names: Iterable[str]) -> set[str]:
    """Distributions that pip installs for these."""
    found: set[str] = set()
    queue = [canonicalize_name(name) for name in names]
    while queue:
        name = queue.pop()
        if name in found:
            continue
        found.add(name)
        for text in metadata.distribution(name).requires or []:
            requirement = Requirement(text)
            wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            if wanted and _is_installed(requirement.name):
                queue.append(canonicalize_name(requirement.name))
    return found


def _is_installed(name: str) -> bool:
    try:
        return metadata.distribution(name) is not None
    except metadata.PackageNotFoundError:
        return False


def test_a_plain_installation_imports_all_but_the_integrations():
    """With the distributions of install_requires alone; each integration names its extra."""
    setup = (ROOT / "setup.py").read_text()
    declared = re.search(r"install_requires=\[(.+?)\]", setup)[1]
    there = required(Requirement(name).name for name in re.findall(r'"(.+?)"', declared))
    blocked = {
        module
        for module, distributions in metadata.packages_distributions().items()
        if not there & {canonicalize_name(name) for name in distributions}
    }
    blocked -= {"sa_plugin", "sa_files", *sys.stdlib_module_names}
    assert {"diffusers", "scipy", "tqdm"} <= blocked
    done = run_without(
        blocked,
        """
        import importlib, pkgutil, sa_plugin
        for module in pkgutil.walk_packages(sa_plugin.__path__, "sa_plugin."):
            try:
                importlib.import_module(module.name)
            except ModuleNotFoundError as error:
                print(module.name, "|", error)
        """,
    )
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        f"sa_plugin.integrations.{module} | {module} is not installed; get it by: "
        f"pip install 'sa-plugin[{extra}]'"
        for module, extra in (
            ("denoising_diffusion_pytorch", "denoising-diffusion-pytorch"),
            ("diffusers", "diffusers"),
        )
    ]


@pytest.mark.parametrize(
    ("module", "extra", "program"),
    [
        ("absl", "adapters", "import adapters.sn_dpm"),
        ("jax", "jax", "import examples.jax_sa2"),
        (
            "tqdm",
            "progress",
            """
            from sa_plugin import NoiseSchedule, Sampler
            sampler = Sampler(lambda x, n: x, NoiseSchedule.linear(100), steps=2)
            sampler.sample((1, 1, 2, 2), progress=True)
            """,
        ),
    ],
)
def test_an_absent_extra_is_named_in_one_line(module, extra, program):
    done = run_without({module}, program)
    assert done.returncode == 1
    said = done.stderr.splitlines()[-1].removeprefix("ModuleNotFoundError: ")
    assert said == f"{module} is not installed; get it by: pip install 'sa-plugin[{extra}]'"


def test_the_extras_that_are_named_exist():
    setup = (ROOT / "setup.py").read_text()
    declared = set(re.findall(r'^        "([\w-]+)": ', setup, re.M))
    folders = ("sa_plugin", "adapters", "examples", "docs")
    texts = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    named = {
        extra
        for path in texts
        if path.suffix in (".py", ".md")
        for extra in re.findall(r"sa-plugin\[([\w-]+)\]", path.read_text())
    }
    assert {"adapters", "docs", "jax", "tests"} <= declared
    assert named <= declared


@pytest.mark.slow
def test_the_wheel_holds_the_library_and_nothing_else(tmp_path):
    """Built of a copy, so that nothing is left in the checkout."""
    source = tmp_path / "source"
    shutil.copytree(ROOT / "sa_plugin", source / "sa_plugin", ignore=_caches)
    for name in ("tests", "adapters", "configs"):  # which must not get in
        (source / name).mkdir()
        (source / name / "__init__.py").touch()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*pip, "-w", tmp_path, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (licence,) = (name for name in archive.namelist() if name.endswith("/LICENSE"))
        (about,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        described = archive.read(about).decode()
    ours = {p for p in (ROOT / "sa_plugin").rglob("*") if p.suffix == ".py" or p.name == "py.typed"}
    assert names == {str(path.relative_to(ROOT)) for path in ours}
    assert "sa_plugin/py.typed" in names
    assert licence
    for line in ("Name: sa-plugin", "Requires-Dist: torch>=", "Provides-Extra: docs"):
        assert line in described


def _caches(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if name == "__pycache__"]
