"""A child that Python was not told of, as uWSGI's workers are, leaves its parent's alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import threading

import pytest

from wsgi_idempotency import forks

#: Says what is in use in a process that has served a request, then in its child, then in the
#: parent again. PyDLL keeps the interpreter's lock, as uWSGI does while it forks.
FORKS = """
    import ctypes, json, os, sys, threading
    sys.path[:0] = {path!r}
    from sqlalchemy import event
    from werkzeug.test import Client
    from wsgi_idempotency import IdempotencyMiddleware, SQLStore, everyone
    from wsgi_idempotency.schema import upgrade

    def app(environ, start_response):
        start_response("201 Created", [])
        return [b"done"]

    store = SQLStore({url!r})
    client = Client(IdempotencyMiddleware(app, store, scope=everyone))

    def serve(who):
        response = client.post("/", headers={{"Idempotency-Key": who}})
        assert response.status_code == 201, response.text
        with store.engine.connect() as connection:
            backend = connection.connection.driver_connection.info.backend_pid
        print(json.dumps([who, backend, len(os.listdir("/proc/self/task"))]), flush=True)

    serve("parent")
    pid = ctypes.PyDLL(None).fork()
    if not pid:
        serve("child")
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    serve("parent-again")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_child_forked_in_c_has_a_connection_and_a_heartbeat_of_its_own(pg_database: str) -> None:
    """On its parent's connection it would read the answers to its parent's statements, and
    the thread that renews its parent's leases doesn't run in it."""
    code = textwrap.dedent(FORKS).format(path=[os.path.dirname(__file__)], url=pg_database)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    said = [json.loads(line) for line in done.stdout.splitlines()]
    assert [who for who, _, _ in said] == ["parent", "child", "parent-again"]
    backends = [backend for _, backend, _ in said]
    assert backends[0] == backends[2] != backends[1]
    assert {threads for _, _, threads in said} == {2}


def test_of_threads_that_notice_at_once_one_leaves_the_parents_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The other waits until it is done: what it used before would be taken away again."""
    both = threading.Barrier(2, timeout=30)
    order = []

    class Turns(dict[int, threading.Lock]):
        def setdefault(self, pid: int, lock: threading.Lock) -> threading.Lock:
            found = super().setdefault(pid, lock)
            both.wait()  # both have seen that the process is another
            return found

    monkeypatch.setattr(forks, "_noticed", -1)
    monkeypatch.setattr(forks, "_turns", Turns())
    monkeypatch.setattr(forks, "_hooks", [lambda: order.append("hook")])

    def use() -> None:
        forks.notice()
        order.append("used")

    threads = [threading.Thread(target=use) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert order == ["hook", "used", "used"]
