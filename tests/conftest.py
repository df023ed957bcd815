"""Workers of pytest-xdist share the cores: one thread each, told before torch is there."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
