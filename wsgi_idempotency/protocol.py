"""The rules of the protocol, as functions of plain values.

This file knows nothing of WSGI, SQL or clocks. :func:`decide` says what a request may
do that found a row under its key; :func:`settle` says what becomes of a claim once its
handler has ended. What a row means (lapsed, past its retention) its store has read off
its own clock, in the statement that fetched it.

::

    row                                       decide
    ----------------------------------------  ------------------------------------
    expired (counts as absent)                TakeOver
    another fingerprint                       Mismatch
    completed, with a body                    Replay
    completed, without one                    NotReplayable
    held                                      OutcomeUnknown
    released, effects committed               ResponseLost
    released                                  TakeOver
    claimed, lease running                    InFlight
    claimed, lapsed, effects committed        ResponseLost
    claimed, lapsed, lapse is HOLD            OutcomeUnknown
    claimed, lapsed, lapse is RELEASE         TakeOver
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass

from wsgi_idempotency.records import Lapse, Record, State, StoredResponse


class Action(enum.Enum):
    """What becomes of a claim once its outcome is known.

    STORE
        Replay the response from now on.
    FORGET
        Drop the row; the key is fresh. Nothing happened, the client may fix its request.
    RELEASE
        The same request may run again; a different one is still refused. Something may
        have happened.
    HOLD
        Nobody runs it until a person or the application has resolved it.
    """

    STORE = "store"
    FORGET = "forget"
    RELEASE = "release"
    HOLD = "hold"


STORE, FORGET, RELEASE, HOLD = Action.STORE, Action.FORGET, Action.RELEASE, Action.HOLD


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a handler ended: with a status, with an exception, or not at all.

    :param status: the status code of its response, or None.
    :param exception: what it raised, or None.
    :param lapsed: the worker died, or lost its lease, before the handler ended.
    """

    status: int | None = None
    exception: BaseException | None = None
    lapsed: bool = False


#: An outcomes function: the policy's answer to "may this operation run again?".
Outcomes = Callable[[Outcome], Action]


def store_success(outcome: Outcome) -> Action:
    """A failed attempt may be tried again; the default.

    2xx and 3xx are stored (a 303 after a form post is a success). After a 4xx nothing
    happened. After a 5xx, an exception or a lapse the same request may run again.
    """
    if outcome.status is None or outcome.status >= 500:
        return RELEASE
    return FORGET if outcome.status >= 400 else STORE


def store_everything(outcome: Outcome) -> Action:
    """Whatever the handler answered is its answer, as in Stripe's API version 1; what
    ended without an answer is held."""
    return HOLD if outcome.status is None else STORE


def hold_unknown(outcome: Outcome) -> Action:
    """For money, when the handler calls other systems: what may or may not have happened
    (a 5xx, an exception, a lapse) is held until somebody finds out."""
    if outcome.status is None or outcome.status >= 500:
        return HOLD
    return FORGET if outcome.status >= 400 else STORE


#: Answers about the request or the moment, never about the operation: an informational
#: status, missing or refused credentials, a time-out, a body or header limit, too early,
#: upgrade, too many requests. RFC 9110 section 15, RFC 6585, RFC 8470.
NEVER_AN_OUTCOME = frozenset({*range(100, 200), 401, 407, 408, 413, 425, 426, 429, 431})

#: Answers to one Range field (RFC 9110 sections 14 and 15.5.17), which a retry may not send.
OF_ONE_RANGE = frozenset({206, 416})

ONE_RANGE = "the response answers one Range request"


def settle(outcome: Outcome, outcomes: Outcomes, overrule: Action | None = None) -> Action:
    """What becomes of the claim.

    What ended without a response has nothing to store: a STORE is then a HOLD, the one
    answer that neither runs it again nor invents a response.

    :param outcomes: the policy's function.
    :param overrule: what the handler asked for through its operation.
    :raises TypeError: ``outcomes`` returned something that is not an Action.
    """
    if outcome.status in NEVER_AN_OUTCOME:
        return overrule if overrule in (RELEASE, HOLD) else FORGET
    if overrule is None and outcome.status in OF_ONE_RANGE:
        return STORE
    action = outcomes(outcome) if overrule is None else overrule
    if not isinstance(action, Action):
        raise TypeError(f"outcomes returned {action!r}; return an Action such as STORE or RELEASE")
    return HOLD if action is STORE and outcome.status is None else action


def settle_done(action: Action, overrule: Action | None = None) -> Action:
    """What becomes of a claim whose effects are committed, where :func:`settle` said ``action``.

    It has happened, however its handler ended, and nobody need find out: it is not forgotten,
    and held only where the handler itself asked for that. A row that is released with its
    effects marked is done, and its response lost.
    """
    if action is FORGET or (action is HOLD and overrule is not HOLD):
        return RELEASE
    return action


@dataclass(frozen=True, slots=True)
class Replay:
    """The operation is done; answer with its response."""

    response: StoredResponse


@dataclass(frozen=True, slots=True)
class NotReplayable:
    """The operation is done, but its response can't be replayed.

    :param status: the status code of the original response, None when it can't be read.
    :param location: the original Location, or None.
    :param reason: why, for people.
    """

    status: int | None
    location: str | None
    reason: str


@dataclass(frozen=True, slots=True)
class InFlight:
    """Somebody is running it now.

    :param age: seconds since it was first claimed.
    :param lease_left: seconds until the claim lapses unless it is renewed.
    """

    age: float
    lease_left: float


@dataclass(frozen=True, slots=True)
class Mismatch:
    """The key was used for another request."""


@dataclass(frozen=True, slots=True)
class TakeOver:
    """The row is free; claim it by compare-and-swap on the record that was seen."""

    seen: Record


@dataclass(frozen=True, slots=True)
class ResponseLost:
    """The operation is done, and its response was not recorded: the handler must not run.

    :param seen: the row; who makes a response claims it by compare-and-swap.
    """

    seen: Record


@dataclass(frozen=True, slots=True)
class OutcomeUnknown:
    """Nobody knows what came of it, and the policy says not to try."""


Decision = Replay | NotReplayable | InFlight | Mismatch | TakeOver | ResponseLost | OutcomeUnknown


def decide(record: Record, fingerprint: bytes) -> Decision:
    """What a request may do whose key has a row.

    :param record: the row.
    :param fingerprint: the request's, made by the algorithm of the row's version.
    """
    if record.expired:
        return TakeOver(record)
    if record.fingerprint != fingerprint:
        return Mismatch()
    if record.state is State.COMPLETED:
        return _completed(record)
    if record.state is State.HELD:
        return OutcomeUnknown()
    if record.state is State.RELEASED:
        return ResponseLost(record) if record.effects else TakeOver(record)
    if not record.lapsed:
        return InFlight(record.age, record.lease_left)
    if record.effects:
        return ResponseLost(record)
    return OutcomeUnknown() if record.lapse is Lapse.HOLD else TakeOver(record)


def _completed(record: Record) -> Replay | NotReplayable:
    if record.status is not None and record.body is not None:
        return Replay(StoredResponse(record.status, record.headers, record.body))
    location = next((value for name, value in record.headers if name.lower() == "location"), None)
    return NotReplayable(
        status=None if record.status is None else int(record.status[:3]),
        location=location,
        reason=record.not_replayable or "there is no stored body",
    )


def retry_after(in_flight: InFlight) -> int:
    """Whole seconds after which to ask again: 1 at first, growing to 5 with the claim's
    age, at most what is left of the lease."""
    return max(1, min(5, 1 + int(in_flight.age / 2), int(in_flight.lease_left)))
