"""The command that deletes expired rows."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click

from wsgi_idempotency.cli_options import (
    EXIT_INTERRUPTED,
    database_option,
    duration,
    json_option,
    log_to_stderr,
    observers_option,
    pause,
    seconds,
    store_of,
    work_until_told,
)
from wsgi_idempotency.purging import purge as purged
from wsgi_idempotency.purging import purge_forever

if TYPE_CHECKING:
    from sqlalchemy import URL

    from wsgi_idempotency.stores.sql import SQLStore


@click.command()
@database_option
@click.option(
    "--older-than",
    default="0",
    callback=duration,
    metavar="DURATION",
    help="Keep rows for so long after they have expired, as 12h or '7 days'.  [default: 0]",
)
@click.option(
    "--batch",
    type=click.IntRange(min=1),
    default=1000,
    show_default=True,
    help="Rows a statement deletes at most; each is a transaction of its own.",
)
@click.option(
    "--sleep",
    type=float,
    default=0.1,
    show_default=True,
    callback=seconds,
    help="Seconds to rest between batches.",
)
@click.option(
    "--max-batches", type=click.IntRange(min=1), help="Stop after so many.  [default: no limit]"
)
@click.option("--forever", is_flag=True, help="Purge again and again, until SIGTERM or SIGINT.")
@click.option(
    "--interval",
    default="10 min",
    show_default=True,
    callback=pause,
    metavar="DURATION",
    help="With --forever: the pause between two purges, on average.",
)
@observers_option
@json_option
def purge(
    database: URL,
    older_than: float,
    batch: int,
    sleep: float,
    max_batches: int | None,
    forever: bool,
    interval: float,
    on_event: list[Any],
    as_json: bool,
) -> None:
    """Delete expired rows, the oldest first.

    Rows in flight, held, or within their retention stay. No request waits for more than
    a batch, and several purges may run at once. SIGTERM and SIGINT end it after the batch at
    hand, which gets five seconds; a second one ends it at once.
    """
    how: dict[str, Any] = {
        "batch": batch,
        "sleep": sleep,
        "older_than": older_than,
        "max_batches": max_batches,
        "on_event": on_event,
    }
    if on_event or forever:
        log_to_stderr()
    deleted = 0
    interrupted = False

    def work(stop: threading.Event) -> None:
        nonlocal deleted
        if forever:
            for count in purge_forever(store, interval=interval, stop=stop, **how):
                deleted += count
            return
        with progress_bar(store, batch, max_batches, older_than) as advance:
            for count in purged(store, stop=stop, **how):
                deleted += count
                advance(count)

    with store_of(database) as store:
        try:
            interrupted, ended = work_until_told(work)
        finally:
            if as_json:
                click.echo(json.dumps({"deleted": deleted, "interrupted": interrupted}))
            else:
                click.echo(f"{deleted} expired rows deleted")
    if not ended:
        click.echo("The batch at hand is left to the database, and is not counted.", err=True)
    if interrupted and not forever:
        click.echo("Interrupted.", err=True)
        sys.exit(EXIT_INTERRUPTED)


@contextlib.contextmanager
def progress_bar(
    store: SQLStore, batch: int, max_batches: int | None, older_than: float
) -> Iterator[Callable[[int], object]]:
    """A bar on a terminal; nothing elsewhere, and no counting beforehand."""
    if not sys.stderr.isatty():
        yield lambda count: None
        return
    from wsgi_idempotency.checkup import about_expired

    with store.engine.connect() as connection:
        total = about_expired(connection, older_than)
    if max_batches is not None:
        total = min(total, batch * max_batches)
    with click.progressbar(length=total, label="Deleting", file=sys.stderr) as bar:
        yield bar.update
