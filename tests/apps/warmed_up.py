"""The ledger, having served a request before it is forked: its store has a connection and
its heartbeat a thread that no child inherits."""

from __future__ import annotations

import threading

from werkzeug.test import Client

from apps.ledger import app

__all__ = ["app"]

response = Client(app).post("/warm-up", headers={"Idempotency-Key": "warm-up"})
assert response.status_code == 201, response.text
assert any(thread.name == "idempotency-heartbeat" for thread in threading.enumerate())
