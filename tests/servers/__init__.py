"""Real servers for the tests: PostgreSQL, and the WSGI servers that people deploy."""

from __future__ import annotations

import fcntl
import functools
import os
import random
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TypeVar

_Text = TypeVar("_Text", str, bytes)

FIRST_PORT, LAST_PORT = 20_000, 32_000

#: The ports that this process has been given.
ours: set[int] = set()


def free_port() -> int:
    """A loopback port nobody listens on.

    No other process is given it from here for as long as ours lives, so that a server may
    leave it and come back. It lies below the range from which the kernel takes the ports of
    outgoing connections, so that none of the tests' own connections can occupy it meanwhile.
    """
    while True:
        port = random.randint(FIRST_PORT, LAST_PORT)
        if port not in ours and is_free(port) and lock(port):
            ours.add(port)
            return port


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def lock(port: int) -> bool:
    """Lock the port's byte of a file, which the kernel unlocks when the process ends."""
    try:
        fcntl.lockf(locks(), fcntl.LOCK_EX | fcntl.LOCK_NB, 1, port)
    except OSError:
        return False
    return True


@functools.cache
def locks() -> BinaryIO:
    return Path(tempfile.gettempdir(), f"wsgi-idempotency-ports-{os.geteuid()}").open("ab")


#: For a watchdog: kill the process group ``$1``. Debian's sh takes no -- behind -KILL.
KILL_GROUP = 'kill -s KILL -- "-$1"'


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

    def __exit__(self, *exc_info: object) -> None:
        self.dismiss()


@contextmanager
def ended(
    process: subprocess.Popen[_Text], *, by: str = "KILL"
) -> Iterator[subprocess.Popen[_Text]]:
    """End a process that would go on by itself: at the end of the context, or when this process
    is gone.

    :param by: the signal; TERM for a command that has to end others.
    """
    with Watchdog('kill -s "$1" "$2"', by, str(process.pid)), process:
        try:
            yield process
        finally:
            process.send_signal(getattr(signal, f"SIG{by}"))
