"""Options written as text: what each means, and what is refused."""

from __future__ import annotations

from dataclasses import fields

import pytest

import wsgi_idempotency
from wsgi_idempotency import (
    IdempotencyMiddleware,
    Policy,
    Route,
    canonical,
    everyone,
    exact,
    first_of,
    form_field,
    header,
    hold_unknown,
    json_field,
    problems,
    settings,
    store_everything,
)
from wsgi_idempotency.errors import ConfigurationError
from wsgi_idempotency.observers.logging import observe as log

routes = [Route("/health", None)]
strict = Policy(required=True)


def observer(event: object) -> None:
    """To be named by a setting."""


def by_tenant(environ: dict[str, str]) -> str | None:
    """To be named by a setting."""
    return environ.get("shop.tenant")


def read(**texts: object) -> dict[str, object]:
    return settings.read(texts, prefix="")


def test_every_option_of_the_middleware_and_of_a_policy_can_be_set() -> None:
    """But a policy's own scope: settings make one policy, whose scope is the middleware's."""
    policy = {field.name for field in fields(Policy) if field.init} - {"scope"}
    middleware = set(IdempotencyMiddleware.__init__.__kwdefaults__) | {"store", "scope"}
    assert set(settings.POLICY) == policy
    assert set(settings.OPTIONS) == middleware | policy


@pytest.mark.parametrize(
    ("option", "text", "value"),
    [
        pytest.param("lease", "90", 90.0, id="a bare number is seconds"),
        pytest.param("lease", "1.5s", 1.5, id="a unit may follow at once"),
        pytest.param("wait", " 500 ms ", 0.5, id="milliseconds"),
        pytest.param("retention", "15 min", 900.0, id="minutes"),
        pytest.param("retention", "24 h", 86400.0, id="hours"),
        pytest.param("retention", "7 Days", 604800.0, id="days, in any case"),
        pytest.param("max_request_bytes", "1000000", 1_000_000, id="a bare number is bytes"),
        pytest.param("max_request_bytes", "16 MiB", 16 * 1024**2, id="mebibytes"),
        pytest.param("max_response_bytes", "1.5KiB", 1536, id="a fraction of kibibytes"),
        pytest.param("max_key_length", "64", 64, id="a whole number"),
        pytest.param("required", "Yes", True, id="yes"),
        pytest.param("required", "off", False, id="off"),
        pytest.param("methods", "post, put", {"POST", "PUT"}, id="names joined by a comma"),
        pytest.param("replay_headers", "Set-Cookie", {"set-cookie"}, id="one name"),
        pytest.param("namespace", "scope", "scope", id="a word"),
        pytest.param("on_store_failure", "bypass", "bypass", id="another word"),
        pytest.param("fingerprint", "exact", exact, id="exact"),
        pytest.param("fingerprint", "canonical", canonical, id="canonical"),
        pytest.param("fingerprint", "none", None, id="no fingerprint"),
        pytest.param("outcomes", "hold_unknown", hold_unknown, id="outcomes of ours"),
        pytest.param(
            "outcomes",
            "wsgi_idempotency:store_everything",
            store_everything,
            id="outcomes by module and name",
        ),
        pytest.param("key", "header:X-Key", header("X-Key"), id="a key in a header field"),
        pytest.param(
            "key",
            "header:Idempotency-Key form_field:key json_field:data.id",
            first_of(header("Idempotency-Key"), form_field("key"), json_field("data.id")),
            id="a key in the first of three places",
        ),
        pytest.param(
            "key",
            "wsgi_idempotency.key:new_key",
            wsgi_idempotency.new_key,
            id="a key by a callable",
        ),
    ],
)
def test_a_text_for_the_policy_means(option: str, text: str, value: object) -> None:
    found = read(**{option: text})
    assert set(found) == {"policy"}
    assert getattr(found["policy"], option) == value


def test_a_transaction_can_be_asked_for_with_a_flag() -> None:
    assert read(transaction="false")["policy"] == Policy()


