"""What a process has to leave to its parent once it was forked: connections, threads, locks.

Python calls the hooks of :func:`os.register_at_fork` only in children made by its own
``os.fork()``. uWSGI's master forks in C and calls none, unless it was started with
``--py-call-osafterfork``: there a child finds out by its process id.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

_hooks: list[Callable[[], None]] = []
_noticed = os.getpid()
_turns: dict[int, threading.Lock] = {}


def in_child(hook: Callable[[], None]) -> None:
    """Have ``hook`` called in each forked child, before it does anything of ours."""
    _hooks.append(hook)


def notice() -> None:
    """Call the hooks if this process was forked since, and Python wasn't told.

    To be called before anything is used that a child must not share.
    """
    pid = os.getpid()
    if pid == _noticed:
        return
    # A lock of this process's own: any older one may be held by a thread of the parent's.
    with _turns.setdefault(pid, threading.Lock()):
        if pid != _noticed:
            _forked()


def _forked() -> None:
    global _noticed
    for hook in _hooks:
        hook()
    _noticed = os.getpid()


os.register_at_fork(after_in_child=_forked)
