"""Sphinx configuration: the site is built with warnings as errors, its examples are run."""

from importlib.metadata import version as version_of

project = "wsgi-idempotency"
author = "wsgi-idempotency contributors"
copyright = author
release = version = version_of(project)

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.doctest"]
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = project
exclude_patterns = ["_build"]

autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_preserve_defaults = True

# Names of other projects are left as text, so that a build needs no network.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!wsgi_idempotency).*")]

# Only what is marked as a test is run, not every line that looks like a prompt.
doctest_test_doctest_blocks = ""
doctest_global_setup = """
import os, tempfile
os.chdir(tempfile.mkdtemp())
"""
