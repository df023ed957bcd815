"""What a user of the library meets first: quick imports, the direction of imports."""

import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_importing_brings_nothing_heavy():
    """Import time, without a clock: no module beyond torch and NumPy's own is loaded."""
    program = textwrap.dedent("""
        import sys, torch, numpy
        before = set(sys.modules)
        import sa_plugin, sa_plugin.hook, sa_plugin.sampler, sa_plugin.metrics
        new = {name.split(".")[0] for name in set(sys.modules) - before}
        heavy = {"scipy", "torchvision", "sklearn", "matplotlib", "pandas", "absl", "PIL"}
        print(sorted(new & heavy), sorted(new & {"third_party", "adapters", "configs"}))
    """)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[] []"


def test_imports_run_one_way():
    sys.path.insert(0, str(ROOT / ".ci"))
    try:
        from check_imports import violations
    finally:
        sys.path.pop(0)
    assert violations(ROOT) == []


def test_the_import_check_sees_what_it_should(tmp_path):
    sys.path.insert(0, str(ROOT / ".ci"))
    try:
        from check_imports import violations
    finally:
        sys.path.pop(0)
    (tmp_path / "sa_plugin").mkdir()
    (tmp_path / "sa_plugin" / "x.py").write_text("def f():\n    from adapters.config import run\n")
    (tmp_path / "third_party" / "host").mkdir(parents=True)
    (tmp_path / "third_party" / "host" / "y.py").write_text("import torch\nimport sa_plugin.loss\n")
    assert violations(tmp_path) == [
        "sa_plugin/x.py:2: sa_plugin must not import adapters",
        "third_party/host/y.py:2: third_party must not import sa_plugin",
    ]
