"""How Sphinx builds these pages: `make docs`. Warnings are errors.

Two parts are generated from the code on each build and are not committed: the table of metrics, and a page of the API
for each package.
"""

import pkgutil
import re
import shutil
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math import latex2mathml
from pygments.lexers.special import TextLexer
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import selfalign
from selfalign.metrics.catalog import METRICS

DOCS = Path(__file__).parent
PACKAGE = Path(selfalign.__file__).parent
SCRIPTS = {"__main__", "vllm_worker"}
"""Modules that are programs: they have no API."""

project = "selfalign"
author = "the authors of selfalign"
version = release = selfalign.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
exclude_patterns = []
nitpicky = True
nitpick_ignore_regex = [(r"py:.*", r"(?!selfalign\b).*"), (r"py:.*", r"selfalign\.[\w.]+\.[A-Z]")]
"""Names of other libraries, whose documentation is on the network; type variables."""

default_role = "code"
autodoc_default_options = {"members": True, "member-order": "bysource", "ignore-module-all": True}
autodoc_typehints = "none"
autodoc_inherit_docstrings = False
autodoc_mock_imports = ["lm_eval", "wandb_workspaces"]
napoleon_google_docstring = True
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = "selfalign"
html_math_renderer = "mathml"


def api_pages() -> dict[str, list[str]]:
    """{title of a page: its modules}: one page for each package, and one for modules that are in no package."""
    pages: dict[str, list[str]] = {}
    for module in pkgutil.walk_packages([str(PACKAGE)], "selfalign."):
        package = module.name.split(".")[1] if module.name.count(".") > 1 or module.ispkg else "selfalign"
        if module.name.rpartition(".")[2] not in SCRIPTS:
            pages.setdefault(package, []).append(module.name)
    return pages


def write_api_pages(app: Sphinx) -> None:
    """Write `api/<package>.rst`, and nothing else into that folder."""
    folder = DOCS / "api"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for package, modules in api_pages().items():
        lines = [package, "=" * len(package)]
        for name in modules:
            lines += ["", name, "-" * len(name), "", f".. automodule:: {name}"]
        (folder / f"{package}.rst").write_text("\n".join(lines) + "\n", encoding="utf-8")


class Metrics(SphinxDirective):
    """The table of all metrics."""

    def run(self) -> list[nodes.Node]:
        lines = [
            "| metric | meaning | unit | axis | better |",
            "|---|---|---|---|---|",
            *(f"| `{m.name}` | {_cell(m.meaning)} | {m.unit} | {m.axis} | {m.arrow} |" for m in METRICS.values()),
        ]
        return self.parse_text_to_nodes("\n".join(lines))


def _cell(text: str) -> str:
    return text.replace("|", r"\|")


def visit_math(self: Any, node: nodes.math) -> None:
    """Write a formula as MathML, which browsers show without a script."""
    self.body.append(str(latex2mathml.tex2mathml(node.astext())))
    raise nodes.SkipNode


def visit_math_block(self: Any, node: nodes.math_block) -> None:
    """Write a formula that stands by itself."""
    self.body.append(str(latex2mathml.tex2mathml(node.astext(), as_block=True)))
    raise nodes.SkipNode


def without_links_to_the_checkout(app: Sphinx, name: str, source: list[str]) -> None:
    """Name a file outside of `docs/` instead of linking to it: these pages travel without the checkout."""
    source[0] = re.sub(r"\[([^\]]+)\]\(\.\./([^)]+)\)", r"\1 (`\2`)", source[0])


def setup(app: Sphinx) -> None:
    app.add_lexer("floors", TextLexer)
    app.add_directive("metrics", Metrics)
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math_block, None))
    app.connect("builder-inited", write_api_pages)
    app.connect("source-read", without_links_to_the_checkout)
