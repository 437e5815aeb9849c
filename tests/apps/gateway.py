"""Systems that honour keys, as Stripe's API of charges does, and count what they have done."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from werkzeug.serving import make_server
from werkzeug.wrappers import Request, Response


class Gateway:
    """``/v1/charges`` and ``/receipts``, on a port of their own."""

    def __init__(self) -> None:
        self.charges: dict[str, dict[str, Any]] = {}
        self.receipts: dict[str, dict[str, Any]] = {}
        self.calls: list[str] = []
        self._lock = threading.Lock()
        self._server = make_server("127.0.0.1", 0, self._app, threaded=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    @contextmanager
    def serving(self) -> Iterator[Gateway]:
        thread = threading.Thread(target=self._server.serve_forever)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            thread.join()
            self._server.server_close()

    @Request.application
    def _app(self, request: Request) -> Response:
        key = request.headers["Idempotency-Key"]
        with self._lock:
            self.calls.append(request.path)
            if request.path == "/receipts":
                return self._answer(self.receipts.setdefault(key, request.get_json()))
            charge = {
                "id": f"ch_{len(self.charges) + 1}",
                "object": "charge",
                "amount": request.form.get("amount", type=int),
            }
            return self._answer(self.charges.setdefault(key, charge))

    def _answer(self, document: dict[str, Any]) -> Response:
        return Response(json.dumps(document), mimetype="application/json")
