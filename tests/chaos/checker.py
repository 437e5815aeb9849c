"""What must hold of a run, whatever broke in it: a pure function of its log.

What can be proved where the handler's effects are not in the store's transaction (lease mode):

1.  A row is given to one token at a time, and to another one only when it was released or
    gone, or had lapsed under a policy that releases a lapse. A stored response never changes.
2.  A row is completed, held, released or dropped by the run that holds it, after it has come
    to an outcome for which the policy says so, or by nobody: a claim that no run came of may
    be undone.
3.  Each claim runs the handler once at most, and nothing runs without a claim.
4.  An operation runs again only after an outcome that its policy forgets or releases, or
    after a lapse that it releases. Under a policy that holds a lapse, what may have happened
    is never run again.
5.  Two runs of one operation overlap only where the earlier one's lease ran out; and a lease
    runs out only where its worker was killed or did not get to run, or the database could not
    be reached.
6.  Whoever is told 2xx is told so by a run that left exactly one row in the ledger, and that
    is recorded, or was reported as not recorded yet. Every other row in the ledger is of a run
    after which the policy lets the operation run again. So where lapses are held, an
    acknowledged operation has exactly one row, and all its clients have the same answer. Where
    they are released, a store that stays away for longer than a lease after the handler has
    run is the one way to a second row: its answer was given and could not be recorded.
7.  What is replayed is what that run answered: status, headers, bytes.
8.  Nobody gets an answer to another scope's, endpoint's, key's or payload's request.
9.  Nobody waits longer than the handler, the policy's wait and the store's time-outs together;
    time in which the process was not let run doesn't count.
10. When all has calmed down, nothing is in flight, every operation that may run again has come
    to its answer, and what is held is of a policy that holds.

In transaction mode nothing lapses, and a run that is not committed has left nothing behind: the
rows of the store show no claim of it, and the operation may run again. In place of 4 and 6:

11. What is written is what is recorded: each completed row of the store has exactly one row that
    its own run has written, each row that was written has its completed row, and there is never
    a second one. Whoever is told 2xx is told so by that run; no failure to record excuses it.
12. Two runs overlap only where a fault may have cut the earlier one's connection, and with it its
    lock.

The oracle is written down here, not taken from the package: a rule that changes there has to
change here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from chaos.log import Answered, Execution, Identity, Log, Transition, Try

#: What each policy makes of each outcome; docs/guarantees.md has the table.
STORE, FORGET, RELEASE, HOLD = "store", "forget", "release", "hold"
RULES = {
    "store_success": {"2": STORE, "4": FORGET, "5": RELEASE, "raised": RELEASE, "lapse": RELEASE},
    "waits": {"2": STORE, "4": FORGET, "5": RELEASE, "raised": RELEASE, "lapse": RELEASE},
    "store_everything": {"2": STORE, "4": STORE, "5": STORE, "raised": HOLD, "lapse": HOLD},
    "hold_unknown": {"2": STORE, "4": FORGET, "5": HOLD, "raised": HOLD, "lapse": HOLD},
    # Nothing lapses there.
    "transaction": {"2": STORE, "4": FORGET, "5": FORGET, "raised": FORGET, "lapse": FORGET},
}

#: The policy in transaction mode.
TRANSACTION = "transaction"

#: Refusals after which the same request may have another answer.
PASSING = frozenset({"CONFLICT", "STORE_UNAVAILABLE", "TRANSACTION_CONFLICT", "COMMIT_UNKNOWN"})

#: Which action leads to which state of the row; None: it is gone.
ENDS = {"completed": STORE, None: FORGET, "released": RELEASE, "held": HOLD}

#: Seconds a fault goes on being felt after it was mended: reconnecting, catching up.
AFTERMATH = 1.0

#: Seconds that a thread may be late on a machine with other things to do.
SLACK = 1.0

#: Faults after which a worker's own code goes on, to an end that is an exception.
ABORTS = frozenset({"worker aborted"})

#: Faults that a deployment makes on purpose, and that no lease may run out by.
GRACEFUL = frozenset({"server reloaded", "clients reset"})


@dataclass(frozen=True)
class Violation:
    """A promise that was not kept."""

    rule: str
    identity: Identity
    what: str

    def __str__(self) -> str:
        return f"{self.rule}: {'/'.join(self.identity)}: {self.what}"


def check(log: Log) -> list[Violation]:
    """Every violation in a log; none in one of a sound build."""
    view = _View(log)
    return [
        Violation(rule.__name__.replace("_", " "), identity, what)
        for rule in _RULES
        for identity, what in rule(view)
    ]


Found = Iterator[tuple[Identity, str]]


class _View:
    """A log, in the order and by the names that the rules ask for."""

    def __init__(self, log: Log) -> None:
        self.log = log
        self.executions = {execution.name: execution for execution in log.executions}
        self.by_token: dict[str | None, list[Execution]] = defaultdict(list)
        for execution in log.executions:
            self.by_token[execution.token].append(execution)
        self.grants: dict[str, Transition] = {}
        self.lapses: dict[str, Transition] = {}
        self.completions: dict[str, Transition] = {}
        self.history: dict[Identity, list[Transition]] = defaultdict(list)
        for change in sorted(log.transitions, key=lambda change: change.seq):
            self.history[change.identity].append(change)
            if change.grants and change.token is not None:
                self.grants[change.token] = change
            if change.takes_over_a_lapsed and change.token_before is not None:
                self.lapses[change.token_before] = change
            if change.after == "completed" and change.token is not None:
                self.completions[change.token] = change
        self.tries: dict[Identity, list[Try]] = defaultdict(list)
        for made in sorted(log.tries, key=lambda made: made.ended):
            self.tries[made.identity].append(made)

    def runs(self) -> Iterator[tuple[Identity, list[Execution]]]:
        """The runs of each operation, in the order of their claims."""
        runs = defaultdict(list)
        for execution in self.log.executions:
            runs[execution.identity].append(execution)
        for identity, of_one in runs.items():
            yield identity, sorted(of_one, key=self._claimed)

    def _claimed(self, execution: Execution) -> float:
        grant = self.grants.get(execution.token or "")
        return execution.begun if grant is None else grant.at

    def actions(self, execution: Execution) -> set[str]:
        """What may become of a run's claim. A worker that is aborted between the handler's
        end and its record has not come to the handler's outcome, but to an exception."""
        rules = RULES[execution.identity.policy]
        actions = set()
        if execution.outcome is not None:
            outcome = execution.outcome
            actions.add(rules[outcome if outcome == "raised" else outcome[0]])
        end = execution.over or float("inf")
        for window in self.log.windows:
            if window.what in ABORTS and window.meets(execution.begun, end + SLACK, execution.pid):
                actions.add(rules["raised"])
        return actions


