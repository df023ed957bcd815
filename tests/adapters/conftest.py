"""Trained runs that several files of tests start from."""

import pytest


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """Runs before their stage ``sample``, by method; tests that change one copy it first."""
    from tests.adapters.test_adapters import call

    workdirs = {method: tmp_path_factory.mktemp(method) / "run" for method in ("analytic", "sn")}
    for method, workdir in workdirs.items():
        second = "gamma" if method == "analytic" else "head"
        assert call(method, workdir, f"--stage=base,{second}") == 0
    return workdirs
