"""The checker of the chaos harness, on logs made by hand: it lets pass what is right, and says
which promise is not kept where one isn't."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from chaos.checker import RULE_NAMES, check
from chaos.log import Answered, Execution, Identity, Log, Row, Transition, Try, Window, Written

PAID = Identity("alice", "store_success", "k")
HELD = Identity("alice", "hold_unknown", "k")
JOINED = Identity("alice", "transaction", "k")


def run(name: str, identity: Identity = PAID, begun: float = 10.0, **changes: Any) -> Execution:
    """A run of half a second that succeeds, under a token of its own name, in process 1."""
    made = Execution(
        name=name,
        identity=identity,
        payload="p",
        token=f"token of {name}",
        attempt=1,
        pid=1,
        begun=begun,
        effects=1,
        outcome="201",
        body=f"answer of {name}",
        decided=begun + 0.5,
        over=begun + 0.5,
    )
    return replace(made, **changes)


def told(name: str, identity: Identity = PAID, ended: float = 10.6, **changes: Any) -> Try:
    """A client that is told of a run's success."""
    made = Try(
        identity=identity,
        payload="p",
        started=ended - 0.6,
        ended=ended,
        bound=45.0,
        status=201,
        body=f"answer of {name}",
        headers=(("Location", f"/executions/{name}"),),
        execution=name,
        echoed=(identity, "p"),
    )
    return replace(made, **changes)


def granted(
    seq: int, name: str, identity: Identity = PAID, at: float = 9.9, **changes: Any
) -> Transition:
    """A row given to a run's token, afresh."""
    made = Transition(
        seq=seq,
        identity=identity,
        now=at,
        at=at,
        before=None,
        token_before=None,
        lease=None,
        lapse=None,
        after="claimed",
        token=f"token of {name}",
    )
    return replace(made, **changes)


def ended(
    seq: int, name: str, after: str | None, identity: Identity = PAID, at: float = 10.55
) -> Transition:
    """A row that a run has settled."""
    made = granted(seq, name, identity, at, before="claimed", after=after, lease=at + 1)
    made = replace(made, token_before=made.token, lapse="release")
    if after is None:
        return replace(made, token=None)
    if after == "completed":
        return replace(made, response=f"answer of {name}", execution=name)
    return made


def overtook(seq: int, name: str, loser: str, at: float, identity: Identity = PAID) -> Transition:
    """A row taken over by one run from another, whose lease had run out 0.1 s before."""
    return granted(
        seq,
        name,
        identity,
        at,
        before="claimed",
        token_before=f"token of {loser}",
        lease=at - 0.1,
        lapse="release",
    )


def once(identity: Identity = PAID) -> Log:
    """One operation that ran, and was replayed."""
    return Log(
        lease=1.5,
        longest=20.0,
        tries=[
            told("a", identity),
            told("a", identity, 11.0, replayed=True),
            told("a", identity, 20.0, replayed=True, closing=True),
        ],
        executions=[run("a", identity)],
        transitions=[granted(1, "a", identity), ended(2, "a", "completed", identity)],
        answered=[Answered(identity=identity, pid=1, started=9.8, ended=10.6, takes=0.5)],
        rows=[row("completed", identity=identity)],
    )


def row(state: str, name: str = "a", identity: Identity = PAID, **changes: Any) -> Row:
    made = Row(
        identity=identity,
        state=state,
        token=f"token of {name}",
        lapsed=True,
        lapse="release",
        lease=11.0,
    )
    return replace(made, **changes)


def stopped() -> Log:
    """A worker stopped mid-handler, overtaken, and let go on."""
    return replace(
        once(),
        tries=[told("b", ended=13.6), told("b", ended=14.1, replayed=True)],
        executions=[
            run("a", decided=14.0, over=14.0),
            run("b", begun=13.0, attempt=2, pid=2),
        ],
        transitions=[
            granted(1, "a"),
            overtook(2, "b", "a", 12.9),
            ended(3, "b", "completed", at=13.55),
        ],
        windows=[Window(what="worker stopped", started=10.2, ended=13.9, pid=1)],
        rows=[row("completed", "b")],
    )


