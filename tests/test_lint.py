"""``wsgi-idempotency lint``: which URLs no policy covers, in the map of each framework."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bottle
import falcon
import pytest
from apps.mapped import STRICT, never, protect
from click.testing import CliRunner
from flask import Flask
from flask.views import MethodView
from pyramid.config import Configurator
from pyramid.httpexceptions import HTTPNotFound
from pyramid.response import Response
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from werkzeug.middleware.proxy_fix import ProxyFix
from werkzeug.routing import Map, Rule

from wsgi_idempotency import Policy, Route, everyone
from wsgi_idempotency.cli import main
from wsgi_idempotency.contrib.flask import Idempotency
from wsgi_idempotency.lint import Verdict, knows, lint

COMMAND = Path(sys.executable).with_name("wsgi-idempotency")

#: What is to be said of each rule of a shop, whatever framework it is made with.
EXPECTED = {
    "charges": Verdict.PROTECTED,
    "number": Verdict.PROTECTED,
    "text": Verdict.PARTLY,
    "free": Verdict.EXEMPT,
    "files": Verdict.OPTIONAL,
    "hooks": Verdict.PARTLY,
    "log-in": Verdict.UNCOVERED,
}


def flask_shop() -> Flask:
    app = Flask("shop")
    for name, rule in {
        "charges": "/charges",
        "number": "/orders/<int:number>",
        "text": "/texts/<text>",
        "free": "/free",
        "files": "/files/<path:rest>",
        "hooks": "/hooks/<sender>",
        "log-in": "/log-in",
    }.items():
        app.add_url_rule(rule, name, never, methods=["GET", "POST"])
    app.add_url_rule("/books", "books", never)
    return app


def wrapped_flask() -> Any:
    app = flask_shop()
    app.wsgi_app = protect(app.wsgi_app)  # type: ignore[method-assign]
    return app


def werkzeug_site() -> Any:
    """An application of one's own, whose URL map is werkzeug's."""

    class Site:
        url_map = Map([*flask_rules()])

        __call__ = never

    return protect(Site())


def flask_rules() -> list[Rule]:
    rules = flask_shop().url_map.iter_rules()
    return [Rule(rule.rule, endpoint=rule.endpoint, methods=rule.methods) for rule in rules]


def pyramid_shop() -> Any:
    config = Configurator()
    for name, rule in {
        "charges": "/charges",
        "number": r"/orders/{number:\d+}",
        "text": "/texts/{text}",
        "free": "free",
        "files": "/files/*rest",
        "hooks": "/hooks/{sender}",
        "log-in": "/log-in",
        "books": "/books",
    }.items():
        methods = "GET" if name == "books" else ("GET", "POST")
        config.add_route(name, rule)
        config.add_view(lambda request: Response(), route_name=name, request_method=methods)
    config.add_view(lambda request: Response(), context=HTTPNotFound)
    return protect(config.make_wsgi_app())


def bottle_shop() -> Any:
    app = bottle.Bottle()
    for name, rule in {
        "charges": "/charges",
        "number": "/orders/<number:int>",
        "text": "/texts/<text>",
        "free": "/free",
        "files": "/files/<rest:path>",
        "hooks": "/hooks/<sender>",
        "log-in": "/log-in",
    }.items():
        named = type("Named", (), {"__call__": never, "__name__": name})()
        app.route(rule, ["GET", "POST"], named)
    app.get("/books", callback=never)
    return protect(app)


def falcon_shop() -> Any:
    app = falcon.App()
    for name, rule in {
        "charges": "/charges",
        "number": "/orders/{number:int}",
        "text": "/texts/{text}",
        "free": "/free",
        "files": "/files/{rest:path}",
        "hooks": "/hooks/{sender}",
        "log-in": "/log-in",
    }.items():
        app.add_route(rule, type(name, (), {"on_post": never})())
    app.add_route("/books", type("books", (), {"on_get": never})())
    return protect(app)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(wrapped_flask, id="Flask"),
        pytest.param(werkzeug_site, id="werkzeug"),
        pytest.param(pyramid_shop, id="Pyramid"),
        pytest.param(bottle_shop, id="Bottle"),
        pytest.param(falcon_shop, id="Falcon"),
    ],
)
def test_each_url_is_told_whether_a_policy_covers_it(make: Callable[[], Any]) -> None:
    """And what can't be posted to is not looked at."""
    found = lint(make())
    assert {one.name: one.verdict for one in found if one.method == "POST"} == EXPECTED
    said = {one.name: one.found for one in found}
    assert "not /hooks/1" in said["hooks"]
    assert said["text"].endswith("/a")


