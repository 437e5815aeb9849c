"""What the TCP proxies have in common that lose an answer at a chosen moment."""

from __future__ import annotations

import abc
import selectors
import socket
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Self


class ThreadingProxy(abc.ABC):
    """Accepts connections, and carries each in a thread, until it is left.

    :param upstream: host and port of the server.
    """

    def __init__(self, upstream: tuple[str, int]) -> None:
        self.upstream = upstream
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = self._listener.getsockname()
        self._wake, self._woken = socket.socketpair()
        self._threads = [threading.Thread(target=self._accept)]

    @abc.abstractmethod
    def carrier(self, client: socket.socket) -> Callable[[], None]:
        """What carries a connection that was accepted, to be called in a thread."""

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        # One byte that nobody reads: readable for every thread, accepting or carrying.
        self._wake.send(b"\0")
        for thread in self._threads:
            thread.join()
        for sock in (self._listener, self._wake, self._woken):
            sock.close()

    def _accept(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._woken, selectors.EVENT_READ)
            while self._woken not in [key.fileobj for key, _ in selector.select()]:
                client, _ = self._listener.accept()
                thread = threading.Thread(target=self.carrier(client))
                self._threads.append(thread)
                thread.start()
