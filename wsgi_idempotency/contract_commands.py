"""The commands that look at an application: what it promises, and what it leaves open."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import sys
import traceback
from collections import Counter
from typing import Any

import click

from wsgi_idempotency.cli_options import import_from_here, json_option
from wsgi_idempotency.errors import ConfigurationError
from wsgi_idempotency.lint import FINDINGS, UNSAFE, Finding, Verdict, knows, lint
from wsgi_idempotency.settings import load
from wsgi_idempotency.urls import middlewares

APP_VARIABLE = "WSGI_IDEMPOTENCY_APP"


def application_of(ctx: click.Context, param: click.Parameter, value: str | None) -> Any:
    """What ``module:app`` names; without it, what the environment says to wrap."""
    import_from_here()
    if value is None and not os.environ.get(APP_VARIABLE):
        raise click.UsageError(
            f"Which application? Name it as module:app, or set {APP_VARIABLE} and what goes with"
            " it, as for wsgi_idempotency.auto:application",
            ctx,
        )
    try:
        # What the application prints meanwhile has no place in JSON.
        with contextlib.redirect_stdout(sys.stderr):
            if value is None:
                # The first import makes it, for a server.
                made = "wsgi_idempotency.auto" not in sys.modules
                from wsgi_idempotency import auto

                return auto.application if made else auto.from_environment()
            app = load("it", value)
    except ConfigurationError as exc:
        raise click.BadParameter(str(exc), ctx, param) from exc
    except Exception as exc:
        # Where in the application it was, its author has to know.
        traceback.print_exc()
        raise click.BadParameter(
            f"the application can't be made: {type(exc).__name__}: {exc}", ctx, param
        ) from exc
    if not callable(app):
        raise click.BadParameter(f"{value} can't be called", ctx, param)
    if inspect.isfunction(app):
        try:
            inspect.signature(app).bind({}, None)
        except TypeError as exc:
            raise click.BadParameter(
                f"{value} doesn't take environ and start_response. If it makes the application,"
                f" name it as {value}()",
                ctx, param,
            ) from exc  # fmt: skip
    return app


app_argument = click.argument(
    "app", metavar="[MODULE:APP]", required=False, callback=application_of
)


@click.command()
@app_argument
@click.option("--openapi", is_flag=True, help="Print a fragment of an OpenAPI 3.1 document.")
@click.option(
    "--title", default="Idempotency keys", show_default=True, help="The heading of what is printed."
)
@click.pass_context
def contract(ctx: click.Context, app: Any, openapi: bool, title: str) -> None:
    """Print what clients of an application are to know of its idempotency keys.

    A page in Markdown, made of the policies that the application has. The application is
    imported, from where you stand too; its store is not connected to.
    """
    from wsgi_idempotency import contract as contracts

    if not middlewares(app):
        raise click.UsageError(
            "there is no IdempotencyMiddleware in this application, as far as its wrappers keep"
            " what they wrap in .app, .wsgi_app or .application",
            ctx,
        )
    if openapi:
        click.echo(json.dumps(contracts.openapi(app, title=title), indent=2))
    else:
        click.echo(contracts.markdown(app, title=title), nl=False)


@click.command("lint")
@app_argument
@click.option(
    "--methods",
    default=",".join(UNSAFE),
    show_default=True,
    help="What needs a policy, besides the methods that policies are for.",
)
@click.option("--strict", is_flag=True, help="Let a key that is not required count as a finding.")
@json_option
@click.pass_context
def lint_routes(ctx: click.Context, app: Any, methods: str, strict: bool, as_json: bool) -> None:
    """List the URLs of an application that no policy covers.

    Walks the URL map of a Flask, Pyramid, Django, Bottle or Falcon application, or of one
    whose url_map is werkzeug's. Exits with 1 when there is a finding. A route that exempts
    a URL is a decision, and no finding.
    """
    if not knows(app):
        raise click.UsageError(
            "there is no URL map in this application that can be walked: it is none of Flask's,"
            " Pyramid's, Django's, Bottle's or Falcon's, and has no url_map of werkzeug's",
            ctx,
        )
    looked_at = lint(app, methods.replace(",", " ").split())
    failing = FINDINGS | {Verdict.OPTIONAL} if strict else FINDINGS
    findings = [one for one in looked_at if one.verdict in failing]
    if as_json:
        click.echo(json.dumps(report(looked_at, ok=not findings), indent=2))
    else:
        show(looked_at, failing)
    sys.exit(1 if findings else 0)


def report(looked_at: list[Finding], *, ok: bool) -> dict[str, Any]:
    """What ``lint --json`` prints."""
    return {
        "ok": ok,
        "routes": [
            {
                "method": one.method,
                "rule": one.rule,
                "name": one.name,
                "verdict": one.verdict.value,
                "found": one.found,
            }
            for one in looked_at
        ],
    }


def show(looked_at: list[Finding], failing: frozenset[Verdict]) -> None:
    for one in looked_at:
        if one.verdict in failing:
            word, colour = "FAIL", "red"
        elif one.verdict is Verdict.OPTIONAL:
            word, colour = "warning", "yellow"
        else:
            word, colour = "ok", "green"
        place = f"{one.method} {one.rule}"
        click.echo(f"{click.style(f'{word:8}', fg=colour)}{place:38} {one.found}")
    counts = Counter(one.verdict in failing for one in looked_at)
    click.echo(
        f"{counts[True]} of {len(looked_at)} need a decision: a policy, or a Route that exempts"
    )
