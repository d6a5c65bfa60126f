"""The site: `make site` builds it from these pages, the docstrings and the tutorials."""

import importlib.metadata

project = "tvm-mars"
author = "The tvm-mars authors"
copyright = "2026, the tvm-mars authors"
release = importlib.metadata.version("tvm-mars")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_gallery.gen_gallery",
]
html_theme = "furo"
html_title = f"tvm-mars {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
exclude_patterns = ["_build", "tutorials/*.ipynb"]
nitpicky = False

myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3

napoleon_google_docstring = False
napoleon_use_rtype = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_class_signature = "separated"

# The tutorials are executed, and what they print and draw is shown, except for the one that needs
# another TVM and CPython 3.10. `sphinx -D plot_gallery=0` leaves all of them as they are.
sphinx_gallery_conf = {
    "examples_dirs": "../tutorials",
    "gallery_dirs": "tutorials",
    "filename_pattern": r"/(?!07_relay_and_tvmc)\d\d_",
    "ignore_pattern": r"__init__",
    "within_subsection_order": "FileNameSortKey",
    "abort_on_example_error": True,
    "capture_repr": (),  # what a script prints
    "download_all_examples": False,
    "remove_config_comments": True,
    "show_memory": False,
    "write_computation_times": False,
}
