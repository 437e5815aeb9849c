"""The extension for Flask: its configuration, and a scope inside the request context."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flask_login
import pytest
from flask import Flask, current_app, g, request, session
from servers.http import Connection, chunked, request_bytes
from servers.http import werkzeug as serve

from wsgi_idempotency import (
    IdempotencyMiddleware,
    Policy,
    Route,
    by_authorization,
    everyone,
    problems,
)
from wsgi_idempotency.contrib.flask import Idempotency
from wsgi_idempotency.errors import ConfigurationError

KEY = {"Idempotency-Key": "k"}


class User(flask_login.UserMixin):
    def __init__(self, name: str) -> None:
        self.id = name


def make_shop(**config: object) -> Flask:
    """A shop with a log-in, that counts what it charges."""
    app = Flask("shop")
    app.config.update(SECRET_KEY="not a secret", **config)
    app.charged = []  # type: ignore[attr-defined]
    app.called = []  # type: ignore[attr-defined]
    logins = flask_login.LoginManager(app)
    logins.user_loader(User)

    @app.before_request
    def before() -> None:
        app.called.append("before")
        g.begun = True

    @app.teardown_request
    def after(error: BaseException | None) -> None:
        app.called.append("teardown")

    @app.post("/log-in/<name>")
    def log_in(name: str) -> str:
        flask_login.login_user(User(name))
        session["tenant"] = f"tenant of {name}"
        return "welcome"

    @app.post("/charges")
    def charge() -> tuple[dict[str, Any], int]:
        app.charged.append(request.form["amount"])
        return {"id": len(app.charged), "amount": request.form["amount"]}, 201

    return app


def pay(client: Any, amount: str = "42", key: str = "k", **more: Any) -> Any:
    return client.post(
        "/charges", data={"amount": amount}, headers={"Idempotency-Key": key}, **more
    )


def test_the_scope_can_be_the_user_who_is_logged_in() -> None:
    """Two users with the same key are two operations, and nobody is none."""
    app = make_shop()
    Idempotency(app, "memory:", scope=lambda: flask_login.current_user.get_id())
    alice, bob = app.test_client(), app.test_client()
    alice.post("/log-in/alice")
    bob.post("/log-in/bob")
    answers = [pay(alice), pay(alice), pay(bob)]
    assert [answer.json["id"] for answer in answers] == [1, 1, 2]
    assert [answer.headers.get("Idempotency-Replayed") for answer in answers] == [
        None, "true", None,
    ]  # fmt: skip
    nobody = pay(app.test_client())
    assert (nobody.status_code, nobody.json["code"]) == (400, "MISSING_SCOPE")
    assert app.charged == ["42", "42"]


@pytest.mark.parametrize(
    "scope",
    [
        pytest.param(lambda: session["tenant"], id="of the session"),
        pytest.param(lambda: request.cookies["session"], id="a cookie"),
        pytest.param(lambda: current_app.name + request.headers["X-Tenant"], id="a header field"),
        pytest.param(lambda: f"{request.endpoint} {request.url}", id="the URL"),
    ],
)
def test_the_scope_can_be(scope: Callable[[], str]) -> None:
    app = make_shop()
    Idempotency(app, "memory:", scope=scope)
    client = app.test_client()
    client.post("/log-in/alice")
    for _ in range(2):
        answer = client.post(
            "/charges", data={"amount": "42"}, headers={**KEY, "X-Tenant": "alice"}
        )
        assert answer.status_code == 201
    assert app.charged == ["42"]


def test_finding_the_scope_calls_no_function_of_the_application_before_the_request() -> None:
    """What is torn down with the context is: a user that was looked up there held something."""
    app = make_shop()

    def scope() -> str:
        assert "begun" not in g
        g.of_the_scope = True
        return "alice"

    Idempotency(app, "memory:", scope=scope)

    @app.before_request
    def apart() -> None:
        assert "of_the_scope" not in g

    client = app.test_client()
    assert pay(client).status_code == 201
    assert app.called == ["teardown", "before", "teardown"]
    app.called.clear()
    assert pay(client).headers["Idempotency-Replayed"] == "true"
    assert app.called == ["teardown"]


def test_finding_the_scope_saves_no_session_and_sets_no_cookie() -> None:
    app = make_shop()

    def scope() -> str:
        session["seen"] = True
        return "alice"

    Idempotency(app, "memory:", scope=scope)
    client = app.test_client()
    assert "Set-Cookie" not in pay(client).headers
    assert "Set-Cookie" not in pay(client).headers


@pytest.mark.parametrize("read", [lambda: request.form["amount"], lambda: request.get_data()])
def test_a_scope_that_reads_the_body_is_refused(
    read: Callable[[], Any], caplog: pytest.LogCaptureFixture
) -> None:
    """It would take it from the application."""
    app = make_shop()
    Idempotency(app, "memory:", scope=lambda: str(read()))
    answer = pay(app.test_client())
    assert (answer.status_code, answer.json["code"]) == (500, "EXTRACTOR_FAILED")
    assert "the scope read the request's body" in caplog.text
    assert app.charged == []


@pytest.mark.parametrize("transfer", ["with a length", "chunked"])
def test_the_application_gets_the_whole_body_after_the_scope_was_found(transfer: str) -> None:
    app = make_shop()
    Idempotency(app, "memory:", scope=lambda: request.headers["X-Tenant"])
    fields = [
        ("Idempotency-Key", "k"),
        ("X-Tenant", "t"),
        ("Content-Type", "application/x-www-form-urlencoded"),
        ("Connection", "close"),
    ]
    body = b"amount=" + b"9" * 100_000
    if transfer == "chunked":
        head = request_bytes("POST", "/charges", [*fields, ("Transfer-Encoding", "chunked")])
        sent = head + chunked(body[:7], body[7:])
    else:
        sent = request_bytes("POST", "/charges", fields, body)
    with serve(app) as address:
        for replayed in (None, "true"):
            with Connection(address) as connection:
                connection.send(sent)
                answer = connection.receive()
            assert (answer.status, answer.header("Idempotency-Replayed")) == (201, replayed)
    assert app.charged == ["9" * 100_000]


@pytest.mark.parametrize("where", ["policy", "routes"])
def test_a_policy_of_its_own_scope_has_it_in_the_request_s_context(where: str) -> None:
    policy = Policy(scope=lambda: flask_login.current_user.get_id())
    options: dict[str, Any] = (
        {"policy": policy}
        if where == "policy"
        else {"routes": [Route("/log-in/<name>", None), Route("/charges", policy)]}
    )
    app = make_shop()
    Idempotency(app, "memory:", scope=lambda: None, **options)
    alice, bob = app.test_client(), app.test_client()
    alice.post("/log-in/alice")
    bob.post("/log-in/bob")
    assert [pay(client).json["id"] for client in (alice, alice, bob)] == [1, 1, 2]
    assert pay(app.test_client()).json["code"] == "MISSING_SCOPE"


@pytest.mark.parametrize(
    "options", [{"policy": "strict"}, {"routes": ["/pay"]}, {"routes": Route("/pay", None)}]
)
def test_what_is_no_policy_and_no_route_is_refused_as_the_middleware_does(
    options: dict[str, Any],
) -> None:
    with pytest.raises(ConfigurationError, match=r"use a Policy|Route\(rule, policy\)"):
        Idempotency(make_shop(), "memory:", scope=everyone, **options)


def test_a_scope_that_raises_refuses_the_request(caplog: pytest.LogCaptureFixture) -> None:
    app = make_shop()
    Idempotency(app, "memory:", scope=lambda: session["nothing of the kind"])
    answer = pay(app.test_client())
    assert (answer.status_code, answer.json["code"]) == (500, "EXTRACTOR_FAILED")
    assert "KeyError" in caplog.text
    assert app.charged == []
    assert app.called == ["teardown"]


def test_a_scope_that_takes_the_environ_is_called_without_a_context() -> None:
    app = make_shop()
    Idempotency(app, "memory:", scope=by_authorization)
    client = app.test_client()
    alice = {"Authorization": "Bearer alice", **KEY}
    for _ in range(2):
        assert client.post("/charges", data={"amount": "42"}, headers=alice).status_code == 201
    assert app.charged == ["42"]
    assert app.called == ["before", "teardown"]


def test_a_callable_without_a_signature_is_called_with_the_environ(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As the core would; type(environ) is a class, and no scope."""
    app = make_shop()
    Idempotency(app, "memory:", scope=type)
    assert pay(app.test_client()).json["code"] == "EXTRACTOR_FAILED"
    assert "the scope is a type; return a str" in caplog.text


