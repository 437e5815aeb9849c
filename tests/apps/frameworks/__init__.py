"""The examples, with views added that read a body in each way and answer in each way.

A view notes each of its runs in the file that the environment variable RUNS names.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator


def ran(key: str) -> None:
    """Note a run: one write to a file opened for appending is one line."""
    file = os.open(os.environ["RUNS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(file, key.encode() + b"\n")
    finally:
        os.close(file)


def digest(pieces: Iterable[bytes]) -> str:
    made = hashlib.sha256()
    for piece in pieces:
        made.update(piece)
    return made.hexdigest()


def in_pieces(stream) -> Iterator[bytes]:
    """Read as one does that knows no length."""
    while piece := stream.read(1000):
        yield piece


def by_line(stream) -> Iterator[bytes]:
    while line := stream.readline():
        yield line


#: How the bytes of a body can be read from a file-like object.
WAYS = {
    "read": lambda stream: [stream.read()],
    "read-n": in_pieces,
    "readline": by_line,
    "iteration": iter,
}


def streamed() -> Iterator[bytes]:
    for number in range(100):
        yield b"line %d of a report\n" % number
