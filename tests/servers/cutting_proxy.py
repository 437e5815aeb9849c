"""A TCP proxy that loses the first answer, as a network does at the worst moment."""

from __future__ import annotations

import contextlib
import selectors
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import final

from servers.proxy import ThreadingProxy


@dataclass
class Conversation:
    """What one connection carried.

    :ivar request: the bytes the client sent, forwarded upstream.
    :ivar answer: the bytes upstream sent.
    :ivar cut: the answer was withheld and the client's connection reset.
    """

    request: bytearray = field(default_factory=bytearray)
    answer: bytearray = field(default_factory=bytearray)
    cut: bool = False

    def header(self, name: str) -> str | None:
        """A header of the request, or None when it has none of that name."""
        head = bytes(self.request).partition(b"\r\n\r\n")[0].decode("latin-1")
        for line in head.split("\r\n")[1:]:
            field_name, _, value = line.partition(":")
            if field_name.lower() == name.lower():
                return value.strip()
        return None


@final
class CuttingProxy(ThreadingProxy):
    """Forwards to a server; its first connections are reset once upstream has answered.

    The request reaches the server and the server's answer reaches the proxy, so the
    server has done its work and believes it has replied. The client sees a reset.

    :param upstream: host and port of the server.
    :param cuts: how many connections to reset; later ones are carried to their end.
    """

    def __init__(self, upstream: tuple[str, int], *, cuts: int = 1) -> None:
        super().__init__(upstream)
        self.conversations: list[Conversation] = []
        self._cuts = cuts

    @property
    def url(self) -> str:
        return "http://{}:{}".format(*self.address)

    def carrier(self, client: socket.socket) -> Callable[[], None]:
        conversation = Conversation(cut=len(self.conversations) < self._cuts)
        self.conversations.append(conversation)
        return partial(self._carry, client, conversation)

    def _carry(self, client: socket.socket, conversation: Conversation) -> None:
        with (
            client,
            socket.create_connection(self.upstream) as server,
            contextlib.suppress(ConnectionError),  # either side may hang up on us, too
        ):
            self._exchange(client, server, conversation)

    def _exchange(
        self, client: socket.socket, server: socket.socket, conversation: Conversation
    ) -> None:
        with selectors.DefaultSelector() as selector:
            for sock in (client, server, self._woken):
                selector.register(sock, selectors.EVENT_READ)
            while True:
                ready = [key.fileobj for key, _ in selector.select()]
                if client in ready:
                    data = client.recv(65536)
                    conversation.request += data
                    server.sendall(data)
                elif server in ready:
                    data = server.recv(65536)
                    conversation.answer += data
                    if conversation.cut:
                        # Lingering for no time at all makes close() send a reset.
                        client.setsockopt(
                            socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
                        )
                        return
                    client.sendall(data)
                else:
                    return
                if not data:
                    return
