"""The values that pass between the middleware, the protocol and a store."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class State(enum.Enum):
    """The stored state of a key. *Lapsed* and *expired* are not stored: they are
    what a row means once the store's clock has passed its lease or its retention."""

    CLAIMED = "claimed"
    RELEASED = "released"
    HELD = "held"
    COMPLETED = "completed"


class Lapse(enum.Enum):
    """What it means when a claim's lease runs out: recorded with the claim, so that
    a retry, the purge and the command agree without the application's policy."""

    RELEASE = "release"
    HOLD = "hold"


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """A response as it was sent, less what must not be replayed.

    :param status: the status line's code and reason, ``"201 Created"``.
    :param headers: name and value pairs, in order, with duplicates and case.
    :param body: the entity's bytes.
    """

    status: str
    headers: tuple[tuple[str, str], ...]
    body: bytes


@dataclass(frozen=True, slots=True)
class Completion:
    """What is recorded of a finished operation.

    :param status: the status line's code and reason.
    :param headers: name and value pairs, in order, with duplicates and case.
    :param body: the entity's bytes, or None when the response can't be replayed.
    :param not_replayable: why there is no body; None when there is one.
    """

    status: str
    headers: tuple[tuple[str, str], ...]
    body: bytes | None
    not_replayable: str | None = None

    def __post_init__(self) -> None:
        if (self.body is None) == (self.not_replayable is None):
            raise ValueError("a completion has either a body or a reason for having none")


@dataclass(frozen=True, slots=True)
class Claim:
    """What a request asks a store for: the right to run the operation of one key.

    :param digest: 32 bytes that name the key in its namespace; the primary key.
    :param token: the fencing token, 16 random bytes made for this request.
    :param fingerprint: bytes that identify the payload.
    :param fingerprint_version: the algorithm that made them.
    :param scope: whose key it is, for people; never a secret.
    :param key: the idempotency key, for people.
    :param method: the request method, for people.
    :param path: the full path, for people.
    :param lease: seconds the claim outlives its last heartbeat.
    :param retention: seconds from the claim until the row expires.
    :param lapse: what it means when the lease runs out.
    :param asynchronous: the claim need not be on the disk before it is granted.
    """

    digest: bytes
    token: bytes
    fingerprint: bytes
    fingerprint_version: int
    scope: str
    key: str
    method: str
    path: str
    lease: float
    retention: float
    lapse: Lapse
    asynchronous: bool = False


@dataclass(frozen=True, slots=True)
class Claimed:
    """The claim was granted.

    :param attempt: 1 for a fresh key, one more for each take-over.
    :param effects: the effects of the operation are committed: its handler must not run, only
        its response is to be made.
    """

    attempt: int
    effects: bool = False


@dataclass(frozen=True, slots=True)
class Record:
    """A row as the store's clock reads it at the moment it was fetched.

    :param token: the fencing token of whoever claimed last.
    :param attempt: how many claims there have been, this one included.
    :param lapsed: the lease of a claimed row has run out.
    :param past_retention: ``expires_at`` has passed.
    :param age: seconds since the operation was first claimed.
    :param lease_left: seconds until the lease runs out; negative once it has.
    :param effects: the application has committed what it wrote under a guard, so the
        operation is done, whether or not its response is recorded.
    :param status: the status line of a completed operation, else None.
    :param headers: the headers of a completed operation.
    :param body: the body, or None when there is nothing to replay.
    :param not_replayable: why a completed operation has no body, else None.
    """

    digest: bytes
    token: bytes
    state: State
    fingerprint: bytes
    fingerprint_version: int
    attempt: int
    lapse: Lapse
    lapsed: bool
    past_retention: bool
    age: float
    lease_left: float
    effects: bool = False
    status: str | None = None
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes | None = None
    not_replayable: str | None = None

    @property
    def done(self) -> bool:
        """Whether the operation is completed, and remembered still."""
        return self.state is State.COMPLETED and not self.past_retention

    @property
    def expired(self) -> bool:
        """Whether the row counts as absent. One in flight or held never does."""
        if not self.past_retention:
            return False
        if self.state is State.CLAIMED:
            return self.lapsed and (self.effects or self.lapse is Lapse.RELEASE)
        return self.state is not State.HELD


@dataclass(frozen=True, slots=True)
class Step:
    """What a store knows of a step of an operation.

    :param result: the JSON text that was recorded of it, or None when nothing was.
    """

    result: str | None
