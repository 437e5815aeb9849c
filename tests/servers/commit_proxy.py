"""A proxy before PostgreSQL that loses the connection at the worst moment of a transaction."""

from __future__ import annotations

import contextlib
import selectors
import socket
from collections.abc import Callable
from functools import partial
from typing import Literal, final

from servers.proxy import ThreadingProxy


@final
class CommitProxy(ThreadingProxy):
    """Forwards to PostgreSQL; connections are cut at their COMMIT.

    :param upstream: host and port of the server.
    :param cut: ``"before"`` the server gets the COMMIT, ``"after"`` it has answered it, or
        ``"withheld"``: the client is cut off, and the server waits for the COMMIT until
        :meth:`let_go`.
    :param cuts: how many COMMITs to cut; later ones are carried.
    :param then_deaf: once it has cut, it carries nothing any more.
    """

    def __init__(
        self,
        upstream: tuple[str, int],
        cut: Literal["before", "after", "withheld"],
        *,
        cuts: int = 1,
        then_deaf: bool = False,
    ) -> None:
        super().__init__(upstream)
        self._cut = cut
        self._cuts = cuts
        self._then_deaf = then_deaf
        self._go, self._gone = socket.socketpair()
        self._commits = False

    def let_go(self, *, commits: bool) -> None:
        """End a transaction whose COMMIT was withheld.

        :param commits: hand the COMMIT on; otherwise the server sees its client go.
        """
        self._commits = commits
        self._go.send(b"\0")

    def __exit__(self, *exc_info: object) -> None:
        super().__exit__(*exc_info)
        self._go.close()
        self._gone.close()

    @property
    def _deaf(self) -> bool:
        return self._then_deaf and not self._cuts

    def carrier(self, client: socket.socket) -> Callable[[], None]:
        return client.close if self._deaf else partial(self._carry, client)

    def _carry(self, client: socket.socket) -> None:
        with (
            client,
            socket.create_connection(self.upstream) as server,
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
                    if self._cut == "withheld":
                        client.close()
                        self._withhold(server, data)
                        return
                if source is server and cutting:
                    return
                target.sendall(data)

    def _withhold(self, server: socket.socket, commit: bytes) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._gone, selectors.EVENT_READ)
            selector.register(self._woken, selectors.EVENT_READ)
            selector.select()
        if self._commits:
            server.sendall(commit)
            server.recv(65536)