def rows_change_hands_as_they_may(view: _View) -> Found:
    for identity, changes in view.history.items():
        state, token, response = None, None, None
        for change in changes:
            if (change.before, change.token_before) != (state, token):
                yield identity, f"{change} does not follow upon {state} of {token}"
            if change.grants and not _may_be_granted(change):
                yield identity, f"it was given away while it was not free: {change}"
            if not change.grants and change.after == "claimed" and change.before != "claimed":
                yield identity, f"it was claimed again by its own token: {change}"
            if state == "completed" and (change.after, change.response) != (state, response):
                yield identity, f"what was stored has changed: {change}"
            if state == "held" and (change.after, change.token) != (state, token):
                yield identity, f"it was held, and nobody has resolved it: {change}"
            state, token, response = change.after, change.token, change.response


def _may_be_granted(change: Transition) -> bool:
    if change.before in (None, "released"):
        return True
    lapsed = change.lease is not None and change.lease <= change.now
    return (
        change.before == "claimed"
        and lapsed
        and change.lapse == RULES[change.identity.policy]["lapse"] == RELEASE
    )


def rows_are_settled_by_who_holds_them(view: _View) -> Found:
    for identity, changes in view.history.items():
        for change in changes:
            if change.grants or change.before != "claimed" or change.after == "claimed":
                continue
            action = ENDS[change.after]
            runs = view.by_token.get(change.token_before, [])
            if not runs:
                # A worker aborted between its claim and its handler can't know that it hasn't run.
                aborted = any(
                    window.what in ABORTS and window.meets(change.at - SLACK, change.at)
                    for window in view.log.windows
                )
                if action == STORE or (action == HOLD and not aborted):
                    yield identity, f"{action} of a claim that nothing ran under: {change}"
                continue
            holder = runs[0]
            if action not in view.actions(holder):
                yield identity, f"{action} although its holder came to {holder.outcome}: {change}"
            elif holder.decided is None or holder.decided > change.at:
                yield identity, f"{action} while its holder was still running: {change}"
            elif action == STORE and change.execution != holder.name:
                yield identity, f"completed by {change.execution}, held by {holder.name}"


