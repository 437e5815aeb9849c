"""Everything a run needs, started; what breaks it; and what it has written down."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import psycopg
from servers.http import Address, Gunicorn
from servers.pgbouncer import PREPARES_FROM, PgBouncer
from servers.postgres import PostgresServer, private_postgres
from sqlalchemy.engine import make_url

from chaos.log import Answered, Execution, Identity, Log, Row, Transition, Try, Window, Written
from chaos.proxy import Proxy
from chaos.schedule import LEASE, STORE_TIMEOUT, WAIT, Fault
from wsgi_idempotency.schema import upgrade

#: Two servers behind one load balancer. Enough workers that a stopped one stops nobody else.
SERVERS: dict[str, dict[str, Any]] = {
    "sync": {"worker_class": "sync", "workers": 4, "preload": True},
    "gthread": {"worker_class": "gthread", "workers": 2, "threads": 6},
}

#: Seconds one call of the store's may take: a connection from the pool and one to open (libpq's
#: least is 2 s), twice; the statement; and its cancellation.
CALL = 2 * (STORE_TIMEOUT + max(2.0, STORE_TIMEOUT)) + STORE_TIMEOUT + 1.0

#: Seconds the store and the policy may add to a request: the schema's check in a new process,
#: the wait, the last look before it ends, a take-over, and the completion or the winner.
LONGEST = WAIT + 4 * CALL

LEDGER = """
CREATE TABLE ledger (
    what text NOT NULL, execution text NOT NULL, scope text NOT NULL, policy text NOT NULL,
    key text NOT NULL, payload text NOT NULL, token text, attempt int, pid int NOT NULL,
    at timestamptz NOT NULL DEFAULT clock_timestamp())
"""

# The effects of transaction mode, in the store's database. Nothing but the library keeps a second
# one of an operation out.
CHARGES = """
CREATE TABLE charges (
    execution text NOT NULL, scope text NOT NULL, policy text NOT NULL, key text NOT NULL,
    payload text NOT NULL)
"""

# The trigger runs in the statement's own transaction, under the row's lock: for each key the
# sequence is the order of the commits.
HISTORY = """
CREATE TABLE history (
    seq bigserial PRIMARY KEY, at timestamptz NOT NULL DEFAULT clock_timestamp(),
    now timestamptz NOT NULL DEFAULT now(), scope text, key text, path text,
    before text, token_before bytea, lease timestamptz, lapse text,
    after text, token bytea, headers text, body bytea);
CREATE FUNCTION record() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE whose idempotency_keys;
BEGIN
    whose := CASE WHEN TG_OP = 'DELETE' THEN OLD ELSE NEW END;
    IF TG_OP = 'UPDATE' AND OLD.state = 'claimed' AND NEW.state = 'claimed'
       AND OLD.claim_token = NEW.claim_token THEN
        RETURN NULL;  -- a heartbeat
    END IF;
    INSERT INTO history (scope, key, path, before, token_before, lease, lapse, after, token,
                         headers, body)
    VALUES (whose.scope, whose.idempotency_key, whose.path,
        CASE WHEN TG_OP <> 'INSERT' THEN OLD.state END,
        CASE WHEN TG_OP <> 'INSERT' THEN OLD.claim_token END,
        CASE WHEN TG_OP <> 'INSERT' THEN OLD.lease_until END,
        CASE WHEN TG_OP <> 'INSERT' THEN OLD.lapse END,
        CASE WHEN TG_OP <> 'DELETE' THEN NEW.state END,
        CASE WHEN TG_OP <> 'DELETE' THEN NEW.claim_token END,
        CASE WHEN TG_OP <> 'DELETE' THEN NEW.response_headers END,
        CASE WHEN TG_OP <> 'DELETE' THEN NEW.response_body END);
    RETURN NULL;
END $$;
CREATE TRIGGER record AFTER INSERT OR UPDATE OR DELETE ON idempotency_keys
    FOR EACH ROW EXECUTE FUNCTION record();