def test_django_s_url_map_is_walked_from_where_one_stands() -> None:
    """In a process of its own, since Django is set up once in one."""
    done = subprocess.run(
        [COMMAND, "lint", "--json", "apps.mapped_django:application"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout)
    verdicts = {one["rule"]: one["verdict"] for one in found["routes"] if one["method"] == "POST"}
    assert found["ok"] is False
    assert verdicts == {
        "/charges": "protected",
        "/orders/<int:number>": "protected",
        "/texts/<text>": "partly",
        "/free": "exempt",
        r"/^files/(?P<rest>.+)$": "optional",
        r"/^hooks/(?P<sender>\w+)$": "partly",
        "/log-in": "uncovered",
        "/set": "uncovered",
        r"/^odd/(?=impossible)nothing$": "unknown",
        "/en-us/translated": "uncovered",
    }


# ---------------------------------------------------------------- finding the middleware


def test_flask_s_extension_is_found() -> None:
    app = flask_shop()
    Idempotency(app, "memory:", scope=everyone, policy=STRICT)
    assert {one.verdict for one in lint(app)} == {Verdict.PROTECTED}


def test_pyramid_s_include_is_found() -> None:
    settings = {
        "idempotency.store": "memory:",
        "idempotency.scope": "everyone",
        "idempotency.required": "true",
    }
    config = Configurator(settings=settings)
    config.include("wsgi_idempotency.contrib.pyramid")
    config.add_route("charges", "/charges", request_method="POST")
    config.add_view(lambda request: Response(), route_name="charges")
    assert [(one.rule, one.verdict) for one in lint(config.make_wsgi_app())] == [
        ("/charges", Verdict.PROTECTED)
    ]


def test_without_middleware_everything_is_uncovered() -> None:
    found = lint(flask_shop())
    assert {one.verdict for one in found} == {Verdict.UNCOVERED}
    assert {one.found for one in found} == {"there is no IdempotencyMiddleware around it"}


def test_mounted_applications_are_looked_at_where_they_are_mounted() -> None:
    """One is protected inside its mount point, the other from outside, the third is not."""
    inside, outside, bare = flask_shop(), flask_shop(), flask_shop()
    app = DispatcherMiddleware(
        ProxyFix(bare),
        {
            "/inside": protect(inside),
            "/outside": protect(
                DispatcherMiddleware(bottle.Bottle(), {"/deep": outside}),
                routes=[Route("/deep/charges", STRICT)],
            ),
        },
    )
    verdicts = {one.rule: one.verdict for one in lint(app)}
    assert verdicts["/charges"] is Verdict.UNCOVERED
    assert verdicts["/inside/charges"] is Verdict.PROTECTED
    assert verdicts["/outside/deep/charges"] is Verdict.PROTECTED
    assert verdicts["/outside/deep/log-in"] is Verdict.UNCOVERED


def test_the_outer_of_two_middlewares_counts() -> None:
    app = protect(protect(flask_shop(), policy=STRICT, routes=()), routes=())
    assert {one.verdict for one in lint(app)} == {Verdict.UNCOVERED}


def test_a_wrapper_that_wraps_itself_ends_the_walk() -> None:
    class Loop:
        __call__ = never

    loop = Loop()
    loop.app = loop  # type: ignore[attr-defined]
    assert not knows(loop)


def test_methods_are_those_that_policies_are_for_and_those_asked_for() -> None:
    app = Flask("shop")

    class Order(MethodView):
        put = never
        delete = never

    app.add_url_rule("/orders", view_func=Order.as_view("order"))
    assert lint(protect(app)) == []
    policy = Policy(methods=["PUT"], required=True)
    put = protect(app, routes=[Route("/orders", policy)])
    assert [(one.method, one.verdict) for one in lint(put)] == [("PUT", Verdict.PROTECTED)]
    assert [(one.method, one.verdict) for one in lint(put, ["delete"])] == [
        ("DELETE", Verdict.UNCOVERED),
        ("PUT", Verdict.PROTECTED),
    ]


def test_pyramid_s_traversal_and_views_for_any_method_are_looked_at() -> None:
    config = Configurator()
    config.add_view(lambda request: Response(), name="pay")
    config.add_route("any", "/any")
    config.add_view(lambda request: Response(), route_name="any")
    config.add_route("posted", "/posted", request_method="POST")
    config.add_view(lambda request: Response(), route_name="posted", request_method="GET")
    config.add_route("no-view", "/no-view")
    found = lint(config.make_wsgi_app(), ["POST"])
    assert [one.rule for one in found] == ["/any", "/no-view", "/pay"]


def test_a_converter_s_values_are_found() -> None:
    app = Flask("shop")
    app.add_url_rule("/<any(north, south):pole>", "pole", never, methods=["POST"])
    app.add_url_rule("/<string(length=3):code>/x", "code", never, methods=["POST"])
    app.add_url_rule("/built", "built", never, methods=["POST"], build_only=True)
    verdicts = {one.name: one.verdict for one in lint(protect(app, policy=STRICT, routes=()))}
    assert verdicts == {"pole": Verdict.PROTECTED, "code": Verdict.PROTECTED}


def flask_oddity() -> Any:
    app = Flask("shop")
    app.add_url_rule("/<string(length=50):code>", "code", never, methods=["POST"])
    return app


def pyramid_oddity() -> Any:
    config = Configurator()
    config.add_route("code", "/{code:[A-Z]{9}}", request_method="POST")
    return config.make_wsgi_app()


def bottle_oddity() -> Any:
    app = bottle.Bottle()
    app.post("/<code:re:[A-Z]{9}>", callback=never)
    app.post("/<number:int>/<code:re:[A-Z]{9}>", callback=never)
    return app


def falcon_oddity() -> Any:
    class Oddity:
        on_post = never

    app = falcon.App()
    app.add_route("/{code:dt}", Oddity())
    return app


@pytest.mark.parametrize(
    "make",
    [flask_oddity, pyramid_oddity, bottle_oddity, falcon_oddity],
    ids=lambda make: make.__name__,
)
def test_what_no_candidate_fits_is_left_to_a_person(make: Callable[[], Any]) -> None:
    """Even where one policy covers everything: nobody has looked."""
    found = lint(protect(make(), policy=STRICT, routes=()))
    assert {one.verdict for one in found} == {Verdict.UNKNOWN}


def test_the_rule_of_another_route_is_none_of_a_rule_s_paths() -> None:
    """Bottle tries fixed rules first, and rules of another method not at all."""
    app = bottle.Bottle()
    app.post("/<name>", callback=never)
    app.post("/1", callback=never)
    verdicts = [(one.rule, one.found) for one in lint(protect(app, routes=[Route("/1", STRICT)]))]
    assert verdicts == [
        ("/<name>", "no policy covers it"),
        ("/1", "protected; a request without a key is refused"),
    ]


def test_a_bound_method_leads_to_what_its_object_wraps() -> None:
    class Wrapper:
        def __init__(self, app: Any) -> None:
            self.app = app

        handle = never

    found = lint(protect(Wrapper(flask_shop()).handle, policy=STRICT, routes=()))
    assert {one.verdict for one in found} == {Verdict.PROTECTED}


# ---------------------------------------------------------------- the command


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module whose attributes a test sets."""
    module = type(sys)("linted_site")
    monkeypatch.setitem(sys.modules, "linted_site", module)
    return module


def run(*arguments: str) -> Any:
    return CliRunner().invoke(main, ["lint", *arguments])


def test_the_command_lists_what_needs_a_decision(site: Any) -> None:
    site.app = wrapped_flask()
    result = run("linted_site:app")
    assert result.exit_code == 1
    lines = result.output.splitlines()
    assert lines[-1] == "3 of 7 need a decision: a policy, or a Route that exempts"
    assert any(line.startswith("FAIL    POST /log-in ") for line in lines)
    assert any(line.startswith("warning POST /files/<path:rest> ") for line in lines)
    assert any(line.startswith("ok      POST /free ") for line in lines)


@pytest.mark.parametrize(("options", "code"), [([], 0), (["--strict"], 1)])
def test_a_key_that_is_not_required_is_a_warning_unless_one_is_strict(
    site: Any, options: list[str], code: int
) -> None:
    site.app = protect(flask_shop(), policy=Policy(), routes=())
    result = run(*options, "linted_site:app")
    assert (result.exit_code, "a request without a key runs unprotected" in result.output) == (
        code,
        True,
    )


def test_json_says_the_same(site: Any) -> None:
    site.app = protect(flask_shop(), policy=STRICT, routes=())
    result = run("--json", "linted_site:app")
    assert result.exit_code == 0
    said = json.loads(result.output)
    assert said["ok"] is True
    assert said["routes"][0] == {
        "method": "POST",
        "rule": "/charges",
        "name": "charges",
        "verdict": "protected",
        "found": "protected; a request without a key is refused",
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param([], "Which application?", id="no application"),
        pytest.param(["nowhere_at_all:app"], "can't be imported", id="no such module"),
        pytest.param(
            ["linted_site:name"], "can't be called", id="something that is no application"
        ),
        pytest.param(["linted_site:plain"], "no URL map", id="no URL map"),
        pytest.param(
            ["linted_site:make"], "name it as linted_site:make()", id="a factory that is not called"
        ),
        pytest.param(
            ["linted_site:broken()"],
            "the application can't be made: KeyError: 'SHOP_SECRET'",
            id="an application that can't be made",
        ),
    ],
)
def test_the_command_is_misused_with(
    site: Any, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.delenv("WSGI_IDEMPOTENCY_APP", raising=False)
    site.name, site.plain = "shop", lambda environ, start_response: []
    site.make, site.broken = wrapped_flask, lambda: {}["SHOP_SECRET"]
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.output


def test_what_an_application_prints_is_kept_out_of_the_json(site: Any) -> None:
    def make() -> Any:
        print("loading the shop")
        return protect(flask_shop(), policy=STRICT, routes=())

    site.make = make
    result = run("--json", "linted_site:make()")
    assert json.loads(result.stdout)["ok"] is True
    assert result.stderr == "loading the shop\n"


def test_the_environment_may_name_the_application(
    site: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for ``wsgi_idempotency.auto:application``, with the options beside it."""
    site.app = flask_shop()
    for name, value in {
        "APP": "linted_site:app",
        "DATABASE": "memory:",
        "SCOPE": "everyone",
        "REQUIRED": "true",
    }.items():
        monkeypatch.setenv(f"WSGI_IDEMPOTENCY_{name}", value)
    assert run().exit_code == 0
    monkeypatch.delenv("WSGI_IDEMPOTENCY_SCOPE")
    result = run()
    assert (result.exit_code, "WSGI_IDEMPOTENCY_SCOPE is not set" in result.output) == (2, True)


@pytest.mark.parametrize("command", ["lint", "contract"])
def test_an_application_of_the_environments_is_made_once(tmp_path: Path, command: str) -> None:
    """It may take its time, or register what is there once."""
    (tmp_path / "slow_shop.py").write_text(
        "import sys\n"
        "from flask import Flask\n"
        "def make():\n"
        "    print('made', file=sys.stderr)\n"
        "    return Flask('shop')\n"
    )
    done = subprocess.run(
        [COMMAND, command],
        cwd=tmp_path,
        env={
            **os.environ,
            "WSGI_IDEMPOTENCY_APP": "slow_shop:make()",
            "WSGI_IDEMPOTENCY_DATABASE": "memory:",
            "WSGI_IDEMPOTENCY_SCOPE": "everyone",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "made\n")
