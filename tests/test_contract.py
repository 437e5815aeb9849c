"""``wsgi-idempotency contract``: what clients are told is what the policies are."""

from __future__ import annotations

import functools
import json
import sys
from datetime import timedelta
from typing import Any

import jsonschema
import pytest
from apps.mapped import never
from click.testing import CliRunner
from flask import Flask
from openapi_spec_validator import OpenAPIV31SpecValidator
from werkzeug.test import Client
from werkzeug.wrappers import Response

from wsgi_idempotency import (
    IdempotencyMiddleware,
    Policy,
    Route,
    by_authorization,
    by_cookie,
    by_header,
    canonical,
    everyone,
    first_of,
    form_field,
    header,
    hold_unknown,
    json_field,
    problems,
    store_everything,
)
from wsgi_idempotency.cli import main
from wsgi_idempotency.contract import duration, markdown, openapi, size, template
from wsgi_idempotency.contrib.flask import Idempotency
from wsgi_idempotency.key import KeySource


def app(environ: Any, start_response: Any) -> Any:
    start_response("201 Created", [])
    return []


def protect(inner: Any = app, **options: Any) -> IdempotencyMiddleware:
    return IdempotencyMiddleware(inner, "memory:", **{"scope": everyone, **options})


def by_account(environ: Any) -> str | None:
    """Each account has its own keys."""
    return None


def first_line(environ: Any, body: bytes) -> bytes:
    return body.partition(b"\n")[0]


class Signed:
    """A key of one's own, without a name."""

    def __call__(self, environ: Any, body: bytes) -> str | None:
        return None


def said_of(name: str, **options: Any) -> str:
    """What the page says under a name, for a policy."""
    (line,) = (
        line for line in markdown(protect(**options)).splitlines() if line.startswith(f"- **{name}")
    )
    return line.partition(":** ")[2]


@pytest.mark.parametrize(
    ("policy", "name", "words"),
    [
        (Policy(), "Where the key", "the header field `Idempotency-Key`, bare or as a quoted "),
        (
            Policy(key=first_of(header("X-Key"), form_field("k"), json_field("a.id"), Signed())),
            "Where the key",
            "the header field `X-Key`, bare or as a quoted string or else the form field `k` or"
            " else the JSON member `a.id` or else what `Signed` finds; at most 256 bytes.",
        ),
        (Policy(max_key_length=64), "Where the key", "at most 64 bytes"),
        (Policy(), "Required", "no; without a key the request is not protected."),
        (Policy(required=True), "Required", "yes; without a key the request is refused."),
        (Policy(), "What a key names", "one operation of one method and path"),
        (Policy(namespace="scope"), "What a key names", "on whatever path"),
        (Policy(), "Remembered", "24 hours from its first use"),
        (Policy(retention=timedelta(days=7)), "Remembered", "7 days from its first use"),
        (Policy(), "What makes", "media type and body, byte for byte"),
        (Policy(fingerprint=canonical), "What makes", "the values of JSON or a form"),
        (Policy(fingerprint=None), "What makes", "the key alone identifies it"),
        (Policy(fingerprint=first_line), "What makes", "what `first_line` makes of it"),
        (Policy(), "A retry while", "it is told at once `CONFLICT`"),
        (Policy(wait=10), "A retry while", "it waits up to 10 seconds, then is told `CONFLICT`"),
        (Policy(max_request_bytes=1000), "Sizes", "a body of 1000 bytes"),
        (Policy(max_response_bytes=512 * 1024), "Sizes", "more than 512 KiB is not sent again"),
    ],
)
def test_the_page_says_what_the_policy_is(policy: Policy, name: str, words: str) -> None:
    assert words in said_of(name, policy=policy)


@pytest.mark.parametrize(
    ("scope", "words"),
    [
        (everyone, "of all clients together."),
        (by_authorization, "Each credential in an Authorization field"),
        (by_cookie("session"), "Each value of the cookie 'session' has its own keys."),
        (by_header("X-Tenant"), "Each value of the header field 'X-Tenant' has its own keys."),
        (by_account, "Each account has its own keys."),
        (lambda environ: None, "of whom `<lambda>` says."),
    ],
)
def test_the_page_says_whose_keys_they_are(scope: Any, words: str) -> None:
    assert said_of("Whose", scope=scope).startswith(words)
    assert said_of("Whose", policy=Policy(scope=scope)).startswith(words)