def failed() -> Log:
    """An attempt that failed and was released, and one that succeeded."""
    return replace(
        once(),
        tries=[told("b", ended=12.6)],
        executions=[run("a", outcome="500"), run("b", begun=12.0, attempt=2)],
        transitions=[
            granted(1, "a"),
            ended(2, "a", "released"),
            granted(3, "b", at=11.9, before="released", token_before="token of a"),
            ended(4, "b", "completed", at=12.55),
        ],
        rows=[row("completed", "b")],
    )


def unrecorded() -> Log:
    """A success that could not be recorded for longer than a lease, and a second one."""
    return replace(
        stopped(),
        tries=[told("a"), told("b", ended=13.6)],
        executions=[run("a"), run("b", begun=13.0, attempt=2, pid=2)],
        windows=[Window(what="PostgreSQL away", started=10.2, ended=12.5)],
        unrecorded=frozenset({"token of a"}),
    )


def killed(identity: Identity) -> Log:
    """A worker killed mid-handler."""
    unknown = {"status": 409, "code": "OUTCOME_UNKNOWN", "execution": None, "echoed": None}
    return replace(
        once(identity),
        tries=[
            told("a", identity, error="reset", status=None, execution=None, echoed=None),
            told("a", identity, 20.0, closing=True, **unknown),
        ],
        executions=[run("a", identity, outcome=None, decided=None, over=None)],
        transitions=[granted(1, "a", identity)],
        windows=[Window(what="worker killed", started=10.2, ended=10.2, pid=1)],
        rows=[row("claimed", identity=identity, lapse="hold")],
    )


def aborted() -> Log:
    """gunicorn ends a worker after its handler has, and before that was recorded."""
    return replace(
        failed(),
        executions=[run("a"), run("b", begun=12.0, attempt=2)],
        windows=[Window(what="worker aborted", started=10.5, ended=10.5, pid=1)],
    )


def undone() -> Log:
    """A claim whose answer was lost, and that was dropped again since nobody ran it."""
    lost = [granted(1, "nobody", at=8.0), ended(2, "nobody", None, at=9.0)]
    return replace(
        once(), transitions=[*lost, granted(3, "a"), ended(4, "a", "completed", at=10.55)]
    )


def held_unrun(*windows: Window) -> Log:
    """A claim that is held though no handler began under it."""
    lost = [granted(1, "nobody", HELD, at=8.0), ended(2, "nobody", "held", HELD, at=9.0)]
    return replace(
        killed(HELD), executions=[], transitions=lost, windows=list(windows),
        rows=[row("held", identity=HELD, lapse="hold")],
    )  # fmt: skip


def joined() -> Log:
    """One operation in transaction mode."""
    return replace(once(JOINED), written=[Written(execution="a", identity=JOINED)])


def undone_with_its_transaction(**changes: Any) -> Log:
    """A run in transaction mode that has left nothing, and one that is committed."""
    lost = run("x", JOINED, begun=8.0, **{"effects": 0, **changes})
    return edited(joined(), executions=lambda found: [lost, *found])


def cut_off() -> Log:
    """A run in transaction mode whose connection was cut, and that goes on all the same."""
    log = undone_with_its_transaction(decided=12.0, over=12.0, outcome="raised")
    return replace(log, windows=[Window(what="database reset", started=8.5, ended=8.5)])


