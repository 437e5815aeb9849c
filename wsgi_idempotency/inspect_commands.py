"""The commands that look and change nothing: stats, list, show."""

from __future__ import annotations

import base64
import codecs
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import click
from werkzeug.http import parse_options_header

from wsgi_idempotency.checkup import oldest_expired, span
from wsgi_idempotency.cli_operations import (
    aligned,
    as_dict,
    described,
    digest_in,
    key_argument,
    matches,
    moment,
    nothing,
    resolution_as_dict,
    scope_option,
    table,
    the_one,
    told,
)
from wsgi_idempotency.cli_options import database_option, duration, json_option, store_of
from wsgi_idempotency.scope import printable
from wsgi_idempotency.stores.inspecting import Inspector, Route
from wsgi_idempotency.stores.resolving import (
    Details,
    FinishedStep,
    Resolution,
    Resolved,
    Resolver,
)
from wsgi_idempotency.stores.sql import shown

if TYPE_CHECKING:
    from sqlalchemy import URL

    from wsgi_idempotency.records import Record

#: Seconds a reading of the whole table may take.
PATIENCE = 600.0

#: Bytes that a compressed body may grow to, and of binary ones that are shown.
LARGEST_SHOWN = 4 * 1024 * 1024
BINARY_SHOWN = 4096

#: Why there is no number of replays.
NOT_COUNTED = (
    "not in the table, since a replay writes nothing: see the metric"
    " wsgi_idempotency_duplicates_prevented_total"
)

# ---------------------------------------------------------------------- stats


@click.command()
@database_option
@click.option(
    "--top",
    type=click.IntRange(min=1),
    default=20,
    show_default=True,
    help="Show so many routes, those with the most rows.",
)
@json_option
def stats(database: URL, top: int, as_json: bool) -> None:
    """Count what is in the table, by route and by what it means now.

    The table knows no routes, only paths: numbers and random names in them count as one, and
    are shown as *. It reads the whole table.
    """
    with store_of(database, timeout=PATIENCE) as store:
        inspector = Inspector(store)
        routes, sizes = inspector.routes(), inspector.sizes()
        with store.engine.connect() as connection:
            unpurged = oldest_expired(connection)
    oldest = max((route.oldest for route in routes), default=None)
    if as_json:
        report = {
            "database": shown(database),
            "rows": totals(routes),
            "reruns": sum(route.reruns for route in routes),
            "replays": None,
            "oldest_seconds": oldest,
            "oldest_expired_seconds": unpurged,
            "bytes": sizes,
            "routes": [route_as_dict(route) for route in routes[:top]],
            "more_routes": max(0, len(routes) - top),
        }
        click.echo(json.dumps(report, indent=2))
        return
    click.echo(shown(database))
    click.echo()
    click.echo(counted(routes, top))
    click.echo()
    facts = {
        "reruns": "attempts beyond the first, of the rows that are there",
        "replays": NOT_COUNTED,
        "oldest": "there is none" if oldest is None else f"claimed {span(oldest)} ago",
        "to be purged": "none" if unpurged is None else f"since {span(unpurged)}",
        "size": ", ".join(f"{name} {in_bytes(size)}" for name, size in sizes.items()),
    }
    click.echo(aligned([name, fact] for name, fact in facts.items()))


def totals(routes: Iterable[Route]) -> dict[str, int]:
    """Rows by the names that --state has for them."""
    routes = list(routes)
    return {
        state: sum(route.counts[kind] for route in routes for kind in kinds)
        for state, kinds in STATES.items()
    }


def counted(routes: Sequence[Route], top: int) -> str:
    """A table of routes, with what is left out and all of them in its last lines."""
    lines: list[tuple[str, Sequence[Route]]] = [
        (printable(f"{route.method} {route.path}", 80), [route]) for route in routes[:top]
    ]
    if len(routes) > top:
        lines.append((f"{len(routes) - top} others", routes[top:]))
    if len(routes) != 1:
        lines.append(("all", routes))
    return aligned(
        [["", *STATES, "reruns"]]
        + [
            [name, *map(str, totals(some).values()), str(sum(route.reruns for route in some))]
            for name, some in lines
        ],
        numbers=True,
    )


def route_as_dict(route: Route) -> dict[str, Any]:
    return {
        "method": route.method,
        "path": route.path,
        "rows": totals([route]),
        "reruns": route.reruns,
        "oldest_seconds": route.oldest,
    }


