"""The report of a comparison, made of the results in its store: STORE/reports/NAME/

report.md, report.html (with its pictures, and links to the next two), tables.tex, cells.csv, *.png
"""

from __future__ import annotations

import json
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from adapters.comparison import figures
from adapters.comparison.engine import Outcome
from adapters.comparison.grid import Cell
from adapters.comparison.page import CELLS_FILE, TABLES_FILE, Picture, Report, html_page
from adapters.comparison.plan import Plan
from adapters.comparison.tables import (
    Entry,
    Table,
    build_tables,
    comma_separated,
    latex,
    markdown,
)
from adapters.comparison.tasks import Task
from adapters.experiment.tables import as_text, table
from adapters.measuring.statistics import paired, spread
from sa_files.writing import write_atomically

REPORTS = "reports"
PAPER = "arXiv 2312.12431"


def write_report(plan: Plan, command: str, failures: Sequence[Outcome] = ()) -> Path:
    """Write the report of the results that exist; return the Markdown file's path.

    ``failures``: the tasks that failed in this command.
    """
    grid, folder = plan.store.grid, plan.store.folder / REPORTS / plan.store.grid.config.name
    folder.mkdir(parents=True, exist_ok=True)
    failed_tasks = {outcome.task for outcome in failures}
    stored = {cell: task.result() for cell, task in plan.cells.items() if task.is_done()}
    results = {cell: found["metrics"] for cell, found in stored.items()}

    def failed(cell: Cell) -> bool:
        task = plan.cells[cell]
        return not task.is_done() and any(t.name in failed_tasks for t in _with_needs(task))

    tables = build_tables(grid, results, failed)
    report = Report(
        title=grid.config.title or grid.config.name,
        state=_state(plan, len(failed_tasks)),
        tables=tuple(tables),
        pictures=tuple(_pictures(folder, plan, tables)),
        facts=_facts(plan, command, stored),
        published=_published(plan),
        failures=tuple(failures),
        config=json.dumps(grid.config.to_dict(), indent=2, sort_keys=True),
    )
    for path in set(folder.glob("*.png")) - {one.path for one in report.pictures}:
        path.unlink(missing_ok=True)  # from a table that this comparison no longer has
    scales = {cell: _eps_scale(found) for cell, found in stored.items()}
    content = {
        "report.md": _markdown(report, folder),
        "report.html": html_page(report),
        TABLES_FILE: latex(tables),
        CELLS_FILE: comma_separated(grid, results, scales),
        "config.json": report.config + "\n",
    }
    for name, text in content.items():
        write_atomically(folder / name, text.encode())
    return folder / "report.md"


def _with_needs(task: Task) -> Iterator[Task]:
    """A task, the tasks that it needs, the tasks that those need, ..."""
    yield task
    for need in task.needs:
        yield from _with_needs(need)


def _state(plan: Plan, failed: int) -> str:
    done = sum(task.is_done() for task in plan.tasks.values())
    text = f"{done} of {len(plan.tasks)} tasks done"
    return f"{text}, {failed} failed" if failed else text


def _pictures(folder: Path, plan: Plan, tables: list[Table]) -> Iterator[Picture]:
    grid = plan.store.grid
    for one in tables:
        path = folder / f"{one.part.key}_{one.metric}.png"
        figures.plot_table(path, one)
        yield Picture(path, f"{one.part.title}: {one.heading}")
        if one.compared:
            path = folder / f"{one.part.key}_{one.metric}_difference.png"
            figures.plot_differences(path, one)
            yield Picture(path, f"{one.part.title}: {one.heading}. {one.caption}")
    for path in figures.draw_gaps(folder, grid, plan):
        start = grid.config.gap.start
        yield Picture(path, f"Gap along reverse chains from x_{start} (Theorem 1; Figure 4)")
    for part in grid.parts:
        path = folder / f"{part.key}_samples.png"
        if figures.draw_samples(path, grid, plan, part):
            yield Picture(path, f"Samples: {part.title}")


