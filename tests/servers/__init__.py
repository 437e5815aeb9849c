"""Real servers for the tests: PostgreSQL, and the WSGI servers that people deploy."""

from __future__ import annotations

import random
import socket
import subprocess
from pathlib import Path
from types import TracebackType

FIRST_PORT, LAST_PORT = 20_000, 32_000


def free_port() -> int:
    """A loopback port nobody listens on.

    It lies below the range from which the kernel takes the ports of outgoing connections,
    so that none of the tests' own connections can occupy it while a server restarts.
    """
    while True:
        port = random.randint(FIRST_PORT, LAST_PORT)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port


class Watchdog:
    """Runs a shell script as soon as this process is gone, even by SIGKILL.

    The script waits for the end of a pipe that only this process writes to. It runs in a
    session of its own, so that an interrupt from the terminal doesn't reach it.

    :param script: what to run; ``$1``, ``$2``… are the arguments.
    :param user: the name of the user to run it as; None for our own.
    """

    def __init__(self, script: str, *arguments: str | Path, user: str | None = None) -> None:
        self._process = subprocess.Popen(
            ["/bin/sh", "-c", f"cat >/dev/null; {script}", "watchdog", *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,
            user=user,
        )

    def fire(self) -> None:
        """Run the script now, and wait for its end."""
        self._process.communicate()

    def dismiss(self) -> None:
        """End the watchdog without running its script."""
        with self._process:
            self._process.kill()

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.dismiss()
