"""(b) The store alone, against pgbench with the very same statements on the same server."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from servers.postgres import PostgresServer
from sqlalchemy.engine import make_url

from bench.measure import Figure, interleaved
from bench.operations import fresh, per_second, replay
from bench.rows import database_with
from wsgi_idempotency import SQLStore
from wsgi_idempotency.stores.sql import _PG_CLAIM, _PG_COMPLETE

ROWS = 10_000

# The values of a statement as SQL of one number of pgbench's; SHA-256 costs the server less
# than a microsecond.
_VALUES = {
    "digest": "sha256(int8send(:number))",
    "token": "substr(sha256(int8send(:number)), 1, 16)",
    "fingerprint": "sha256(int8send(:number))",
    "fingerprint_version": "1",
    "lease": "60.0::float8",
    "retention": "86400.0::float8",
    "lapse": "'release'::text",
    "scope": "'everyone'::text",
    "key": "'k'::text",
    "method": "'POST'::text",
    "path": "'/payments'::text",
    "status": "'201 Created'",
    "headers": '\'[["Content-Type","application/json"],["Location","/payments/1"]]\'',
    "body": "convert_to(repeat('x', 100), 'UTF8')",
    "reason": "NULL",
}


def measure(server: PostgresServer, *, rounds: int, seconds: float) -> list[Figure]:
    url = database_with(server, ROWS)
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory() as folder:
        new = _script(Path(folder, "fresh.sql"), "1000000, 9000000000000", _PG_CLAIM, _PG_COMPLETE)
        done = _script(Path(folder, "replay.sql"), f"1, {ROWS}", _PG_CLAIM)
        for threads in (1, 4, 8, 16):
            store = SQLStore(url, pool_size=threads)
            for case, script, operate in (
                ("claim + complete", new, fresh(store)),
                ("replay", done, replay(store, ROWS)),
            ):
                figures += interleaved(
                    "b",
                    f"{case}, {threads} thread{'s' * (threads > 1)}",
                    {
                        "pgbench": partial(_pgbench, url, script, threads, seconds),
                        "SQLStore": partial(per_second, operate, threads=threads, seconds=seconds),
                    },
                    rounds=rounds,
                    unit="a second",
                )
            store.close()
    store = SQLStore(url, pool_size=1)
    for case, operate in (("claim + complete", fresh(store)), ("replay", replay(store, ROWS))):
        figures += _where_time_goes(case, operate)
    store.close()
    return figures


def _where_time_goes(case: str, operate: object) -> list[Figure]:
    """The client's own work, and what is left: waiting for the server."""
    assert callable(operate)
    operate()
    cpu, wall, times = time.thread_time(), time.perf_counter(), 500
    for _ in range(times):
        operate()
    cpu, wall = time.thread_time() - cpu, time.perf_counter() - wall
    figures = [
        Figure(section="b", case=f"{case}, 1 thread", variant=what, unit="us", values=[value])
        for what, value in (
            ("CPU of the client", cpu / times * 1e6),
            ("waiting for the server", (wall - cpu) / times * 1e6),
        )
    ]
    for figure in figures:
        print(figure, file=sys.stderr)
    return figures


def _script(path: Path, numbers: str, *statements: str) -> Path:
    made = [f"\\set number random({numbers})"]
    for statement in statements:
        text = re.sub(r"%\((\w+)\)s", lambda found: _VALUES[found[1]], statement)
        made.append(" ".join(text.split()) + ";")
    path.write_text("\n".join(made) + "\n")
    return path


def _pgbench(url: str, script: Path, threads: int, seconds: float) -> float:
    program = shutil.which("pgbench")
    if program is None:
        raise SystemExit("pgbench is not here: apt-get install postgresql-client")
    conninfo = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    done = subprocess.run(
        [program, "-M", "prepared", "-n", "-f", script, "-c", str(threads),
         "-j", str(min(threads, 2)), "-T", str(max(1, round(seconds))), conninfo],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    found = re.search(r"tps = ([0-9.]+)", done.stdout)
    if done.returncode or found is None:
        raise RuntimeError(f"pgbench failed: {done.stdout}{done.stderr}")
    return float(found[1])
