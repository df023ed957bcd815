"""The page of answers quotes the pages of results: its intervals stand on pages that it links."""

import re

import pytest

from tests.code_blocks import ROOT

RESULTS = ROOT / "docs" / "results"
PARAGRAPHS = (RESULTS / "index.md").read_text().split("\n\n")
ANSWERS = [text for text in PARAGRAPHS if not text.startswith("How ")]
INTERVAL = re.compile(r"[-+]?\d+\.\d+\s\[[-+]\d+\.\d+,\s[-+]\d+\.\d+\]")


@pytest.mark.parametrize("answer", [text for text in ANSWERS if INTERVAL.search(text)])
def test_every_interval_stands_on_a_linked_page(answer):
    links = re.findall(r"\]\((\w+\.md)", answer)
    sources = "".join((RESULTS / link).read_text() for link in links)
    for interval in INTERVAL.findall(answer):
        assert " ".join(interval.split()) in sources


def test_the_readme_gives_its_first_lines():
    assert "**Result.** " + PARAGRAPHS[1] in (ROOT / "README.md").read_text()
