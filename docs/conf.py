"""How the site is built: `python -m sphinx -W docs build/site`."""

project = "llama-adapter"
author = "the llama-adapter developers"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
html_theme = "furo"
html_title = "llama-adapter"
html_static_path: list[str] = []
exclude_patterns = ["build"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
suppress_warnings = ["myst.xref_missing"]  # links to files of the repository, which are no pages of the site

autodoc_member_order = "bysource"
autodoc_typehints = "description"
napoleon_use_ivar = True
