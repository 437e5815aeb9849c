"""The application of :mod:`apps.answers`, on the database that STORE names."""

from __future__ import annotations

from apps.answers import served

app = served()
