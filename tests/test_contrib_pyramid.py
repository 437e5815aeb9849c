"""The include for Pyramid: around all that makes the response, with Pyramid's own user."""

from __future__ import annotations

from typing import Any

import pytest
from pyramid.authentication import AuthTktCookieHelper
from pyramid.config import Configurator
from pyramid.events import NewResponse
from pyramid.httpexceptions import HTTPConflict
from pyramid.request import Request
from pyramid.response import Response
from pyramid.router import default_execution_policy
from pyramid.security import remember
from werkzeug.test import Client

from wsgi_idempotency import IdempotencyMiddleware, Policy, by_authorization
from wsgi_idempotency.errors import ConfigurationError

FIT = "wsgi_idempotency.contrib.pyramid"

SETTINGS = {"idempotency.store": "memory:", "idempotency.scope": "everyone"}


class Security:
    """Users by a signed cookie."""

    def __init__(self) -> None:
        self.helper = AuthTktCookieHelper("not a secret")

    def identity(self, request: Request) -> Any:
        return self.helper.identify(request)

    def authenticated_userid(self, request: Request) -> Any:
        identity = self.identity(request)
        return identity["userid"] if identity else None

    def permits(self, request: Request, context: object, permission: str) -> bool:
        return self.authenticated_userid(request) is not None

    def remember(self, request: Request, userid: str, **kw: Any) -> Any:
        return self.helper.remember(request, userid, **kw)

    def forget(self, request: Request, **kw: Any) -> Any:
        return self.helper.forget(request, **kw)


class Shop:
    """A shop that counts what it charges, and notes what became of its requests."""

    def __init__(self, security: Security | None = None, **settings: object) -> None:
        self.charged: list[str] = []
        self.finished: list[str] = []
        self.config = Configurator(settings={**SETTINGS, **settings})
        self.config.set_security_policy(security or Security())
        self.config.add_route("charges", "/charges")
        self.config.add_view(self.charge, route_name="charges", request_method="POST")
        self.config.add_route("log-in", "/log-in/{name}")
        self.config.add_view(self.log_in, route_name="log-in")
        self.config.add_request_method(self.note, "noted", reify=True)

    def note(self, request: Request) -> bool:
        request.add_finished_callback(lambda request: self.finished.append(request.path))
        return True

    def charge(self, request: Request) -> Response:
        self.charged.append(request.POST["amount"])
        request.add_response_callback(add_receipt)
        return Response(json_body={"id": len(self.charged)}, status=201)

    def log_in(self, request: Request) -> Response:
        return Response(headerlist=remember(request, request.matchdict["name"]))

    def open(self) -> Any:
        return self.config.make_wsgi_app()


def add_receipt(request: Request, response: Response) -> None:
    response.headers["X-Receipt"] = request.POST["amount"]


def pay(client: Client, amount: str = "42", **headers: str) -> Any:
    return client.post(
        "/charges", data={"amount": amount}, headers={"Idempotency-Key": "k", **headers}
    )


def test_an_include_protects_the_application() -> None:
    shop = Shop()
    shop.config.include(FIT)
    client = Client(shop.open())
    first, again, other = pay(client), pay(client), pay(client, "43")
    assert (first.status_code, again.data) == (201, first.data)
    assert again.headers["Idempotency-Replayed"] == "true"
    assert other.json["code"] == "FINGERPRINT_MISMATCH"
    assert shop.charged == ["42"]


def test_what_is_replayed_is_what_was_sent_and_not_what_the_view_had_returned() -> None:
    """Response callbacks, subscribers and tweens have had their say before it is recorded."""
    shop = Shop()
    shop.config.include(FIT)
    shop.config.add_subscriber(
        lambda event: event.response.headers.update({"X-Subscriber": "yes"}), NewResponse
    )
    client = Client(shop.open())
    first, again = pay(client), pay(client)
    for name in ("X-Receipt", "X-Subscriber", "Content-Type"):
        assert first.headers[name] == again.headers[name]


