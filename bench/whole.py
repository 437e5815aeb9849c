"""(c) gunicorn, loaded by wrk: the bare application, the wrapped one, and the references."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from servers.http import Connection, Gunicorn
from servers.postgres import PostgresServer
from sqlalchemy import create_engine, text

from bench.measure import Figure, interleaved
from bench.rows import database_with
from wsgi_idempotency.schema import upgrade

CONNECTIONS = 16
REPLAYED = 16  # keys that replays are of
#: In the table beforehand: nobody's statements are planned for an empty one, which the references
#: would go on to read from end to end.
ROWS = 10_000
HERE = Path(__file__).parent
PROCESSES = Path("/proc")
COUNTED = (PROCESSES / "thread-self/children").exists()
ASYNCHRONOUS, IN_MEMORY = "wrapped, asynchronous claim", "wrapped, with records in memory"
#: Of which kind of request a variant has anything to say that another doesn't say.
ONLY = {ASYNCHRONOUS: ("fresh",), IN_MEMORY: ("replay",)}
REFERENCES = {
    "reference: exec_prepared, INSERT-first": "ExecPreparedInsertFirst",
    "reference: execute, look first": "ExecuteBinaryOne",
}

# Every key of a run is its own; the keys of replays were sent before.
_SCRIPT = """
local kind, prefix, count = os.getenv("BENCH_KIND"), os.getenv("BENCH_PREFIX"), 0
wrk.headers["Authorization"] = "Bearer 5f0e3c"
if kind ~= "GET" then
    wrk.method, wrk.body = "POST", '{"amount": 100, "currency": "EUR"}'
    wrk.headers["Content-Type"] = "application/json"
end
request = function()
    if kind == "GET" then return wrk.format(nil, "/payments/1") end
    count = count + 1
    local number = kind == "replay" and count % %REPLAYED% or count
    wrk.headers["Idempotency-Key"] = prefix .. "-" .. number
    return wrk.format(nil, "/payments")
