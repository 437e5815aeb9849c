"""What the operator decides: defaults, durations, and nonsense refused with advice."""

from __future__ import annotations

from datetime import timedelta

import pytest

from wsgi_idempotency import HOLD, RELEASE, STORE, Policy, Route, exact, hold_unknown
from wsgi_idempotency.errors import ConfigurationError
from wsgi_idempotency.records import Lapse


def test_the_defaults_are_the_documented_ones():
    policy = Policy()
    assert policy.methods == {"POST", "PATCH"}
    assert policy.fingerprint is exact
    assert policy.retention_seconds == 86400
    assert policy.lease_seconds == 60
    assert policy.wait_seconds == 0
    assert policy.lapse is Lapse.RELEASE
    assert Policy(outcomes=hold_unknown).lapse is Lapse.HOLD
    assert Policy(outcomes=lambda outcome: HOLD).lapse is Lapse.HOLD
    assert Policy(outcomes=lambda outcome: RELEASE).lapse is Lapse.RELEASE


def test_durations_are_seconds_or_timedeltas():
    policy = Policy(lease=timedelta(seconds=90), retention=120, wait=1.5)
    assert (policy.lease_seconds, policy.retention_seconds, policy.wait_seconds) == (90, 120, 1.5)


def test_methods_and_replayed_headers_are_taken_in_any_case():
    policy = Policy(methods=["post", " put "], replay_headers=("Set-Cookie",))
    assert policy.methods == {"POST", "PUT"}
    assert policy.replay_headers == {"set-cookie"}


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        pytest.param({"methods": "POST"}, "list or tuple", id="methods in a string"),
        pytest.param({"methods": ()}, "at least one", id="no methods"),
        pytest.param({"methods": [1]}, "use names", id="a method that is a number"),
        pytest.param(
            {"methods": ["POST;", "PUT"]}, "can't be a name", id="a method that no request can have"
        ),
        pytest.param(
            {"replay_headers": ["Set-Cookie:"]}, "can't be a name", id="a header with its colon"
        ),
        pytest.param({"required": "no"}, "True or False", id="a requirement that is a text"),
        pytest.param({"transaction": "no"}, "True or False", id="a transaction that is a text"),
        pytest.param(
            {"replay_headers": ["Connection"]},
            "can't be replayed",
            id="replaying a hop-by-hop header",
        ),
        pytest.param({"replay_headers": "Set-Cookie"}, "list or tuple", id="headers in a string"),
        pytest.param({"key": "Idempotency-Key"}, "use header", id="a key that is a string"),
        pytest.param({"scope": "alice"}, "use by_authorization", id="a scope that is a string"),
        pytest.param(
            {"fingerprint": "exact"}, "use exact, canonical or None", id="a fingerprint by name"
        ),
        pytest.param({"namespace": "global"}, '"endpoint" or "scope"', id="an unknown namespace"),
        pytest.param(
            {"namespace": "scope", "fingerprint": None},
            "replay one endpoint's response",
            id="a namespace that needs a fingerprint",
        ),
        pytest.param(
            {"on_store_failure": "ignore"},
            '"refuse" or "bypass"',
            id="an unknown wish for when the store fails",
        ),
        pytest.param(
            {"transaction": True, "on_store_failure": "bypass"},
            "without the transaction",
            id="a transaction that may be bypassed",
        ),
        pytest.param(
            {"transaction": True, "isolation_level": "AUTOCOMMIT"},
            "READ COMMITTED, REPEATABLE READ, SERIALIZABLE",
            id="no isolation at all",
        ),
        pytest.param(
            {"isolation_level": "SERIALIZABLE"},
            "give transaction=True",
            id="isolation of no transaction",
        ),
        pytest.param(
            {"claim_durability": "none"},
            '"synchronous" or "asynchronous"',
            id="an unknown durability",
        ),
        pytest.param(
            {"transaction": True, "claim_durability": "asynchronous"},
            "in one commit",
            id="an asynchronous claim of a transaction",
        ),
        pytest.param({"max_key_length": 0}, "at least 1", id="no length for a key"),
        pytest.param({"max_key_length": True}, "whole number", id="a length that is True"),
        pytest.param({"max_request_bytes": -1}, "at least 0", id="a negative number of bytes"),
        pytest.param({"max_response_bytes": 1.5}, "whole number", id="half a byte"),
        pytest.param({"lease": 0.5}, "at least 1 s", id="a short lease"),
        pytest.param({"lease": "60"}, "seconds or a timedelta", id="a lease that is a string"),
        pytest.param(
            {"lease": float("nan")}, "seconds or a timedelta", id="a lease that is not a number"
        ),
        pytest.param(
            {"lease": 60, "retention": 59}, "at least 60 s", id="a retention shorter than the lease"
        ),
        pytest.param({"retention": 1e12}, "at most a century", id="a retention of ages"),
        pytest.param({"wait": -1}, "at least 0 s", id="a negative wait"),
        pytest.param({"wait": True}, "seconds or a timedelta", id="a wait that is True"),
        pytest.param({"outcomes": "store"}, "not callable", id="outcomes by name"),
        pytest.param({"rebuild": "order"}, "rebuild is not callable", id="a rebuild by name"),
        pytest.param(
            {"rebuild": print, "transaction": True},
            "use one or the other",
            id="a rebuild of what is never lost",
        ),
        pytest.param({"max_step_bytes": 0}, "at least 1", id="no room for a step"),
        pytest.param(
            {"outcomes": lambda outcome: RELEASE if outcome.status >= 500 else STORE},
            "RELEASE or HOLD",
            id="outcomes that can't judge an exception",
        ),
        pytest.param(
            {"outcomes": lambda outcome: STORE},
            "RELEASE to let a retry run it again or HOLD",
            id="outcomes that store a lapse",
        ),
    ],
)
def test_nonsense_is_refused_with_what_would_be_right(options, advice):
    with pytest.raises(ConfigurationError, match=advice):
        Policy(**options)


def test_a_route_without_a_leading_slash_is_refused():
    with pytest.raises(ConfigurationError, match="start with a slash"):
        Route("pay", Policy())


def test_a_route_with_something_else_for_a_policy_is_refused():
    with pytest.raises(ConfigurationError, match="use a Policy, or None to exempt it"):
        Route("/pay", "strict")


def test_a_route_for_a_method_that_no_request_can_have_is_refused():
    """It would exempt nothing."""
    with pytest.raises(ConfigurationError, match="can't be a name"):
        Route("/pay", None, methods=["POST;"])


def test_a_route_whose_methods_its_policy_does_not_protect_is_refused():
    with pytest.raises(ConfigurationError, match="not protect PUT; give the policy the same"):
        Route("/pay", Policy(), methods=["put", "POST"])
    assert Route("/pay", Policy(), methods=["post"]).methods == {"POST"}
    assert Route("/pay", None, methods=["PUT"]).methods == {"PUT"}