def test_a_source_of_one_s_own_says_where_it_looks_or_is_named() -> None:
    class Nameless(KeySource):
        def find(self, environ: Any, body: Any) -> str | None:
            return None

    assert said_of("Where", policy=Policy(key=Nameless())).startswith("what `Nameless` finds;")


def test_a_scope_that_flask_s_extension_calls_is_called_by_its_own_name() -> None:
    def by_log_in() -> str | None:
        return None

    shop = Flask("shop")
    Idempotency(shop, "memory:", scope=by_log_in)
    assert "of whom `by_log_in` says." in markdown(shop)


def outcomes(policy: Policy) -> dict[str, str]:
    """The table of outcomes."""
    page = markdown(protect(policy=policy))
    table = page.partition("|---|---|\n")[2].partition("\n\n")[0]
    return dict(line.strip("| ").split(" | ") for line in table.splitlines())


SAME = "a retry gets the same response"
FREE = "it is free: the request runs again, corrected or not"
AGAIN = "the same request runs again; another one is refused"
NEVER = {"401, 407, 408, 413, 425, 426, 429, 431": FREE}
DONE = {"206, 416": "it is done, and a retry is told `RESPONSE_NOT_REPLAYABLE`"}
FAILED, DIED = "an error of the service's", "no answer, because the service was interrupted"


def test_the_page_says_what_becomes_of_a_key() -> None:
    assert outcomes(Policy()) == {
        "2xx to 3xx": SAME,
        "4xx": FREE,
        "5xx": AGAIN,
        **NEVER,
        **DONE,
        FAILED: AGAIN,
        DIED: AGAIN,
    }
    held = outcomes(Policy(outcomes=hold_unknown))
    assert {held["5xx"], held[FAILED], held[DIED]} == {
        "nothing runs until the service has found out; a retry is told `OUTCOME_UNKNOWN`"
    }
    everything = outcomes(Policy(outcomes=store_everything))
    assert everything["2xx to 5xx"] == SAME


def test_statuses_that_an_outcomes_function_picks_are_named() -> None:
    def picky(outcome: Any) -> Any:
        return (
            store_everything(outcome)
            if outcome.status in (402, 409, 410)
            else hold_unknown(outcome)
        )

    found = outcomes(Policy(outcomes=picky))
    assert found["2xx to 3xx, 402, 409 to 410"] == SAME


def test_in_transaction_mode_nothing_has_happened_but_what_is_recorded(sqlite_url: str) -> None:
    protected = IdempotencyMiddleware(
        app, sqlite_url, scope=everyone, policy=Policy(transaction=True, outcomes=hold_unknown)
    )
    page = markdown(protected)
    assert f"| 4xx to 5xx | {FREE} |" in page
    assert f"| {FAILED} | {FREE} |" in page
    assert DIED not in page
    assert "| `TRANSACTION_CONFLICT` | 503 | yes, after `Retry-After` |" in page
    protected.store.close()


@pytest.mark.parametrize(
    ("policy", "code"),
    [
        (Policy(), "MISSING_KEY"),
        (Policy(fingerprint=None), "FINGERPRINT_MISMATCH"),
        (Policy(), "TRANSACTION_FAILED"),
        (Policy(), "REBUILD_FAILED"),
    ],
)
def test_an_error_that_can_not_come_is_left_out(policy: Policy, code: str) -> None:
    assert f"`{code}`" not in markdown(protect(policy=policy))
    assert "| `CONFLICT` | 409 | yes, after `Retry-After` |" in markdown(protect(policy=policy))


def test_what_is_special_is_told() -> None:
    page = markdown(
        protect(policy=Policy(on_store_failure="bypass", rebuild=lambda operation: app))
    )
    assert "- **When keys can't be remembered:** the request runs, and its response says " in page
    assert "| `REBUILD_FAILED` | 500 | yes |" in page
    assert "When keys can't be remembered" not in markdown(protect())


def test_errors_have_the_statuses_that_the_application_s_renderer_gives_them() -> None:
    page = markdown(protect(render_problem=problems.stripe))
    assert "| `FINGERPRINT_MISMATCH` | 400 | no |" in page


