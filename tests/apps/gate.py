"""A gate at which a handler waits, in whatever process it runs, until a test lets it pass."""

from __future__ import annotations

import json
import socket
from dataclasses import dataclass
from typing import Any

PATIENCE = 30  # seconds that either side waits for the other


def wait_at(address: str, said: dict[str, Any]) -> str:
    """Tell the test who we are, and wait for its word; the handler's side.

    :param address: ``host:port`` of the gate.
    :returns: what the test said, or nothing when it is gone.
    """
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), PATIENCE) as connection:
        connection.sendall(json.dumps(said).encode() + b"\n")
        with connection.makefile("r") as reader:
            return reader.readline().strip()


@dataclass(frozen=True)
class Waiting:
    """A handler that waits at the gate.

    :param pid: of the process it runs in.
    :param attempt: which attempt at its operation it is; None without one.
    """

    pid: int
    attempt: int | None
    _connection: socket.socket

    def let_pass(self, status: str = "") -> None:
        """Let the handler go on.

        :param status: the status line it is to answer with, instead of the one it has.
        """
        self._connection.sendall(status.encode() + b"\n")


class Gate:
    """Where handlers wait; the test's side."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self._connections: list[socket.socket] = []

    @property
    def address(self) -> str:
        return "{}:{}".format(*self._listener.getsockname())

    def arrival(self, timeout: float = PATIENCE) -> Waiting:
        """The next handler that arrives.

        :raises TimeoutError: none does.
        """
        self._listener.settimeout(timeout)
        connection, _ = self._listener.accept()
        self._connections.append(connection)
        connection.settimeout(PATIENCE)
        with connection.makefile("r") as reader:
            said = json.loads(reader.readline())
        return Waiting(said["pid"], said["attempt"], connection)

    def __enter__(self) -> Gate:
        return self

    def __exit__(self, *exc_info: object) -> None:
        for sock in (self._listener, *self._connections):
            sock.close()
