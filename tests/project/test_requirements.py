"""What setup.py asks for: every requirement has a lower bound, and what is installed is within."""

import runpy
from importlib import metadata

import pytest
from packaging.version import Version

from tests import ROOT

MODULE = runpy.run_path(str(ROOT / ".ci" / "requirements.py"))
FOUND = MODULE["requirements"]()


@pytest.mark.parametrize("extra", FOUND)
def test_every_requirement_has_a_lower_bound_that_is_met(extra):
    for requirement in MODULE["lowest"]([extra]):
        name, _, least = requirement.partition("==")
        try:
            installed = metadata.version(name)
        except metadata.PackageNotFoundError:
            assert extra == "docs", f"{name} of {extra!r} is not installed"  # an extra of its own
            continue
        assert Version(installed) >= Version(least), name


def test_a_requirement_without_a_bound_is_told(monkeypatch):
    lowest = MODULE["lowest"]
    monkeypatch.setitem(lowest.__globals__, "requirements", lambda: {"": ["torch"], "x": []})
    with pytest.raises(ValueError, match="'torch' in '' has no lower bound"):
        lowest(["x"])


def test_pytorch_is_one_whose_weights_only_holds():
    """Before 2.6 it could be led to run code (CVE-2025-32434)."""
    found = dict(requirement.split("==") for requirement in MODULE["lowest"]([]))
    assert Version(found["torch"]) >= Version("2.6")
