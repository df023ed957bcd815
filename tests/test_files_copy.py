"""`third_party/common/files` is the copy of `sa_plugin/_files` that its docstring says it is."""

from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_both_copies_are_equal() -> None:
    original, copy = (
        {path.name: path.read_bytes() for path in (ROOT / folder).glob("*.py")}
        for folder in ("sa_plugin/_files", "third_party/common/files")
    )
    assert original == copy
    assert set(original) >= {"reading.py", "arrays.py", "pickled.py", "tensors.py"}
