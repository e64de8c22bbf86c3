"""Sphinx: furo, Markdown by myst, the API from docstrings."""

from __future__ import annotations

from importlib.metadata import version as installed

project = "bittern"
author = "The bittern authors"
copyright = author
release = version = installed("bittern")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build", "*_table.md"]  # tables are parts of other pages

html_theme = "furo"
html_title = "bittern"

default_role = "code"
python_maximum_signature_line_length = 88
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True


def setup(app) -> None:
    app.connect("autodoc-process-docstring", _escape_bars)


def _escape_bars(app, what, name, obj, options, lines: list[str]) -> None:
    # Docstrings write magnitudes as |w|, which reStructuredText would take for a substitution.
    lines[:] = [line.replace("|", "\\|") for line in lines]
