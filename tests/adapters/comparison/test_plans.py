"""Dry runs: a plan of any configuration takes little memory, whatever its network and images."""

import os
import subprocess
import sys

import pytest
from PIL import Image

from tests import ROOT

CONFIGS = ROOT / "configs"
GRIDS = [*CONFIGS.glob("*_tables.py"), *CONFIGS.glob("table*.py"), CONFIGS / "figure4_gap.py"]
EXPERIMENTS = [p for p in CONFIGS.glob("*.py") if "def get_config(method" in p.read_text()]
PLANS = [("compare", path.stem) for path in sorted(GRIDS)]
PLANS += [("sn_dpm", path.stem) for path in sorted(EXPERIMENTS)]


@pytest.mark.slow
@pytest.mark.parametrize(("command", "name"), PLANS)
def test_a_dry_run_stays_below_3_gb(command, name, tmp_path):
    arguments = [f"--config=configs/{name}.py", f"--workdir={tmp_path / 'run'}", "--device=cpu"]
    section = "config.experiment.data" if command == "compare" else "config.data"
    arguments.append(f"--{section}.root={tmp_path}")
    if name.startswith("folder"):  # its plan reads the images' headers
        for file in ("a.png", "b.png"):
            Image.new("RGB", (40, 30)).save(tmp_path / file)
    process = subprocess.Popen(
        [sys.executable, "-m", f"adapters.{command}", *arguments, "--dry_run"],
        cwd=CONFIGS.parent,
        stdout=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    assert 100 * 2**20 < usage.ru_maxrss * 2**10 < 3 * 2**30  # PyTorch alone takes the first
    assert not (tmp_path / "run").exists()
