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
        ({"methods": "POST"}, "list or tuple"),
        ({"methods": ()}, "at least one"),
        ({"methods": [1]}, "use names"),
        ({"replay_headers": ["Connection"]}, "can't be replayed"),
        ({"replay_headers": "Set-Cookie"}, "list or tuple"),
        ({"key": "Idempotency-Key"}, "use header"),
        ({"fingerprint": "exact"}, "use exact, canonical or None"),
        ({"namespace": "global"}, '"endpoint" or "scope"'),
        ({"namespace": "scope", "fingerprint": None}, "replay one endpoint's response"),
        ({"on_store_failure": "ignore"}, '"refuse" or "bypass"'),
        ({"transaction": True}, "not in this release"),
        ({"max_key_length": 0}, "at least 1"),
        ({"max_key_length": True}, "whole number"),
        ({"max_request_bytes": -1}, "at least 0"),
        ({"max_response_bytes": 1.5}, "whole number"),
        ({"lease": 0.5}, "at least 1 s"),
        ({"lease": "60"}, "seconds or a timedelta"),
        ({"lease": float("nan")}, "seconds or a timedelta"),
        ({"lease": 60, "retention": 59}, "at least 60 s"),
        ({"retention": 1e12}, "at most a century"),
        ({"wait": -1}, "at least 0 s"),
        ({"wait": True}, "seconds or a timedelta"),
        ({"outcomes": "store"}, "not callable"),
        (
            {"outcomes": lambda outcome: RELEASE if outcome.status >= 500 else STORE},
            "RELEASE or HOLD",
        ),
        ({"outcomes": lambda outcome: STORE}, "RELEASE to let a retry run it again or HOLD"),
    ],
    ids=lambda value: repr(value)[:60],
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


def test_a_route_whose_methods_its_policy_does_not_protect_is_refused():
    with pytest.raises(ConfigurationError, match="give the policy the same methods"):
        Route("/pay", Policy(), methods=["PUT"])
    assert Route("/pay", Policy(), methods=["post"]).methods == {"POST"}
    assert Route("/pay", None, methods=["PUT"]).methods == {"PUT"}