SOUND: dict[str, Callable[[], Log]] = {
    "one run, replayed": once,
    "one run under a policy that holds": lambda: once(HELD),
    "a stopped worker, overtaken": stopped,
    "a failure, released and run again": failed,
    "a success that could not be recorded": unrecorded,
    "a killed worker whose operation is held": lambda: killed(HELD),
    "a worker aborted before its handler's success was recorded": aborted,
    "a claim that was made in vain, and undone": undone,
    "a transaction": joined,
    "a transaction that failed, and another one": lambda: undone_with_its_transaction(
        outcome="500"
    ),
    "a transaction whose worker was killed, and another one": lambda: undone_with_its_transaction(
        outcome=None, decided=None, over=None
    ),
    "a transaction whose commit was lost, and another one": undone_with_its_transaction,
    "a transaction that was cut off, and another one at once": cut_off,
    "a worker aborted between its claim and its handler": lambda: held_unrun(
        Window(what="worker aborted", started=8.5, ended=8.5, pid=1)
    ),
}


@pytest.mark.parametrize("log", SOUND.values(), ids=SOUND)
def test_what_is_right_is_let_pass(log: Callable[[], Log]) -> None:
    assert check(log()) == []


def edited(log: Log, **changes: Callable[[list[Any]], list[Any]]) -> Log:
    """A log with some of its lists changed."""
    return replace(log, **{name: change(getattr(log, name)) for name, change in changes.items()})


def last(**changes: Any) -> Callable[[list[Any]], list[Any]]:
    return lambda found: [*found[:-1], replace(found[-1], **changes)]


def first(**changes: Any) -> Callable[[list[Any]], list[Any]]:
    return lambda found: [replace(found[0], **changes), *found[1:]]


def also(*more: Any) -> Callable[[list[Any]], list[Any]]:
    return lambda found: [*found, *more]


def none(found: list[Any]) -> list[Any]:
    return []


(
    CHANGE_HANDS, SETTLED, CLAIMED, AGAIN, AT_ONCE, CAUSE, TOLD, WRITTEN, ANSWERS, NOBODY, BOUND,
    LEFT,
) = RULE_NAMES  # fmt: skip

