"""What the commands have in common: the database they are for, and what they say of one that
can't be used."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
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


def observers_of(ctx: click.Context, param: click.Parameter, value: str | None) -> list[Any]:
    from wsgi_idempotency.settings import load_observers

    if value is None:
        return []
    try:
        return load_observers("it", value)
    except ConfigurationError as exc:
        raise click.BadParameter(str(exc), ctx, param) from exc


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
def stopped_by_signals() -> Iterator[threading.Event]:
    """Set an event at the first SIGTERM or SIGINT; the next does what it did before."""
    stop = threading.Event()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def told_to_stop(number: int, frame: object) -> None:
        restore()
        # In a thread: who is interrupted may have the event's lock, just before it sleeps or
        # just after, and would then wait for itself.
        setter = threading.Thread(target=stop.set, daemon=True)
        setter.start()
        setter.join(0.1)

    for number in before:
        signal.signal(number, told_to_stop)
    try:
        yield stop
    finally:
        restore()