def test_an_exception_view_has_its_say_before_it_is_settled() -> None:
    """Otherwise a conflict would count as a crash."""
    shop = Shop(**{"idempotency.outcomes": "store_everything"})
    shop.config.include(FIT)
    answers = []

    def failing(request: Request) -> Response:
        answers.append(request)
        raise HTTPConflict("sold out")

    shop.config.add_route("seats", "/seats")
    shop.config.add_view(failing, route_name="seats")
    client = Client(shop.open())
    responses = [client.post("/seats", headers={"Idempotency-Key": "k"}) for _ in range(2)]
    assert [response.status_code for response in responses] == [409, 409]
    assert responses[1].headers["Idempotency-Replayed"] == "true"
    assert len(answers) == 1


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_another_execution_policy_runs_inside(before: bool) -> None:
    """Such as that of pyramid_retry, whether it is set before the include or after."""
    shop = Shop()
    ran = []

    def policy(environ: dict[str, Any], router: Any) -> Any:
        ran.append(environ["wsgi_idempotency.operation"].key)
        return default_execution_policy(environ, router)

    if before:
        shop.config.set_execution_policy(policy)
    shop.config.include(FIT)
    if not before:
        shop.config.set_execution_policy(policy)
    client = Client(shop.open())
    assert [pay(client).status_code for _ in range(2)] == [201, 201]
    assert ran == ["k"]


def test_an_execution_policy_that_displaces_ours_is_refused() -> None:
    """The application would run unprotected."""
    shop = Shop()
    shop.config.include(FIT)
    shop.config.commit()
    shop.config.set_execution_policy(default_execution_policy)
    with pytest.raises(ConfigurationError, match="include ours last"):
        shop.open()


def test_the_scope_can_be_the_user_that_the_security_policy_finds() -> None:
    shop = Shop(**{"idempotency.scope": "authenticated_userid"})
    shop.config.include(FIT)
    app = shop.open()
    alice, bob = Client(app), Client(app)
    alice.get("/log-in/alice")
    bob.get("/log-in/bob")
    assert [pay(client).json["id"] for client in (alice, alice, bob)] == [1, 1, 2]
    assert pay(Client(app)).json["code"] == "MISSING_SCOPE"
    assert shop.charged == ["42", "42"]


def test_finding_the_user_has_the_requests_methods_and_finishes_the_request() -> None:
    class Noting(Security):
        def authenticated_userid(self, request: Request) -> str:
            assert request.noted
            return "alice"

    shop = Shop(Noting(), **{"idempotency.scope": "authenticated_userid"})
    shop.config.include(FIT)
    client = Client(shop.open())
    assert pay(client).status_code == 201
    assert shop.finished == ["/charges"]


def test_a_security_policy_that_reads_the_body_is_refused(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It would take it from the view."""

    class Reading(Security):
        def authenticated_userid(self, request: Request) -> str:
            return str(request.POST["amount"])

    shop = Shop(Reading(), **{"idempotency.scope": "authenticated_userid"})
    shop.config.include(FIT)
    client = Client(shop.open())
    assert pay(client).json["code"] == "EXTRACTOR_FAILED"
    assert "the scope read the request's body" in caplog.text
    assert shop.charged == []


def test_the_settings_are_the_options() -> None:
    """Of an ini file, or as Python has them."""
    shop = Shop(
        **{
            "idempotency.scope": by_authorization,
            "idempotency.wait": "2 s",
            "idempotency.required": True,
            "pyramid.includes": FIT,
        }
    )
    middleware = shop.open().execution_policy.middleware
    assert isinstance(middleware, IdempotencyMiddleware)
    assert middleware.scope is by_authorization
    assert middleware.policy == Policy(wait=2, required=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"idempotency.store": None}, "idempotency.store is not in the settings"),
        ({"idempotency.scope": None}, "idempotency.scope is not in the settings"),
        ({"idempotency.leese": "5"}, "did you mean idempotency.lease?"),
        ({"idempotency.lease": "soon"}, "idempotency.lease is 'soon'"),
    ],
    ids=["no store", "no scope", "a slip", "nonsense"],
)
def test_settings_are_refused_that_have(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        Shop(**settings).config.include(FIT)
    assert message in str(refused.value)
