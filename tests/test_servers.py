"""What the other tests stand on: servers start, answer, and go away."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from servers.browser import NAMES
from servers.http import IN_PROCESS, TESTS, Connection, Gunicorn, Response, chunked
from servers.postgres import PostgresServer, find_programs


def echo(environ, start_response):
    """Answer with the request's body, in two pieces."""
    size = int(environ.get("CONTENT_LENGTH") or 0)
    body = environ["wsgi.input"].read(size)
    start_response("201 Made It", [("Content-Length", str(len(body))), ("X-Echo", "yes")])
    return [body[:1], body[1:]]


def ends(pid: int) -> bool:
    """Wait for the end of a process that needn't be ours."""
    try:
        watch = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([watch], [], [], 30)[0])
    finally:
        os.close(watch)


def expect_echo(connection: Connection) -> None:
    for body in (b"first", b"second"):
        response = connection.request("POST", "/", [("Connection", "keep-alive")], body)
        assert (response.status, response.reason, response.body) == (201, "Made It", body)
        assert response.header("x-echo") == "yes"
        if response.version == "HTTP/1.0" or response.header("Connection") == "close":
            assert connection.at_end()
            break


@pytest.mark.parametrize("name", IN_PROCESS)
def test_a_server_in_this_process_answers_and_ends(name: str) -> None:
    with IN_PROCESS[name](echo) as address, Connection(address) as connection:
        expect_echo(connection)
    with pytest.raises(ConnectionRefusedError):
        Connection(address)


@pytest.mark.parametrize(
    "options",
    [
        {"worker_class": "sync"},
        {"worker_class": "gthread", "threads": 4},
        {"worker_class": "gevent"},
        {"preload": True},
    ],
    ids=lambda options: " ".join(f"{name} {value}" for name, value in options.items()),
)
def test_gunicorn_answers_and_ends(options: dict[str, object], tmp_path: Path) -> None:
    with Gunicorn("test_servers:echo", tmp_path, **options) as server:
        with Connection(server.address) as connection:
            expect_echo(connection)
        assert len(set(server.worker_pids)) == 2
    assert ends(server.pid)
    assert all(map(ends, server.worker_pids))


def test_gunicorn_that_cannot_load_the_application_says_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no_such_module"):
        Gunicorn("no_such_module:app", tmp_path)


def test_gunicorn_serves_the_package_that_the_tests_test(tmp_path: Path) -> None:
    """Not, say, the checkout, when a wheel is installed."""
    import wsgi_idempotency

    with (
        Gunicorn("test_servers:where", tmp_path, workers=1) as server,
        Connection(server.address) as connection,
    ):
        response = connection.request("GET", "/")
    assert response.body.decode() == wsgi_idempotency.__file__


def where(environ, start_response):
    import wsgi_idempotency

    start_response("200 OK", [])
    return [wsgi_idempotency.__file__.encode()]


def test_a_chunked_response_is_decoded_and_the_connection_stays_in_step(tmp_path: Path) -> None:
    with (
        Gunicorn("test_servers:pieces", tmp_path, worker_class="gthread", threads=2) as server,
        Connection(server.address) as connection,
    ):
        for _ in range(2):
            connection.send(
                b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
                + chunked(b"some", b"thing")
            )
            response = connection.receive()
            assert response.header("Transfer-Encoding") == "chunked"
            assert response.body == b"something"


def pieces(environ, start_response):
    body = environ["wsgi.input"].read()
    start_response("200 OK", [])
    yield body[:3]
    yield body[3:]


def test_a_header_that_came_twice_is_not_taken_for_one() -> None:
    response = Response("HTTP/1.1", 200, "OK", (("Date", "now"), ("date", "then")), b"")
    assert response.all("DATE") == ["now", "then"]
    with pytest.raises(AssertionError, match="2 times"):
        response.header("Date")


def test_postgresql_keeps_its_rows_through_a_crash(postgres_server: PostgresServer) -> None:
    postgres_server.execute("CREATE TABLE kept AS SELECT 1 AS one")
    before = postgres_server.pid
    postgres_server.restart("immediate")
    assert postgres_server.pid != before
    assert postgres_server.execute("TABLE kept") == [(1,)]
    postgres_server.execute("DROP TABLE kept")


def test_the_statements_sent_to_one_database_are_collected(
    postgres_server: PostgresServer, pg_url: str
) -> None:
    if not pg_url.startswith(postgres_server.url("")):
        pg_url = postgres_server.create_database()
    name = pg_url.rpartition("/")[2]
    with postgres_server.statements(pg_url) as statements:
        with postgres_server.connect(name) as connection:
            connection.execute("SELECT %s,\n2", [1])
            with connection.transaction():
                connection.execute("SELECT 3", prepare=True)
        postgres_server.execute("SELECT 'on another database'")
    postgres_server.execute("SELECT 'afterwards'", name)
    assert statements == ["SELECT $1,\n2", "BEGIN", "SELECT 3", "COMMIT"]


RUNNER = """
    import os, sys
    from servers.postgres import PostgresServer
    server = PostgresServer(origin="wheel")
    print(server.version, server.pid, server.folder, flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize(
    "signal_sent", [None, signal.SIGTERM, signal.SIGKILL], ids=["at exit", "SIGTERM", "SIGKILL"]
)
def test_the_wheels_postgresql_ends_with_the_process_that_started_it(
    signal_sent: signal.Signals | None,
) -> None:
    runner = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(RUNNER)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(TESTS)},
    )
    with runner:
        version, pid, folder = runner.stdout.readline().split()
        assert int(version.split(".")[0]) >= 18
        assert Path(folder).exists()
        if signal_sent is not None:
            runner.send_signal(signal_sent)
    assert ends(int(pid))


HOLDERS = {
    "gunicorn": """
        import sys
        from pathlib import Path
        from servers.http import Gunicorn
        server = Gunicorn("test_servers:echo", Path(sys.argv[1]), workers=1)
        print(server.pid, *server.worker_pids, flush=True)
        sys.stdin.read()
    """,
    "a browser": """
        import sys
        from pathlib import Path
        from servers.browser import chromium
        with chromium(Path(sys.argv[1])) as browser:
            children = Path(f"/proc/{browser.service.process.pid}/task")
            children = [one.read_text() for one in children.glob("*/children")]
            print(browser.service.process.pid, *children, flush=True)
            sys.stdin.read()
    """,
}


@pytest.mark.parametrize("holder", HOLDERS.values(), ids=HOLDERS)
def test_what_a_killed_test_run_has_started_ends_with_it(holder: str, tmp_path: Path) -> None:
    """Left alone, either would go on for ever."""
    if "browser" in holder and not any(map(shutil.which, NAMES)):
        pytest.skip("there is no Chromium here")
    runner = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(holder), tmp_path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(TESTS)},
    )
    with runner:
        pids = [int(pid) for pid in runner.stdout.readline().split()]
        runner.kill()
    try:
        assert len(pids) > 1
        assert all(map(ends, pids))
    finally:
        with contextlib.suppress(ProcessLookupError, IndexError):
            os.killpg(pids[0], signal.SIGKILL)


def test_a_missing_postgresql_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("servers.postgres.system_folders", lambda: iter(()))
    monkeypatch.setattr("servers.postgres.wheel_folders", lambda: iter(()))
    with pytest.raises(RuntimeError, match="no PostgreSQL"):
        find_programs()
