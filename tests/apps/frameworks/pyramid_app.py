"""The ini file that the environment variable INI names."""

from __future__ import annotations

import os

from paste.deploy import loadapp

app = loadapp(f"config:{os.environ['INI']}")
