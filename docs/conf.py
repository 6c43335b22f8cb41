"""Sphinx configuration: Markdown pages, built without a network and with warnings as errors."""

import re
from pathlib import Path

project = "shapadapter"
author = "The shapadapter authors"
# Read, not imported: importing the package would load torch for a line of text.
_source = (Path(__file__).parents[1] / "shapadapter" / "__init__.py").read_text(encoding="utf-8")
_match = re.search(r'^__version__ = "([^"]+)"', _source, flags=re.MULTILINE)
if _match is None:
    raise RuntimeError("shapadapter/__init__.py does not state __version__.")
release = version = _match.group(1)

extensions = ["myst_parser", "sphinx.ext.mathjax"]
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
nitpicky = True

html_theme = "furo"
html_title = f"shapadapter {release}"
html_copy_source = False