end
""".replace("%REPLAYED%", str(REPLAYED))


def require_wrk() -> None:
    if shutil.which("wrk") is None:
        raise SystemExit(
            "section c needs wrk, which makes requests: apt-get install wrk, or brew install wrk;"
            " or leave it out: --only a,b,d,e,f"
        )


def measure(server: PostgresServer, *, rounds: int, seconds: float) -> list[Figure]:
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory() as folder:
        bench = _Bench(server, Path(folder), rounds=rounds, seconds=seconds)
        for worker_class, threads in (("sync", 1), ("gthread", 4)):
            figures += bench.postgresql(worker_class, threads)
            figures += bench.sqlite(worker_class, threads)
        figures += bench.writing("PostgreSQL", 0.80)
        figures += bench.writing("SQLite", None)
    return figures


class _Bench:
    def __init__(
        self, server: PostgresServer, folder: Path, *, rounds: int, seconds: float
    ) -> None:
        self._server = server
        self._folder = folder
        self._rounds = rounds
        self._seconds = seconds
        self._script = folder / "requests.lua"
        self._script.write_text(_SCRIPT)
        self._wrk = str(shutil.which("wrk"))

    def postgresql(self, worker_class: str, threads: int) -> list[Figure]:
        store = {"BENCH_STORE": database_with(self._server, ROWS)}
        asynchronous = json.dumps({"claim_durability": "asynchronous"})
        variants: dict[str, dict[str, str]] = {
            "bare": {"BENCH_WRAP": "bare"},
            "wrapped": {"BENCH_WRAP": "wrapped", **store},
            ASYNCHRONOUS: {
                "BENCH_WRAP": "wrapped", **store, "BENCH_POLICY": asynchronous,
            },
        }  # fmt: skip
        if worker_class == "sync":
            # What a cache in the process could gain that always had the response.
            variants[IN_MEMORY] = {"BENCH_WRAP": "wrapped", "BENCH_STORE": "memory:"}
            for name, kind in REFERENCES.items():
                # Of its own: the references keep what the product would not find its own.
                variants[name] = {
                    "BENCH_WRAP": kind, "BENCH_STORE": database_with(self._server, ROWS)
                }  # fmt: skip
        floors = {
            "fresh": {"wrapped": 0.40, ASYNCHRONOUS: 0.55},
            "replay": {"wrapped": 0.92},
            "GET": {"wrapped": 0.98},
        }
        found = self._cases(f"PostgreSQL, {worker_class}", worker_class, threads, variants, floors)
        return found + _against_references(found)

    def sqlite(self, worker_class: str, threads: int) -> list[Figure]:
        store = {"BENCH_STORE": self._sqlite()}
        variants = {
            "bare": {"BENCH_WRAP": "bare"},
            "wrapped": {"BENCH_WRAP": "wrapped", **store},
        }
        return self._cases(f"SQLite, {worker_class}", worker_class, threads, variants, {})

    def writing(self, database: str, floor: float | None) -> list[Figure]:
        """An application that itself writes one row and commits. In a transaction that it joins,
        a session of SQLAlchemy's begins a savepoint or does not, as it is told to."""
        url = database_with(self._server, ROWS) if database == "PostgreSQL" else self._sqlite()
        engine = create_engine(url)
        with engine.begin() as connection:
            connection.execute(text("CREATE TABLE charges (amount integer NOT NULL)"))
        engine.dispose()
        shop = {"BENCH_SHOP": url}
        wrapped = {**shop, "BENCH_WRAP": "wrapped", "BENCH_STORE": url}
        joined = {**wrapped, "BENCH_POLICY": json.dumps({"transaction": True})}
        variants = {
            "bare": {**shop, "BENCH_WRAP": "bare"},
            "wrapped, with a lease": wrapped,
            "wrapped, in its transaction": {**joined, "BENCH_JOIN": "conditional_savepoint"},
            "wrapped, in a savepoint of its transaction": {
                **joined, "BENCH_JOIN": "create_savepoint",
            },
        }  # fmt: skip
        floors = {"fresh": {"wrapped, in its transaction": floor}} if floor else {}
        case = f"{database}, sync, the app commits a row"
        return self._cases(case, "sync", 1, variants, floors, kinds=("fresh", "replay"))

    def _sqlite(self) -> str:
        url = f"sqlite:///{self._folder / secrets.token_hex(4)}.db"
        upgrade(url)
        return url

    def _cases(
        self,
        case: str,
        worker_class: str,
        threads: int,
        variants: Mapping[str, Mapping[str, str]],
        floors: Mapping[str, Mapping[str, float]],
        *,
        kinds: tuple[str, ...] = ("fresh", "replay", "GET"),
    ) -> list[Figure]:
        figures: list[Figure] = []
        with ExitStack() as stack:
            served = {
                name: stack.enter_context(self._serve(worker_class, threads, environment))
                for name, environment in variants.items()
            }
            for kind in kinds:
                spent: dict[str, list[_Spent]] = {name: [] for name in served}
                chosen = {
                    name: partial(self._load, gunicorn, kind, spent[name])
                    for name, gunicorn in served.items()
                    if kind in ONLY.get(name, (kind,))
                }
                figures += interleaved(
                    "c",
                    f"{case}, {kind}",
                    chosen,
                    rounds=self._rounds,
                    unit="requests/s",
                    floors=floors.get(kind),
                )
                if case.startswith("PostgreSQL") and COUNTED:
                    figures += _cpu_figures(f"{case}, {kind}", spent)
        return figures

    @contextmanager
    def _serve(
        self, worker_class: str, threads: int, environment: Mapping[str, str]
    ) -> Iterator[Gunicorn]:
        folder = self._folder / secrets.token_hex(4)
        folder.mkdir()
        with Gunicorn(
            "served:app",
            folder,
            worker_class=worker_class,
            workers=4,
            threads=threads,
            environment={**environment, "BENCH_THREADS": str(threads)},
            folders=[HERE],
        ) as gunicorn:
            for _ in range(16):  # every worker connects and prepares
                self._post(gunicorn, secrets.token_hex(8))
            for number in range(REPLAYED):
                self._post(gunicorn, f"replayed-{number}")
            yield gunicorn

    def _post(self, gunicorn: Gunicorn, key: str) -> None:
        headers = {
            "Authorization": "Bearer 5f0e3c",
            "Idempotency-Key": key,
            "Content-Type": "application/json",
            "Connection": "close",
        }
        body = b'{"amount": 100, "currency": "EUR"}'
        with Connection(gunicorn.address) as connection:
            response = connection.request("POST", "/payments", headers.items(), body)
        if response.status != 201:
            raise RuntimeError(f"{response}\n{gunicorn.log_text()}")

    def _load(self, gunicorn: Gunicorn, kind: str, spent: list[_Spent]) -> float:
        prefix = "replayed" if kind == "replay" else secrets.token_hex(8)
        before = _cpu_seconds(gunicorn.pid), _cpu_seconds(self._server.pid)
        done = subprocess.run(
            [self._wrk, "-t1", f"-c{CONNECTIONS}", f"-d{max(1, round(self._seconds))}s",
             "-s", str(self._script), f"{gunicorn.url}/payments"],
            env={"BENCH_KIND": kind, "BENCH_PREFIX": prefix}, capture_output=True, text=True,
            check=True,
        )  # fmt: skip
        found = re.search(r"Requests/sec:\s*([0-9.]+)", done.stdout)
        if found is None or "Non-2xx" in done.stdout:
            raise RuntimeError(f"{done.stdout}{done.stderr}{gunicorn.log_text()[-2000:]}")
        after = _cpu_seconds(gunicorn.pid), _cpu_seconds(self._server.pid)
        count = int(re.findall(r"([0-9]+) requests in", done.stdout)[0])
        workers, server = ((b - a) / count * 1e6 for a, b in zip(before, after, strict=True))
        spent.append(_Spent(workers, server))
        return float(found[1])


