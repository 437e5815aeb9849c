"""The command itself: open a shop, say how to try it, close it."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import secrets
import shlex
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import click

from wsgi_idempotency.demo import double_tap, server
from wsgi_idempotency.errors import ConfigurationError


@click.command()
@click.option(
    "--database",
    metavar="URL",
    help="Where keys and ledger are kept; the tables are made. Default: an SQLite file that is"
    " removed at the end.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="Port to listen on; 0 takes any that is free.",
)
@click.option(
    "--workers",
    type=click.IntRange(1),
    default=2,
    show_default=True,
    help="Processes that serve the shop.",
)
@click.option(
    "--once",
    is_flag=True,
    help="Tap twice and retry later without a browser, on any free port; show what happened, and"
    " fail unless the protected order was charged exactly once.",
)
def demo(database: str | None, host: str, port: int, workers: int, once: bool) -> None:
    """Serve a small shop, to double-tap its Pay button with protection on and off."""
    for module in ("flask", "gunicorn"):
        if importlib.util.find_spec(module) is None:
            raise click.ClickException(
                f"The demo needs {module}: pip install 'wsgi-idempotency[demo]'"
            )
    try:
        with server.stopped_by_signals(), kept_in(database) as url:
            listener = listen(host, 0 if once else port)
            address = listener.getsockname()[:2]
            environ = {server.DATABASE_VARIABLE: url}
            with server.serve(listener, workers=workers, environ=environ) as process:
                if once:
                    tap_twice(address)
                else:
                    announce(host, address[1])
                    server.wait_for_end(process)
    except server.ShopFailed as exc:
        raise click.ClickException(str(exc)) from exc
    except KeyboardInterrupt:
        if once:
            raise
        click.echo("\nThe shop is closed.")


@contextlib.contextmanager
def kept_in(database: str | None) -> Iterator[str]:
    """Make the tables; yields the URL of the database they are in.

    :param database: a URL, or None for a file that lasts as long as the block.
    """
    if database is not None:
        yield prepare(database)
        return
    with tempfile.TemporaryDirectory(prefix="wsgi-idempotency-demo-") as folder:
        yield prepare(f"sqlite:///{Path(folder, 'shop.db')}", temporary=True)


def prepare(database: str, *, temporary: bool = False) -> str:
    """Bring the schema up to date, make the ledger, and say so of a database that stays."""
    from sqlalchemy.exc import SQLAlchemyError

    from wsgi_idempotency import schema
    from wsgi_idempotency.demo.shop import ledger, metadata
    from wsgi_idempotency.stores.sql import database_url

    try:
        url = database_url(database)
        with schema.connect(url) as connection, connection.begin():
            upgrade = schema.upgrade_connection(connection)
            metadata.create_all(connection)
    except ConfigurationError as exc:
        raise click.ClickException(str(exc)) from exc
    except SQLAlchemyError as exc:
        reason = str(getattr(exc, "orig", None) or exc).partition("\n")[0]
        raise click.ClickException(f"The database can't be prepared: {reason}") from exc
    if not temporary:
        same = upgrade.before == upgrade.after
        before = "as before" if same else f"upgraded from {upgrade.before or 'nothing'}"
        click.echo(
            f"{url.render_as_string(hide_password=True)}: the schema is at {upgrade.after},"
            f" {before}. The charges are kept in the table {ledger.name}. Both stay when the demo"
            " ends.\n"
        )
    return url.render_as_string(hide_password=False)


def listen(host: str, port: int) -> socket.socket:
    """Take the port, or say why not and what to do."""
    try:
        return server.listen(host, port)
    except OSError as exc:
        if exc.errno == errno.EADDRINUSE:
            raise click.ClickException(
                f"Port {port} of {host} is taken, perhaps by another demo. Name another one,"
                f" such as --port {port % 65535 + 1}, or let --port 0 find a free one."
            ) from exc
        raise click.ClickException(
            f"Can't listen on {host} port {port}: {exc.strerror}. Try another --host or --port."
        ) from exc


def announce(host: str, port: int) -> None:
    """Say where the shop is, and give lines to paste."""
    shop = origin(host, port)
    protected, unprotected = (
        shlex.join(
            [
                *("curl", "-i", f"{shop}/{door}/charges"),
                *("-H", f"Idempotency-Key: {double_tap.new_key()}"),
                *("-d", f"order={secrets.token_hex(4)}", "-d", f"amount={double_tap.AMOUNT}"),
            ]
        )
        for door in ("protected", "unprotected")
    )
    click.echo(
        f"The shop is open at {shop}/\n\n"
        "Press Pay there twice, quickly, with protection on and off.\n"
        "Or paste each of these lines twice.\n\n"
        "With protection the second answer is the first one again, with Idempotency-Replayed:\n\n"
        f"  {protected}\n\n"
        "Without protection each of them charges:\n\n"
        f"  {unprotected}\n\n"
        "What was charged:\n\n"
        f"  {shlex.join(['curl', f'{shop}/ledger'])}\n\n"
        "Ctrl-C closes the shop."
    )


def origin(host: str, port: int) -> str:
    """The URL under which a shop is found from this machine."""
    host = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def tap_twice(address: tuple[str, int]) -> None:
    """Buy at both doors and show what happened.

    :raises SystemExit: with 1, unless the protected order was charged exactly once.
    """
    click.echo("Two taps at once for one order, then a retry when both have their answer.\n")
    purchases = [double_tap.buy(address, protected=protected) for protected in (False, True)]
    click.echo(double_tap.report(purchases) + "\n")
    for purchase in purchases:
        door = "With" if purchase.protected else "Without"
        click.echo(f"{door} protection the order was charged {double_tap.times(purchase.rows)}.")
    found = [complaint for purchase in purchases for complaint in double_tap.complaints(purchase)]
    for complaint in found:
        click.echo(complaint, err=True)
    if found:
        raise SystemExit(1)