"""


class Site:
    """Two application servers on one database, with a proxy in front of each of the three.

    :param folder: an empty one, for what the servers write.
    :param pooler: put a PgBouncer in transaction mode before the database.
    :param broken: which promise the store breaks, as in :mod:`chaos.broken`; None for a sound
        one.
    :param lease: seconds of every claim's lease.
    """

    def __init__(
        self,
        folder: Path,
        *,
        pooler: bool = False,
        broken: str | None = None,
        lease: float = LEASE,
    ) -> None:
        self._stack = ExitStack()
        self._lease = lease
        self._windows: list[Window] = []
        self._tries: list[Try] = []
        self._over = threading.Event()
        self._journal = folder / "journal"
        self._journal.touch()
        self._read = 0  # how far the journal was read
        self._begun: dict[str, dict[str, Any]] = {}
        try:
            self._start(folder, pooler, broken)
        except BaseException:
            self._stack.close()
            raise

    def _start(self, folder: Path, pooler: bool, broken: str | None) -> None:
        self.postgres = self._server()
        self._ledger_server = self._server()
        url = self.postgres.create_database()
        self._database = make_url(url).database
        upgrade(url)
        with self._connect() as connection:
            connection.execute(HISTORY)
            connection.execute(CHARGES)
        with self._ledger_server.connect() as connection:
            connection.execute(LEDGER)
        upstream = ("127.0.0.1", self.postgres.port)
        prepare = True
        if pooler:
            self.pooler = self._stack.enter_context(PgBouncer(upstream))
            upstream = self.pooler.address
            prepare = self.pooler.version >= PREPARES_FROM
        self._to_database = self._stack.enter_context(Proxy(upstream))
        store = make_url(url).set(port=self._to_database.address[1])
        environment = {
            "STORE": store.render_as_string(hide_password=False),
            "LEDGER": f"host=127.0.0.1 port={self._ledger_server.port} user=postgres",
            "JOURNAL": str(self._journal),
            "PREPARE": "yes" if prepare else "no",
            "BROKEN": broken or "",
            "LEASE": str(self._lease),
        }
        self._servers: list[Gunicorn] = []
        self._to_servers: list[Proxy] = []
        for name, options in SERVERS.items():
            place = folder / name
            place.mkdir()
            server = Gunicorn(
                "chaos.app:app",
                place,
                environment=environment,
                arguments=["--keep-alive", "0", "--graceful-timeout", "10"],
                **options,
            )
            self._stack.enter_context(server)
            self._servers.append(server)
            self._to_servers.append(self._stack.enter_context(Proxy(server.address)))
        probe = threading.Thread(target=self._probe, args=(store.set(drivername="postgresql"),))
        probe.start()
        self._stack.callback(probe.join)
        self._stack.callback(self._over.set)

    def _server(self) -> PostgresServer:
        server = private_postgres()
        self._stack.callback(server.close)
        return server

    def _connect(self) -> psycopg.Connection[Any]:
        return self.postgres.connect(self._database)

    @property
    def addresses(self) -> list[Address]:
        """Where clients turn to."""
        return [proxy.address for proxy in self._to_servers]

    def record(self, made: Try) -> None:
        self._tries.append(made)

    def __enter__(self) -> Site:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    # ------------------------------------------------------------------ what breaks

    def strike(self, fault: Fault) -> None:
        """Break something, for as long as the fault says, and mend it."""
        started, pid = time.time(), None
        if fault.kind.startswith("worker"):
            pid = self._strike_worker(fault)
        elif fault.kind == "server reloaded":
            server = self._servers[int(fault.pick * len(self._servers))]
            os.kill(server.pid, signal.SIGHUP)
        elif fault.kind == "clients reset":
            for proxy in self._to_servers:
                proxy.reset()
        elif fault.kind == "database reset":
            self._to_database.reset()
        elif fault.kind == "database frozen":
            self._to_database.freeze()
            time.sleep(fault.lasts)
            self._to_database.thaw()
        elif fault.kind == "PgBouncer killed":
            self.pooler.kill()
            self.pooler.start()
        else:
            self.postgres.stop("immediate")
            if fault.kind == "PostgreSQL away":
                time.sleep(fault.lasts)
            self.postgres.start()
        self._windows.append(Window(what=fault.kind, started=started, ended=time.time(), pid=pid))

    def _strike_worker(self, fault: Fault) -> int:
        workers = [pid for server in self._servers for pid in children(server.pid)]
        # One that is running a handler, if any is: the others have nothing to lose.
        busy = {line["pid"] for line in self._running()}
        workers = [pid for pid in workers if pid in busy] or workers
        pid = workers[int(fault.pick * len(workers))]
        with suppress(ProcessLookupError):  # it has just ended by itself
            if fault.kind == "worker killed":
                os.kill(pid, signal.SIGKILL)
            elif fault.kind == "worker aborted":
                os.kill(pid, signal.SIGABRT)
            else:
                os.kill(pid, signal.SIGSTOP)
                time.sleep(fault.lasts)
                os.kill(pid, signal.SIGCONT)
        return pid

    def _running(self) -> list[dict[str, Any]]:
        """The runs of the handler that have begun and are not over, by the journal."""
        with self._journal.open() as file:
            file.seek(self._read)
            for text in iter(file.readline, ""):
                line = json.loads(text)
                if line["what"] == "begun":
                    self._begun[line["execution"]] = line
                elif line["what"] == "over":
                    self._begun.pop(line["execution"], None)
            self._read = file.tell()
        return list(self._begun.values())

    def _probe(self, url: Any) -> None:
        """Ask the database again and again, by the same way as the store, and write down when
        it does not answer: the machine may be slow without our doing."""
        conninfo = url.render_as_string(hide_password=False)
        connection = None
        while not self._over.wait(0.1):
            started, answered = time.time(), False
            with suppress(psycopg.Error):
                if connection is None or connection.closed:
                    connection = psycopg.connect(conninfo, autocommit=True, connect_timeout=2)
                    connection.prepare_threshold = None
                connection.execute("SELECT 1")
                answered = True
            if not answered or time.time() - started > 0.3:
                self._windows.append(Window(what="slow", started=started, ended=time.time()))
        if connection is not None:
            connection.close()

    # ------------------------------------------------------------------ what was written

    def in_flight(self) -> bool:
        """Whether a lease is still running."""
        with self._connect() as connection:
            row = connection.execute(
                "SELECT FROM idempotency_keys WHERE state = 'claimed' AND lease_until > now()"
            ).fetchone()
        return row is not None

    def stop(self) -> None:
        """Stop the servers gracefully: what they have to finish, they finish."""
        for server in self._servers:
            server.stop()

    def log(self) -> Log:
        """Everything that was recorded."""
        journal = self._read_journal()
        written = list(self._written())
        stalls = [
            Window(what="stalled", started=line["started"], ended=line["at"], pid=line["pid"])
            for line in journal["stalled"]
        ]
        return Log(
            lease=self._lease,
            longest=LONGEST,
            tries=list(self._tries),
            executions=list(self._executions(journal, Counter(one.execution for one in written))),
            transitions=list(self._transitions()),
            windows=self._windows + stalls,
            answered=[
                Answered(
                    identity=Identity(line["scope"], line["policy"], line["key"]),
                    pid=line["pid"],
                    started=line["started"],
                    ended=line["at"],
                    takes=line["takes"],
                )
                for line in journal["answered"]
            ],
            unrecorded=frozenset(
                line["token"]
                for line in journal["event"]
                if line["name"] == "store_failure" and line["token"] is not None
            ),
            rows=list(self._rows()),
            written=written,
        )

    def _read_journal(self) -> dict[str, list[dict[str, Any]]]:
        lines = defaultdict(list)
        for text in self._journal.read_text().splitlines():
            line = json.loads(text)
            lines[line["what"]].append(line)
        return lines

    def _executions(
        self, journal: dict[str, list[dict[str, Any]]], written: Counter[str]
    ) -> Iterator[Execution]:
        # Of two, the later one counts: gunicorn may end a worker after the first.
        decided = {line["execution"]: line for line in journal["decided"]}
        over = {line["execution"]: line["at"] for line in journal["over"]}
        with self._ledger_server.connect() as connection:
            rows = connection.execute(
                "SELECT execution, scope, policy, key, payload, token, attempt, pid,"
                " extract(epoch FROM min(at) FILTER (WHERE what = 'begun'))::float8,"
                " count(*) FILTER (WHERE what = 'effect')"
                " FROM ledger GROUP BY 1, 2, 3, 4, 5, 6, 7, 8"
            ).fetchall()
        for name, scope, policy, key, payload, token, attempt, pid, begun, effects in rows:
            end = decided.get(name, {})
            yield Execution(
                name=name,
                identity=Identity(scope, policy, key),
                payload=payload,
                token=token,
                attempt=attempt,
                pid=pid,
                begun=begun,
                effects=effects + written[name],
                outcome=end.get("outcome"),
                body=end.get("body"),
                decided=end.get("at"),
                over=over.get(name),
            )

    def _transitions(self) -> Iterator[Transition]:
        with self._connect() as connection:
            rows = connection.execute(
                "SELECT seq, scope, path, key, extract(epoch FROM now)::float8,"
                " extract(epoch FROM at)::float8, before, token_before,"
                " extract(epoch FROM lease)::float8, lapse, after, token, headers, body"
                " FROM history ORDER BY seq"
            ).fetchall()
        for (
            seq, scope, path, key, now, at, before, token_before, lease, lapse, after, token,
            headers, body,
        ) in rows:  # fmt: skip
            yield Transition(
                seq=seq,
                identity=Identity(scope, path.strip("/"), key),
                now=now,
                at=at,
                before=before,
                token_before=token_before and token_before.hex(),
                lease=lease,
                lapse=lapse,
                after=after,
                token=token and token.hex(),
                response=None if body is None else hashlib.sha256(body).hexdigest(),
                execution=_execution_in(headers),
            )

    def _written(self) -> Iterator[Written]:
        with self._connect() as connection:
            rows = connection.execute("SELECT execution, scope, policy, key FROM charges")
            for execution, *identity in rows.fetchall():
                yield Written(execution=execution, identity=Identity(*identity))

    def _rows(self) -> Iterator[Row]:
        with self._connect() as connection:
            rows = connection.execute(
                "SELECT scope, path, idempotency_key, state, claim_token, lease_until <= now(),"
                " lapse, extract(epoch FROM lease_until)::float8 FROM idempotency_keys"
            ).fetchall()
        for scope, path, key, state, token, lapsed, lapse, lease in rows:
            yield Row(
                identity=Identity(scope, path.strip("/"), key),
                state=state,
                token=token.hex(),
                lapsed=lapsed,
                lapse=lapse,
                lease=lease,
            )


def _execution_in(headers: str | None) -> str | None:
    """Which run of the handler stored header fields are of."""
    for name, value in json.loads(headers or "[]"):
        if name.lower() == "location":
            return str(value).rpartition("/")[2]
    return None


def children(pid: int) -> list[int]:
    """The process ids of a process's children that still run, in order."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has just ended
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            if int(parent) == pid and state != "Z":
                found.append(int(stat.parent.name))
    return sorted(found)
