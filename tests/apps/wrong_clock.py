"""The ledger on a host whose clock is wrong, from before anything is imported."""

from __future__ import annotations

import os
import time

right_time, right_time_ns = time.time, time.time_ns
ahead = int(os.environ["CLOCK_AHEAD"])
time.time = lambda: right_time() + ahead
time.time_ns = lambda: right_time_ns() + ahead * 1_000_000_000

from apps.ledger import app  # noqa: E402

__all__ = ["app"]
