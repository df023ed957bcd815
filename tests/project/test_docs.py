"""Every Python block of README and docs runs; the commands beside them name what exists."""

import re
from collections.abc import Callable, Iterable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.code_blocks import ROOT, Block, all_blocks, blocks, pages, run
from tests.published import random_state, save_host, save_sa_dpm_training, tiny
from tests.stand_ins import OriginalContinuous
from tests.toys import images
from third_party.analytic_dpm.criterions import DDPMDSM
from third_party.common.schedule import NamedSchedule
from third_party.common.wrapper import DTWrapper
from third_party.extended_analytic_dpm.criterions import DTDSM

RECIPES = ROOT / "docs" / "recipes"  # run in stand-ins of their hosts: test_recipes.py
LANGUAGES = {"", "python", "sh", "text"}

Variables = Iterable[dict[str, Any]]


def _network_and_images(folder: Path) -> Variables:
    return [{"model": lambda x, n: 0.9 * x, "x0": images(0, 4, 1, 8, 8).float()}]


def _checkpoints(folder: Path) -> Variables:
    network = tiny()
    states = random_state(network, 1), random_state(network, 2)
    save_sa_dpm_training(folder, *states)
    save_host(folder, *states).rename(folder / "500000.ckpt")
    return [{"network": network}]


class TimeBlind(torch.nn.Conv2d):
    """A network as the hosts call it."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(x)


def _criteria(folder: Path) -> Variables:
    """One criterion a block; after each its objective runs with the SA term."""
    schedule, network = NamedSchedule("linear", 100), TimeBlind(1, 1, 1)
    states = ({"model": network}, {}, {})
    wrapper = DTWrapper(network, "eps", N=100)
    betas = schedule.betas
    for criterion in (
        DTDSM(schedule, wrapper, *states),
        DDPMDSM(betas, True, *states),
        DDPMDSM(betas, False, *states, shift1=True),
        OriginalContinuous(network),
    ):
        yield {"criterion": criterion}
        assert criterion.objective(images(0, 8, 1, 8, 8).float()).shape == (8,)
        assert criterion.statistics["sa_loss"] > 0


def _trainable(folder: Path) -> Variables:
    return [{"network": TimeBlind(1, 1, 1)}]


# What a page's blocks take for granted: one set of variables before each of the first blocks.
GIVEN: dict[str, Callable[[Path], Variables]] = {
    "README.md": _network_and_images,
    "docs/checkpoints.md": _checkpoints,
    "docs/choosing.md": _trainable,
    "docs/hooking.md": _criteria,
    "docs/indexing.md": _trainable,
    "docs/sampling.md": _network_and_images,
}
# Sizes of long blocks, for the quick run; the slow test runs them as they stand.
QUICK: dict[str, list[dict[str, str]]] = {
    "docs/start.md": [
        {"num_train_timesteps=1000": "num_train_timesteps=20", "(16, 32)": "(8, 16)"},
        {"range(1500)": "range(2)", "randint(1000": "randint(20"},
        {"images[:32]": "images[:2]", "num_inference_steps=25": "num_inference_steps=3"},
    ],
    "docs/likelihood.md": [{"(100, 3, 8, 8)": "(4, 3, 8, 8)"}],
}


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT)) if page.is_relative_to(ROOT) else str(page)


def run_page(page: Path, folder: Path, changes: list[dict[str, str]]) -> dict[str, Any]:
    """Run its blocks in one namespace; a block of plain text after one is what that prints."""
    namespace: dict[str, Any] = {}
    given = iter(GIVEN.get(name_of(page), lambda folder: [])(folder))
    changes, previous, printed = list(changes), None, ""
    for block in all_blocks(page):
        if block.language == "python":
            namespace.update(next(given, {}))
            changed = changes.pop(0) if changes else {}
            printed = run(block, namespace, changed)
            previous = None if changed else block
        elif block.language == "text" and previous:
            assert printed == block.code, f"{page}:{block.line}"
            previous = None
    assert next(given, None) is None, "variables for more blocks than there are"
    return namespace


PAGES = [page for page in pages() if page.parent != RECIPES and blocks(page)]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_blocks_of_a_page_run_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    run_page(page, tmp_path, QUICK.get(name_of(page), []))


@pytest.mark.slow
def test_the_start_page_trains(tmp_path, monkeypatch):
    """As it stands: the loss falls, and what the page says of its two terms is so."""
    monkeypatch.chdir(tmp_path)
    namespace = run_page(ROOT / "docs" / "start.md", tmp_path, [])
    simple, sa = torch.tensor(namespace["losses"])[-200:].mean(0).tolist()
    assert simple < 0.25 * namespace["losses"][0][0]
    assert 0.57 * simple < sa < 0.76 * simple
    assert len(namespace["pictures"]) == 16


def test_every_python_block_is_found():
    """A fence that the collector does not see would not be run."""
    for page in pages():
        fences = re.findall(r"^\s*(?:```|~~~)(\S*)", page.read_text(), re.M)
        opened = [fence for fence in fences[::2] if not fence.startswith("{")]
        assert set(opened) <= LANGUAGES, page
        assert len(fences) % 2 == 0, page
        assert len([fence for fence in opened if fence == "python"]) == len(blocks(page)), page


# A pattern's placeholder, and tools that need not be installed where the tests run.
NOT_OURS = {"adapters.NAME", "pytest", "sphinx", "venv"}


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_commands_name_modules_and_configurations_that_exist(page):
    text = page.read_text()
    modules = set(re.findall(r"python -m ([\w.]+)", text)) - NOT_OURS
    assert {name for name in modules if find_spec(name) is None} == set()
    configs = set(re.findall(r"\bconfigs/\w+\.py", text))
    assert {name for name in configs if not (ROOT / name).exists()} == set()
    scripts = set(re.findall(r"\bexamples/\w+\.py", text))
    assert {name for name in scripts if not (ROOT / name).exists()} == set()


@pytest.mark.parametrize(
    "page", ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "third_party/README.md"]
)
def test_links_outside_the_site_resolve(page):
    """Sphinx checks those of docs."""
    links = set(re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / page).read_text()))
    assert {link for link in links if not (ROOT / page).parent.joinpath(link).exists()} == set()


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_names_of_the_library_exist(page):
    for name in set(re.findall(r"`(sa_plugin(?:\.\w+)+)`", page.read_text())):
        resolve(name)


def resolve(name: str) -> Any:
    """The module or what is in one; ImportError or AttributeError if there is no such thing."""
    try:
        return import_module(name)
    except ModuleNotFoundError:
        before, _, last = name.rpartition(".")
        return getattr(resolve(before), last)


def test_every_public_module_is_in_the_reference():
    text = "".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    told = set(re.findall(r"automodule:: (\S+)", text))
    files = (ROOT / "sa_plugin").rglob("[!_]*.py")
    modules = {".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files}
    assert {name for name in modules if "._" not in name} == told


def test_the_runner_sees_a_wrong_output_and_a_missing_size(tmp_path):
    block = Block(tmp_path / "page.md", 3, "python", "n = 1000\nprint(n)\n")
    assert run(block, {}) == "1000\n"
    assert run(block, {}, {"1000": "2"}) == "2\n"
    with pytest.raises(ValueError, match="has no '500' to replace"):
        run(block, {}, {"500": "2"})
    page = tmp_path / "page.md"
    page.write_text("```python\nprint(1)\n```\n\n```text\n2\n```\n")
    with pytest.raises(AssertionError, match=r"page\.md:6"):
        run_page(page, tmp_path, [])
