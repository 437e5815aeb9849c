"""What a run does, from one seed: which operations are sent when and how, and what breaks when.

The same arguments give the same schedule. What then happens also depends on the machine: a
fault meets whatever runs at its moment.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from chaos.log import Identity

LEASE = 1.5  # seconds
STORE_TIMEOUT = 2.0  # seconds
WAIT = 2.0  # seconds that a duplicate waits under the policy of that name
LARGEST = 64 * 1024  # bytes of a response that are kept

#: Seconds after which a patient client says that its request hangs. More than the longest
#: fault, the longest handler and every time-out of the store's together.
BOUND = 45.0

#: Options of each Policy, ``outcomes`` by name.
POLICIES: dict[str, dict[str, object]] = {
    "store_success": {"outcomes": "store_success"},
    "waits": {"outcomes": "store_success", "wait": WAIT},
    "store_everything": {"outcomes": "store_everything"},
    "hold_unknown": {"outcomes": "hold_unknown"},
    "transaction": {"outcomes": "store_success", "wait": WAIT, "transaction": True},
}

#: Those whose operations have a lease.
LEASED = tuple(name for name, options in POLICIES.items() if "transaction" not in options)

#: What a handler does, and how often it is asked to.
KINDS = {
    "answers": 50,
    "fails once": 10,  # 500 after its effect, at the first attempt
    "raises once": 10,  # the same by an exception
    "refuses": 10,  # 400 without effect until the client has corrected its request
    "large": 8,  # more than is kept
    "streams": 7,  # an event stream
    "clashes": 5,  # the second tap sends another payload
}

#: Faults of workers, of networks, of the database: each group has a timeline of its own.
WORKERS = ("worker killed", "worker stopped", "worker aborted", "server reloaded")
NETWORKS = ("clients reset", "database reset", "database frozen")
DATABASES = ("PostgreSQL crashed", "PostgreSQL away")
POOLERS = ("PgBouncer killed",)
FAULTS = (*WORKERS, *NETWORKS, *DATABASES, *POOLERS)


@dataclass(frozen=True, kw_only=True)
class Tap:
    """One client of an operation, which retries as SDKs do.

    :param after: seconds after the operation's moment.
    :param seed: of its back-off, and of which server it turns to.
    :param patience: seconds it waits for an answer at its first try.
    :param cut: what it does to the connection of its first try: ``no``, ``half sent``,
        ``unread`` (hangs up before the answer).
    """

    after: float
    seed: int
    patience: float
    cut: str = "no"


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One operation, and everybody who asks for it.

    :param at: seconds from the start.
    :param takes: seconds of work of its handler.
    """

    at: float
    identity: Identity
    kind: str
    takes: float
    taps: tuple[Tap, ...]

    def body(self, *, broken: bool = False, tap: int = 0) -> bytes:
        """The payload: all retries of one request send the same bytes."""
        asked: dict[str, object] = {"kind": self.kind, "takes": self.takes, "broken": broken}
        if self.kind == "clashes":
            asked["of"] = tap
        return json.dumps(asked).encode()


@dataclass(frozen=True, kw_only=True)
class Fault:
    """Something that breaks.

    :param at: seconds from the start.
    :param lasts: seconds until it is mended, where it has a length.
    :param pick: from 0 to 1: which server or worker it befalls.
    """

    at: float
    kind: str
    lasts: float
    pick: float


