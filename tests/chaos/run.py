"""One run: the load and the faults of a schedule, the calm after it, and what came of it all."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from chaos.checker import PASSING, Violation, check
from chaos.clients import Client, send
from chaos.log import Log, Try
from chaos.schedule import (
    DATABASES,
    LEASE,
    NETWORKS,
    POOLERS,
    WORKERS,
    Fault,
    Operation,
    Schedule,
)
from chaos.site import Site

#: Clients at once. Each is a thread that mostly waits.
CLIENTS = 96

#: Seconds from the last fault until every operation has come to its end.
CALM = 60.0


@dataclass(frozen=True)
class Result:
    schedule: Schedule
    log: Log
    violations: list[Violation]


def run(
    schedule: Schedule,
    folder: Path,
    *,
    pooler: bool = False,
    broken: str | None = None,
    lease: float = LEASE,
    tell: Callable[[str], object] = lambda _: None,
) -> Result:
    """Carry out a schedule on servers of its own.

    :param folder: an empty one, for what the servers write.
    :param pooler: put a PgBouncer before the database.
    :param broken: which promise the store breaks; None for a sound one.
    :param lease: seconds of every claim's lease.
    :param tell: called with a line from time to time.
    """
    with Site(folder, pooler=pooler, broken=broken, lease=lease) as site:
        _storm(schedule, site, tell)
        _close(schedule, site)
        site.stop()
        log = site.log()
    return Result(schedule, log, check(log))


def _storm(schedule: Schedule, site: Site, tell: Callable[[str], object]) -> None:
    start, working = time.monotonic(), list[Future[None]]()
    with ThreadPoolExecutor(CLIENTS) as clients, ThreadPoolExecutor(4) as injectors:
        for group in (WORKERS, NETWORKS, DATABASES, POOLERS):
            due = [fault for fault in schedule.faults if fault.kind in group]
            working.append(injectors.submit(_in_time, start, due, site.strike))
        taps = [
            (operation.at + tap.after, Client(operation, tap, site.addresses, site.record))
            for operation in schedule.operations
            for tap in operation.taps
        ]
        told = 0.0
        for at, client in sorted(taps, key=lambda due: due[0]):
            _sleep_until(start + at)
            if at - told >= 30:
                told = at
                tell(f"{at:.0f} s")
            working.append(clients.submit(client.run))
    for done in working:
        done.result()


def _in_time(start: float, due: Iterable[Fault], strike: Callable[[Fault], object]) -> None:
    for fault in due:
        _sleep_until(start + fault.at)
        strike(fault)


def _sleep_until(moment: float) -> None:
    time.sleep(max(0.0, moment - time.monotonic()))


def _close(schedule: Schedule, site: Site) -> None:
    """Ask once more for each operation, until there is an answer that is final, and wait for
    the last lease to be over."""
    deadline = time.monotonic() + CALM

    def ask(operation: Operation) -> None:
        made = None
        while made is None or _open(made):
            if made is not None:
                if time.monotonic() > deadline:
                    return
                time.sleep(0.3)
            address = site.addresses[operation.taps[0].seed % len(site.addresses)]
            made, _ = send(address, operation.identity, operation.body(), closing=True)
            site.record(made)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, schedule.operations))
    while site.in_flight() and time.monotonic() < deadline:
        time.sleep(0.1)


def _open(made: Try) -> bool:
    return (
        made.status is None
        or made.code in PASSING
        or (made.code is None and made.status >= 500 and not made.replayed)
    )
