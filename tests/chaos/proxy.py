"""A TCP proxy that resets its connections, or stands still, when it is told to."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from typing import final

#: Lingering for no time at all makes close() send a reset.
RESET = b"\1\0\0\0\0\0\0\0"


@final
class Proxy:
    """Carries connections to a server, whole, until something is done to them."""

    def __init__(self, upstream: tuple[str, int]) -> None:
        self._upstream = upstream
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.address: tuple[str, int] = self._listener.getsockname()
        self._loop = asyncio.new_event_loop()
        self._live: set[asyncio.StreamWriter] = set()
        self._moving = asyncio.Event()
        self._moving.set()
        self._over = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),))

    def reset(self) -> None:
        """Reset every connection there is, towards both ends."""
        self._loop.call_soon_threadsafe(self._reset)

    def freeze(self) -> None:
        """Carry nothing any more, as a network that has lost its way; connections stay."""
        self._loop.call_soon_threadsafe(self._moving.clear)

    def thaw(self) -> None:
        """Carry again, first what was held back."""
        self._loop.call_soon_threadsafe(self._moving.set)

    def __enter__(self) -> Proxy:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join()
        self._loop.close()

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._carry, sock=self._listener)
        await self._over.wait()
        server.close()
        self._reset()
        carrying = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in carrying:
            task.cancel()
        await asyncio.gather(*carrying, return_exceptions=True)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._live.add(writer)
        there = None
        try:
            await self._moving.wait()
            upstream, there = await asyncio.open_connection(*self._upstream)
            self._live.add(there)
            await asyncio.gather(self._pump(reader, there), self._pump(upstream, writer))
        except OSError:
            self._cut(writer)
            if there is not None:
                self._cut(there)
        finally:
            for end in filter(None, (writer, there)):
                self._live.discard(end)
                end.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            await self._moving.wait()
            writer.write(data)
            await writer.drain()
        writer.close()

    def _reset(self) -> None:
        for writer in list(self._live):
            self._cut(writer)

    @staticmethod
    def _cut(writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        writer.transport.abort()
