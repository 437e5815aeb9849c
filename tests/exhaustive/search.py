"""Every state that some clients can bring about, and the promises that hold in each.

A step of a state is one of: a client's statement takes effect and is answered; its answer is
lost, and the statement takes effect later or never; it takes effect unheard, and the store
asks again; a handler ends, one way or another; a worker is killed, with or without a
statement on its way; a heartbeat renews or catches up with what it was left; a lease or the
retention runs out; a purge runs. Nobody has to take a step: a client that takes none while
clocks run out is a worker that is paused.
"""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from exhaustive import clients as asked
from exhaustive.clients import Client, Duty, Node, Question
from exhaustive.database import CLAIMED, COMPLETED, Database, Granted, Row, expired, look

_Steps = Iterator[tuple["Step", "Situation"]]

# What has become of a client's execution, as one knows who sees everything.
NOTHING = "nothing"  # it never began, was forgotten, or is past its retention
RUNNING = "running"  # it may have begun, and nothing is recorded of it
STORED = "stored"
RELEASED = "released"
HELD = "held"

_FATES = {asked.COMPLETE: STORED, asked.RELEASE: RELEASED, asked.HOLD: HELD, asked.FORGET: NOTHING}


class Standing(NamedTuple):
    """Where a client stands.

    :param looked: its claim's snapshot was taken, and had no row.
    :param asks_again: its statement took effect once already, unheard.
    :param fate: of its execution.
    :param lapsed: its lease ran out while it had the claim.
    :param duties: what its heartbeat has been left with.
    """

    node: Node
    looked: Any = False
    asks_again: bool = False
    fate: str = NOTHING
    lapsed: bool = False
    duties: tuple[Duty, ...] = ()


class Open(NamedTuple):
    """A transaction on the server.

    :param row: the row as only it sees it, once it has changed it.
    :param connected: its client may still say something.
    :param committing: COMMIT is on its way.
    """

    client: int
    row: Row | None = None
    wrote: bool = False
    connected: bool = True
    committing: bool = False


class Situation(NamedTuple):
    """A state of everything.

    :param crashes: how many workers may still be killed.
    :param losses: how many answers may still be lost.
    :param on_their_way: statements nobody waits for any more.
    :param open: transactions that have not ended on the server.
    :param written: whose application's writes have been committed in transaction mode.
    :param recorded: whose responses have.
    """

    row: Row | None
    clients: tuple[Standing, ...]
    crashes: int
    losses: int
    on_their_way: tuple[tuple[int, Question], ...] = ()
    open: tuple[Open, ...] = ()
    written: tuple[int, ...] = ()
    recorded: tuple[int, ...] = ()


#: Who, what, and a detail of it.
Step = tuple[int | None, str, Any]


class Violation(Exception):
    """Raised where a promise is broken.

    :param promise: its name in the design.
    """

    def __init__(self, promise: str, what: str) -> None:
        super().__init__(f"{promise}: {what}")
        self.promise = promise


@dataclass(frozen=True)
class Found:
    """What a search came to.

    :param states: how many states were visited.
    :param steps: how many steps lead from them.
    :param violation: the first promise that was found broken, or None.
    :param trace: the shortest way there.
    """

    states: int
    steps: int
    violation: Violation | None = None
    trace: tuple[str, ...] = ()


