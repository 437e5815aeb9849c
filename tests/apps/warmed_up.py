"""The ledger, having served a request while it was loaded. Loaded before a fork, its store has
a connection and its heartbeat a thread that no child may use."""

from __future__ import annotations

import os
import threading

from werkzeug.test import Client

from apps.ledger import app

__all__ = ["app"]

key = f"warm-up-{os.getpid()}"
response = Client(app).post("/warm-up", headers={"Idempotency-Key": key})
assert response.status_code == 201, response.text
assert any(thread.name == "idempotency-heartbeat" for thread in threading.enumerate())
