"""The code blocks of the documentation's pages, and how they are run."""

from __future__ import annotations

import contextlib
import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests import ROOT

FENCE = re.compile(r"^```(?P<language>\S*)[^\n]*\n(?P<code>.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """A fenced block: its page, the number of its first line, its language and text."""

    page: Path
    line: int
    language: str
    code: str

    @property
    def changed_lines(self) -> list[str]:
        """Its lines of code: neither empty nor a comment."""
        lines = (line.strip() for line in self.code.splitlines())
        return [line for line in lines if line and not line.startswith("#")]


def pages() -> list[Path]:
    """README and every page of docs."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path, language: str = "python") -> list[Block]:
    """The page's blocks of one language, in order."""
    return [block for block in all_blocks(page) if block.language == language]


def all_blocks(page: Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(page, text[: f.start("code")].count("\n") + 1, f["language"], f["code"])
        for f in FENCE.finditer(text)
    ]


def run(block: Block, namespace: dict[str, Any], changes: dict[str, str] | None = None) -> str:
    """Execute the block; returns what it printed.

    Args:
        namespace: shared by the blocks of a page.
        changes: text to replace where it stands (sizes for a quick run), each of which must occur.
    """
    code = block.code
    for text, replacement in (changes or {}).items():
        if text not in code:
            raise ValueError(f"{block.page}:{block.line} has no {text!r} to replace")
        code = code.replace(text, replacement)
    # Empty lines first, so that a traceback shows the page's own line.
    program = compile("\n" * (block.line - 1) + code, str(block.page), "exec", dont_inherit=True)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(program, namespace)
    return printed.getvalue()
