"""Sphinx's settings: `make docs`."""

from datetime import date

from relattn import __version__

project = "relattn"
author = "relattn authors"
copyright = f"{date.today().year}, {author}"
release = version = __version__

extensions = [
    "myst_parser",  # pages are Markdown
    "sphinx.ext.autodoc",  # the reference is made of docstrings,
    "sphinx.ext.napoleon",  # ... which are in Google's form
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]
myst_enable_extensions = ["dollarmath", "attrs_inline"]
myst_heading_anchors = 3

default_role = "py:obj"  # `name` in a docstring: a link if the name is documented, else code
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the signature shows them, the text gives shapes
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

html_theme = "pydata_sphinx_theme"
html_title = "relattn"
html_static_path = ["_static", "../examples/chorales/samples"]
html_css_files = ["wide.css"]
html_show_sourcelink = False
html_sidebars = {"**": ["globaltoc.html"]}
highlight_language = "none"  # where a block names none: commands, formulas
html_theme_options = {
    "show_prev_next": True,
    "navigation_with_keys": False,
    "navbar_center": [],  # all pages are in the sidebar, in every page
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
}