def nothing_runs_without_a_claim_nor_twice_under_one(view: _View) -> Found:
    for token, executions in view.by_token.items():
        for execution in executions:
            grant = None if token is None else view.grants.get(token)
            if grant is None and token is not None and execution.identity.policy == TRANSACTION:
                continue  # its claim is gone with its transaction
            if grant is None:
                yield execution.identity, f"run {execution.name} had no claim"
            elif grant.identity != execution.identity or grant.at > execution.begun:
                yield execution.identity, f"run {execution.name} began before its claim"
        if token is not None and len(executions) > 1:
            names = ", ".join(execution.name for execution in executions)
            yield executions[0].identity, f"one claim ran {names}"


def operations_run_again_only_as_their_policy_says(view: _View) -> Found:
    for identity, runs in view.runs():
        for earlier, later in pairwise(runs):
            if not _may_follow(view, earlier):
                yield (
                    identity,
                    f"run {later.name} after {earlier.name}, which came to {earlier.outcome}",
                )


def _may_follow(view: _View, execution: Execution) -> bool:
    if execution.identity.policy == TRANSACTION:
        return execution.token not in view.completions
    if view.actions(execution) & {FORGET, RELEASE}:
        return True
    lapses = RULES[execution.identity.policy]["lapse"] == RELEASE
    return lapses and execution.token in view.lapses


def two_run_at_once_only_after_a_lapse(view: _View) -> Found:
    for identity, runs in view.runs():
        for number, earlier in enumerate(runs):
            for later in runs[number + 1 :]:
                # One whose process died is over; when, its lease alone can tell.
                if earlier.over is None or earlier.over <= later.begun:
                    continue
                if identity.policy == TRANSACTION and _may_be_cut_off(view, earlier, later):
                    continue
                if earlier.token not in view.lapses:
                    yield identity, f"{earlier.name} and {later.name} ran at once"


def _may_be_cut_off(view: _View, earlier: Execution, later: Execution) -> bool:
    return any(
        window.what not in GRACEFUL
        and window.meets(earlier.begun - AFTERMATH, later.begun, earlier.pid)
        for window in view.log.windows
    )


def leases_run_out_only_for_a_cause(view: _View) -> Found:
    lapsed = [
        (change.identity, change.token_before, change.lease)
        for change in view.lapses.values()
        if change.lease is not None
    ]
    lapsed += [
        (row.identity, row.token, row.lease)
        for row in view.log.rows
        if row.state == "claimed" and row.lapsed
    ]
    for identity, token, lease in lapsed:
        runs = view.by_token.get(token, [])
        pid = runs[0].pid if runs else None
        # It was not renewed from here on.
        started = lease - view.log.lease - AFTERMATH
        if not any(
            window.what not in GRACEFUL and window.meets(started, lease, pid)
            for window in view.log.windows
        ):
            yield identity, f"the lease of {token} ran out at {lease:.3f}, and nothing was broken"


def who_is_told_of_success_has_one_row_in_the_ledger(view: _View) -> Found:
    runs_of = dict(view.runs())
    for identity, tries in view.tries.items():
        told = {made.execution for made in tries if made.acknowledged}
        for name in sorted(filter(None, told)):
            yield from _acknowledged(view, identity, view.executions.get(name), name)
        if None in told:
            yield identity, "a success that no run of the handler can be told of"
        if not told:
            continue
        runs = runs_of.get(identity, [])
        with_effect = [run for run in runs if run.effects]
        once = identity.policy == TRANSACTION or RULES[identity.policy]["lapse"] == HOLD
        if once and (len(with_effect) != 1 or len(told) != 1):
            yield identity, f"told of {len(told)} successes, {len(with_effect)} in the ledger"
        for run in with_effect:
            if run.name not in told and run is not runs[-1] and not _may_follow(view, run):
                yield identity, f"run {run.name} is in the ledger, and can't be accounted for"
        last = max((run.begun for run in runs if run.name in told), default=0.0)
        for run in runs:
            # Told of a success, and overtaken all the same.
            if run.name in told and run.begun < last and run.token not in view.log.unrecorded:
                yield identity, f"run {run.name} was acknowledged, and the operation ran again"


def _acknowledged(view: _View, identity: Identity, run: Execution | None, name: str) -> Found:
    if run is None:
        yield identity, f"the success of {name}, which the ledger doesn't know"
        return
    if run.effects != 1:
        yield identity, f"the success of {name} has {run.effects} rows in the ledger"
    excused = run.token in view.log.unrecorded and identity.policy != TRANSACTION
    if run.token not in view.completions and not excused:
        yield identity, f"the success of {name} was neither recorded nor reported as unrecorded"


