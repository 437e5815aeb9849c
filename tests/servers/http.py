"""The WSGI servers that people deploy, and a client that sends exactly what it is told."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from servers import KILL_GROUP, Watchdog

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

TESTS = Path(__file__).parent.parent

START_TIMEOUT = 30  # seconds; a loaded machine of two cores needs some

Address = tuple[str, int]

# post_worker_init runs when a worker has loaded the application: from then on it answers.
GUNICORN_CONFIGURATION = """
def post_worker_init(worker):
    worker.log.info("Worker ready (pid: %s)", worker.pid)
"""


class Gunicorn:
    """An application served by gunicorn, in a session of its own, ready to answer.

    :param application: ``"module:name"``; looked for in ``tests/`` and in ``folders``.
    :param folder: an empty folder for its configuration and log; also where it runs.
    :param worker_class: ``sync``, ``gthread`` or ``gevent``.
    :param threads: how many a ``gthread`` worker has.
    :param preload: load the application before the workers are forked.
    :param timeout: seconds after which gunicorn aborts a silent worker.
    :param environment: added to our own.
    :param folders: more places to import the application from.
    :param arguments: more of gunicorn's own options.
    """

    def __init__(
        self,
        application: str,
        folder: Path,
        *,
        worker_class: str = "sync",
        workers: int = 2,
        threads: int = 1,
        preload: bool = False,
        timeout: int = 60,
        environment: Mapping[str, str] | None = None,
        folders: Iterable[Path] = (),
        arguments: Iterable[str] = (),
    ) -> None:
        # The port is ours before gunicorn starts: none is free for sure once it was looked for.
        listener = socket.create_server(("127.0.0.1", 0))
        self.address: Address = listener.getsockname()
        self.workers = workers
        self.log = folder / "gunicorn.log"
        configuration = folder / "gunicorn.conf.py"
        configuration.write_text(GUNICORN_CONFIGURATION)
        command = [
            sys.executable, "-m", "gunicorn", application,
            "--config", configuration,
            "--bind", f"fd://{listener.fileno()}",
            "--worker-class", worker_class,
            "--workers", str(workers),
            "--threads", str(threads),
            "--timeout", str(timeout),
            *(["--preload"] if preload else []),
            *arguments,
        ]  # fmt: skip
        path = [TESTS, *folders, *filter(None, [os.environ.get("PYTHONPATH")])]
        with listener, self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Not the checkout: gunicorn imports from its working directory first.
                cwd=folder,
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(map(str, path)),
                    **(environment or {}),
                },
                start_new_session=True,
                pass_fds=[listener.fileno()],
            )
        self._watchdog = Watchdog(KILL_GROUP, str(self.process.pid))
        try:
            self._wait_until_ready()
        except BaseException:
            self.kill()
            raise

    @property
    def pid(self) -> int:
        """The process id of gunicorn's arbiter, and of its process group."""
        return self.process.pid

    @property
    def worker_pids(self) -> list[int]:
        """The process ids of every worker that has ever been ready, in order."""
        return [int(pid) for pid in re.findall(r"Worker ready \(pid: (\d+)\)", self.log_text())]

    @property
    def url(self) -> str:
        """Without a slash at the end."""
        return "http://{}:{}".format(*self.address)

    def log_text(self) -> str:
        """What gunicorn and its workers wrote."""
        return self.log.read_text(errors="replace")

    def stop(self) -> None:
        """Stop gracefully, as a deployment does; by force after 30 seconds."""
        if self.process.poll() is None:
            self._wait_until_complete()
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(30)
        self.kill()

    def kill(self) -> None:
        """Kill arbiter and workers at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._watchdog.dismiss()

    def _wait_until_complete(self) -> None:
        """Wait for the workers that replace killed ones: one that doesn't handle signals yet
        loses the request to end, and gunicorn gives it 30 seconds to follow it."""
        deadline = time.monotonic() + START_TIMEOUT
        while self.process.poll() is None and time.monotonic() < deadline:
            if sum(map(is_running, set(self.worker_pids))) >= self.workers:
                return
            time.sleep(0.02)

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT
        while len(self.worker_pids) < self.workers:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"gunicorn did not start:\n{self.log_text()}")
            time.sleep(0.02)

    def __enter__(self) -> Gunicorn:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()


def is_running(pid: int) -> bool:
    """Whether there is such a process, and it hasn't ended."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/cmdline").read_bytes() != b""
    return False


@contextmanager
def waitress(application: WSGIApplication, *, threads: int = 8) -> Iterator[Address]:
    """Serve with waitress, in this process."""
    from waitress import wasyncore
    from waitress.server import create_server

    server = create_server(application, host="127.0.0.1", port=0, threads=threads)

    served: dict[int, object] = {}

    def end() -> None:
        # Closed is later: what pulls the trigger may not be done with it.
        served.update(server._map)
        server._map.clear()

    with running(server.run, lambda: server.trigger.pull_trigger(end)):
        yield "127.0.0.1", server.effective_port
    server.task_dispatcher.shutdown()
    # close_all() closes the sockets alone, not what is buffered for them on disk.
    for channel in list(server.active_channels.values()):
        channel.handle_close()
    wasyncore.close_all(served)


@contextmanager
def cheroot(application: WSGIApplication, *, threads: int = 8) -> Iterator[Address]:
    """Serve with cheroot, in this process."""
    from cheroot.wsgi import Server

    server = Server(("127.0.0.1", 0), application, numthreads=threads, shutdown_timeout=5)
    server.prepare()
    with running(server.serve, server.stop):
        yield server.bind_addr


