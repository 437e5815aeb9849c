"""The application of :mod:`apps.answers`, having served a request while it was loaded: if that
was before a fork, its store has a connection and its heartbeat a thread that no child may use."""

from __future__ import annotations

import os
import threading

from werkzeug.test import Client

from apps.answers import served

app = served()
response = Client(app).post("/warm-up", headers={"Idempotency-Key": f"warm-up-{os.getpid()}"})
assert response.status_code == 201, response.text
assert any(thread.name == "idempotency-heartbeat" for thread in threading.enumerate())
