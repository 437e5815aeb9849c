"""Operations as the commands find them and show them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import click

from wsgi_idempotency.checkup import span
from wsgi_idempotency.records import Lapse, State
from wsgi_idempotency.scope import printable
from wsgi_idempotency.stores.resolving import Resolution

if TYPE_CHECKING:
    from wsgi_idempotency.stores.resolving import Details, Resolved, Resolver

_DIGEST = re.compile("[0-9a-fA-F]{64}")

#: Operations with one key that are listed before somebody has to say which scope they mean.
_MATCHES = 20

key_argument = click.argument("key")
scope_option = click.option(
    "--scope",
    metavar="TEXT",
    help="Whose key it is, as the table has it; see list. Needed where several have this key.",
)


def digest_in(key: str, scope: str | None) -> bytes | None:
    """The digest that a person may have meant; None when it can only be a key."""
    return bytes.fromhex(key) if scope is None and _DIGEST.fullmatch(key) else None


def matches(resolver: Resolver, key: str, scope: str | None) -> list[Details]:
    """The operations that a person may have meant; one more than are listed, if there are."""
    found = []
    digest = digest_in(key, scope)
    if digest is not None:
        found += [row for row in (resolver.details(digest),) if row is not None]
    # As the middleware writes them down.
    whose = None if scope is None else printable(scope)
    named = resolver.find(printable(key), whose, limit=_MATCHES + 1)
    return found + [row for row in named if row.digest != digest]


def the_one(resolver: Resolver, key: str, scope: str | None) -> Details:
    """:raises click.ClickException: there is none, or there are several, which are listed."""
    found = matches(resolver, key, scope)
    if not found:
        raise nothing(key, scope)
    if len(found) > 1:
        click.echo(table(found[:_MATCHES]))
        count = f"{len(found)}" if len(found) <= _MATCHES else f"More than {_MATCHES}"
        raise click.ClickException(
            f"{count} operations have this key. Name one by its digest, or give --scope"
        )
    return found[0]


def nothing(key: str, scope: str | None) -> click.ClickException:
    where = "" if scope is None else f" in the scope {printable(scope)}"
    return click.ClickException(f"No operation has the key {printable(key)}{where}")


def table(rows: Iterable[Details]) -> str:
    """Operations for people, one on a line, the digest last since it is long."""
    lines = [["age", "state", "attempt", "request", "key", "scope", "digest"]]
    for row in rows:
        cells = [
            span(row.age),
            state_of(row),
            str(row.attempt),
            f"{row.method} {row.path}",
            row.key,
            row.scope,
            row.digest.hex(),
        ]
        lines.append([printable(cell, 80) for cell in cells])
    return aligned(lines)


def aligned(rows: Iterable[Sequence[str]], *, numbers: bool = False) -> str:
    """Columns: the first to the left, and numbers to the right."""
    lines = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if numbers and column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def state_of(row: Details) -> str:
    """What a row means now, for people."""
    word: str = row.state.value
    if row.state is State.RELEASED and row.effects:
        return "released, done"
    if row.state is not State.CLAIMED:
        return word
    if not row.lapsed:
        return "in flight"
    if row.effects:
        return "lapsed, done"
    return "lapsed, held" if row.lapse is Lapse.HOLD else "lapsed, to be rerun"


def as_dict(row: Details) -> dict[str, Any]:
    """A row for programs."""
    return {
        "digest": row.digest.hex(),
        "state": row.state.value,
        "held": row.held,
        "lapsed": row.lapsed,
        "lapse": row.lapse.value,
        "effects": row.effects,
        "attempt": row.attempt,
        "method": row.method,
        "path": row.path,
        "scope": row.scope,
        "key": row.key,
        "age": row.age,
        "created_at": moment(row.created_at),
        "lease_until": moment(row.lease_until),
        "expires_at": moment(row.expires_at),
        "completed_at": None if row.completed_at is None else moment(row.completed_at),
        "status": row.status,
        "body_bytes": row.body_bytes,
        "not_replayable": row.not_replayable,
    }


def moment(seconds_since_1970: float) -> str:
    """A moment as ISO 8601 has it, in UTC."""
    return datetime.fromtimestamp(seconds_since_1970, timezone.utc).isoformat(timespec="seconds")


def described(row: Details) -> str:
    """All of one operation, for people."""
    facts = {
        "request": f"{row.method} {row.path}",
        "key": row.key,
        "scope": row.scope,
        "digest": row.digest.hex(),
        "state": state_of(row),
        "attempt": str(row.attempt),
        "claimed first": f"{moment(row.created_at)}, {span(row.age)} ago",
    }
    if row.state is State.CLAIMED:
        facts["lease"] = f"{'ran' if row.lapsed else 'runs'} out {moment(row.lease_until)}"
    if row.state is State.HELD and row.lease_left > 0:
        facts["looked at again"] = f"by a reconciler, not before {moment(row.lease_until)}"
    if not row.held:
        over = ", and counts as absent" if row.past_retention and not in_flight(row) else ""
        facts["remembered until"] = f"{moment(row.expires_at)}{over}"
    if row.effects:
        facts["effects"] = "committed under a guard: it was done, and doesn't run again"
    if row.completed_at is not None:
        facts["completed"] = moment(row.completed_at)
        size = row.not_replayable or f"{row.body_bytes} bytes"
        facts["response"] = f"{row.status}, {size}"
    width = max(map(len, facts)) + 2
    return "\n".join(f"{name:{width}}{printable(fact)}" for name, fact in facts.items())


def in_flight(row: Details) -> bool:
    return row.state is State.CLAIMED and not row.lapsed


def told(one: Resolved) -> str:
    """One decision, for people."""
    action = {
        Resolution.FORGET: "forgotten",
        Resolution.RELEASE: "released",
        Resolution.COMPLETE: f"completed with {one.status}",
    }[one.action]
    return printable(
        f"{moment(one.resolved_at)} {action} after attempt {one.attempt} by {one.actor}:"
        f" {one.reason}"
    )


def resolution_as_dict(one: Resolved) -> dict[str, Any]:
    """A decision for programs."""
    return {
        "resolved_at": moment(one.resolved_at),
        "actor": one.actor,
        "reason": one.reason,
        "action": one.action.value,
        "digest": one.digest.hex(),
        "scope": one.scope,
        "key": one.key,
        "method": one.method,
        "path": one.path,
        "attempt": one.attempt,
        "status": one.status,
    }