@pytest.mark.parametrize(
    ("scope", "message"),
    [
        (lambda one, two: "", "use a callable without parameters, or one that takes the environ"),
        ("alice", "scope is 'alice', which can't be called"),
    ],
    ids=["that takes two arguments", "that is no callable"],
)
def test_a_scope_is_refused(scope: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Idempotency(make_shop(), "memory:", scope=scope)


# ---------------------------------------------------------------- configuration


def test_the_configuration_says_what_is_not_given() -> None:
    app = make_shop(
        IDEMPOTENCY_STORE="memory:",
        IDEMPOTENCY_SCOPE="everyone",
        IDEMPOTENCY_REQUIRED=True,
        IDEMPOTENCY_WAIT="2 s",
        IDEMPOTENCY_ROUTES=[Route("/log-in/<name>", None)],
    )
    idempotency = Idempotency()
    idempotency.init_app(app)
    middleware = app.extensions["idempotency"]
    assert isinstance(middleware, IdempotencyMiddleware)
    assert middleware is app.wsgi_app
    assert middleware.policy == Policy(required=True, wait=2)
    client = app.test_client()
    assert client.post("/log-in/alice").status_code == 200
    assert client.post("/charges").json["code"] == "MISSING_KEY"
    assert [pay(client).status_code, pay(client).status_code] == [201, 201]
    assert app.charged == ["42"]


def test_the_environment_can_be_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through Flask's own way to read it, which takes numbers and booleans for JSON."""
    monkeypatch.setenv("FLASK_IDEMPOTENCY_STORE", "memory:")
    monkeypatch.setenv("FLASK_IDEMPOTENCY_SCOPE", "header:X-Tenant")
    monkeypatch.setenv("FLASK_IDEMPOTENCY_RETENTION", "7 days")
    monkeypatch.setenv("FLASK_IDEMPOTENCY_WAIT", "2")
    monkeypatch.setenv("FLASK_IDEMPOTENCY_REQUIRED", "true")
    app = make_shop()
    app.config.from_prefixed_env()
    Idempotency(app)
    policy = Policy(retention=7 * 86400, wait=2, required=True)
    assert app.extensions["idempotency"].policy == policy


def test_what_is_given_goes_before_the_configuration() -> None:
    app = make_shop(IDEMPOTENCY_STORE="nonsense", IDEMPOTENCY_SCOPE="by_authorization")
    app.config["IDEMPOTENCY_MAX_WAITING"] = 0
    idempotency = Idempotency(
        scope=everyone,
        policy=None,
        routes=[Route("/charges", Policy())],
        on_event=[],
        render_problem=problems.stripe,
        max_waiting=3,
        secret=b"sixteen bytes or more",
    )
    idempotency.init_app(app, "memory:")
    middleware = app.extensions["idempotency"]
    assert middleware.scope is everyone
    assert middleware.policy is None
    assert middleware.render_problem is problems.stripe
    assert middleware.secret == b"sixteen bytes or more"


def test_one_extension_can_protect_several_applications() -> None:
    """Made by a factory, each with a store of its own."""
    idempotency = Idempotency(scope=everyone)
    shops = [make_shop(IDEMPOTENCY_STORE="memory:") for _ in range(2)]
    for shop in shops:
        idempotency.init_app(shop)
    assert [pay(shop.test_client()).json["id"] for shop in shops] == [1, 1]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        pytest.param({}, "set IDEMPOTENCY_STORE", id="no store"),
        pytest.param({"IDEMPOTENCY_STORE": "memory:"}, "set IDEMPOTENCY_SCOPE", id="no scope"),
        pytest.param({"IDEMPOTENCY_LEESE": 5}, "did you mean IDEMPOTENCY_LEASE?", id="a slip"),
        pytest.param({"IDEMPOTENCY_LEASE": "5 apples"}, "IDEMPOTENCY_LEASE is", id="nonsense"),
    ],
)
def test_a_configuration_is_refused_that_has(config: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        Idempotency(make_shop(**config))
    assert message in str(refused.value)


def test_an_application_is_protected_once() -> None:
    app = make_shop()
    idempotency = Idempotency(app, "memory:", scope=everyone)
    with pytest.raises(ConfigurationError, match="protected already"):
        idempotency.init_app(app)
