"""What the commands have in common: the database they are for, and what they say of one that
can't be used."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click

from wsgi_idempotency.errors import ConfigurationError, SchemaError, StoreUnavailable
from wsgi_idempotency.schema import DATABASE_VARIABLE

if TYPE_CHECKING:
    from sqlalchemy import URL

    from wsgi_idempotency.stores.sql import SQLStore


EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it


def usable_database(ctx: click.Context, param: click.Parameter, value: str | None) -> URL:
    from wsgi_idempotency.stores.sql import database_url

    if value is None:
        raise click.UsageError(
            f"Which database? Give --database URL or set {DATABASE_VARIABLE}, to one like"
            " postgresql://user@host/name or sqlite:////srv/shop/keys.db",
            ctx,
        )
    try:
        return database_url(value)
    except ConfigurationError as exc:
        raise click.BadParameter(str(exc), ctx, param) from exc


def seconds(ctx: click.Context, param: click.Parameter, value: float) -> float:
    if not 0 <= value <= 3600:
        raise click.BadParameter(f"{value} is not from 0 to 3600 seconds", ctx, param)
    return value


def duration(ctx: click.Context, param: click.Parameter, value: str) -> float:
    """Seconds, of a text as in settings: ``90``, ``15 min``, ``7 days``."""
    from wsgi_idempotency import settings

    try:
        return settings.duration("it", value)
    except ConfigurationError as exc:
        raise click.BadParameter(str(exc), ctx, param) from exc


def pause(ctx: click.Context, param: click.Parameter, value: str) -> float:
    """Seconds between two rounds of a service, which is not to ask a database without a rest."""
    found = duration(ctx, param, value)
    if not 1 <= found <= 30 * 86400:
        raise click.BadParameter(f"{value} is not from 1 s to 30 days", ctx, param)
    return found


def observers_of(ctx: click.Context, param: click.Parameter, value: str | None) -> list[Any]:
    from wsgi_idempotency.settings import load_observers

    if value is None:
        return []
    try:
        return load_observers("it", value)
    except ConfigurationError as exc:
        raise click.BadParameter(str(exc), ctx, param) from exc


def import_from_here() -> None:
    """Let modules that a user names be found where they stand, which a command's own path
    leaves out."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")

observers_option = click.option(
    "--on-event",
    metavar="NAMES",
    callback=observers_of,
    help="Tell these observers: logging, prometheus, opentelemetry, or module:name.",
)

database_option = click.option(
    "--database",
    metavar="URL",
    envvar=DATABASE_VARIABLE,
    show_envvar=True,
    callback=usable_database,
    help="The database, as postgresql://user@host/name or sqlite:////path/to/file.",
)


@contextlib.contextmanager
def store_of(database: URL, timeout: float = 60.0) -> Iterator[SQLStore]:
    """The store in a database that has our schema, and what to do about one that hasn't.

    :param timeout: seconds a statement may take. Nobody waits for it, unlike for a request.
    """
    from wsgi_idempotency.checkup import sqlite_file_exists
    from wsgi_idempotency.stores.sql import SQLStore

    sqlite = database.get_backend_name() == "sqlite"
    if sqlite and not sqlite_file_exists(database):
        raise click.ClickException(f"{database.database} doesn't exist. Is the path right?")
    # On SQLite it is only the time to get the lock.
    store = SQLStore(database, create=False, timeout=5.0 if sqlite else timeout)
    with contextlib.closing(store), unavailable():
        store.check()
        yield store


def log_to_stderr() -> None:
    """What a service has to say while it runs."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
    # SQLAlchemy names a pool's logger after our class, and has two lines for each attempt.
    logging.getLogger("wsgi_idempotency.stores.pools").setLevel(logging.WARNING)


@contextlib.contextmanager
def unavailable() -> Iterator[None]:
    """Add what to do to what a database says that can't be used."""
    from sqlalchemy.exc import SQLAlchemyError

    from wsgi_idempotency.checkup import reason

    try:
        yield
    except SchemaError:
        raise  # it has its advice
    except (StoreUnavailable, SQLAlchemyError) as exc:
        advice = "To see what is wrong, run: wsgi-idempotency check"
        raise click.ClickException(f"{reason(exc)}. {advice}") from exc


@contextlib.contextmanager
def stopped_by_signals(told: Callable[[], object] = lambda: None) -> Iterator[threading.Event]:
    """Set an event at the first SIGTERM or SIGINT, at once; the next does what it did before.

    :param told: called after that, in a thread.
    """
    stop = threading.Event()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    heard, hears = socket.socketpair()
    heard.setblocking(False)

    def restore(*_: object) -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def listen() -> None:
        while numbers := hears.recv(64):
            if before.keys() & set(numbers):
                stop.set()
                told()

    # A handler in Python runs once the main thread runs Python: not before the rest it is just
    # about to take is over. Python's own, in C, writes to this socket whenever a signal comes.
    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    previous = signal.set_wakeup_fd(heard.fileno())
    for number in before:
        signal.signal(number, restore)
    try:
        yield stop
    finally:
        restore()
        signal.set_wakeup_fd(previous)
        heard.close()
        listener.join()
        hears.close()


def work_until_told(
    work: Callable[[threading.Event], None], *, grace: float = 5.0
) -> tuple[bool, bool]:
    """Work in a thread, which a SIGTERM or SIGINT ends, or leaves behind where it can't: libpq
    and SQLite can wait for a minute, and hear of no signal.

    :param work: called with an event, at which it is to end.
    :param grace: seconds it has for that; the least that anything gives a service to stop is
        Docker's 10.
    :returns: whether there was a signal, and whether the work has ended.
    """
    over = threading.Event()
    raised: list[BaseException] = []

    with stopped_by_signals(over.set) as stop:

        def run() -> None:
            try:
                work(stop)
            except BaseException as exc:
                raised.append(exc)
            finally:
                over.set()

        worker = threading.Thread(target=run, daemon=True)
        worker.start()
        over.wait()
        worker.join(grace)
    if raised:
        raise raised[0]
    return stop.is_set(), not worker.is_alive()
