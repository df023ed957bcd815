"""Names and errors in reports: they stay words in HTML, Markdown, LaTeX and CSV."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from adapters.comparison.engine import Outcome
from adapters.comparison.page import Picture, Report, html_page
from adapters.comparison.report import _markdown
from adapters.comparison.tables import build_tables, comma_separated, latex
from adapters.experiment.tables import as_text, table
from configs.comparison import baseline, part
from tests.adapters.comparison.test_comparison_statistics import a_grid, results

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</pre></table></html><iframe src=//x>",
    "{{ 7 * 7 }}{% raw %}",
    "a | b |\n\n# c\r\n| d",
    r"\input{/etc/passwd} 50% & $x_1^2$ ~ {}#",
    "\x1b[31mred\x00\u202e",
]


class Page(HTMLParser):
    """Tags, attributes and words of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: Counter[str] = Counter()
        self.sources: list[str] = []
        self.words = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes.update(name for name, _ in attrs)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.words += data


def report_of(name: str, folder: Path, log: str = "Traceback") -> Report:
    """With the name in every place that takes words."""
    picture = folder / "x.png"
    Image.new("L", (2, 2)).save(picture)
    grid = a_grid(trainings={"b": baseline(), "sa": {"title": name, "set": {}}})
    return Report(
        title=name,
        state="1 of 2 tasks done",
        tables=tuple(build_tables(grid, results(grid))),
        pictures=(Picture(picture, name),),
        facts={name: name},
        published=table(["method"], [[name]], left=1),
        failures=(Outcome(name, error=name, log=log),),
        config=name,
    )


@pytest.mark.parametrize("name", HOSTILE)
def test_a_page_has_the_same_elements_whatever_the_names(name: str, tmp_path: Path) -> None:
    found, plain = (Page(html_page(report_of(text, tmp_path))) for text in (name, "plain"))
    assert found.tags == plain.tags
    assert found.attributes == plain.attributes
    assert "img" in plain.tags
    allowed = ("data:image/png;base64,", "#", "cells.csv", "tables.tex")
    assert all(source.startswith(allowed) for source in found.sources)
    words, expected = (re.sub("[\r\x00]", "", text) for text in (found.words, name))
    assert expected in words


def test_the_log_of_a_failure_stays_in_its_block(tmp_path: Path) -> None:
    log = "Traceback\n\n# no title\n</pre><script>alert(1)</script>\n"
    block = _markdown(report_of("x", tmp_path, log), tmp_path).split("## Failed")[1]
    lines = block.split("## Pictures")[0].splitlines()[3:]  # behind the task's own line
    assert [line.strip() for line in lines if line] == [line for line in log.split("\n") if line]
    assert all(line.startswith(" " * 6) for line in lines if line)
    assert "script" not in Page(html_page(report_of("x", tmp_path, log))).tags


def cells(line: str) -> int:
    return len(re.findall(r"(?<!\\)\|", line))


@pytest.mark.parametrize("name", HOSTILE)
def test_a_markdown_report_has_the_same_lines_whatever_the_names(name: str, tmp_path: Path) -> None:
    found, plain = (_markdown(report_of(n, tmp_path), tmp_path) for n in (name, "plain"))
    assert len(found.split("\n")) == len(plain.split("\n"))
    for here, there in zip(found.split("\n"), plain.split("\n"), strict=True):
        assert here[:1] == there[:1]
        if there.startswith("|"):
            assert cells(here) == cells(there)
    assert "<" not in found
    assert all(c.isprintable() for c in found.replace("\n", ""))
    assert as_text("SA-2, λ = 0.1 ± 2") == "SA-2, λ = 0.1 ± 2"


@pytest.mark.parametrize("name", HOSTILE)
def test_a_latex_table_has_the_same_lines_and_commands(name: str) -> None:
    def of(title: str) -> str:
        grid = a_grid(trainings={"b": baseline(), "sa": {"title": title, "set": {}}})
        return latex(build_tables(grid, results(grid)))

    found, plain = of(name), of("plain")
    assert len(found.split("\n")) == len(plain.split("\n"))
    harmless = {"textbackslash", "textasciitilde", "textasciicircum"}
    assert set(re.findall(r"\\([a-z]+)", found)) <= set(re.findall(r"\\([a-z]+)", plain)) | harmless
    for special in "&#%$":
        count = len(re.findall(rf"(?<!\\){re.escape(special)}", found))
        assert count == len(re.findall(rf"(?<!\\){re.escape(special)}", plain))


@pytest.mark.parametrize("name", HOSTILE[:-1])
def test_csv_keeps_names_in_their_cells(name: str) -> None:
    key = name.replace("/", "").replace(".", "")  # of a training, as a configuration may hold it
    trainings = {"b": baseline(), key: {"title": "x", "set": {}}}
    grid = a_grid(trainings=trainings, parts={"main": part("Main", ("b", key), ("ddim",), (5,))})
    found = results(grid)
    text = comma_separated(grid, found, dict.fromkeys(found, 1.0))
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    assert len(rows) == len(found)
    assert {row["training"] for row in rows} == {"b", key}
    assert all(None not in row and None not in row.values() for row in rows)
