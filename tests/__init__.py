"""Tests, in the rooms of the code they test; this folder holds what they share."""

from pathlib import Path

ROOT = Path(__file__).parent.parent
DATA = ROOT / "tests" / "data"