@dataclass(frozen=True, kw_only=True)
class Schedule:
    operations: tuple[Operation, ...]
    faults: tuple[Fault, ...]

    def digest(self) -> str:
        """The same for the same schedule."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:12]


def make(
    seed: int,
    seconds: float,
    *,
    rate: float = 5.0,
    pooler: bool = False,
    kinds: Mapping[str, int] = KINDS,
    policies: Sequence[str] = tuple(POLICIES),
) -> Schedule:
    """A schedule for ``seconds`` of load.

    :param rate: operations a second.
    :param pooler: whether there is a PgBouncer to kill.
    :param kinds: how often each kind of operation comes.
    :param policies: of the operations.
    """
    chance = random.Random(seed)
    operations = tuple(_operations(chance, seconds, rate, kinds, policies))
    groups = [(WORKERS, 1.2), (NETWORKS, 3.0), (DATABASES, 9.0)]
    if pooler:
        groups.append((POOLERS, 13.0))
    faults = [
        fault for kinds_, every in groups for fault in _faults(chance, kinds_, every, seconds)
    ]
    return Schedule(operations=operations, faults=tuple(sorted(faults, key=lambda fault: fault.at)))


def _operations(
    chance: random.Random,
    seconds: float,
    rate: float,
    kinds: Mapping[str, int],
    policies: Sequence[str],
) -> Iterator[Operation]:
    at, number = 0.0, 0
    before: Operation | None = None
    while (at := at + chance.expovariate(rate)) < seconds:
        number += 1
        kind = chance.choices(list(kinds), list(kinds.values()))[0]
        scope, policy = chance.choice(["alice", "bob"]), chance.choice(policies)
        key = f"{number:05}-{chance.getrandbits(64):016x}"
        if before is not None and chance.random() < 0.1:
            # The key of another operation, in another scope: they must never meet.
            key, policy = before.identity.key, before.identity.policy
            scope = "bob" if before.identity.scope == "alice" else "alice"
        operation = Operation(
            at=round(at, 3),
            identity=Identity(scope, policy, key),
            kind=kind,
            takes=_takes(chance),
            taps=tuple(_taps(chance, 2 if kind == "clashes" else chance.choice([1, 1, 1, 2, 3]))),
        )
        # Used once: a third operation under the key could be the first one's again.
        before = None if before is not None and before.identity.key == key else operation
        yield operation


def _takes(chance: random.Random) -> float:
    shortest, longest = chance.choices(
        [(0.0, 0.05), (0.2, 0.8), (1.2 * LEASE, 2.2 * LEASE)], [6, 3, 2]
    )[0]
    return round(chance.uniform(shortest, longest), 3)


def _taps(chance: random.Random, count: int) -> Iterator[Tap]:
    for number in range(count):
        yield Tap(
            after=0.0 if number == 0 else round(chance.uniform(0, 0.4), 3),
            seed=chance.getrandbits(32),
            patience=chance.choice([0.3, 1.0, BOUND, BOUND]),
            cut=chance.choices(["no", "half sent", "unread"], [12, 1, 2])[0],
        )


def _faults(
    chance: random.Random, kinds: tuple[str, ...], every: float, seconds: float
) -> Iterator[Fault]:
    at = chance.uniform(0.3, 1.0) * every
    while at < seconds:
        # Longer than a lease has left: a worker stopped, and a database away, are overtaken.
        fault = Fault(
            at=round(at, 3),
            kind=chance.choice(kinds),
            lasts=round(chance.uniform(0.7, 2.0) * LEASE, 3),
            pick=chance.random(),
        )
        yield fault
        at += fault.lasts + chance.expovariate(1 / every)


def stops(seed: int, seconds: float) -> Schedule:
    """Slow operations, asked for again and again by clients who don't wait, while one worker
    after the other stands still for longer than a lease."""
    chance = random.Random(seed)
    operations = []
    for number in range(int(seconds * 2)):
        policy = chance.choice(LEASED)
        tap = Tap(after=0.0, seed=chance.getrandbits(32), patience=0.3)
        operations.append(
            Operation(
                at=number / 2,
                identity=Identity("alice", policy, f"{number:05}-{chance.getrandbits(64):016x}"),
                kind=chance.choice(["answers", "fails once"]),
                takes=round(chance.uniform(1.2, 2.2) * LEASE, 3),
                taps=(tap, replace(tap, after=0.5, seed=chance.getrandbits(32))),
            )
        )
    lasts = round(1.6 * LEASE, 3)
    faults = tuple(
        Fault(at=0.7 + number * 1.1 * lasts, kind="worker stopped", lasts=lasts, pick=pick)
        for number in range(int((seconds - 0.7) / lasts))
        for pick in [chance.random()]
    )
    return Schedule(operations=tuple(operations), faults=faults)


def transactions(seed: int, seconds: float) -> Schedule:
    """Operations in transaction mode that succeed, fail or raise at first, and nothing else
    that would be amiss."""
    kinds = {"answers": 2, "fails once": 1, "raises once": 1}
    load = make(seed, seconds, rate=8.0, kinds=kinds, policies=["transaction"])
    return replace(load, faults=())


def outage(seed: int, seconds: float, *, away: float = 5.0) -> Schedule:
    """PostgreSQL goes away under load, from a third of the time on, for ``away`` seconds."""
    load = make(seed, seconds, rate=8.0, kinds={"answers": 1}, policies=LEASED)
    fault = Fault(at=seconds / 3, kind="PostgreSQL away", lasts=away, pick=0.0)
    return replace(load, faults=(fault,))
