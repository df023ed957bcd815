"""What a report shows, and its HTML file: style and pictures included, all text escaped.

Its only links lead to the CSV and LaTeX files beside it.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import jinja2

from adapters.comparison.engine import Outcome
from adapters.comparison.tables import Table, legend

CELLS_FILE, TABLES_FILE = "cells.csv", "tables.tex"  # beside the page


@dataclass(frozen=True)
class Picture:
    """A PNG file of the report with its caption."""

    path: Path
    caption: str


@dataclass(frozen=True)
class Report:
    """All that a report shows."""

    title: str
    state: str
    tables: tuple[Table, ...]
    pictures: tuple[Picture, ...]
    facts: dict[str, str]
    published: str  # Markdown, "" where nothing is published
    failures: tuple[Outcome, ...]
    config: str  # JSON


_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ report.title }}</title>
<style>
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1100px; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ddd; }
h3 { margin: 1.6rem 0 .4rem; font-size: 1rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .2rem .7rem; text-align: right; white-space: nowrap; }
th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left; }
thead th { border-bottom: 1px solid #888; } tr.first td { border-top: 1px solid #ddd; }
td.best { font-weight: 700; } td.sure { background: #eef4fb; }
details { margin: .4rem 0 1rem; } summary { cursor: pointer; color: #555; }
img { max-width: 100%; height: auto; display: block; margin: .6rem 0; }
figure { margin: 1rem 0; } figcaption { color: #555; font-size: .9rem; }
pre { background: #f6f6f6; padding: .8rem; overflow-x: auto; font-size: .8rem; }
nav a { margin-right: 1rem; }
</style>
<h1>{{ report.title }}</h1>
<p>{{ report.state }}. {{ legend }}</p>
<p>Mean ± standard deviation over the seeds. <b>Bold</b>, with three or more seeds: best of a
process's lines, if the paired 95 % intervals of its difference from every other line exclude zero.
The intervals are not adjusted for their number: of a hundred, five exclude zero by chance.</p>
<p>Every cell of every seed: <a href="{{ cells }}">{{ cells }}</a>. The tables for LaTeX:
<a href="{{ tex }}">{{ tex }}</a>.</p>
<nav>{% for title, _ in parts %}<a href="#part{{ loop.index }}">{{ title }}</a>{% endfor %}
<a href="#pictures">Pictures</a><a href="#made">Made by</a></nav>
{% for title, tables in parts %}
<h2 id="part{{ loop.index }}">{{ title }}</h2>
{% for one in tables %}
<h3>{{ one.heading }}</h3>
{% if one.verdicts %}<ul>{% for sentence in one.verdicts %}<li>{{ sentence }}</li>
{% endfor %}</ul>{% endif %}
<div class="scroll"><table><thead><tr><th>steps</th><th></th>
{% for s in one.part.steps %}<th>{{ s }}</th>{% endfor %}</tr></thead><tbody>
{% for row in one.rows %}
<tr{% if loop.changed(row.process) %} class="first"{% endif %}><td>{{ row.process }}</td>
<td>{{ row.line }}</td>
{% for e in row.entries %}<td{% if e.is_best %} class="best"{% endif %}>{{ e.text() }}</td>
{% endfor %}</tr>
{% endfor %}</tbody></table></div>
{% if one.compared %}<details><summary>{{ one.caption }}</summary>
<div class="scroll"><table><thead><tr><th>steps</th><th></th>
{% for s in one.part.steps %}<th>{{ s }}</th>{% endfor %}</tr></thead><tbody>
{% for row in one.compared %}<tr><td>{{ row.process }}</td><td>{{ row.line }}</td>
{% for e in row.entries %}<td{% if e.difference and e.difference.tells_apart %} class="sure"
{% endif %}>{{ e.difference_text() }}</td>{% endfor %}</tr>{% endfor %}
</tbody></table></div></details>{% endif %}
{% endfor %}
{% endfor %}
{% if report.failures %}<h2>Failed</h2><ul>{% for one in report.failures %}
<li><code>{{ one.task }}</code>: {{ one.error }}<details><summary>its log</summary>
<pre>{{ one.log }}</pre></details></li>{% endfor %}</ul>{% endif %}
<h2 id="pictures">Pictures</h2>
{% for picture in report.pictures %}<figure><img alt="{{ picture.caption }}"
src="data:image/png;base64,{{ data(picture.path) }}"><figcaption>{{ picture.caption }}</figcaption>
</figure>{% endfor %}
{% if report.published %}<h2>Published numbers</h2><pre>{{ report.published }}</pre>{% endif %}
<h2 id="made">Made by</h2>
<ul>{% for name, text in report.facts.items() %}<li>{{ name }}: <code>{{ text }}</code></li>
{% endfor %}</ul>
<details><summary>Configuration</summary><pre>{{ report.config }}</pre></details>
</html>
"""


def html_page(report: Report) -> str:
    """The report as an HTML page."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    parts = [(title, list(ts)) for title, ts in groupby(report.tables, lambda t: t.part.title)]
    return environment.from_string(_PAGE).render(
        report=report,
        parts=parts,
        legend=legend(report.tables),
        cells=CELLS_FILE,
        tex=TABLES_FILE,
        data=_base64,
    )


def _base64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()
