"""Transaction mode: the statements of ``stores/transactions.py`` and what may come between.

To begin is to take a snapshot, and then to try the key's lock and to insert the row: the two
are one statement on PostgreSQL, but its snapshot is older than the lock. A transaction whose
client is dead or cut off is rolled back by the server, sooner or later, unless its COMMIT is
on its way. Who has had no answer to a COMMIT asks whether the lock is free, then for the row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from exhaustive import clients as asked
from exhaustive.database import COMPLETED, Granted, Row, fresh
from exhaustive.search import (
    NOTHING,
    RUNNING,
    STORED,
    Open,
    Search,
    Situation,
    Standing,
    _Steps,
    _uncommitted,
    _with,
)

LOOKS_FOR_IT = "looks whether it was committed"


@dataclass
class TransactionSearch(Search):
    """A search in transaction mode, also beside clients with leases.

    :param locks: whether the key's lock is asked for.
    :param inserts_first: whether the row is inserted before the handler runs.
    :param writes_within: whether the application writes in the transaction.
    :param waits_for_the_lock: whether a lost COMMIT is waited for before the row is read.
    """

    locks: bool = True
    inserts_first: bool = True
    writes_within: bool = True
    waits_for_the_lock: bool = True

    def _steps(self, now: Situation) -> _Steps:
        if {*now.written} != {*now.recorded}:
            self._trying = None, "now", None
            self._broken("P10", f"written: {now.written}, recorded: {now.recorded}")
        for n, mine in enumerate(now.open):
            others = now.open[:n] + now.open[n + 1 :]
            if mine.committing:
                step = self._trying = mine.client, "COMMIT takes effect late", None
                yield step, self._committed(now._replace(open=others), mine)
            if not mine.connected:
                step = mine.client, "is rolled back by the server", None
                yield step, self._rolled_back(now._replace(open=others), mine, excused=True)
        yield from super()._steps(now)

    def _awaited(self, now: Situation, i: int, standing: Standing) -> _Steps:
        kind = standing.node.question[0]
        if kind is asked.BEGIN:
            yield from self._begin(now, i, standing)
        elif kind is asked.TAKE_OVER_WITHIN:
            yield from self._take_over(now, i, standing)
        elif kind is asked.WRITE:
            yield from self._write(now, i, standing)
        elif kind is asked.COMMIT:
            yield from self._commit(now, i, standing)
        elif kind is asked.ROLLBACK:
            mine = _of(now, i)
            if mine is not None:
                now = self._rolled_back(_without(now, mine), mine)
            yield from self._answered(now, i, now.clients[i], None)
        else:
            yield from super()._awaited(now, i, standing)

    # ------------------------------------------------------------ the beginning

    def _begin(self, now: Situation, i: int, standing: Standing) -> _Steps:
        if now.losses:
            lost = _cut_off(now, i)._replace(losses=now.losses - 1)
            yield from self._answered(lost, i, standing, asked.UNDONE)
        wanted = standing.node.question[1]
        if not standing.looked:
            looked = standing._replace(looked=(now.row,))
            step = i, "takes a snapshot", now.row
            yield step, now._replace(clients=_with(now.clients, i, looked))
            return
        (seen,) = standing.looked
        mine = _of(now, i)
        free = mine is not None or not self.locks or not now.open
        if not free:
            if seen is not None and seen.state == COMPLETED and not seen.past_retention:
                yield from self._answered(now, i, standing, seen)
            else:
                yield from self._answered(now, i, standing, None)
            return
        if mine is None:
            mine = Open(i)
            now = now._replace(open=(*now.open, mine))
        if seen is not None:
            yield from self._answered(now, i, standing, seen)
        elif now.row is not None:
            # Neither seen nor inserted: it looks again, and has the lock meanwhile.
            again = standing._replace(looked=(now.row,))
            step = i, "neither saw a row nor inserted one", None
            yield step, now._replace(clients=_with(now.clients, i, again))
        else:
            if _uncommitted(now):
                self._trying = i, "inserts", None
                self._broken("prompt", f"client {i} waits in the primary key for a handler")
                return
            row = fresh(wanted) if self.inserts_first else None
            yield from self._run_by(now, i, mine, row, Granted(1), None)

    def _take_over(self, now: Situation, i: int, standing: Standing) -> _Steps:
        mine = _of(now, i)
        _, wanted, seen = standing.node.question
        if mine is None:  # it was cut off
            yield from self._answered(now, i, standing, asked.UNDONE)
            return
        row, answer = self.database.take_over(now.row, wanted, seen)
        if answer is None:
            yield from self._answered(now, i, standing, None)
        else:
            yield from self._run_by(now, i, mine, row, answer, now.row)

    def _run_by(
        self, now: Situation, i: int, mine: Open, row: Row | None, answer: Granted, seen: Row | None
    ) -> _Steps:
        self._trying = i, "is granted the key", answer
        question = now.clients[i].node.question
        clients = self._granted(seen, now.clients, i, question, answer, True)
        now = _replaced(now._replace(clients=clients), mine, mine._replace(row=row))
        yield from self._answered(now, i, clients[i], answer)

    # ------------------------------------------------------------ the handler and the end

    def _write(self, now: Situation, i: int, standing: Standing) -> _Steps:
        mine = _of(now, i)
        if mine is None or now.losses:
            lost = now
            if mine is not None:
                lost = _cut_off(now, i)._replace(losses=now.losses - 1)
            yield from self._answered(lost, i, standing, asked.LOST)
        if mine is None:
            return
        if self.writes_within:
            now = _replaced(now, mine, mine._replace(wrote=True))
        else:
            now = now._replace(written=tuple(sorted({*now.written, i})))
        yield from self._answered(now, i, standing, None)

    def _commit(self, now: Situation, i: int, standing: Standing) -> _Steps:
        if standing.looked == LOOKS_FOR_IT:
            yield from self._find_out(now, i, standing)
            return
        mine = _of(now, i)
        if mine is None:  # it was cut off
            yield from self._answered(now, i, standing, asked.UNDONE)
            return
        if now.losses:
            looks = _with(now.clients, i, standing._replace(looked=LOOKS_FOR_IT))
            for committing in (False, True):
                after = _cut_off(now, i, committing=committing)
                step = i, "has no answer to its COMMIT", "sent" if committing else "not sent"
                yield step, after._replace(clients=looks, losses=now.losses - 1)
        self._trying = i, "commits", None
        now = self._committed(_without(now, mine), mine)
        yield from self._answered(now, i, now.clients[i], None)

    def _find_out(self, now: Situation, i: int, standing: Standing) -> _Steps:
        if now.row is not None and now.row.token == i and now.row.state == COMPLETED:
            yield from self._answered(now, i, standing, None)
        elif not self.waits_for_the_lock or not any(one.client == i for one in now.open):
            yield from self._answered(now, i, standing, asked.UNDONE)
        yield from self._answered(now, i, standing, asked.UNKNOWN)

    def _committed(self, now: Situation, mine: Open) -> Situation:
        i = mine.client
        standing = now.clients[i]
        if standing.node is self.clients[i].told_undone:
            self._broken("P10", f"client {i} was told that nothing happened")
        wanted = mine.row
        if wanted is None:  # only where the row is not inserted first
            wanted = fresh(self.clients[i].start.question[1])
        result = asked.Result(asked.CREATED, bytes([i]), None)
        fate = standing._replace(fate=STORED, lapsed=False)
        written = {*now.written, i} if mine.wrote else {*now.written}
        return now._replace(
            row=wanted._replace(state=COMPLETED, lapsed=False, result=result),
            clients=_with(now.clients, i, fate),
            written=tuple(sorted(written)),
            recorded=tuple(sorted({*now.recorded, i})),
        )

    def _rolled_back(self, now: Situation, mine: Open, *, excused: bool = False) -> Situation:
        """:param excused: the handler may still run, and can write nothing any more."""
        i = mine.client
        standing = now.clients[i]
        if standing.fate != RUNNING:
            return now
        over = not excused or standing.node.question[0] is asked.ANSWERED
        after = standing._replace(fate=NOTHING if over else RUNNING, lapsed=not over)
        return now._replace(clients=_with(now.clients, i, after))

    def _crash(self, now: Situation, i: int, standing: Standing, on_their_way: Any) -> _Steps:
        mine = _of(now, i)
        for step, after in super()._crash(now, i, standing, on_their_way):
            yield step, _cut_off(after, i)
            if mine is not None and standing.node.question[0] is asked.COMMIT:
                sent = step[0], "is killed with its COMMIT on its way", step[2]
                yield sent, _cut_off(after, i, committing=True)


def _of(now: Situation, i: int) -> Open | None:
    """The transaction a client can still speak in."""
    return next((one for one in now.open if one.client == i and one.connected), None)


def _without(now: Situation, mine: Open) -> Situation:
    return now._replace(open=tuple(one for one in now.open if one is not mine))


def _replaced(now: Situation, mine: Open, by: Open) -> Situation:
    return now._replace(open=tuple(by if one is mine else one for one in now.open))


def _cut_off(now: Situation, i: int, *, committing: bool = False) -> Situation:
    mine = _of(now, i)
    if mine is None:
        return now
    return _replaced(now, mine, mine._replace(connected=False, committing=committing))
