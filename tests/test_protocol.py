"""The rules of the protocol, against the table in the file's own docstring."""

from __future__ import annotations

import dataclasses

import pytest
from rows import IN_FLIGHT

from wsgi_idempotency import protocol
from wsgi_idempotency.protocol import (
    FORGET,
    HOLD,
    RELEASE,
    STORE,
    Outcome,
    decide,
    hold_unknown,
    retry_after,
    settle,
    settle_done,
    store_everything,
    store_success,
)
from wsgi_idempotency.records import Lapse, Record, State


def row(**changes) -> Record:
    return dataclasses.replace(IN_FLIGHT, **changes)


DONE = {"state": State.COMPLETED, "status": "201 Made It", "headers": (("Location", "/x"),)}


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({}, protocol.InFlight),
        ({"lapsed": True}, protocol.TakeOver),
        ({"lapsed": True, "lapse": Lapse.HOLD}, protocol.OutcomeUnknown),
        ({"state": State.RELEASED}, protocol.TakeOver),
        ({"state": State.HELD}, protocol.OutcomeUnknown),
        ({**DONE, "body": b""}, protocol.Replay),
        ({**DONE, "not_replayable": "too large"}, protocol.NotReplayable),
        ({"fingerprint": b"g"}, protocol.Mismatch),
        ({**DONE, "body": b"", "fingerprint": b"g"}, protocol.Mismatch),
        ({"state": State.HELD, "fingerprint": b"g"}, protocol.Mismatch),
        ({**DONE, "body": b"", "past_retention": True}, protocol.TakeOver),
        ({"state": State.RELEASED, "past_retention": True, "fingerprint": b"g"}, protocol.TakeOver),
        ({"past_retention": True}, protocol.InFlight),
        ({"past_retention": True, "lapsed": True, "fingerprint": b"g"}, protocol.TakeOver),
        (
            {"past_retention": True, "lapsed": True, "lapse": Lapse.HOLD},
            protocol.OutcomeUnknown,
        ),
        ({"past_retention": True, "state": State.HELD}, protocol.OutcomeUnknown),
        ({"effects": True}, protocol.InFlight),
        ({"effects": True, "lapsed": True}, protocol.ResponseLost),
        ({"effects": True, "lapsed": True, "lapse": Lapse.HOLD}, protocol.ResponseLost),
        ({"effects": True, "state": State.RELEASED}, protocol.ResponseLost),
        ({"effects": True, "state": State.HELD}, protocol.OutcomeUnknown),
        ({"effects": True, "lapsed": True, "fingerprint": b"g"}, protocol.Mismatch),
        ({**DONE, "body": b"", "effects": True}, protocol.Replay),
        (
            {"effects": True, "lapsed": True, "lapse": Lapse.HOLD, "past_retention": True},
            protocol.TakeOver,
        ),
    ],
)
def test_what_a_request_may_do_follows_from_the_row(changes, kind):
    assert type(decide(row(**changes), b"f")) is kind


def test_a_replay_carries_the_stored_response():
    decision = decide(row(**DONE, body=b"b"), b"f")
    assert decision.response.status == "201 Made It"
    assert decision.response.headers == (("Location", "/x"),)
    assert decision.response.body == b"b"


def test_what_is_not_replayable_still_says_its_status_and_location():
    decision = decide(row(**DONE, not_replayable="too large"), b"f")
    assert decision == protocol.NotReplayable(201, "/x", "too large")
    corrupt = decide(row(state=State.COMPLETED, not_replayable="corrupt"), b"f")
    assert corrupt == protocol.NotReplayable(None, None, "corrupt")
    assert decide(row(state=State.COMPLETED), b"f").reason == "there is no stored body"


@pytest.mark.parametrize(
    ("outcomes", "answers"),
    [
        (store_success, [STORE, STORE, FORGET, RELEASE, RELEASE, RELEASE]),
        (store_everything, [STORE, STORE, STORE, STORE, HOLD, HOLD]),
        (hold_unknown, [STORE, STORE, FORGET, HOLD, HOLD, HOLD]),
    ],
)
def test_each_policy_answers_as_its_table_says(outcomes, answers):
    outcome = [Outcome(status=status) for status in (299, 303, 400, 500)]
    outcome += [Outcome(exception=ValueError()), Outcome(lapsed=True)]
    assert [settle(one, outcomes) for one in outcome] == answers


@pytest.mark.parametrize("status", [100, 199, 401, 407, 408, 413, 425, 426, 429, 431])
def test_an_answer_about_the_request_is_never_an_outcome(status):
    outcome = Outcome(status=status)
    assert settle(outcome, store_everything) is FORGET
    assert settle(outcome, store_everything, STORE) is FORGET
    assert settle(outcome, store_everything, HOLD) is HOLD
    assert settle(outcome, store_everything, RELEASE) is RELEASE


@pytest.mark.parametrize("status", [206, 416])
def test_an_answer_to_one_range_counts_as_done(status):
    assert settle(Outcome(status=status), store_success) is STORE
    assert settle(Outcome(status=status), store_success, RELEASE) is RELEASE


def test_the_handler_overrules_the_policy():
    assert settle(Outcome(status=500), store_success, STORE) is STORE
    assert settle(Outcome(status=201), store_success, HOLD) is HOLD
    assert settle(Outcome(exception=ValueError()), store_success, FORGET) is FORGET


def test_what_ended_without_a_response_is_held_rather_than_stored():
    assert settle(Outcome(exception=ValueError()), store_success, STORE) is HOLD
    assert settle(Outcome(exception=ValueError()), lambda outcome: STORE) is HOLD


@pytest.mark.parametrize(
    ("action", "done"), [(STORE, STORE), (FORGET, RELEASE), (RELEASE, RELEASE), (HOLD, RELEASE)]
)
def test_what_has_committed_effects_is_neither_forgotten_nor_held(action, done):
    assert settle_done(action) is done
    assert settle_done(action, action) is (HOLD if action is HOLD else done)


def test_an_outcomes_function_has_to_return_an_action():
    with pytest.raises(TypeError, match="return an Action"):
        settle(Outcome(status=200), lambda outcome: "store")


@pytest.mark.parametrize(
    ("age", "left", "seconds"),
    [(0, 60, 1), (2, 60, 2), (7, 60, 4), (90, 60, 5), (90, 3.7, 3), (90, 0.2, 1)],
)
def test_retry_after_grows_with_the_age_up_to_the_lease(age, left, seconds):
    assert retry_after(protocol.InFlight(age, left)) == seconds
