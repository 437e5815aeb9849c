"""The values: what a row means, and what can't be one."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from rows import IN_FLIGHT

from wsgi_idempotency.records import (
    Claim,
    Claimed,
    Completion,
    Lapse,
    State,
    StoredResponse,
)

ROW = dataclasses.replace(IN_FLIGHT, past_retention=True)


@pytest.mark.parametrize(
    ("state", "lapse", "lapsed"),
    list(itertools.product(State, Lapse, [False, True])),
    ids=lambda value: value.name if isinstance(value, (State, Lapse)) else f"lapsed {value}",
)
def test_a_row_past_its_retention_counts_as_absent_unless_somebody_runs_it_or_holds_it(
    state, lapse, lapsed
):
    row = dataclasses.replace(ROW, state=state, lapse=lapse, lapsed=lapsed)
    assert row.expired is {
        State.COMPLETED: True,
        State.RELEASED: True,
        State.HELD: False,
        State.CLAIMED: lapsed and lapse is Lapse.RELEASE,
    }.get(state)


@pytest.mark.parametrize("state", list(State))
def test_no_row_is_expired_within_its_retention(state):
    row = dataclasses.replace(ROW, state=state, lapsed=True, past_retention=False)
    assert row.expired is False


@pytest.mark.parametrize(
    "value",
    [
        ROW,
        Claimed(1),
        Completion("200 OK", (), b""),
        StoredResponse("200 OK", (), b""),
        Claim(b"", b"", b"", 1, "", "", "", "", 60.0, 86400.0, Lapse.HOLD),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_value_does_not_change_once_it_is_made(value):
    name = dataclasses.fields(value)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, name, None)


def test_a_completion_has_either_a_body_or_a_reason_for_having_none():
    assert Completion("200 OK", (), b"").not_replayable is None
    assert Completion("200 OK", (), None, "too large").body is None
    for body, reason in ((None, None), (b"", "too large")):
        with pytest.raises(ValueError, match="either a body or a reason"):
            Completion("200 OK", (), body, reason)
