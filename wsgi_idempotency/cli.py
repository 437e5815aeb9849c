"""The ``wsgi-idempotency`` command. What a command needs is imported when it runs."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from importlib import import_module
from typing import TYPE_CHECKING, Any

import click

from wsgi_idempotency.cli_options import EXIT_INTERRUPTED, database_option, json_option
from wsgi_idempotency.errors import IdempotencyError

if TYPE_CHECKING:
    from sqlalchemy import URL
    from sqlalchemy.exc import SQLAlchemyError

    from wsgi_idempotency.checkup import Finding

#: Commands of which only the name and a line of help are here.
ELSEWHERE = {
    "contract": "wsgi_idempotency.contract_commands:contract",
    "lint": "wsgi_idempotency.contract_commands:lint_routes",
    "demo": "wsgi_idempotency.demo:demo",
    "purge": "wsgi_idempotency.purge_command:purge",
    "stats": "wsgi_idempotency.inspect_commands:stats",
    "list": "wsgi_idempotency.inspect_commands:list_operations",
    "show": "wsgi_idempotency.inspect_commands:show",
    "resolve": "wsgi_idempotency.resolve_commands:resolve",
    "reconcile": "wsgi_idempotency.resolve_commands:reconcile",
}


class Commands(click.Group):
    """Commands whose errors are one line, and of which one is loaded when it is called."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        if name in ELSEWHERE:
            module, _, attribute = ELSEWHERE[name].partition(":")
            command = getattr(import_module(module), attribute)
        return name, command, rest

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except IdempotencyError as exc:
            raise click.ClickException(str(exc)) from exc
        except KeyboardInterrupt:
            click.echo("Interrupted.", err=True)
            ctx.exit(EXIT_INTERRUPTED)


def numbered(ctx: click.Context, param: click.Parameter, value: str) -> str:
    if not re.fullmatch("head|[0-9]{4}", value):
        raise click.BadParameter(f"{value!r} is neither head nor four digits", ctx, param)
    return value


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit status: 0 when all is well, 1 when it is not, 2 when the command was"
    f" misused, {EXIT_INTERRUPTED} when it was interrupted.",
)
@click.version_option(package_name="wsgi-idempotency")
def main() -> None:
    """Look after the database of WSGI middleware that makes retried requests safe."""


@main.command()
@database_option
@click.option(
    "--revision",
    default="head",
    show_default=True,
    callback=numbered,
    help="How far, as 0001; head is what this release needs.",
)
def upgrade(database: URL, revision: str) -> None:
    """Create the tables, or bring them up to this release.

    Safe to run twice, and on several machines at once. It happens as a whole or not at all.
    """
    from alembic.util import CommandError
    from sqlalchemy.exc import SQLAlchemyError

    from wsgi_idempotency.checkup import reason
    from wsgi_idempotency.schema import newer_than_this_release
    from wsgi_idempotency.schema import upgrade as upgrade_schema
    from wsgi_idempotency.stores.sql import shown

    try:
        done = upgrade_schema(database, revision)
    except CommandError as exc:
        raise click.ClickException(f"{exc}. Nothing was changed.") from exc
    except SQLAlchemyError as exc:
        raise click.ClickException(f"{reason(exc)}. {upgrade_advice(exc, database)}") from exc
    if newer_than_this_release(done.before):
        change = f"at {done.before}, which is newer than this release: nothing to do"
    elif done.before == done.after:
        change = f"at {done.after}: nothing to do"
    else:
        change = f"upgraded from {done.before or 'nothing'} to {done.after}"
    click.echo(f"{shown(database)}: {change}")


def upgrade_advice(exc: SQLAlchemyError, database: URL) -> str:
    """What to do about an upgrade that the database refused."""
    from sqlalchemy.exc import OperationalError

    from wsgi_idempotency.checkup import connection_advice

    if getattr(getattr(exc, "orig", None), "sqlstate", None) == "42501":
        return "Run it as the schema's owner, or let that one GRANT CREATE ON SCHEMA to this role"
    if isinstance(exc, OperationalError):
        return connection_advice(database)
    return "Nothing was changed"


@main.command()
@database_option
@json_option
def check(database: URL, as_json: bool) -> None:
    """Connect, and say whether the database keeps the promises.

    Looks at the schema's version, at settings that would break a promise, at clocks, and at
    rows that nobody purges. Exits with 1 when a promise would be broken; a warning is none.
    """
    from wsgi_idempotency.checkup import Verdict, check_database
    from wsgi_idempotency.stores.sql import shown

    name = shown(database)
    findings = []
    if not as_json:
        click.echo(name)
    for finding in check_database(database):
        findings.append(finding)
        if not as_json:
            show_finding(finding)
    failed = any(finding.verdict is Verdict.FAIL for finding in findings)
    if as_json:
        click.echo(json.dumps(report(name, findings, ok=not failed), indent=2))
    elif failed:
        click.echo(f"{name} would break a promise: see FAIL above.", err=True)
    sys.exit(1 if failed else 0)


def report(database: str, findings: Iterable[Finding], ok: bool) -> dict[str, Any]:
    """What ``check --json`` prints."""
    return {
        "database": database,
        "ok": ok,
        "findings": [
            {
                "check": finding.check,
                "verdict": finding.verdict.value,
                "found": finding.found,
                "advice": finding.advice,
            }
            for finding in findings
        ],
    }


def show_finding(finding: Finding) -> None:
    word, colour = {
        "ok": ("ok", "green"),
        "warning": ("warning", "yellow"),
        "fail": ("FAIL", "red"),
    }[finding.verdict.value]
    click.echo(f"{click.style(f'{word:8}', fg=colour)}{finding.check:30} {finding.found}")
    if finding.advice is not None:
        click.echo(f"{'':8}{finding.advice}")


@main.command()
def purge() -> None:
    """Delete expired rows, the oldest first."""


@main.command()
def stats() -> None:
    """Count what is in the table, by route and by what it means now."""


@main.command("list")
def list_operations() -> None:
    """List operations whose outcome nobody knows, or those of a state."""


@main.command()
def show() -> None:
    """Show one operation: what it is now, what happened to it, and its response."""


@main.command()
def resolve() -> None:
    """Decide what becomes of an operation, and put it on record."""


@main.command()
def reconcile() -> None:
    """Ask a function of yours what became of operations, and resolve them."""


@main.command()
def contract() -> None:
    """Print what clients are to know of an application's idempotency keys."""


@main.command()
def lint() -> None:
    """List the URLs of an application that no policy covers."""


@main.command()
def demo() -> None:
    """Serve a small shop whose Pay button you may double-tap."""
