"""A proxy before PostgreSQL that loses the connection at the worst moment of a transaction."""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
from types import TracebackType
from typing import Literal, final


@final
class CommitProxy:
    """Forwards to PostgreSQL; connections are cut at their COMMIT.

    :param upstream: host and port of the server.
    :param cut: ``"before"`` the server gets the COMMIT, ``"after"`` it has answered it.
    :param cuts: how many COMMITs to cut; later ones are carried.
    :param then_deaf: once it has cut, it carries nothing any more.
    """

    def __init__(
        self,
        upstream: tuple[str, int],
        cut: Literal["before", "after"],
        *,
        cuts: int = 1,
        then_deaf: bool = False,
    ) -> None:
        self._upstream = upstream
        self._cut = cut
        self._cuts = cuts
        self._then_deaf = then_deaf
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._wake, self._woken = socket.socketpair()
        self._threads = [threading.Thread(target=self._accept)]

    @property
    def port(self) -> int:
        port: int = self._listener.getsockname()[1]
        return port

    def __enter__(self) -> CommitProxy:
        self._threads[0].start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._wake.send(b"\0")  # nobody reads it: readable for every thread
        for thread in self._threads:
            thread.join()
        for sock in (self._listener, self._wake, self._woken):
            sock.close()

    @property
    def _deaf(self) -> bool:
        return self._then_deaf and not self._cuts

    def _accept(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._woken, selectors.EVENT_READ)
            while self._woken not in [key.fileobj for key, _ in selector.select()]:
                client, _ = self._listener.accept()
                if self._deaf:
                    client.close()
                    continue
                thread = threading.Thread(target=self._carry, args=(client,))
                self._threads.append(thread)
                thread.start()

    def _carry(self, client: socket.socket) -> None:
        with (
            client,
            socket.create_connection(self._upstream) as server,
            contextlib.suppress(ConnectionError),
            selectors.DefaultSelector() as selector,
        ):
            for sock in (client, server, self._woken):
                selector.register(sock, selectors.EVENT_READ)
            cutting = False
            while True:
                ready = [key.fileobj for key, _ in selector.select()]
                if self._woken in ready:
                    return
                source, target = (client, server) if client in ready else (server, client)
                data = source.recv(65536)
                if not data or (self._deaf and not cutting):
                    return
                if source is client and b"COMMIT" in data and self._cuts:
                    self._cuts -= 1
                    cutting = True
                    if self._cut == "before":
                        return
                if source is server and cutting:
                    return
                target.sendall(data)
