"""The figures that a test's code makes, so that it can ask what they hold."""

import matplotlib.figure
import pytest


@pytest.fixture
def figures(monkeypatch):
    """In the order in which they are made."""
    made: list[matplotlib.figure.Figure] = []

    class Recorded(matplotlib.figure.Figure):
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, **kwargs)
            made.append(self)

    for module in ("pictures", "gap_pictures"):
        monkeypatch.setattr(f"adapters.pictures.{module}.Figure", Recorded)
    return made