def _facts(plan: Plan, command: str, stored: dict[Cell, dict]) -> dict[str, str]:
    seconds = sum(found["seconds"] for found in stored.values())
    made = Counter(json.dumps(found["made_with"], sort_keys=True) for found in stored.values())
    facts = {
        "command": command,
        "seeds": ", ".join(map(str, plan.store.grid.seeds)),
        "sampling and measuring": f"{seconds / 3600:.2f} hours in {len(stored)} cells",
    }
    for text, count in made.most_common():
        versions = ", ".join(f"{k} {v}" for k, v in json.loads(text).items())
        facts[f"made with {versions}"] = f"{count} cells"
    scales = {
        f"eps scale of {plan.store.grid.title(cell.line)}, seed {cell.seed}": f"{scale:.4f}"
        for cell, found in stored.items()
        if (scale := found["eps_scale"]) != 1
    }
    lines = {
        f"eps of {plan.store.grid.title(cell.line)}, seed {cell.seed}, is divided by": _divisor(
            *line
        )
        for cell, found in stored.items()
        if (line := found.get("eps_line"))
    }
    return facts | scales | lines | _gap_facts(plan)


def _eps_scale(found: dict) -> float | str:
    """The factor of a stored cell's eps: a number, or a text where it depends on the step n."""
    line = found.get("eps_line")
    return f"1 / ({_divisor(*line)})" if line else found["eps_scale"]


def _divisor(k: float, c_0: float) -> str:
    return f"{k:.3g} n + {c_0:.4f}"


def _gap_facts(plan: Plan) -> dict[str, str]:
    """Theorem 1's total gap of each training, and the differences from the first, by seed."""
    grid = plan.store.grid
    gaps: dict[str, dict[int, float]] = {name: {} for name in grid.config.gap.trainings}
    for (name, seed), task in plan.gaps.items():
        if task.is_done():
            gaps[name][seed] = float(task.result().mean[-1])
    facts, every = {}, len(grid.seeds)
    for name, values in gaps.items():
        entry = Entry(spread(values), None, False, every)
        title = grid.training_title(name)
        facts[f"total gap from x_{grid.config.gap.start}, {title}"] = entry.text(3)
        reference = grid.config.gap.trainings[0]
        if name != reference and (difference := paired(values, gaps[reference])):
            text = Entry(None, difference, False, every).difference_text(3)
            facts[f"its difference, {title} less {grid.training_title(reference)}"] = text
    return facts


def _published(plan: Plan) -> str:
    """Other people's numbers, each with its source, and a reference to the SA paper's numbers."""
    published = plan.store.grid.config.published
    if not len(published):
        return ""
    rows = [published[key] for key in published]
    steps = sorted({int(s) for row in rows for s in row["values"]})
    lines = [
        [row.title, row.metric, *(str(row["values"].get(str(s), "")) for s in steps), row.source]
        for row in rows
    ]
    lines.append(["SA rows", "", *("" for _ in steps), f"see {PAPER}"])
    head = ["method", "metric", *map(str, steps), "source"]
    return table(head, lines, left=2)


def _markdown(report: Report, folder: Path) -> str:
    facts = "\n".join(f"- {as_text(name)}: {as_text(text)}" for name, text in report.facts.items())
    parts = [f"# {as_text(report.title)}\n", f"{report.state}.\n", markdown(report.tables)]
    if report.failures:
        lines = "\n".join(
            f"- {as_text(one.task)}: {as_text(one.error)}\n\n{textwrap.indent(one.log, ' ' * 6)}"
            for one in report.failures
        )
        parts.append(f"## Failed\n\n{lines}\n")
    pictures = "\n\n".join(
        f"![{as_text(one.caption)}]({one.path.relative_to(folder)})" for one in report.pictures
    )
    parts.append(f"## Pictures\n\n{pictures}\n")
    if report.published:
        parts.append(f"## Published numbers\n\n{report.published}")
    parts.append(f"## Made by\n\n{facts}\n\nThe configuration is in config.json.\n")
    return "\n".join(parts)
