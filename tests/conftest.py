"""What holds for all tests: threads, and which devices they see."""

import logging
import os

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores; told before torch is there
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure(config):
    """Hide GPUs, here and from child processes, so that a run is the same wherever it is made."""
    if config.getoption("markexpr") != "cuda":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(autouse=True)
def _no_log_after_the_test():
    """Commands log to a test's standard error, which is closed afterwards."""
    yield
    for handler in logging.root.handlers[:]:
        if type(handler) is logging.StreamHandler:
            logging.root.removeHandler(handler)
