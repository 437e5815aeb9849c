"""A temporary file that closes itself in silence."""

from __future__ import annotations

import io
import os
import tempfile


class Spool(io.BufferedRandom):
    """A real file, since ``SpooledTemporaryFile`` is not a full stream before Python 3.11.

    Nobody can tell when an application or a server has read its last byte, so it is closed
    when the last reference goes, without the ResourceWarning of a forgotten file.
    """

    @classmethod
    def new(cls) -> Spool:
        """An empty one."""
        with tempfile.TemporaryFile(buffering=0) as named:
            return cls(_Descriptor(os.dup(named.fileno()), "r+"))

    def __del__(self) -> None:
        self.close()


class _Descriptor(io.FileIO):
    """What is below the buffer. In a reference cycle (a traceback is one) it may be
    finalized first, so it too has to close itself in silence."""

    def __del__(self) -> None:
        self.close()
