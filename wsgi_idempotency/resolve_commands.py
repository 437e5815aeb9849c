"""The commands that decide about operations: resolve, reconcile."""

from __future__ import annotations

import os
import pwd
import re
import sys
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, BinaryIO

import click

from wsgi_idempotency.cli_operations import key_argument, scope_option, the_one
from wsgi_idempotency.cli_options import (
    EXIT_INTERRUPTED,
    database_option,
    import_from_here,
    log_to_stderr,
    seconds,
    stopped_by_signals,
    store_of,
)
from wsgi_idempotency.errors import ConfigurationError, NotResolvable
from wsgi_idempotency.reconciler import FAILED, Reconciler, summary
from wsgi_idempotency.records import StoredResponse
from wsgi_idempotency.scope import printable
from wsgi_idempotency.settings import load
from wsgi_idempotency.stores.resolving import (
    MAX_RESPONSE_BYTES,
    Resolution,
    Resolver,
    completion_of,
)

if TYPE_CHECKING:
    from sqlalchemy import URL

_WITHOUT_BODY = (204, 205, 304)  # RFC 9110 sections 15.3.5, 15.3.6 and 15.4.5


def status_line(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """``"201"`` gets its usual reason."""
    if value is None or not re.fullmatch("[0-9]{3}", value):
        return value
    try:
        return f"{value} {HTTPStatus(int(value)).phrase}"
    except ValueError:
        return f"{value} "


def header_fields(
    ctx: click.Context, param: click.Parameter, values: tuple[str, ...]
) -> tuple[tuple[str, str], ...]:
    for value in values:
        if ":" not in value:
            raise click.BadParameter(f"{value!r} is not like 'Name: value'", ctx, param)
    return tuple(
        (name.strip(), field.strip()) for name, _, field in (v.partition(":") for v in values)
    )


def said(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    if value is not None and not value.strip():
        raise click.BadParameter("it says nothing", ctx, param)
    return value


max_body_option = click.option(
    "--max-body-bytes",
    type=click.IntRange(min=0),
    default=MAX_RESPONSE_BYTES,
    show_default=True,
    help="Refuse a larger body.",
)


@click.command()
@database_option
@key_argument
@scope_option
@click.option("--forget", is_flag=True, help="It was not done: drop it. The key is fresh.")
@click.option("--release", is_flag=True, help="Let the same request run again.")
@click.option("--complete", is_flag=True, help="It was done: replay this response from now on.")
@click.option(
    "--status",
    metavar="STATUS",
    callback=status_line,
    help="With --complete: the status, as 201 or '201 Made It'.",
)
@click.option(
    "--body-file", type=click.File("rb"), help="With --complete: the body; - is standard input."
)
@click.option(
    "--header",
    "headers",
    multiple=True,
    metavar="'NAME: VALUE'",
    callback=header_fields,
    help="With --complete: a header field; may be given several times.",
)
@max_body_option
@click.option(
    "--undone",
    is_flag=True,
    help="With --forget: what it has committed in the database was undone by hand.",
)
@click.option("--reason", required=True, metavar="TEXT", callback=said, help="Why, for the record.")
@click.option(
    "--actor",
    metavar="NAME",
    callback=said,
    help="Who decides, for the record.  [default: the user]",
)
def resolve(
    database: URL,
    key: str,
    scope: str | None,
    forget: bool,
    release: bool,
    complete: bool,
    status: str | None,
    body_file: BinaryIO | None,
    headers: tuple[tuple[str, str], ...],
    max_body_bytes: int,
    undone: bool,
    reason: str,
    actor: str | None,
) -> None:
    """Decide what becomes of an operation, and put it on record.

    KEY is the idempotency key, or the 64 hexadecimal digits of its digest. The operation
    has to be held, released or lapsed: nobody may be running it. A worker that was only
    slow can't change it any more afterwards. One whose effects the application has committed
    under a guard was done: it is not forgotten without --undone, and a retry of one that is
    released gets what the policy's rebuild makes, or RESPONSE_NOT_REPLAYABLE.
    """
    if forget + release + complete != 1:
        raise click.UsageError("Give one of --forget, --release and --complete.")
    response = None
    if complete:
        response = response_of(status, headers, body_file, max_body_bytes)
    elif status is not None or headers or body_file is not None:
        raise click.UsageError("--status, --header and --body-file belong to --complete.")
    if undone and not forget:
        raise click.UsageError("--undone belongs to --forget.")
    with store_of(database) as store:
        resolver = Resolver(store)
        row = the_one(resolver, key, scope)
        try:
            resolver.resolve(
                row.digest,
                row.token,
                action_of(forget, release),
                actor=current_user() if actor is None else actor,
                reason=reason,
                response=response,
                max_response_bytes=max_body_bytes,
                undone=undone,
            )
        except NotResolvable as exc:
            raise click.ClickException(f"{sentence(str(exc))} Nothing was changed.") from exc
    name = printable(f"{row.method} {row.path}, key {row.key}, scope {row.scope}")
    if response is not None:
        kept = completion_of(response, max_body_bytes).headers
        left_out = ", ".join(name for name, value in headers if (name, value) not in kept)
        click.echo(f"Completed: {name}. Retries get {response.status.strip()} from now on.")
        if left_out:
            click.echo(f"Never replayed, and left out: {left_out}.")
    elif forget:
        click.echo(f"Forgotten: {name}. The key is fresh.")
    elif row.effects:
        click.echo(f"Released: {name}. It was done: its response may be rebuilt.")
    else:
        click.echo(f"Released: {name}. The same request may run again.")


def action_of(forget: bool, release: bool) -> Resolution:
    if forget:
        return Resolution.FORGET
    return Resolution.RELEASE if release else Resolution.COMPLETE


def response_of(
    status: str | None,
    headers: tuple[tuple[str, str], ...],
    body_file: BinaryIO | None,
    max_body_bytes: int,
) -> StoredResponse:
    """The response that a person has described.

    :raises click.UsageError: it is not all there.
    :raises NotStorable: it can't be stored or replayed.
    """
    if status is None:
        raise click.UsageError("--complete needs the --status that clients are to get.")
    if body_file is None and not status.startswith(tuple(map(str, _WITHOUT_BODY))):
        raise click.UsageError(
            "--complete needs the --body-file that clients are to get; /dev/null is empty."
        )
    body = b"" if body_file is None else body_file.read(max_body_bytes + 1)
    response = StoredResponse(status, headers, body)
    completion_of(response, max_body_bytes)
    return response


def current_user() -> str:
    """Who runs the command, as the system knows them."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return f"user {os.getuid()}"


def sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


# ---------------------------------------------------------------------- reconcile


def verdict_of(ctx: click.Context, param: click.Parameter, value: str) -> Any:
    """The function that ``module:function`` names; modules are found where one stands, too."""
    import_from_here()
    try:
        verdict = load("it", value)
    except ConfigurationError as exc:
        raise click.BadParameter(str(exc), ctx, param) from exc
    if not callable(verdict):
        raise click.BadParameter(f"{value} can't be called", ctx, param)
    return verdict


@click.command()
@database_option
@click.option(
    "--verdict",
    required=True,
    metavar="MODULE:FUNCTION",
    callback=verdict_of,
    help="Called with each operation; returns Completed(response), NotExecuted or StillUnknown.",
)
@click.option("--once", is_flag=True, help="End after one walk; fail if a verdict failed.")
@click.option(
    "--interval",
    type=float,
    default=60.0,
    show_default=True,
    callback=seconds,
    help="Seconds to rest between walks, each of which reads the table once.",
)
@click.option(
    "--patience",
    type=click.FloatRange(1.0, 86400.0),
    default=60.0,
    show_default=True,
    help="Seconds a verdict may take until somebody else may look.",
)
@max_body_option
@click.option(
    "--actor", metavar="NAME", callback=said, help="Who decides.  [default: reconciler@host]"
)
def reconcile(
    database: URL,
    verdict: Any,
    once: bool,
    interval: float,
    patience: float,
    max_body_bytes: int,
    actor: str | None,
) -> None:
    """Ask a function of yours what became of operations, and resolve them.

    It looks at what is held or has lapsed, on as many hosts at once as you like. SIGTERM and
    SIGINT end it after the operation at hand; a second one ends it at once.
    """
    log_to_stderr()
    with store_of(database) as store:
        reconciler = Reconciler(
            store, verdict, patience=patience, max_response_bytes=max_body_bytes, actor=actor
        )
        with stopped_by_signals() as stop:
            try:
                if once:
                    reconciler.walk(stop=stop)
                else:
                    reconciler.run(interval=interval, stop=stop)
            finally:
                click.echo(summary(reconciler.counts))
    if once and stop.is_set():
        sys.exit(EXIT_INTERRUPTED)
    sys.exit(1 if once and reconciler.counts[FAILED] else 0)