@dataclass(frozen=True)
class _Spent:
    """What a request took, in microseconds of CPU.

    :param workers: of gunicorn's processes.
    :param server: of PostgreSQL's.
    """

    workers: float
    server: float


def _cpu_seconds(pid: int) -> float:
    """What a process and its children have used so far (Linux, proc_pid_stat(5)); 0 where that
    can't be told."""
    if not COUNTED:
        return 0.0
    ticks = 0
    for one in (pid, *map(int, (PROCESSES / f"{pid}/task/{pid}/children").read_text().split())):
        with suppress(OSError):  # it has ended
            fields = (PROCESSES / f"{one}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def _cpu_figures(case: str, spent: Mapping[str, list[_Spent]]) -> list[Figure]:
    made = []
    for variant, values in spent.items():
        if values:
            for whose in ("workers", "server"):
                made.append(
                    Figure(
                        section="c", case=f"{case}, CPU of the {whose}", variant=variant,
                        unit="us a request", values=[getattr(one, whose) for one in values],
                    )
                )  # fmt: skip
    return made


def _against_references(figures: list[Figure]) -> list[Figure]:
    """The product's ratio to each reference of the same rounds."""
    made = []
    figures = [figure for figure in figures if figure.ratios]
    for ours in figures:
        for theirs in figures:
            if ours.variant != "wrapped" or theirs.case != ours.case:
                continue
            if theirs.variant not in REFERENCES or ours.case.endswith("GET"):
                continue
            ratios = [a / b for a, b in zip(ours.values, theirs.values, strict=True)]
            made.append(
                Figure(
                    section="c", case=ours.case, variant="wrapped", unit="requests/s",
                    values=ours.values, base=theirs.variant, ratios=ratios, floor=0.95,
                )
            )  # fmt: skip
    return made
