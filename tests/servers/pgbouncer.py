"""A private PgBouncer in transaction mode, in front of a PostgreSQL server of the tests.

It comes from the machine (Debian: ``apt-get install pgbouncer``); PyPI has none.
``WSGI_IDEMPOTENCY_TEST_PGBOUNCER`` names a program elsewhere.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

from servers import KILL_GROUP, Watchdog, free_port
from servers.postgres import unprivileged_user

PROGRAM_VARIABLE = "WSGI_IDEMPOTENCY_TEST_PGBOUNCER"

START_TIMEOUT = 15  # seconds

#: Why there is none, and what to do.
MISSING = (
    "there is no pgbouncer on this machine: install it (Debian: apt-get install pgbouncer) or"
    f" name the program in {PROGRAM_VARIABLE}"
)

#: The first release that carries prepared statements over in transaction mode, if it is
#: told how many (PgBouncer's NEWS, 1.21.0).
PREPARES_FROM = (1, 21)

CONFIGURATION = """
[databases]
* = host={host} port={port} user=postgres

[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {listen}
unix_socket_dir =
auth_type = any
pool_mode = transaction
default_pool_size = {pool_size}
max_client_conn = 500
server_reset_query =
server_login_retry = 1
logfile = {folder}/log
pidfile = {folder}/pid
{more}
"""


def find_pgbouncer() -> str | None:
    """The program; None when there is none. Debian keeps it where not everybody's PATH looks."""
    named = os.environ.get(PROGRAM_VARIABLE)
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])
    return shutil.which(named or "pgbouncer", path=path)


class PgBouncer:
    """A pooler in transaction mode.

    :param upstream: host and port of the PostgreSQL server.
    :param pool_size: connections to the server, for each database.
    :param prepared: how many prepared statements it carries over; 0 for none. Only for
        releases from 1.21.
    :raises RuntimeError: there is no program; the message says how to get it.
    """

    def __init__(
        self, upstream: tuple[str, int], *, pool_size: int = 20, prepared: int = 0
    ) -> None:
        program = find_pgbouncer()
        if program is None:
            raise RuntimeError(MISSING)
        self._program = program
        self._user = unprivileged_user()
        self.address = ("127.0.0.1", free_port())
        self.folder = Path(tempfile.mkdtemp(prefix="pgbouncer-"))
        self._configuration = self.folder / "pgbouncer.ini"
        self._configuration.write_text(
            CONFIGURATION.format(
                host=upstream[0],
                port=upstream[1],
                listen=self.address[1],
                pool_size=pool_size,
                folder=self.folder,
                more=f"max_prepared_statements = {prepared}" if prepared else "",
            )
        )
        if self._user is not None:
            shutil.chown(self.folder, self._user, pwd.getpwnam(self._user).pw_gid)
        self.start()

    @property
    def version(self) -> tuple[int, ...]:
        """As the program says it, ``(1, 18, 0)``."""
        said = subprocess.run([self._program, "--version"], capture_output=True, text=True).stdout
        found = re.search(r"PgBouncer (\d+(?:\.\d+)*)", said)
        assert found is not None, said
        return tuple(map(int, found[1].split(".")))

    @property
    def pid(self) -> int:
        return self._process.pid

    def start(self) -> None:
        """Start, and wait until connections are accepted."""
        self._process = subprocess.Popen(
            [self._program, "-q", self._configuration],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=self.folder,
            user=self._user,
            start_new_session=True,
        )
        self._watchdog = Watchdog(KILL_GROUP, str(self.pid))
        deadline = time.monotonic() + START_TIMEOUT
        while True:
            with contextlib.suppress(OSError), socket.create_connection(self.address, 1):
                return
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                log = self.folder / "log"
                raise RuntimeError(
                    f"pgbouncer did not start:\n{log.read_text() if log.exists() else ''}"
                )
            time.sleep(0.02)

    def kill(self) -> None:
        """Kill it at once; every connection through it is gone."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        self._watchdog.dismiss()

    def close(self) -> None:
        """Kill it and leave nothing behind."""
        self.kill()
        shutil.rmtree(self.folder)

    def __enter__(self) -> PgBouncer:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
