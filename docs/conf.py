"""The documentation site: sphinx-build -W docs build/docs (extra "docs")."""

import re
import sys
from pathlib import Path
from typing import Any

from docutils.nodes import SkipNode, math_block
from latex2mathml.converter import convert
from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from sa_plugin import __version__  # noqa: E402 - found by the line above

project = "sa_plugin"
release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_math_renderer = "mathml"
html_title = f"sa_plugin {release}"
myst_enable_extensions = ["dollarmath"]  # $...$ and $$...$$ are formulas
myst_heading_anchors = 3  # links to a heading, as GitHub has them
autodoc_default_options = {
    "members": True,
    "member-order": "bysource",
    "special-members": "__call__",
}
autodoc_type_aliases = {"ArrayLike": "ArrayLike", "Numeric": "Numeric"}
maximum_signature_line_length = 88
python_use_unqualified_type_names = True
napoleon_numpy_docstring = False


def escape_formulas(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """In docstrings |e| is a norm and *shape a shape, not marks of reStructuredText."""
    literal_from = None  # the indent of the line whose "::" begins a literal block
    for i, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        if line.strip() and literal_from is not None and indent <= literal_from:
            literal_from = None
        if literal_from is None:
            parts = re.split(r"(``.+?``)", line)
            parts[::2] = [re.sub(r"([|*])", r"\\\1", part) for part in parts[::2]]
            lines[i] = "".join(parts)
            if line.rstrip().endswith("::"):
                literal_from = indent


def name_aliases(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str, returns: str
) -> tuple[str, str]:
    """Aliases of types by their names, which Sphinx wraps where they stand in a union."""
    wrapped = r"TypeAliasForwardRef\('(\w+)'\)"
    return tuple(re.sub(wrapped, r"\1", text) if text else text for text in (signature, returns))


def write_formula(writer: Any, node: Any) -> None:
    """A formula as MathML, which browsers show by themselves: the site loads no script for it."""
    is_block = isinstance(node, math_block)
    text = convert(node.astext(), display="block" if is_block else "inline")
    writer.body.append(f"<div>{text}</div>" if is_block else text)
    raise SkipNode


def setup(app: Sphinx) -> None:
    app.add_html_math_renderer("mathml", (write_formula, None), (write_formula, None))
    # Before napoleon, which makes marks of its own of the sections.
    app.connect("autodoc-process-docstring", escape_formulas, priority=100)
    app.connect("autodoc-process-signature", name_aliases)