def in_bytes(size: int) -> str:
    for unit, factor in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} bytes"


# ---------------------------------------------------------------------- list

#: The kinds that --state, --held and --lapsed stand for.
STATES = {
    "live": ["live"],
    "in-flight": ["in flight"],
    "released": ["released"],
    "held": ["held", "lapsed, held"],
    "lapsed": ["lapsed"],
    "expired": ["expired"],
}
LAPSED = ["lapsed, held", "lapsed"]


@click.command("list")
@database_option
@click.option(
    "--state",
    "states",
    type=click.Choice(list(STATES)),
    multiple=True,
    help="Those that are this now; may be given several times.",
)
@click.option(
    "--held",
    is_flag=True,
    help="Those whose retries are told OUTCOME_UNKNOWN: held, or lapsed where a lapse holds.",
)
@click.option(
    "--lapsed",
    is_flag=True,
    help="Those whose worker is gone, whether a retry may run them or not.",
)
@click.option(
    "--older-than",
    default="0",
    callback=duration,
    metavar="DURATION",
    help="Those claimed first so long ago, as 15min or '7 days'.  [default: 0]",
)
@click.option("--scope", metavar="TEXT", help="Those of this scope, as the table has it.")
@click.option(
    "--limit", type=click.IntRange(min=1), default=100, show_default=True, help="List so many."
)
@json_option
def list_operations(
    database: URL,
    states: tuple[str, ...],
    held: bool,
    lapsed: bool,
    older_than: float,
    scope: str | None,
    limit: int,
    as_json: bool,
) -> None:
    """List operations whose outcome nobody knows, or those of a state.

    The oldest come first. Without --state, --held or --lapsed it is --held and --lapsed. It
    reads the whole table.
    """
    if not states and not lapsed and not held:
        held = lapsed = True
    wanted = [kind for state in states for kind in STATES[state]]
    wanted += [*(STATES["held"] if held else ()), *(LAPSED if lapsed else ())]
    whose = None if scope is None else printable(scope)
    with store_of(database, timeout=PATIENCE) as store:
        found = Inspector(store).operations(
            kinds=wanted, older_than=older_than, scope=whose, limit=limit + 1
        )
    more, found = len(found) > limit, found[:limit]
    if as_json:
        operations = [as_dict(row) for row in found]
        click.echo(json.dumps({"operations": operations, "more": more}, indent=2))
        return
    if not found:
        click.echo("There is none.")
        return
    click.echo(table(found))
    if more:
        click.echo(f"There are more than these {limit}; see --limit.", err=True)


# ---------------------------------------------------------------------- show


@click.command()
@database_option
@key_argument
@scope_option
@click.option("--body", is_flag=True, help="Show the whole body of the response, decoded.")
@json_option
def show(database: URL, key: str, scope: str | None, body: bool, as_json: bool) -> None:
    """Show one operation: what it is now, what happened to it, and its response.

    KEY is the idempotency key, or the 64 hexadecimal digits of its digest. To find a key
    reads the whole table, to find a digest doesn't.
    """
    with store_of(database, timeout=PATIENCE) as store:
        resolver = Resolver(store)
        digest = digest_in(key, scope)
        if digest is not None and not matches(resolver, key, scope):
            row, decided = None, resolver.resolutions(digest)  # it may have been forgotten
        else:
            row = the_one(resolver, key, scope)
            decided = resolver.resolutions(row.digest)
        steps, response = [], None
        if row is not None:
            steps = resolver.steps(row.digest)
        if row is not None and row.status is not None:
            response = store.lookup(row.digest)
    if row is None and not decided:
        raise nothing(key, scope)
    if as_json:
        found = shown_as_dict(row, decided, steps, response, body)
        click.echo(json.dumps(found, indent=2))
        return
    if row is None:
        click.echo("There is no such operation any more.")
    else:
        click.echo(described(row))
    click.echo()
    click.echo(timeline(row, decided, steps))
    if response is not None and response.status is not None:
        click.echo()
        click.echo(responded(response, body))


def timeline(
    row: Details | None, decided: Iterable[Resolved], steps: Iterable[FinishedStep]
) -> str:
    """What happened, in order. Of attempts before the last the table has only the number."""
    decided = list(decided)
    # In the order in which they can happen, which tells where SQLite has one millisecond for two.
    lines = [] if row is None else [(at, f"{moment(at)} {what}") for at, what in events(row)]
    lines += [
        (step.created_at, f"{moment(step.created_at)} attempt {step.attempt} did step {step.name}")
        for step in steps
    ]
    lines += [(one.resolved_at, told(one)) for one in decided]
    at = None if row is None else row.completed_at
    if row is not None and at is not None and not by_decision(at, decided):
        lines.append((at, f"{moment(at)} completed with {row.status}"))
    lines.sort(key=lambda line: line[0])
    return "\n".join(printable(text) for _, text in lines)


