"""uWSGI, which has a WSGI server of its own in C."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sysconfig
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from servers import KILL_GROUP, Watchdog
from servers.http import TESTS, Address, Connection

#: Where the wheel puts it; None where it isn't installed.
PROGRAM = next(
    (str(path) for path in [Path(sysconfig.get_path("scripts")) / "pyuwsgi"] if path.exists()),
    None,
)


@contextmanager
def uwsgi(
    application: str, folder: Path, *, workers: int = 2, environment: Mapping[str, str]
) -> Iterator[Address]:
    """Serve with uWSGI, in a session of its own.

    Its master loads the application and forks the workers afterwards.

    :param application: ``"module:name"``; looked for in ``tests/``.
    :param folder: where its log goes.
    :param environment: added to our own.
    """
    assert PROGRAM is not None, "pyuwsgi is not installed"
    listener = socket.create_server(("127.0.0.1", 0))
    address: Address = listener.getsockname()
    command = [
        PROGRAM,
        "--http-socket", f"fd://{listener.fileno()}",
        "--module", application,
        "--master", "--need-app", "--die-on-term",
        "--processes", str(workers),
        # A request head of more than 4 KiB is refused without a word otherwise.
        "--buffer-size", "32768",
    ]  # fmt: skip
    path = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    log = folder / "uwsgi.log"
    with listener, log.open("wb") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path), **environment},
            start_new_session=True,
            pass_fds=[listener.fileno()],
        )
    watchdog = Watchdog(KILL_GROUP, str(process.pid))
    try:
        # The socket listens already; its first answer says that a worker is ready.
        try:
            with Connection(address) as connection:
                connection.request("GET", "/")
        except OSError as exc:
            raise RuntimeError(f"uWSGI did not start:\n{log.read_text()}") from exc
        yield address
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        watchdog.dismiss()