def test_each_route_has_its_section_in_the_order_that_counts() -> None:
    routes = [
        Route("/free", None),
        Route("/pay", Policy(methods=["POST", "PUT"]), methods=["PUT"]),
        Route("/exempt", None, methods=["POST"]),
    ]
    headings = [
        line for line in markdown(protect(routes=routes)).splitlines() if line.startswith("## ")
    ]
    assert headings == [
        "## Any method `/free`",
        "## `PUT` `/pay`",
        "## `POST` `/exempt`",
        "## `PATCH`, `POST` on all other paths",
    ]
    assert "## `PATCH`, `POST`\n" in markdown(protect())
    assert "all other paths" not in markdown(protect(policy=None, routes=routes))


def test_a_mounted_application_s_paths_are_told_in_full() -> None:
    from werkzeug.middleware.dispatcher import DispatcherMiddleware

    mounted = protect(routes=[Route("/pay", Policy())])
    page = markdown(DispatcherMiddleware(app, {"/shop": mounted}))
    assert "## `PATCH`, `POST` `/shop/pay`\n" in page
    assert "## `PATCH`, `POST` `/shop/` and below\n" in page


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (1, "1 second"),
        (1.5, "1.5 seconds"),
        (60, "60 seconds"),
        (120, "2 minutes"),
        (86400, "24 hours"),
        (172800, "2 days"),
        (90061, "90061 seconds"),
    ],
)
def test_a_duration_is_told_in_the_largest_unit_that_is_exact(seconds: float, words: str) -> None:
    assert duration(seconds) == words


@pytest.mark.parametrize(
    ("number", "words"),
    [(0, "0 bytes"), (1, "1 byte"), (1024, "1 KiB"), (1025, "1025 bytes"), (2**24, "16 MiB")],
)
def test_a_size_is_told_in_the_largest_unit_that_is_exact(number: int, words: str) -> None:
    assert size(number) == words


# ---------------------------------------------------------------- OpenAPI


def shop() -> Flask:
    flask = Flask("shop")
    for method, rule in (
        ("POST", "/charges"),
        ("POST", "/orders/<int:number>/pay"),
        ("PUT", "/orders/<int:number>"),
        ("POST", "/free"),
    ):
        flask.add_url_rule(rule, view_func=never, methods=[method])
    flask.wsgi_app = protect(  # type: ignore[method-assign]
        flask.wsgi_app,
        policy=Policy(required=True),
        routes=[
            Route("/free", None),
            Route("/charges", Policy(key=first_of(header("X-Key"), form_field("k")), wait=10)),
        ],
    )
    return flask


def test_the_fragment_is_valid_openapi_and_has_the_paths_that_are_covered() -> None:
    document = openapi(shop(), title="Shop")
    OpenAPIV31SpecValidator(document).validate()
    operations = {(path, *operation) for path, operation in document["paths"].items()}
    assert operations == {("/charges", "post"), ("/orders/{number}/pay", "post")}
    assert document["info"]["title"] == "Shop"


def resolved(document: Any, node: Any) -> Any:
    """A node with its references followed."""
    while isinstance(node, dict) and set(node) == {"$ref"}:
        names = node["$ref"].removeprefix("#/").split("/")
        node = functools.reduce(lambda part, name: part[name], names, document)
    return node


def test_a_key_in_a_header_field_is_a_parameter() -> None:
    document = openapi(shop())
    for path, name, required in (
        ("/orders/{number}/pay", "Idempotency-Key", True),
        ("/charges", "X-Key", False),
    ):
        parameters = [
            resolved(document, one) for one in document["paths"][path]["post"]["parameters"]
        ]
        (key,) = (one for one in parameters if one["in"] == "header")
        assert (key["name"], key["required"]) == (name, required)
        variables = [one["name"] for one in parameters if one["in"] == "path"]
        assert variables == (["number"] if "{" in path else [])


def test_the_responses_are_those_that_are_sent() -> None:
    """Status, type, members and fields of a real refusal are as the fragment has them."""
    flask = shop()
    document = openapi(flask)
    responses = document["paths"]["/orders/{number}/pay"]["post"]["responses"]
    assert set(responses) == {"400", "409", "411", "413", "422", "500", "503"}
    for headers in ({}, {"Idempotency-Key": '"not closed'}):
        answer = Client(flask).post("/orders/1/pay", headers=headers)
        told = resolved(document, responses[str(answer.status_code)])
        content = told["content"][answer.mimetype]
        assert answer.json["code"] in content["examples"]
        assert {name for name in told["headers"] if name != "Retry-After"} <= set(
            answer.headers.keys()
        )
        jsonschema.validate(answer.json, resolved(document, content["schema"]))