@dataclass
class Search:
    """A breadth-first search.

    :param clients: in the order in which those that are alike begin, which is no
        restriction: what differs between them is their names alone.
    :param ends: the ways in which a handler may end.
    :param crashes: workers killed at most.
    :param losses: answers lost, or interrupted, at most.
    :param blind_to: promises that are not looked at, to see what else breaks.
    """

    clients: Sequence[Client]
    ends: Sequence[str]
    crashes: int = 1
    losses: int = 1
    interrupts: bool = False
    database: Database = field(default_factory=Database)
    blind_to: frozenset[str] = frozenset()
    _trying: Step = (None, "", None)

    def run(self) -> Found:
        gc.disable()  # it would walk all states again and again
        try:
            return self._run()
        finally:
            gc.enable()

    def _run(self) -> Found:
        standings = tuple(Standing(client.start) for client in self.clients)
        first = Situation(None, standings, self.crashes, self.losses)
        came_from: dict[Situation, tuple[Situation, Step] | None] = {first: None}
        left = deque([first])
        steps = 0
        while left:
            situation = left.popleft()
            try:
                stuck = True
                for step, following in self._steps(situation):
                    steps += 1
                    stuck = stuck and step[1] in _OF_CLOCKS
                    if following not in came_from:
                        came_from[following] = situation, step
                        left.append(following)
                if stuck:
                    self._check_the_end(situation)
            except Violation as violation:
                trace = (*_trace(came_from, situation), _told(self._trying), str(violation))
                return Found(len(came_from), steps, violation, trace)
        return Found(len(came_from), steps)

    # ------------------------------------------------------------ steps

    def _steps(self, now: Situation) -> _Steps:
        if now.row is not None:
            yield from self._clocks(now, now.row)
        for n, (i, question) in enumerate(now.on_their_way):
            if self._blocked(now, i, question):
                continue
            self._trying = step = i, "takes effect late", question
            row, clients, _ = self._effect(now.row, now.clients, i, question, runs=False)
            others = now.on_their_way[:n] + now.on_their_way[n + 1 :]
            yield step, now._replace(row=row, clients=clients, on_their_way=others)
        before: Standing | None = None
        for i, standing in enumerate(now.clients):
            if before is not None and self._interchangeable(i - 1, before):
                break
            before = standing
            yield from self._steps_of(now, i, standing)

    def _interchangeable(self, i: int, standing: Standing) -> bool:
        """Whether a client has yet to begin, and the next one is like it."""
        return (
            standing.node is self.clients[i].start
            and not standing.looked
            and self.clients[i].payload == self.clients[i + 1].payload
        )

    def _clocks(self, now: Situation, row: Row) -> _Steps:
        i = row.token
        standing = now.clients[i]
        if row.state == CLAIMED and not row.lapsed:
            lapsed = standing
            if standing.fate == RUNNING:
                over = standing.node is self.clients[i].dead
                lapsed = standing._replace(fate=NOTHING if over else RUNNING, lapsed=not over)
            clients = _with(now.clients, i, lapsed)
            yield (
                (None, "the lease runs out", i),
                now._replace(row=row._replace(lapsed=True), clients=clients),
            )
        # No statement takes as long as a retention: those of its claim have come by then, and
        # the second try, if there is one, is over.
        tries_again = standing.asks_again or standing.node.answers[-1:] == (asked.DISCONNECTED,)
        if not row.past_retention and not tries_again:
            clients = now.clients
            if standing.fate in (STORED, RELEASED):
                clients = _with(clients, i, standing._replace(fate=NOTHING))
            yield (
                (None, "the retention runs out", i),
                now._replace(
                    row=row._replace(past_retention=True),
                    clients=clients,
                    on_their_way=tuple(sent for sent in now.on_their_way if sent[0] != i),
                ),
            )
        if expired(row) and not _uncommitted(now):
            yield (None, "a purge deletes the row", i), now._replace(row=None)

    def _steps_of(self, now: Situation, i: int, standing: Standing) -> _Steps:
        node, row = standing.node, now.row
        if row is not None and row.lapsed and _renews(standing) and not _uncommitted(now):
            yield from self._renewal(now, i, standing, row)
        for n, duty in enumerate(standing.duties):
            if not self._blocked(now, i, duty.question):
                yield from (self._undo if duty.undo else self._catch_up)(now, i, n, duty)
        kind = node.question[0]
        if kind is asked.ANSWERED:
            if standing.duties and now.crashes:
                yield from self._crash(now, i, standing, now.on_their_way)
            return
        if now.crashes:
            yield from self._crash(now, i, standing, now.on_their_way)
        if kind in _CHOICES or kind is asked.HANDLER:
            for answer in self.ends if kind is asked.HANDLER else _CHOICES[kind]:
                yield from self._answered(now, i, standing, answer)
            return
        yield from self._awaited(now, i, standing)

    def _awaited(self, now: Situation, i: int, standing: Standing) -> _Steps:
        """What becomes of the statement that a client waits for."""
        kind = standing.node.question[0]
        if kind is asked.CLAIM and not standing.looked:
            row = now.row
            if row is None:
                looked = _with(now.clients, i, standing._replace(looked=True))
                yield (i, "takes a snapshot without a row", kind), now._replace(clients=looked)
            else:
                found = look(row, i)
                if isinstance(found, Granted):  # by a statement of its that came late
                    standing = standing._replace(fate=RUNNING, lapsed=row.lapsed)
                yield from self._answered(now, i, standing, found)
        elif not self._blocked(now, i, standing.node.question):
            yield from self._statement(now, i, standing)
        if now.losses:
            yield from self._losses(now, i, standing)

    def _statement(self, now: Situation, i: int, standing: Standing) -> _Steps:
        question = standing.node.question
        self._trying = i, "has effect", question
        row, clients, answer = self._effect(now.row, now.clients, i, question)
        now = now._replace(row=row, clients=clients)
        if question[0] is asked.CLAIM and answer is None:
            # The row was committed after the snapshot: the store asks again.
            again = _with(clients, i, standing._replace(looked=False))
            yield (
                (i, "neither saw a row nor inserted one", asked.CLAIM),
                now._replace(clients=again),
            )
        else:
            yield from self._answered(now, i, clients[i], answer)

    def _losses(self, now: Situation, i: int, standing: Standing) -> _Steps:
        question = standing.node.question
        on_the_way = _sent(now, i, question)
        fewer = now._replace(losses=now.losses - 1)
        sent = fewer._replace(on_their_way=on_the_way)
        for answer in (asked.LOST, asked.INTERRUPTED) if self.interrupts else (asked.LOST,):
            yield from self._answered(sent, i, standing, answer)
        if question[0] in _GRANTS:
            yield from self._answered(sent, i, standing, asked.DISCONNECTED)
            return
        if standing.asks_again or self._blocked(now, i, question):
            return
        self._trying = step = i, "has effect, unheard, and is asked again", question
        row, clients, _ = self._effect(now.row, now.clients, i, question)
        if row is not now.row:
            again = clients[i]._replace(asks_again=True, looked=False)
            yield step, fewer._replace(row=row, clients=_with(clients, i, again))

    def _crash(
        self, now: Situation, i: int, standing: Standing, on_their_way: tuple[Any, ...]
    ) -> _Steps:
        fate = NOTHING if standing.fate == RUNNING and standing.lapsed else standing.fate
        dead = Standing(self.clients[i].dead, fate=fate)
        after = now._replace(clients=_with(now.clients, i, dead), crashes=now.crashes - 1)
        question = standing.node.question
        if standing.node is not self.clients[i].start or standing.looked:
            yield (i, "is killed", question), after
        sent = _sent(now, i, question)
        if sent is not now.on_their_way:
            yield (
                (i, "is killed with a statement on its way", question),
                after._replace(on_their_way=sent),
            )

    def _renewal(self, now: Situation, i: int, standing: Standing, row: Row) -> _Steps:
        self._trying = step = i, "renews its lease", None
        after = self.database.renew(row, i)
        if after == row:
            return
        if row.token != i:
            self._broken("P3", f"client {i} renewed the claim of client {row.token}")
        clients = _with(now.clients, i, standing._replace(lapsed=False))
        yield step, now._replace(row=after, clients=clients)

    def _catch_up(self, now: Situation, i: int, n: int, duty: Duty) -> _Steps:
        self._trying = step = i, "catches up with", duty.question
        row, clients, done = self._effect(now.row, now.clients, i, duty.question)
        after = _less(clients[i], n)
        following = duty.then[0 if done else 1]
        if following is not None:
            after = after._replace(duties=(*after.duties, following))
        yield step, now._replace(row=row, clients=_with(clients, i, _at_the_end(after)))

    def _undo(self, now: Situation, i: int, n: int, duty: Duty) -> _Steps:
        """It is asked again and again, and for the last time when nothing can be on its way
        any more. What comes even later is left behind, and nobody is to blame."""
        self._trying = step = i, "undoes", duty.question
        row, clients, _ = self._effect(now.row, now.clients, i, duty.question)
        if row is not now.row:
            yield step, now._replace(row=row, clients=clients)
        after = _less(clients[i], n)
        if any(j == i and sent[0] in _GRANTS for j, sent in now.on_their_way):
            after = after._replace(node=self.clients[i].gave_up)
        yield (
            (i, "undoes for the last time", duty.question),
            now._replace(row=row, clients=_with(clients, i, _at_the_end(after))),
        )

    def _answered(self, now: Situation, i: int, standing: Standing, answer: Any) -> _Steps:
        before = standing.node
        kind = before.question[0]
        self._trying = step = i, kind, answer
        node = before.after(answer)
        fate = standing.fate
        if kind in _GRANTS and answer in _RAISED and fate == RUNNING:
            fate = NOTHING  # its execution won't begin
        duties = standing.duties + node.duties[len(before.duties) :]
        after = Standing(node, fate=fate, lapsed=standing.lapsed, duties=duties)
        if node.question[0] is asked.HANDLER:
            self._check_begin(now, i, after)
        elif node.question[0] is asked.ANSWERED:
            self._check_answer(node, i, kind, answer)
            ended = self.clients[i].told_undone if answer == asked.UNDONE else self.clients[i].ended
            after = _at_the_end(after._replace(node=ended))
        yield step, now._replace(clients=_with(now.clients, i, after))

    # ------------------------------------------------------------ transaction mode

    def _blocked(self, now: Situation, i: int, question: Question) -> bool:
        """Whether a statement waits for the end of a transaction that has changed the row:
        one that would insert it, or change the version of it that everybody sees."""
        if not now.open or not _uncommitted(now):
            return False
        kind = question[0]
        if kind is asked.CLAIM:
            return now.row is None
        if kind is asked.LOOKUP or kind not in asked.STATEMENTS:
            return False
        token = question[2] if kind is asked.TAKE_OVER else i
        return now.row is not None and now.row.token == token

    # ------------------------------------------------------------ effects and promises

    def _effect(
        self,
        row: Row | None,
        clients: tuple[Standing, ...],
        i: int,
        question: Question,
        *,
        runs: bool = True,
    ) -> tuple[Row | None, tuple[Standing, ...], Any]:
        """What a statement of a client does, and what becomes of the executions by it.

        :param runs: whether anybody will run the handler if it is a claim.
        """
        kind = question[0]
        database = self.database
        after: Row | None
        answer: Any
        if kind is asked.CLAIM:
            after, answer = database.insert(row, question[1])
        elif kind is asked.TAKE_OVER:
            after, answer = database.take_over(row, question[1], question[2])
        elif kind is asked.COMPLETE:
            after, answer = database.complete(row, i, question[1])
        elif kind is asked.LOOKUP:
            after, answer = row, row
        else:
            after, answer = getattr(database, kind)(row, i)
        if after == row:
            return row, clients, answer
        if kind in _GRANTS:
            return after, self._granted(row, clients, i, question, answer, runs), answer
        if row is None or row.token != i:
            self._broken("P3", f"client {i}, who had lost the claim, changed the row")
        if row is not None and row.state == COMPLETED and not row.past_retention:
            self._broken("P2", f"client {i} replaced the recorded response")
        fate = _FATES[kind]
        if after is not None and after.past_retention and fate in (STORED, RELEASED):
            fate = NOTHING
        changed = clients[i]._replace(fate=fate, lapsed=False)
        return after, _with(clients, i, changed), answer

    def _granted(
        self,
        row: Row | None,
        clients: tuple[Standing, ...],
        i: int,
        question: Question,
        granted: Granted | None,
        runs: bool,
    ) -> tuple[Standing, ...]:
        if row is not None and not expired(row) and row.fingerprint != question[1].fingerprint:
            self._broken("P4", f"client {i} runs the operation of another payload")
        for j, other in enumerate(clients):
            if j == i:
                continue
            if other.fate == STORED:
                self._broken("P2", f"client {i} is granted what client {j} has recorded")
            if other.fate == HELD:
                self._broken("HOLD", f"client {i} is granted what client {j} holds")
            if other.fate == RUNNING and not other.lapsed:
                self._broken("P1", f"client {i} is granted what client {j} still has")
            # What ran in a transaction is known: undone with it.
            left = self.clients[j].lapse == "hold" and not self.clients[j].transacts
            if other.fate == RUNNING and left:
                self._broken("HOLD", f"client {i} is granted what client {j} has left unknown")
        clients = tuple(
            other._replace(fate=NOTHING) if other.fate == RELEASED else other for other in clients
        )
        if not runs:
            return clients
        return _with(clients, i, clients[i]._replace(fate=RUNNING, lapsed=False))

    def _check_begin(self, now: Situation, i: int, standing: Standing) -> None:
        """A handler begins: under its claim, unless its worker has been paused past its lease
        between the two, which no statement can rule out."""
        row = now.row
        if any(mine.client == i for mine in now.open):
            return
        if row is not None and row.token == i and row.state == CLAIMED:
            return
        if not standing.lapsed or self.clients[i].lapse == "hold":
            self._broken("P1", f"client {i} runs its handler without a claim")

    def _check_answer(self, node: Node, i: int, kind: str, answer: Any) -> None:
        _, status, body, replayed = node.question
        if replayed:
            seen = [found for found in node.answers if isinstance(found, Row)][-1]
            if seen.state != COMPLETED or seen.result is None or seen.result.body != body:
                self._broken("P4", f"client {i} is told what is not recorded")
            if seen.fingerprint != self.clients[i].start.question[1].fingerprint:
                self._broken("P4", f"client {i} is told the response to another payload")
        elif kind is asked.COMPLETE and answer is False and status == 201:
            self._broken("P3", f"client {i} has lost its claim, and is told its own answer")

    def _check_the_end(self, now: Situation) -> None:
        """Nobody can do anything any more."""
        self._trying = None, "the end", None
        row = now.row
        for mine in now.open:
            self._broken("crash-safe", f"client {mine.client} has left its transaction open")
        if row is None or row.state != CLAIMED:
            return
        if now.clients[row.token].node is self.clients[row.token].ended:
            self._broken("crash-safe", f"client {row.token} is alive and has left its claim behind")

    def _broken(self, promise: str, what: str) -> None:
        if promise not in self.blind_to:
            raise Violation(promise, what)