def what_is_written_in_a_transaction_is_what_is_recorded(view: _View) -> Found:
    written: dict[Identity, list[str]] = defaultdict(list)
    for one in view.log.written:
        written[one.identity].append(one.execution)
    recorded: dict[Identity, list[str]] = defaultdict(list)
    for row in view.log.rows:
        if row.identity.policy == TRANSACTION and row.state == "completed":
            runs = view.by_token.get(row.token, [])
            recorded[row.identity] += [run.name for run in runs] or [f"no run, but {row.token}"]
    for identity in sorted({*written, *recorded}):
        there, known = sorted(written[identity]), sorted(recorded[identity])
        if there != known or len(there) != 1:
            yield identity, f"written by {there}, recorded of {known}"


def answers_are_what_the_handler_answered(view: _View) -> Found:
    """Fresh or replayed."""
    for identity, tries in view.tries.items():
        headers: dict[str, tuple[tuple[str, str], ...]] = {}
        for made in tries:
            if made.replayed and made.execution is None:
                yield identity, f"a replay of nothing: {made}"
            if made.execution is None:
                continue
            run = view.executions.get(made.execution)
            if run is None or (str(made.status), made.body) != (run.outcome, run.body):
                yield identity, f"{made} is not what the handler answered: {run}"
                continue
            if headers.setdefault(made.execution, made.headers) != made.headers:
                yield identity, f"{made} has other headers than before"
            if made.replayed and run.token not in view.completions:
                yield identity, f"{made} was replayed, but never recorded"


def nobody_gets_somebody_elses_answer(view: _View) -> Found:
    for identity, tries in view.tries.items():
        for made in tries:
            if made.echoed is not None and made.echoed != (identity, made.payload):
                yield identity, f"was answered as {made.echoed}"


def nobody_waits_longer_than_the_bound(view: _View) -> Found:
    for made in view.log.tries:
        if made.bound is not None and made.error == "timeout":
            yield made.identity, f"no answer within {made.bound:g} s, from {made.started:.3f}"
    for request in view.log.answered:
        took = request.ended - request.started - request.takes - _stood_still(view, request)
        if took > view.log.longest + SLACK:
            yield request.identity, f"{took:.1f} s in the middleware, from {request.started:.3f}"


def _stood_still(view: _View, request: Answered) -> float:
    return sum(
        min(window.ended, request.ended) - max(window.started, request.started)
        for window in view.log.windows
        if window.what == "stalled"
        and window.meets(request.started, request.ended)
        and window.pid == request.pid
    )


def nothing_is_left_in_flight(view: _View) -> Found:
    for row in view.log.rows:
        holds = RULES[row.identity.policy]["lapse"] == HOLD
        if row.state == "claimed" and not (row.lapsed and holds and row.lapse == HOLD):
            yield row.identity, f"still in flight: {row}"
        if row.state == "held" and HOLD not in RULES[row.identity.policy].values():
            yield row.identity, f"held by a policy that never holds: {row}"
    for identity, tries in view.tries.items():
        closing = [made for made in tries if made.closing]
        if closing and not _final(closing[-1]):
            yield identity, f"it has come to no answer: {closing[-1]}"


def _final(made: Try) -> bool:
    rules = RULES[made.identity.policy]
    if made.status is None or made.code in PASSING:
        return False
    if made.code == "OUTCOME_UNKNOWN":
        return rules["lapse"] == HOLD
    if made.code is not None:
        return made.code in ("RESPONSE_NOT_REPLAYABLE", "FINGERPRINT_MISMATCH")
    return rules.get(str(made.status)[0]) == STORE


_RULES: Iterable[Callable[[_View], Found]] = (
    rows_change_hands_as_they_may,
    rows_are_settled_by_who_holds_them,
    nothing_runs_without_a_claim_nor_twice_under_one,
    operations_run_again_only_as_their_policy_says,
    two_run_at_once_only_after_a_lapse,
    leases_run_out_only_for_a_cause,
    who_is_told_of_success_has_one_row_in_the_ledger,
    what_is_written_in_a_transaction_is_what_is_recorded,
    answers_are_what_the_handler_answered,
    nobody_gets_somebody_elses_answer,
    nobody_waits_longer_than_the_bound,
    nothing_is_left_in_flight,
)
RULE_NAMES = tuple(rule.__name__.replace("_", " ") for rule in _RULES)
