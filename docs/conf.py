"""Sphinx configuration: Markdown pages, built without a network and with warnings as errors."""

import re
from pathlib import Path

from docutils import nodes
from docutils.utils.math import latex2mathml

project = "shapadapter"
author = project_copyright = "The shapadapter authors"
# Read, not imported: importing the package would load torch for a line of text.
_source = (Path(__file__).parents[1] / "shapadapter" / "__init__.py").read_text(encoding="utf-8")
_match = re.search(r'^__version__ = "([^"]+)"', _source, flags=re.MULTILINE)
if _match is None:
    raise RuntimeError("shapadapter/__init__.py does not state __version__.")
release = version = _match.group(1)

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["dollarmath", "amsmath", "attrs_block"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
nitpicky = True
# Docstrings name types and exceptions in plain words, which are no links.
nitpick_ignore_regex = [("py:.*", ".*")]
default_role = "code"
autodoc_typehints = "none"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
add_module_names = False

html_theme = "furo"
html_title = "shapadapter"
html_short_title = "shapadapter"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {"navigation_with_keys": True, "sidebar_hide_name": False}
html_copy_source = False
html_show_sphinx = False
# Light and dark follow the reader's system, and a switch on each page; both keep code readable.
pygments_style = "friendly"
pygments_dark_style = "native"
# Formulas are MathML, which browsers draw themselves: no page asks another server for a script.
html_math_renderer = "mathml"


def _inline(translator, node):
    translator.body.append(latex2mathml.tex2mathml(node.astext()))
    raise nodes.SkipNode


def _block(translator, node):
    formula = latex2mathml.tex2mathml(node.astext()).replace("<math ", '<math display="block" ', 1)
    translator.body.append(f'<div class="formula">{formula}</div>')
    raise nodes.SkipNode


def setup(app):
    """Let Sphinx know the renderer of formulas."""
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
