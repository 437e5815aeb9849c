"""What a run is summed up as, for people."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator

from chaos.checker import Violation
from chaos.log import Execution, Identity, Log, Try, Window
from chaos.schedule import FAULTS, POLICIES

UNHURT = "none"


def table(log: Log) -> str:
    """Faults by policies: the operations that a fault has met, and what became of them.

    A fault of a worker meets what runs in it at that moment, any other fault all that is under
    way. An operation that several faults have met counts in each of their rows.
    """
    hurt = _hurt(log)
    runs: dict[Identity, list[Execution]] = defaultdict(list)
    for execution in log.executions:
        runs[execution.identity].append(execution)
    last: dict[Identity, Try] = {}
    for made in sorted(log.tries, key=lambda made: made.ended):
        last[made.identity] = made
    lines = [("fault", "policy", "operations", "executions", "ledger rows", "client saw at last")]
    for fault in (UNHURT, *FAULTS):
        for policy in POLICIES:
            met = sorted(one for one in hurt.get(fault, ()) if one.policy == policy)
            if met:
                executions = [run for one in met for run in runs[one]]
                saw = Counter(answer(last[one]) for one in met)
                lines.append(
                    (
                        fault,
                        policy,
                        str(len(met)),
                        str(len(executions)),
                        str(sum(run.effects for run in executions)),
                        ", ".join(f"{count}x {what}" for what, count in saw.most_common()),
                    )
                )
    return _aligned(lines)


def answer(made: Try) -> str:
    """An answer in two words."""
    if made.status is None:
        return str(made.error)
    return f"{made.status} {made.code}" if made.code else str(made.status)


def _hurt(log: Log) -> dict[str, set[Identity]]:
    under_way: dict[Identity, list[Try]] = defaultdict(list)
    for made in log.tries:
        if not made.closing:
            under_way[made.identity].append(made)
    hurt: dict[str, set[Identity]] = defaultdict(set)
    for window in log.windows:
        if window.what in FAULTS:
            hurt[window.what].update(_met(window, log.executions, under_way))
    hurt[UNHURT] = set(under_way).difference(*hurt.values())
    return hurt


def _met(
    window: Window, executions: Iterable[Execution], tries: dict[Identity, list[Try]]
) -> Iterator[Identity]:
    if window.pid is None:
        for identity, of_one in tries.items():
            if any(window.meets(made.started, made.ended) for made in of_one):
                yield identity
    for run in executions:
        end = window.started if run.over is None else run.over
        if window.pid == run.pid and window.meets(run.begun, end):
            yield run.identity


def summary(log: Log, violations: Iterable[Violation]) -> str:
    """The figures of a run, and every violation."""
    tries = Counter(f"{answer(made)}{' replayed' if made.replayed else ''}" for made in log.tries)
    faults = Counter(window.what for window in log.windows if window.what in FAULTS)
    lapses = sum(change.takes_over_a_lapsed for change in log.transitions)
    late = late_completions(log)
    slowest = max((one.ended - one.started - one.takes for one in log.answered), default=0.0)
    violations = list(violations)
    identities = {made.identity for made in log.tries}
    lines = [
        f"{len(identities)} operations, {len(log.tries)} requests, {len(log.executions)}"
        f" executions, {sum(run.effects for run in log.executions)} ledger rows,"
        f" {sum(faults.values())} faults",
        "faults: " + ", ".join(f"{count}x {what}" for what, count in faults.most_common()),
        "answers: " + ", ".join(f"{count}x {what}" for what, count in tries.most_common()),
        f"{lapses} lapsed claims taken over; {len(log.unrecorded)} ends that could not be"
        f" recorded at once, {late} of them completed later; slowest request"
        f" {slowest:.1f} s beside its handler",
        f"{len(violations)} violations",
        *map(str, violations),
    ]
    return "\n".join(lines)


def late_completions(log: Log) -> int:
    """How many operations were completed after their answer had been given without that."""
    completed = {change.token for change in log.transitions if change.after == "completed"}
    return len(log.unrecorded & completed)


def _aligned(lines: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines
    )