#: What is wrong, in which log, and the rule that has to see it.
WRONG: dict[str, tuple[str, Callable[[], Log]]] = {
    "a row taken over before its lease has run out": (
        CHANGE_HANDS,
        lambda: edited(
            stopped(), transitions=lambda found: [found[0], replace(found[1], lease=99), found[2]]
        ),
    ),
    "a completed row given to somebody else": (
        CHANGE_HANDS,
        lambda: edited(
            once(),
            transitions=also(
                granted(3, "b", at=12.0, before="completed", token_before="token of a")
            ),
        ),
    ),
    "a lapse taken over that the policy holds": (
        CHANGE_HANDS,
        lambda: edited(
            killed(HELD), transitions=also(overtook(2, "b", "a", 14.0, HELD)), rows=none
        ),
    ),
    "a stored response replaced by another one": (
        CHANGE_HANDS,
        lambda: edited(
            once(),
            transitions=also(
                replace(ended(3, "a", "completed"), before="completed", response="another")
            ),
        ),
    ),
    "a held row dropped by nobody": (
        CHANGE_HANDS,
        lambda: edited(
            killed(HELD),
            transitions=also(
                ended(2, "a", "held", HELD),
                replace(ended(3, "a", None, HELD), before="held"),
            ),
        ),
    ),
    "a change that does not follow upon the one before": (
        CHANGE_HANDS,
        lambda: edited(once(), transitions=last(token_before="another token")),
    ),
    "a released row claimed by its own token": (
        CHANGE_HANDS,
        lambda: edited(
            failed(),
            transitions=lambda found: [*found[:2], replace(found[2], token="token of a")],
        ),
    ),
    "a completion by somebody who has lost the claim": (
        SETTLED,
        lambda: edited(stopped(), transitions=last(execution="a")),
    ),
    "a completion while the holder is still running": (
        SETTLED,
        lambda: edited(stopped(), transitions=last(at=13.2)),
    ),
    "a success that was released": (
        SETTLED,
        lambda: edited(failed(), executions=first(outcome="201")),
    ),
    "a failure that was stored by a policy that releases it": (
        SETTLED,
        lambda: edited(once(), executions=first(outcome="500")),
    ),
    "a completion of a claim that nothing ran under": (
        SETTLED,
        lambda: edited(once(), executions=first(token=None)),
    ),
    "an operation that is held and never ran": (SETTLED, held_unrun),
    "a run without a claim": (CLAIMED, lambda: edited(once(), executions=also(run("x")))),
    "an unprotected run": (
        CLAIMED,
        lambda: edited(once(), executions=also(run("x", token=None))),
    ),
    "a run that began before its claim": (
        CLAIMED,
        lambda: edited(once(), executions=first(begun=9.0)),
    ),
    "two runs under one claim": (
        CLAIMED,
        lambda: edited(once(), executions=also(run("x", begun=11.0, token="token of a"))),
    ),
    "a run after a success": (
        AGAIN,
        lambda: edited(once(), executions=also(run("x", begun=12.0))),
    ),
    "a run after what may have happened, where that is held": (
        AGAIN,
        lambda: edited(killed(HELD), executions=also(run("x", HELD, begun=15.0))),
    ),
    "two runs at once without a lapse": (
        AT_ONCE,
        lambda: edited(failed(), executions=first(over=12.2)),
    ),
    "a lease that ran out although nothing was broken": (
        CAUSE,
        lambda: edited(stopped(), windows=none),
    ),
    "a lease that ran out while another worker stood still": (
        CAUSE,
        lambda: edited(stopped(), windows=first(pid=7)),
    ),
    "a lease that ran out after a deployment": (
        CAUSE,
        lambda: edited(stopped(), windows=first(what="server reloaded", pid=None)),
    ),
    "a held lapse although nothing was broken": (
        CAUSE,
        lambda: edited(killed(HELD), windows=none),
    ),
    "a success that left no row in the ledger": (
        TOLD,
        lambda: edited(once(), executions=first(effects=0)),
    ),
    "a success that left two": (TOLD, lambda: edited(once(), executions=first(effects=2))),
    "a success that the ledger doesn't know": (TOLD, lambda: edited(once(), executions=none)),
    "a success that was never recorded": (
        TOLD,
        lambda: edited(once(), transitions=lambda found: found[:1]),
    ),
    "a success of no run": (TOLD, lambda: edited(once(), tries=first(execution=None))),
    "a second success that has no excuse": (
        TOLD,
        lambda: replace(unrecorded(), unrecorded=frozenset({"another token"})),
    ),
    "a row in the ledger that nobody was told of": (
        TOLD,
        lambda: edited(
            once(),
            executions=lambda found: [run("x", begun=9.0, token="token of x"), *found],
        ),
    ),
    "two rows in the ledger where lapses are held": (
        TOLD,
        lambda: edited(once(HELD), executions=also(run("x", HELD, begun=12.0))),
    ),
    "a transaction that is recorded and wrote nothing": (
        WRITTEN,
        lambda: edited(joined(), written=none),
    ),
    "a transaction that wrote and is not recorded": (WRITTEN, lambda: edited(joined(), rows=none)),
    "a transaction that wrote twice": (
        WRITTEN,
        lambda: edited(joined(), written=also(Written(execution="a", identity=JOINED))),
    ),
    "a transaction of one run that is recorded of another": (
        WRITTEN,
        lambda: edited(joined(), written=first(execution="x")),
    ),
    "a transaction that failed and has written": (
        WRITTEN,
        lambda: edited(
            undone_with_its_transaction(outcome="500", effects=1),
            written=also(Written(execution="x", identity=JOINED)),
        ),
    ),
    "a success of a transaction that is only said to be unrecorded": (
        TOLD,
        lambda: replace(edited(joined(), transitions=none), unrecorded=frozenset({"token of a"})),
    ),
    "two successes of one transaction": (
        TOLD,
        lambda: edited(
            undone_with_its_transaction(), tries=also(told("x", JOINED), told("a", JOINED, 10.7))
        ),
    ),
    "a transaction that is run again after it was committed": (
        AGAIN,
        lambda: edited(joined(), executions=also(run("x", JOINED, begun=12.0, effects=0))),
    ),
    "an unprotected run in transaction mode": (
        CLAIMED,
        lambda: undone_with_its_transaction(token=None),
    ),
    "two transactions at once though nothing was broken": (
        AT_ONCE,
        lambda: replace(cut_off(), windows=[]),
    ),
    "two transactions at once during a deployment": (
        AT_ONCE,
        lambda: edited(cut_off(), windows=first(what="clients reset")),
    ),
    "a transaction's claim that can be seen": (
        LEFT,
        lambda: edited(joined(), rows=first(state="claimed")),
    ),
    "a replay with another body": (ANSWERS, lambda: edited(once(), tries=last(body="another"))),
    "a replay with another status": (ANSWERS, lambda: edited(once(), tries=last(status=200))),
    "a replay with other headers": (ANSWERS, lambda: edited(once(), tries=last(headers=()))),
    "a first answer that was changed on the way": (
        ANSWERS,
        lambda: edited(once(), tries=first(body="another")),
    ),
    "a replay of what was never recorded": (
        ANSWERS,
        lambda: edited(once(), transitions=lambda found: found[:1]),
    ),
    "a replay of nothing": (ANSWERS, lambda: edited(once(), tries=last(execution=None))),
    "an answer to another scope": (
        NOBODY,
        lambda: edited(once(), tries=last(echoed=(PAID._replace(scope="bob"), "p"))),
    ),
    "an answer to another payload": (
        NOBODY,
        lambda: edited(once(), tries=last(echoed=(PAID, "another"))),
    ),
    "a request that hangs": (
        BOUND,
        lambda: edited(once(), tries=also(told("a", error="timeout", status=None))),
    ),
    "a request that is too long in the middleware": (
        BOUND,
        lambda: edited(once(), answered=first(ended=40.0)),
    ),
    "a request that is too long while another process stood still": (
        BOUND,
        lambda: edited(
            once(),
            answered=first(ended=40.0),
            windows=also(Window(what="stalled", started=10.0, ended=40.0, pid=2)),
        ),
    ),
    "a row left in flight": (LEFT, lambda: edited(once(), rows=first(state="claimed"))),
    "a row still leased": (
        LEFT,
        lambda: edited(killed(HELD), rows=first(lapsed=False)),
    ),
    "an operation that never comes to an answer": (
        LEFT,
        lambda: edited(once(), tries=last(status=409, code="CONFLICT")),
    ),
    "a client that gets no last answer": (
        LEFT,
        lambda: edited(once(), tries=last(status=None, error="reset")),
    ),
    "a lapse that stays closed under a policy that releases it": (
        LEFT,
        lambda: edited(once(), tries=last(status=409, code="OUTCOME_UNKNOWN")),
    ),
    "a row held by a policy that never holds": (
        LEFT,
        lambda: edited(once(), rows=first(state="held")),
    ),
}


@pytest.mark.parametrize(("rule", "log"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_seen(rule: str, log: Callable[[], Log]) -> None:
    assert rule in {violation.rule for violation in check(log())}


def test_a_process_that_did_not_get_to_run_is_not_blamed_for_it() -> None:
    log = edited(
        once(),
        answered=first(ended=40.0),
        windows=also(Window(what="stalled", started=10.0, ended=39.0, pid=1)),
    )
    assert check(log) == []


def test_every_rule_has_been_seen_to_fail() -> None:
    assert {rule for rule, _ in WRONG.values()} == set(RULE_NAMES)


def test_a_violation_names_the_rule_and_the_operation() -> None:
    [violation, *_] = check(edited(once(), executions=first(effects=2)))
    assert str(violation).startswith(f"{TOLD}: alice/store_success/k: ")
