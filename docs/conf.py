"""Sphinx configuration of the documentation: `make docs` builds it into docs/_build/html."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from generate_reference import write_reference

project = "fastgrpo"
copyright = "the fastgrpo authors, Apache-2.0"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = "fastgrpo"
autodoc_member_order = "bysource"
autodoc_typehints = "none"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
# Values such as [B, T, 3, H, W] in docstrings are prose, no references.
nitpicky = False

# The pages reference/configuration.md and reference/commands.md are made from the code at every
# build, so that they cannot fall behind it.
write_reference(Path(__file__).parent / "reference")
