"""A TCP proxy that loses the first answers, as a network does at the worst moment."""

from __future__ import annotations

import contextlib
import selectors
import socket
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, final

from servers.proxy import ThreadingProxy

#: What becomes of an answer: the connection is reset before its first byte; it ends before the
#: answer's last bytes; or nothing comes until the client has had enough.
Fault = Literal["reset", "truncated", "delayed"]


@dataclass
class Conversation:
    """What one connection carried.

    :ivar fault: what became of the answer; None when the client got it.
    :ivar request: the bytes the client sent, forwarded upstream.
    :ivar answer: the bytes upstream sent.
    """

    fault: Fault | None = None
    request: bytearray = field(default_factory=bytearray)
    answer: bytearray = field(default_factory=bytearray)

    @property
    def cut(self) -> bool:
        """Whether the client did not get the answer."""
        return self.fault is not None

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
    """Forwards to a server; on its first connections the server's answer is lost.

    The request reaches the server and the server's answer reaches the proxy, so the
    server has done its work and believes it has replied.

    :param upstream: host and port of the server.
    :param cuts: how many connections to reset; later ones are carried to their end.
    :param faults: what befalls the first connections, in order, instead.
    """

    def __init__(
        self, upstream: tuple[str, int], *, cuts: int = 1, faults: Sequence[Fault] | None = None
    ) -> None:
        super().__init__(upstream)
        self.conversations: list[Conversation] = []
        self._faults: Sequence[Fault] = ["reset"] * cuts if faults is None else faults

    @property
    def url(self) -> str:
        return "http://{}:{}".format(*self.address)

    def carrier(self, client: socket.socket) -> Callable[[], None]:
        number = len(self.conversations)
        fault = self._faults[number] if number < len(self._faults) else None
        conversation = Conversation(fault)
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
                    if conversation.fault is None:
                        client.sendall(data)
                    elif conversation.fault == "delayed":
                        if not data:
                            selector.unregister(server)
                            continue  # until the client hangs up
                    elif self._cut(client, conversation):
                        return
                else:
                    return
                if not data:
                    return

    def _cut(self, client: socket.socket, conversation: Conversation) -> bool:
        """Lose the answer, as soon as there is enough of it to lose."""
        if conversation.fault == "reset":
            # Lingering for no time at all makes close() send a reset.
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return True
        body = bytes(conversation.answer).partition(b"\r\n\r\n")[2]
        if len(body) > 5:
            client.sendall(conversation.answer[:-5])
        return len(body) > 5