@contextmanager
def werkzeug(application: WSGIApplication, *, threads: int = 8) -> Iterator[Address]:
    """Serve with werkzeug's development server, a thread for each request, in this process."""
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Handler(WSGIRequestHandler):
        def log(self, type: str, message: str, *arguments: object) -> None:
            """Keep the tests' output quiet."""

    server = make_server("127.0.0.1", 0, application, threaded=threads > 1, request_handler=Handler)
    with running(server.serve_forever, server.shutdown), contextlib.closing(server.socket):
        yield "127.0.0.1", server.server_port


@contextmanager
def wsgiref(application: WSGIApplication, *, threads: int = 8) -> Iterator[Address]:
    """Serve with wsgiref, a thread for each request, in this process."""
    from socketserver import ThreadingMixIn
    from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

    class Handler(WSGIRequestHandler):
        def log_message(self, format: str, *arguments: object) -> None:
            """Keep the tests' output quiet."""

    class Threaded(ThreadingMixIn, WSGIServer):
        daemon_threads = True

    kind = Threaded if threads > 1 else WSGIServer
    server = make_server("127.0.0.1", 0, application, kind, Handler)
    with running(server.serve_forever, server.shutdown), contextlib.closing(server.socket):
        yield "127.0.0.1", server.server_port


#: Servers that run in a thread of this process, by name.
IN_PROCESS = {
    "waitress": waitress,
    "cheroot": cheroot,
    "werkzeug": werkzeug,
    "wsgiref": wsgiref,
}


@contextmanager
def running(serve: Callable[[], object], stop: Callable[[], object]) -> Iterator[None]:
    """Run a server's loop in a thread for as long as the context lasts."""
    thread = threading.Thread(target=serve, name="server")
    thread.start()
    try:
        yield
    finally:
        stop()
        thread.join(30)
        assert not thread.is_alive(), "the server's loop did not end"


@dataclass(frozen=True)
class Response:
    """A response as it came over the wire.

    :param version: ``"HTTP/1.1"``.
    :param headers: in order, with duplicates and case.
    :param body: decoded, if it was chunked.
    """

    version: str
    status: int
    reason: str
    headers: tuple[tuple[str, str], ...]
    body: bytes

    def all(self, name: str) -> list[str]:
        """Every value of a field, in order."""
        return [value for found, value in self.headers if found.lower() == name.lower()]

    def header(self, name: str) -> str | None:
        """The value of a field that comes once; None when it doesn't come."""
        values = self.all(name)
        assert len(values) <= 1, f"{name} came {len(values)} times"
        return values[0] if values else None


class Connection:
    """One connection to a server, on which bytes are sent as they are given.

    :param timeout: seconds to wait for any single read or write.
    """

    def __init__(self, address: Address, *, timeout: float = 30) -> None:
        self.socket = socket.create_connection(address, timeout)
        self._reader = self.socket.makefile("rb")

    def send(self, data: bytes) -> None:
        """Send bytes, none added, none changed."""
        self.socket.sendall(data)

    def receive(self, method: str = "POST") -> Response:
        """Read one response, interim ones passed over.

        :param method: of the request it answers; a response to HEAD has no body.
        :raises ConnectionError: the connection ended before the response did.
        """
        while True:
            version, status, reason = self._status_line()
            headers = tuple(self._headers())
            if status >= 200:
                break
        response = Response(version, status, reason, headers, b"")
        if method == "HEAD" or status in (204, 304):
            return response
        return Response(version, status, reason, headers, self._body(response))

    def request(
        self,
        method: str,
        target: str,
        headers: Iterable[tuple[str, str]] = (),
        body: bytes | None = None,
    ) -> Response:
        """Send a request and read its response."""
        self.send(request_bytes(method, target, headers, body))
        return self.receive(method)

    def at_end(self) -> bool:
        """Whether the server has ended the connection and sent nothing more; waits for either."""
        try:
            return not self._reader.peek(1)
        except ConnectionResetError:
            return True

    def abort(self) -> None:
        """Reset the connection, as a client that dies does."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._reader.close()
        self.socket.close()

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _status_line(self) -> tuple[str, int, str]:
        version, status, *reason = self._line().split(" ", 2)
        return version, int(status), "".join(reason)

    def _headers(self) -> Iterator[tuple[str, str]]:
        while line := self._line():
            name, _, value = line.partition(":")
            yield name, value.strip(" \t")

    def _body(self, response: Response) -> bytes:
        if "chunked" in response.all("Transfer-Encoding"):
            return b"".join(self._chunks())
        length = response.header("Content-Length")
        return self._reader.read() if length is None else self._exactly(int(length))

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self._line().partition(";")[0], 16):
            yield self._exactly(size)
            assert self._line() == "", "a chunk is longer than it said"
        for _ in self._headers():  # trailers
            pass

    def _line(self) -> str:
        line = self._reader.readline()
        if not line.endswith(b"\r\n"):
            raise ConnectionError(f"the connection ended within {line!r}")
        return line[:-2].decode("latin-1")

    def _exactly(self, size: int) -> bytes:
        data = self._reader.read(size)
        if len(data) < size:
            raise ConnectionError(f"the connection ended after {len(data)} of {size} bytes")
        return data


def request_bytes(
    method: str,
    target: str,
    headers: Iterable[tuple[str, str]] = (),
    body: bytes | None = None,
) -> bytes:
    """A request, with Host, and with Content-Length if there is a body."""
    fields = [("Host", "localhost"), *headers]
    if body is not None:
        fields.append(("Content-Length", str(len(body))))
    lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in fields)]
    return "".join(f"{line}\r\n" for line in lines).encode("latin-1") + b"\r\n" + (body or b"")


def chunked(*pieces: bytes) -> bytes:
    """A body in the chunked coding, to follow a ``Transfer-Encoding: chunked`` header."""
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in [*pieces, b""])
