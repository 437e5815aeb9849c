"""A run from the command line; ``--help`` says how."""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

from servers.pgbouncer import MISSING, find_pgbouncer

from chaos.broken import BROKEN
from chaos.report import summary, table
from chaos.run import run
from chaos.schedule import make, outage, stops, transactions

ONLY = {"stops": stops, "outage": outage, "transactions": transactions}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="chaos", description="Break workers, networks and databases, and check every promise."
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="of load and faults")
    parser.add_argument("--seed", type=int, help="the same gives the same schedule")
    parser.add_argument("--rate", type=float, default=5.0, help="operations a second")
    parser.add_argument(
        "--pgbouncer", action="store_true", help="put one in transaction mode before the database"
    )
    parser.add_argument("--broken", choices=BROKEN, help="break this promise of the store's")
    parser.add_argument("--keep", type=Path, help="an empty folder for logs and the journal")
    parser.add_argument(
        "--only", choices=ONLY, help="workers that stand still, one outage, or transactions"
    )
    options = parser.parse_args()

    seed = random.SystemRandom().randrange(10**6) if options.seed is None else options.seed
    pooler = options.pgbouncer and find_pgbouncer() is not None
    if options.pgbouncer and not pooler:
        print(f"going on WITHOUT PgBouncer: {MISSING}", file=sys.stderr)
    if options.only:
        schedule = ONLY[options.only](seed, options.seconds)
    else:
        schedule = make(seed, options.seconds, rate=options.rate, pooler=pooler)
    print(
        f"seed {seed}, {options.seconds:g} s, schedule {schedule.digest()}:"
        f" {len(schedule.operations)} operations, {len(schedule.faults)} faults,"
        f" {'through PgBouncer in transaction mode' if pooler else 'without PgBouncer'},"
        f" {options.broken or 'sound'} build",
        flush=True,
    )
    started = time.monotonic()

    def tell(line: str) -> None:
        print(f"... {line}", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory(prefix="chaos-") as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        result = run(schedule, folder, pooler=pooler, broken=options.broken, tell=tell)
    print(table(result.log))
    print()
    print(summary(result.log, result.violations))
    print(f"seed {seed}, took {time.monotonic() - started:.0f} s")
    return 1 if result.violations else 0


if __name__ == "__main__":
    sys.exit(main())