@pytest.mark.parametrize(
    ("option", "text", "value"),
    [
        pytest.param("store", "sqlite:///keys.db", "sqlite:///keys.db", id="a store's URL"),
        pytest.param("secret", "0123456789abcdef", "0123456789abcdef", id="a secret"),
        pytest.param("max_waiting", "3", 3, id="a number"),
        pytest.param("scope", "everyone", everyone, id="a scope of ours"),
        pytest.param("scope", "test_settings:by_tenant", by_tenant, id="a scope of the user's"),
        pytest.param("policy", "test_settings:strict", strict, id="a policy of the user's"),
        pytest.param("policy", "none", None, id="routes alone"),
        pytest.param("routes", "test_settings:routes", routes, id="routes"),
        pytest.param("routes", "test_settings:routes.copy()", routes, id="what a call gives"),
        pytest.param("on_event", "test_settings:observer", [observer], id="an observer"),
        pytest.param(
            "on_event", "logging, test_settings:observer", [log, observer], id="one of ours, too"
        ),
        pytest.param("render_problem", "stripe", problems.stripe, id="a renderer"),
    ],
)
def test_a_text_for_the_middleware_means(
    option: str, text: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "test_settings", sys.modules[__name__])
    assert read(**{option: text}) == {option: value}


@pytest.mark.parametrize(
    ("text", "environ"),
    [
        ("by_authorization", {"HTTP_AUTHORIZATION": "Bearer alice"}),
        ("by_remote_user", {"REMOTE_USER": "alice"}),
        ("header:X-Tenant", {"HTTP_X_TENANT": "alice"}),
        ("cookie:session", {"HTTP_COOKIE": "session=alice"}),
    ],
)
def test_a_scope_tells_people_apart(text: str, environ: dict[str, str]) -> None:
    scope = read(scope=text)["scope"]
    bob = {name: value.replace("alice", "bob") for name, value in environ.items()}
    assert scope(environ) is not None
    assert scope(environ) != scope(bob)
    assert scope({}) is None


def test_a_value_that_is_no_text_is_taken_as_it_is() -> None:
    found = read(routes=routes, policy=None)
    assert found == {"routes": routes, "policy": None}
    assert read(wait=5, required=True) == {"policy": Policy(wait=5, required=True)}


def test_names_may_have_a_prefix_and_upper_case() -> None:
    found = settings.read(
        {"SHOP_WAIT": "5", "SHOP_KEYS": "memory:", "SHOP_NAME": "shop", "OTHER": "x"},
        prefix="SHOP_",
        upper=True,
        renamed={"store": "SHOP_KEYS"},
        others=["SHOP_NAME"],
    )
    assert found == {"store": "memory:", "policy": Policy(wait=5)}


@pytest.mark.parametrize(
    ("option", "text", "message"),
    [
        ("retention", "a week", "retention is 'a week'; use one like 30 s"),
        ("retention", "1 month", "use one like"),
        ("lease", "60 MiB", "use one like"),
        ("max_request_bytes", "16 MB", "max_request_bytes is '16 MB'; use one like 16 MiB"),
        ("max_request_bytes", "0.3 KiB", "no whole number of bytes"),
        ("max_waiting", "-1", "max_waiting is '-1'; use a whole number"),
        ("required", "maybe", "required is 'maybe'; use true or false"),
        ("store", " ", "store is empty; give it a value or leave it out"),
        ("scope", "by_magic", "use by_authorization, by_remote_user, everyone, header:X-Tenant,"),
        ("scope", "header:", "can't be the name of a header field"),
        ("key", "Idempotency-Key", "use header:Idempotency-Key, form_field:"),
        ("outcomes", "nowhere_at_all:fn", "nowhere_at_all can't be imported"),
        ("outcomes", "wsgi_idempotency:nothing", "wsgi_idempotency has no nothing"),
        ("outcomes", ":fn", "use module:name, such as shop:app"),
        ("routes", "shop", "use module:name, such as shop:app"),
        ("lease", "0.5 s", "lease is 0.5 s; use at least 1 s"),
        ("methods", "POST; PUT", "methods has 'POST;', which can't be a name"),
        ("on_event", ",", "on_event is ',', which names nothing"),
    ],
)
def test_what_makes_no_sense_is_refused_with_what_would(
    option: str, text: str, message: str
) -> None:
    with pytest.raises(ConfigurationError) as refused:
        read(**{option: text})
    assert message in str(refused.value)


def test_a_misspelt_option_is_refused_with_the_one_that_was_meant() -> None:
    with pytest.raises(ConfigurationError, match=r"no setting retenton; did you mean retention\?"):
        read(retenton="7 days")


def test_a_policy_and_one_of_its_options_exclude_each_other() -> None:
    with pytest.raises(ConfigurationError, match="policy is set beside lease, wait"):
        read(policy=strict, wait="5", lease="60")


def test_an_error_inside_a_named_module_is_not_hidden(
    tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path.joinpath("broken_shop.py").write_text("import os\nos.environ['NO_SUCH_VARIABLE']\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(KeyError, match="NO_SUCH_VARIABLE"):
        settings.load("APP", "broken_shop:app")