def by_decision(completed_at: float, decided: Iterable[Resolved]) -> bool:
    """Whether a person or a reconciler has completed it, which SQLite says in two statements."""
    return any(
        one.action is Resolution.COMPLETE and abs(one.resolved_at - completed_at) < 1.0
        for one in decided
    )


def events(row: Details) -> Iterator[tuple[float, str]]:
    yield row.created_at, "claimed first"
    if row.lapsed:
        yield row.lease_until, f"the lease of attempt {row.attempt} ran out"
    if row.past_retention and not row.held:
        yield row.expires_at, "its retention was over"


def responded(response: Record, whole: bool) -> str:
    """The response that is replayed."""
    lines = [printable(response.status or "")]
    lines += [printable(f"{name}: {value}") for name, value in response.headers]
    if response.body:
        lines.append("")
        lines.append(
            decoded(response.headers, response.body)
            if whole
            else f"{len(response.body)} bytes; --body shows them"
        )
    return "\n".join(lines)


def field(headers: Iterable[tuple[str, str]], name: str) -> str:
    return next((value for found, value in headers if found.lower() == name), "")


def decoded(headers: Sequence[tuple[str, str]], body: bytes) -> str:
    """A body as a terminal may have it: decompressed, JSON laid out, and nothing in it that
    moves the cursor. What is no text is shown as bytes, and not to its end."""
    try:
        plain, cut = decompressed(field(headers, "content-encoding"), body)
        text = as_text(headers, plain, cut)
    except (UnicodeError, LookupError, zlib.error):
        return hexadecimal(body)
    if "\0" in text:
        return hexadecimal(body)
    if "json" in field(headers, "content-type"):
        with suppress(ValueError, RecursionError):  # then as it is
            text = json.dumps(json.loads(text), indent=2, ensure_ascii=False)
    lines = [printable(line.replace("\t", "    "), LARGEST_SHOWN) for line in text.splitlines()]
    if cut:
        lines.append(f"and more than these {LARGEST_SHOWN} bytes; --json has them, compressed")
    return "\n".join(lines)


def decompressed(encoding: str, body: bytes) -> tuple[bytes, bool]:
    """A body without its encoding, and whether that is only its beginning."""
    if encoding.strip().lower() not in ("gzip", "x-gzip", "deflate"):
        return body, False
    decompressor = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)
    return decompressor.decompress(body, LARGEST_SHOWN), bool(decompressor.unconsumed_tail)


def as_text(headers: Sequence[tuple[str, str]], body: bytes, cut: bool) -> str:
    """:param cut: the body may end within a character."""
    _, options = parse_options_header(field(headers, "content-type"))
    decoder = codecs.getincrementaldecoder(options.get("charset", "utf-8"))()
    return decoder.decode(body, final=not cut)


def hexadecimal(body: bytes) -> str:
    """As hexdump -C has it."""
    lines = []
    for start in range(0, min(len(body), BINARY_SHOWN), 16):
        row = body[start : start + 16]
        text = re.sub(r"[^ -~]", ".", row.decode("latin-1"))
        lines.append(f"{start:08x}  {row.hex(' '):47}  |{text}|")
    if len(body) > BINARY_SHOWN:
        lines.append(f"and {len(body) - BINARY_SHOWN} more bytes; --json has them all")
    return "\n".join(lines)


def shown_as_dict(
    row: Details | None,
    decided: Iterable[Resolved],
    steps: Iterable[FinishedStep],
    response: Record | None,
    whole: bool,
) -> dict[str, Any]:
    """What ``show --json`` prints."""
    found: dict[str, Any] = {
        "operation": None if row is None else as_dict(row),
        "resolutions": [resolution_as_dict(one) for one in decided],
        "steps": [
            {"name": step.name, "attempt": step.attempt, "created_at": moment(step.created_at)}
            for step in steps
        ],
    }
    if response is not None:
        found["response"] = {"status": response.status, "headers": response.headers}
        if whole and response.body is not None:
            found["response"]["body_base64"] = base64.b64encode(response.body).decode()
    return found