_GRANTS = (asked.CLAIM, asked.TAKE_OVER)
_RAISED = (asked.LOST, asked.DISCONNECTED, asked.INTERRUPTED)
_OF_CLOCKS = ("the lease runs out", "the retention runs out", "a purge deletes the row")
_CHOICES: dict[str, tuple[Any, ...]] = {
    asked.STREAM: ("sent",),
    asked.SLEEP: (False, True),
    asked.THREAD: ("started", asked.NO_THREAD),
}


def _with(clients: tuple[Standing, ...], i: int, standing: Standing) -> tuple[Standing, ...]:
    return (*clients[:i], standing, *clients[i + 1 :])


def _less(standing: Standing, n: int) -> Standing:
    """Without one of its duties."""
    return standing._replace(duties=standing.duties[:n] + standing.duties[n + 1 :])


def _uncommitted(now: Situation) -> bool:
    return any(transaction.row is not None for transaction in now.open)


def _renews(standing: Standing) -> bool:
    return standing.node.kept or any(not duty.undo for duty in standing.duties)


def _at_the_end(standing: Standing) -> Standing:
    """What still matters of a request that has been answered: all others who ran late are
    excused by their lapse."""
    if not standing.duties and standing.node.question[0] is asked.ANSWERED and standing.lapsed:
        return standing._replace(fate=NOTHING, lapsed=False)
    return standing


def _sent(now: Situation, i: int, question: Question) -> tuple[tuple[int, Question], ...]:
    """The statements on their way, with one more if this is one that changes anything."""
    if question[0] not in asked.STATEMENTS or question[0] is asked.LOOKUP:
        return now.on_their_way
    return (*now.on_their_way, (i, question))


def _trace(
    came_from: dict[Situation, tuple[Situation, Step] | None], situation: Situation
) -> list[str]:
    lines = []
    at = came_from[situation]
    while at is not None:
        situation, step = at
        lines.append(_told(step))
        at = came_from[situation]
    return lines[::-1]


def _told(step: Step) -> str:
    who, what, detail = step
    return f"{'' if who is None else f'client {who}: '}{what}: {_short(detail)}"


def _short(detail: Any) -> str:
    if isinstance(detail, Row):
        clocks = [" lapsed" * detail.lapsed, " past its retention" * detail.past_retention]
        return f"the row of client {detail.token}, {detail.state}{''.join(clocks)}"
    if isinstance(detail, Granted):
        return f"granted, attempt {detail.attempt}"
    if isinstance(detail, tuple):
        return str(detail[0])
    return str(detail)