def test_every_example_is_of_the_schema_and_of_its_status() -> None:
    document = openapi(protect(routes=[Route("/pay", Policy(required=True))]))
    seen = set()
    for status, response in document["paths"]["/pay"]["post"]["responses"].items():
        told = resolved(document, response)
        content = told["content"]["application/problem+json"]
        for code, example in content["examples"].items():
            seen.add(code)
            jsonschema.validate(example["value"], resolved(document, content["schema"]))
            assert (example["value"]["code"], example["value"]["status"]) == (code, int(status))
        retried = any(example["value"]["retryable"] for example in content["examples"].values())
        assert ("Retry-After" in told["headers"]) is (retried and status != "400")
    assert seen == set(problems.CODES) - {
        "TRANSACTION_CONFLICT",
        "TRANSACTION_FAILED",
        "COMMIT_UNKNOWN",
        "REBUILD_FAILED",
    }


def test_an_application_without_a_url_map_has_the_paths_of_its_routes() -> None:
    document = openapi(protect(routes=[Route("/orders/<int:number>/pay", Policy())]))
    OpenAPIV31SpecValidator(document).validate()
    assert set(document["paths"]) == {"/orders/{number}/pay"}
    assert set(document["paths"]["/orders/{number}/pay"]) == {"patch", "post"}


def test_what_is_rendered_otherwise_is_told_as_it_is_sent() -> None:
    def plain(problem: Any, environ: Any) -> Any:
        return Response(problem.detail, problem.status, content_type="text/plain; charset=utf-8")

    routes = [Route("/pay", Policy())]
    document = openapi(protect(render_problem=plain, routes=routes))
    OpenAPIV31SpecValidator(document).validate()
    response = resolved(document, document["paths"]["/pay"]["post"]["responses"]["422"])
    (example,) = response["content"]["text/plain"]["examples"].values()
    assert example["value"].startswith("This idempotency key was used before")


def test_two_policies_that_answer_otherwise_have_components_of_their_own() -> None:
    document = openapi(protect(routes=[Route("/a", Policy()), Route("/b", Policy(required=True))]))
    a, b = (document["paths"][path]["post"]["responses"] for path in ("/a", "/b"))
    assert a["400"] != b["400"]
    assert a["409"] == b["409"]
    assert set(document["components"]["parameters"]) == {"Idempotency-Key", "Idempotency-Key-2"}


@pytest.mark.parametrize(
    ("rule", "path"),
    [
        ("/orders/<int:id>/pay", "/orders/{id}/pay"),
        ("/a/<b>", "/a/{b}"),
        (r"/a/{b:\d+}/c", "/a/{b}/c"),
        (r"/a/{b:\d{2,4}}/c", "/a/{b}/c"),
        ("/a/*rest", "/a/{rest}"),
        ("/a/{b:int}", "/a/{b}"),
        (r"/^a/(?P<b>\w+)/c\.json$", "/a/{b}/c.json"),
        (r"/^a\Z", "/a"),
    ],
)
def test_a_rule_of_any_framework_becomes_a_template(rule: str, path: str) -> None:
    assert template(rule) == path
    assert template("/a/<b:path>", "bottle") == "/a/{b}"


# ---------------------------------------------------------------- the command


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module whose attributes a test sets."""
    module = type(sys)("published_site")
    monkeypatch.setitem(sys.modules, "published_site", module)
    module.app, module.bare = shop(), app
    return module


def test_the_command_prints_the_page(site: Any) -> None:
    result = CliRunner().invoke(main, ["contract", "--title", "Keys", "published_site:app"])
    assert result.exit_code == 0
    assert result.output == markdown(site.app, title="Keys")
    assert result.output.startswith("# Keys\n")
    assert result.output.endswith("|\n")


def test_the_command_prints_openapi(site: Any) -> None:
    result = CliRunner().invoke(main, ["contract", "--openapi", "published_site:app"])
    assert result.exit_code == 0
    assert json.loads(result.output) == openapi(site.app)


def test_an_application_without_the_middleware_has_no_contract(site: Any) -> None:
    result = CliRunner().invoke(main, ["contract", "published_site:bare"])
    assert result.exit_code == 2
    assert "there is no IdempotencyMiddleware in this application" in result.output
