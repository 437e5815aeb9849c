"""What a run of the harness has recorded; all that the checker knows.

Every time is seconds since 1970 on the one clock of the one machine: ``time.time()`` of the
harness and the workers, ``clock_timestamp()`` of the two PostgreSQL servers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple


class Identity(NamedTuple):
    """What a key is unique in: every operation has one."""

    scope: str
    policy: str
    key: str


@dataclass(frozen=True, kw_only=True)
class Try:
    """One request of a client, and what came back.

    :param payload: hex digest of the body that was sent.
    :param error: ``timeout``, ``reset``, or ``cut`` when the client itself hung up; None with
        a response.
    :param bound: seconds within which something had to come; None for a client that has
        planned not to wait so long.
    :param code: of the problem, when the middleware has refused.
    :param body: hex digest of the body that came.
    :param headers: those of the handler that are to be replayed, in order.
    :param execution: which run of the handler it says it is the answer of.
    :param echoed: whose answer, to which payload, it says it is.
    :param closing: sent after everything had calmed down; an answer is final.
    """

    identity: Identity
    payload: str
    started: float
    ended: float
    error: str | None = None
    bound: float | None = None
    status: int | None = None
    code: str | None = None
    replayed: bool = False
    body: str | None = None
    headers: tuple[tuple[str, str], ...] = ()
    execution: str | None = None
    echoed: tuple[Identity, str] | None = None
    closing: bool = False

    @property
    def acknowledged(self) -> bool:
        return self.status is not None and 200 <= self.status < 300


@dataclass(frozen=True, kw_only=True)
class Execution:
    """One run of the handler.

    :param token: of the claim it ran under; None when it was not protected.
    :param effects: how many rows it left in the ledger beside the one of its beginning, or
        beside the store's table in transaction mode.
    :param outcome: the status it answered with, ``raised``, or None when its process died.
    :param body: hex digest of the body it answered with.
    :param decided: when the outcome was certain.
    :param over: when its last line had run; None when its process died.
    """

    name: str
    identity: Identity
    payload: str
    token: str | None
    attempt: int | None
    pid: int
    begun: float
    effects: int
    outcome: str | None = None
    body: str | None = None
    decided: float | None = None
    over: float | None = None


@dataclass(frozen=True, kw_only=True)
class Transition:
    """One change of a row of the store, as a trigger saw it, in the order of their commits.

    :param now: the ``now()`` of the statement, by which it judges leases.
    :param at: when it was made; it was visible to others only later.
    :param before: ``claimed``, ``released``, ``held``, ``completed``; None: there was no row.
    :param after: the same; None: the row is gone.
    :param lease: until when the claim was granted, before the change.
    :param response: hex digest of the stored response; None without one.
    :param execution: which run of the handler the stored response says it is of.
    """

    seq: int
    identity: Identity
    now: float
    at: float
    before: str | None
    token_before: str | None
    lease: float | None
    lapse: str | None
    after: str | None
    token: str | None
    response: str | None = None
    execution: str | None = None

    @property
    def grants(self) -> bool:
        """Whether it gives the row to a new token."""
        return self.token is not None and self.token != self.token_before

    @property
    def takes_over_a_lapsed(self) -> bool:
        return self.grants and self.before == "claimed"


@dataclass(frozen=True, kw_only=True)
class Window:
    """A time in which something was broken.

    :param what: the fault, ``stalled`` for a process that did not get to run, ``slow`` for a
        database that did not answer.
    :param pid: the one process it befell; None for all.
    """

    what: str
    started: float
    ended: float
    pid: int | None = None

    def meets(self, started: float, ended: float, pid: int | None = None) -> bool:
        return (
            self.started <= ended
            and started <= self.ended
            and (pid is None or self.pid is None or self.pid == pid)
        )


@dataclass(frozen=True, kw_only=True)
class Answered:
    """A request inside its worker, from the middleware's call to its return.

    :param takes: seconds of it that were the handler's.
    """

    identity: Identity
    pid: int
    started: float
    ended: float
    takes: float


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of the store that is left when all is over."""

    identity: Identity
    state: str
    token: str
    lapsed: bool
    lapse: str
    lease: float


@dataclass(frozen=True, kw_only=True)
class Written:
    """A row that a handler has written in transaction mode, and that is there when all is over."""

    execution: str
    identity: Identity


@dataclass(frozen=True, kw_only=True)
class Log:
    """Everything.

    :param lease: seconds of every claim's lease.
    :param longest: seconds that the store's calls for one request may take in all, the
        policy's wait included.
    :param unrecorded: tokens whose end the store could not be told at once, as the
        middleware's observer has said.
    """

    lease: float
    longest: float
    tries: list[Try] = field(default_factory=list)
    executions: list[Execution] = field(default_factory=list)
    transitions: list[Transition] = field(default_factory=list)
    windows: list[Window] = field(default_factory=list)
    answered: list[Answered] = field(default_factory=list)
    unrecorded: frozenset[str] = frozenset()
    rows: list[Row] = field(default_factory=list)
    written: list[Written] = field(default_factory=list)
