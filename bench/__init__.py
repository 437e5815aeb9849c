"""Measurements of the package, run by ``tox -e bench``. Not part of what is installed."""
