"""The ``wsgi-idempotency`` command: what it does, says, and exits with."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from psycopg import sql
from servers.postgres import ORIGIN_VARIABLE, Postgres, PostgresServer, database_of
from sqlalchemy import delete, update
from sqlalchemy.engine import make_url
from table import add_rows, count_rows

from wsgi_idempotency import checkup
from wsgi_idempotency.checkup import (
    Finding,
    PostgreSQLServer,
    PostgreSQLTable,
    SQLiteFile,
    Verdict,
)
from wsgi_idempotency.cli import main
from wsgi_idempotency.schema import connect, upgrade
from wsgi_idempotency.stores import tables
from wsgi_idempotency.stores.sql import database_url

COMMAND = Path(sys.executable).with_name("wsgi-idempotency")

#: Where nobody listens. 1 is tcpmux's.
NOBODY = "postgresql://shop:s3cret@127.0.0.1:1/shop"

OLD = 2 * checkup.PURGE_TOLERANCE

HEAD = tables.SCHEMA_REVISION


@pytest.fixture(params=["pg_url", "sqlite_url"], ids=["on PostgreSQL", "on SQLite"])
def empty(request: pytest.FixtureRequest) -> str:
    """The URL of a database with nothing in it."""
    url: str = request.getfixturevalue(request.param)
    return url


@pytest.fixture
def database(empty: str) -> str:
    """The URL of a database with our schema and no row."""
    upgrade(empty)
    return empty


@pytest.fixture(scope="module")
def sound_server(postgres: Postgres) -> Iterator[PostgresServer]:
    """A server set up as in production, for the tests to spoil."""
    server = PostgresServer(origin=os.environ.get(ORIGIN_VARIABLE) or None, durable=True)
    yield server
    server.close()


@pytest.fixture
def sound(on_postgresql: None, sound_server: PostgresServer) -> Iterator[str]:
    """The URL of a database of that server, with our schema."""
    url = sound_server.create_database()
    upgrade(url)
    yield url
    sound_server.drop_database(url)


def invoke(*arguments: str, **environ: str) -> Result:
    """Call the command in this process."""
    return CliRunner(env={"WSGI_IDEMPOTENCY_DATABASE": None, **environ}).invoke(main, arguments)


def run(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run the command as a person does."""
    clean = {k: v for k, v in os.environ.items() if k != "WSGI_IDEMPOTENCY_DATABASE"}
    return subprocess.run(
        [COMMAND, *arguments],
        env=clean | environ,
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )


def findings(url: str) -> dict[str, Finding]:
    """What a check of a database finds, by name."""
    return {finding.check: finding for finding in checkup.check_database(database_url(url))}


def set_revision(url: str, revision: str | None) -> None:
    with connect(url) as connection, connection.begin():
        if revision is None:
            connection.execute(delete(tables.version_table))
        else:
            connection.execute(update(tables.version_table).values(version_num=revision))


def drop_keys(url: str) -> None:
    with connect(url) as connection, connection.begin():
        tables.idempotency_steps.drop(connection)  # it refers to them
        tables.idempotency_keys.drop(connection)


# ---------------------------------------------------------------------- the command as such


def test_help_says_what_there_is_and_what_it_exits_with() -> None:
    done = run("--help")
    assert done.returncode == 0
    for word in (
        "upgrade",
        "check",
        "purge",
        "stats",
        "list",
        "show",
        "resolve",
        "reconcile",
        "demo",
        "Exit status: 0 when all is well, 1 when",
    ):
        assert word in done.stdout


def test_version_is_that_of_the_installed_package() -> None:
    done = run("--version")
    assert done.stdout == f"wsgi-idempotency, version {version('wsgi-idempotency')}\n"


def test_help_loads_nothing_heavy() -> None:
    program = """
import sys
from wsgi_idempotency.cli import main
main(["--help"], standalone_mode=False)
print(*sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-I", "-c", program], capture_output=True, text=True, check=True
    )
    assert {"sqlalchemy", "alembic", "psycopg", "flask", "gunicorn"}.isdisjoint(done.stdout.split())
    assert "click" in done.stdout.split()


def run_without(packages: set[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command where some packages are not installed."""
    program = f"""
import sys
from importlib.machinery import PathFinder

class Without:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] not in {packages!r}:
            return PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Without
from wsgi_idempotency.cli import main
main(prog_name="wsgi-idempotency")
"""
    return subprocess.run(
        [sys.executable, "-I", "-c", program, *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_demo_without_its_extra_says_what_to_install() -> None:
    done = run_without({"flask", "gunicorn"}, "demo")
    assert done.returncode == 1
    assert "pip install 'wsgi-idempotency[demo]'" in done.stderr
    assert "Traceback" not in done.stderr
    assert run_without({"flask", "gunicorn"}, "--help").returncode == 0


def test_postgresql_without_its_driver_says_what_to_install() -> None:
    done = run_without({"psycopg"}, "upgrade", "--database", "postgresql://localhost/shop")
    assert done.returncode == 2
    assert "pip install 'wsgi-idempotency[postgresql]'" in done.stderr


def test_the_demo_is_loaded_when_it_is_called() -> None:
    done = invoke("demo", "--help")
    assert done.exit_code == 0
    assert "--once" in done.output


@pytest.mark.parametrize("command", ["upgrade", "check", "purge", "list"])
class TestEveryCommandWithADatabase:
    """What ``upgrade``, ``check``, ``purge`` and ``list`` have in common."""

    def test_says_how_to_name_one(self, command: str) -> None:
        done = invoke(command)
        assert done.exit_code == 2
        assert "Give --database URL or set WSGI_IDEMPOTENCY_DATABASE" in done.stderr

    def test_takes_it_from_the_environment(self, command: str, sqlite_url: str) -> None:
        upgrade(sqlite_url)
        done = run(command, WSGI_IDEMPOTENCY_DATABASE=sqlite_url)
        assert (done.returncode, done.stderr) == (0, "")

    @pytest.mark.parametrize(
        ("url", "said"),
        [
            ("shop.db", "the database is not a URL"),
            ("mysql://root:s3cret@localhost/shop", "mysql is not supported"),
            ("sqlite://", "in-memory SQLite database"),
            ("", "the database is not a URL"),
        ],
        ids=["a path", "another database", "memory", "nothing"],
    )
    def test_refuses_what_it_is_not_for(self, command: str, url: str, said: str) -> None:
        done = invoke(command, "--database", url)
        assert done.exit_code == 2
        assert said in done.stderr
        assert "s3cret" not in done.output

    def test_says_that_nobody_listens_and_hides_the_password(self, command: str) -> None:
        done = run(command, "--database", NOBODY)
        assert done.returncode == 1
        said = done.stdout + done.stderr
        assert "Connection refused" in said
        assert "s3cret" not in said
        assert "Traceback" not in said

    def test_says_that_a_file_is_not_a_database(self, command: str, tmp_path: Path) -> None:
        (tmp_path / "notes.db").write_text("Buy milk. " * 1000)
        done = run(command, "--database", f"sqlite:///{tmp_path / 'notes.db'}")
        assert done.returncode == 1
        assert "file is not a database" in done.stdout + done.stderr
        assert "Traceback" not in done.stderr


# ---------------------------------------------------------------------- upgrade


def test_upgrade_says_what_it_did(empty: str) -> None:
    name = make_url(empty).render_as_string(hide_password=True)
    first, second = invoke("upgrade", "--database", empty), run("upgrade", "--database", empty)
    assert (first.exit_code, first.output) == (0, f"{name}: upgraded from nothing to {HEAD}\n")
    assert (second.returncode, second.stdout) == (0, f"{name}: at {HEAD}: nothing to do\n")


def test_upgrade_twice_at_once_makes_one_schema(empty: str) -> None:
    two = [
        subprocess.Popen(
            [COMMAND, "upgrade", "--database", empty], stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    said = [process.communicate()[0] for process in two]
    assert [process.returncode for process in two] == [0, 0]
    assert sorted(line.partition(": ")[2] for line in said) == [
        f"at {HEAD}: nothing to do\n",
        f"upgraded from nothing to {HEAD}\n",
    ]


def test_upgrade_leaves_a_newer_schema_alone(database: str) -> None:
    set_revision(database, "9999")
    done = invoke("upgrade", "--database", database)
    assert done.exit_code == 0
    assert "at 9999, which is newer than this release: nothing to do" in done.output


def test_upgrade_goes_no_further_than_asked(empty: str) -> None:
    done = invoke("upgrade", "--database", empty, "--revision", "0001")
    assert done.output.endswith(": upgraded from nothing to 0001\n")


@pytest.mark.parametrize("revision", ["-1", "base", "1", "", "heads"])
def test_upgrade_goes_up_to_a_numbered_revision_only(revision: str) -> None:
    done = invoke("upgrade", "--database", NOBODY, "--revision", revision)
    assert done.exit_code == 2
    assert "is neither head nor four digits" in done.stderr


def test_upgrade_says_that_there_is_no_such_revision(empty: str) -> None:
    done = invoke("upgrade", "--database", empty, "--revision", "9999")
    assert done.exit_code == 1
    assert "Can't locate revision identified by '9999'. Nothing was changed." in done.stderr


def test_upgrade_says_that_a_table_of_unknown_revision_is_in_the_way(database: str) -> None:
    set_revision(database, None)
    done = invoke("upgrade", "--database", database)
    assert done.exit_code == 1
    assert "idempotency_keys is there, but its revision is not in" in done.stderr


def test_upgrade_says_that_something_else_is_in_the_way(pg_url: str, postgres: Postgres) -> None:
    name = database_of(pg_url)
    postgres.execute("CREATE TABLE ix_idempotency_keys_expires_at ()", name)
    done = invoke("upgrade", "--database", pg_url)
    assert done.exit_code == 1
    assert 'relation "ix_idempotency_keys_expires_at" already exists. Nothing was' in done.stderr


def test_upgrade_says_that_a_folder_is_missing(tmp_path: Path) -> None:
    done = invoke("upgrade", "--database", f"sqlite:///{tmp_path / 'no' / 'keys.db'}")
    assert done.exit_code == 1
    assert "Error: unable to open database file. Check that the file and its folder" in done.stderr


@contextlib.contextmanager
def role(server: PostgresServer, url: str, *statements: str) -> Iterator[str]:
    """The URL of a database for a role ``little``, which may only do what it is granted."""
    name = database_of(url)
    server.execute("CREATE ROLE little LOGIN")
    try:
        for statement in statements:
            server.execute(sql.SQL(statement).format(), name)
        yield make_url(url).set(username="little").render_as_string(hide_password=False)
    finally:
        server.execute("DROP OWNED BY little", name)
        server.execute("DROP ROLE little")


def test_upgrade_says_which_privilege_it_lacks(
    on_postgresql: None, sound_server: PostgresServer
) -> None:
    url = sound_server.create_database()
    with role(sound_server, url, "REVOKE CREATE ON SCHEMA public FROM PUBLIC") as little:
        done = invoke("upgrade", "--database", little)
    sound_server.drop_database(url)
    assert done.exit_code == 1
    assert "permission denied for schema public" in done.stderr
    assert "GRANT CREATE ON SCHEMA" in done.stderr


# ---------------------------------------------------------------------- check


def verdicts(url: str) -> dict[str, Verdict]:
    return {check: finding.verdict for check, finding in findings(url).items()}


def test_check_finds_nothing_wrong_with_a_sound_server(sound: str) -> None:
    done = run("check", "--database", sound)
    assert (done.returncode, done.stderr) == (0, "")
    first, *lines = done.stdout.splitlines()
    assert first == make_url(sound).render_as_string(hide_password=True)
    assert {line.split()[0] for line in lines} == {"ok"}
    for check in ("server", "schema", "fsync", "synchronous_commit", "clock", "expired rows"):
        assert any(line.startswith(f"ok      {check} ") for line in lines), check


def test_check_finds_nothing_wrong_with_a_file(sqlite_url: str) -> None:
    upgrade(sqlite_url)
    done = run("check", "--database", sqlite_url)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()[1:]
    assert {line.split()[0] for line in lines} == {"ok"}
    assert any(line.split() == ["ok", "journal_mode", "wal"] for line in lines)


def test_check_prints_json_for_programs(sound: str) -> None:
    done = run("check", "--json", "--database", sound)
    said = json.loads(done.stdout)
    assert (done.returncode, said["ok"]) == (0, True)
    assert said["database"] == make_url(sound).render_as_string(hide_password=True)
    schema = {"check": "schema", "verdict": "ok", "found": HEAD, "advice": None}
    assert schema in said["findings"]


def test_check_prints_json_when_nobody_listens() -> None:
    done = invoke("check", "--json", "--database", NOBODY)
    said = json.loads(done.stdout)
    assert (done.exit_code, said["ok"]) == (1, False)
    (finding,) = said["findings"]
    assert (finding["check"], finding["verdict"]) == ("connection", "fail")
    assert "s3cret" not in done.output


def test_check_fails_and_says_so(pg_url: str) -> None:
    done = invoke("check", "--database", pg_url)
    assert done.exit_code == 1
    assert "FAIL    schema" in done.stdout
    assert "        Run: wsgi-idempotency upgrade\n" in done.stdout
    assert "would break a promise" in done.stderr


def test_check_passes_with_a_warning(sqlite_url: str) -> None:
    """On SQLite the store makes what is missing."""
    done = invoke("check", "--database", sqlite_url)
    assert done.exit_code == 0
    assert "warning file" in done.stdout
    assert not Path(make_url(sqlite_url).database or "").exists()


@pytest.mark.parametrize(
    ("setting", "check", "verdict"),
    [
        ("synchronous_commit = off", "synchronous_commit", Verdict.FAIL),
        ("default_transaction_read_only = on", "default_transaction_read_only", Verdict.FAIL),
        (
            "default_transaction_isolation = serializable",
            "default_transaction_isolation",
            Verdict.WARNING,
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_check_finds_a_setting_of_the_database(
    sound: str, sound_server: PostgresServer, setting: str, check: str, verdict: Verdict
) -> None:
    assert verdicts(sound)[check] is Verdict.OK
    statement = sql.SQL("ALTER DATABASE {} SET " + setting)
    sound_server.execute(statement.format(sql.Identifier(database_of(sound))))
    assert verdicts(sound)[check] is verdict


@pytest.mark.parametrize(
    ("setting", "verdict"),
    [
        ("fsync", Verdict.FAIL),
        ("full_page_writes", Verdict.FAIL),
        ("autovacuum", Verdict.WARNING),
    ],
)
def test_check_finds_a_setting_of_the_server(
    sound: str, sound_server: PostgresServer, setting: str, verdict: Verdict
) -> None:
    assert verdicts(sound)[setting] is Verdict.OK
    name = sql.Identifier(setting)
    sound_server.execute(sql.SQL("ALTER SYSTEM SET {} = off").format(name))
    sound_server.restart()
    try:
        assert verdicts(sound)[setting] is verdict
    finally:
        sound_server.execute(sql.SQL("ALTER SYSTEM RESET {}").format(name))
        sound_server.restart()


def test_check_finds_that_it_is_on_a_standby(sound: str, sound_server: PostgresServer) -> None:
    sound_server.stop()
    signal_file = sound_server.data / "standby.signal"
    signal_file.touch()
    sound_server.start()
    try:
        found = findings(sound)["primary"]
    finally:
        sound_server.stop()
        signal_file.unlink(missing_ok=True)
        sound_server.start()
    assert (found.verdict, found.found) == (Verdict.FAIL, "no: a standby, which takes no writes")


@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII"])
def test_check_finds_another_encoding(
    on_postgresql: None, sound_server: PostgresServer, encoding: str
) -> None:
    statement = "CREATE DATABASE {} TEMPLATE template0 ENCODING {} LOCALE 'C'"
    name = f"in_{encoding}"
    sound_server.execute(sql.SQL(statement).format(sql.Identifier(name), encoding))
    url = sound_server.url(name)
    upgrade(url)
    found = findings(url)
    sound_server.drop_database(url)
    assert (found["encoding"].verdict, found["encoding"].found) == (Verdict.FAIL, encoding)
    assert found["schema"].verdict is Verdict.OK


@pytest.mark.parametrize(
    ("statement", "check", "verdict"),
    [
        ("SET UNLOGGED", "table", Verdict.FAIL),
        ("SET (autovacuum_enabled = off)", "table's autovacuum", Verdict.WARNING),
        ("SET (autovacuum_enabled = false)", "table's autovacuum", Verdict.WARNING),
        ("RESET (fillfactor)", "fillfactor", Verdict.WARNING),
        ("SET (fillfactor = 30)", "fillfactor", Verdict.OK),
    ],
)
def test_check_finds_a_setting_of_the_table(
    sound: str, sound_server: PostgresServer, statement: str, check: str, verdict: Verdict
) -> None:
    assert verdicts(sound)[check] is Verdict.OK
    if statement == "SET UNLOGGED":  # which what refers to it has to be first
        sound_server.execute("ALTER TABLE idempotency_steps SET UNLOGGED", database_of(sound))
    alter = sql.SQL("ALTER TABLE idempotency_keys " + statement).format()
    sound_server.execute(alter, database_of(sound))
    assert verdicts(sound)[check] is verdict


def test_check_finds_a_missing_privilege(sound: str, sound_server: PostgresServer) -> None:
    granted = (
        "GRANT SELECT ON wsgi_idempotency_version TO little",
        "GRANT SELECT, INSERT, UPDATE ON idempotency_keys TO little",
    )
    with role(sound_server, sound, *granted) as little:
        found = findings(little)
        sound_server.execute("GRANT DELETE ON idempotency_keys TO little", database_of(sound))
        assert findings(little)["schema"].verdict is Verdict.OK
    assert found["privileges"] == Finding(
        "privileges",
        Verdict.FAIL,
        "missing: DELETE on idempotency_keys",
        "Let the tables' owner GRANT them to this role",
    )


def test_check_says_all_that_a_role_lacks(sound: str, sound_server: PostgresServer) -> None:
    with role(sound_server, sound) as little:
        done = invoke("check", "--database", little)
    assert done.exit_code == 1
    assert "missing: SELECT on wsgi_idempotency_version, SELECT on idempotency_keys" in done.stdout
    assert done.stdout.count("FAIL") == 1, "it has not tried what it may not do"


def test_check_finds_a_schema_that_is_missing(empty: str) -> None:
    """The store makes it on SQLite, and only there."""
    found = findings(empty)
    if empty.startswith("sqlite"):
        assert found["file"].verdict is Verdict.WARNING
    else:
        assert (found["schema"].verdict, found["schema"].found) == (Verdict.FAIL, "missing")


def test_check_finds_a_file_without_a_schema(sqlite_url: str) -> None:
    with connect(sqlite_url) as connection:
        connection.exec_driver_sql("CREATE TABLE orders (id INTEGER)")
    assert findings(sqlite_url)["schema"].verdict is Verdict.WARNING


def test_check_finds_a_newer_schema(database: str) -> None:
    set_revision(database, "9999")
    found = findings(database)["schema"]
    assert found.verdict is Verdict.WARNING
    assert found.found == f"9999, newer than the {HEAD} that this release knows"


def test_check_finds_an_older_schema(database: str) -> None:
    set_revision(database, "0000")
    found = findings(database)["schema"]
    assert found.verdict is Verdict.FAIL
    assert found.advice == "Run: wsgi-idempotency upgrade"


def test_check_finds_a_table_that_is_missing(database: str) -> None:
    drop_keys(database)
    found = findings(database)["schema"]
    assert found.verdict is Verdict.FAIL
    assert found.found == f"wsgi_idempotency_version says {HEAD}, but idempotency_keys is missing"


@pytest.mark.parametrize(
    ("expired", "verdict", "said"),
    [
        (-60, Verdict.OK, "none"),
        (OLD / 4, Verdict.OK, "the oldest expired 12 hours ago"),
        (OLD, Verdict.WARNING, "the oldest expired 2 days ago"),
    ],
    ids=["nothing to purge", "purged not long ago", "nobody purges"],
)
def test_check_finds_that_nobody_purges(
    database: str, expired: float, verdict: Verdict, said: str
) -> None:
    add_rows(database, 1, expired=expired + 1)
    add_rows(database, 1, state="held", expired=10 * OLD)
    found = findings(database)["expired rows"]
    assert (found.verdict, found.found) == (verdict, said)


def test_check_finds_a_file_that_cant_be_in_wal_mode(tmp_path: Path) -> None:
    """As one on a file system without shared memory; SQLite has a VFS that is like it."""
    url = f"sqlite:///file:{tmp_path / 'keys.db'}?vfs=unix-dotfile&uri=true"
    upgrade(url)
    found = findings(url)["journal_mode"]
    assert (found.verdict, found.found) == (Verdict.WARNING, "delete")


def test_check_finds_a_file_that_is_read_only(sqlite_url: str) -> None:
    upgrade(sqlite_url)
    findings(sqlite_url)  # which switches it to WAL, as the store would
    path = make_url(sqlite_url).database
    found = findings(f"sqlite:///file:{path}?mode=ro&uri=true")
    assert found["connection"].verdict is Verdict.FAIL
    assert found["connection"].found == "attempt to write a readonly database"
    assert "can be written" in (found["connection"].advice or "")


def test_check_finds_a_folder_in_which_no_file_can_be_made(tmp_path: Path) -> None:
    found = findings(f"sqlite:///{tmp_path / 'no' / 'keys.db'}")
    assert found["file"].verdict is Verdict.FAIL


SERVER = PostgreSQLServer(
    version="13.0",
    version_number=130000,
    in_recovery=False,
    read_only="off",
    isolation="read committed",
    synchronous_commit="on",
    fsync="on",
    full_page_writes="on",
    encoding="UTF8",
    autovacuum="on",
    clock_ahead=0.0,
)


@pytest.mark.parametrize(
    ("change", "check", "verdict"),
    [
        ({}, "server", Verdict.OK),
        ({"version_number": 129999}, "server", Verdict.FAIL),
        ({"synchronous_commit": "local"}, "synchronous_commit", Verdict.OK),
        ({"clock_ahead": 60.0}, "clock", Verdict.OK),
        ({"clock_ahead": 61.0}, "clock", Verdict.WARNING),
        ({"clock_ahead": -61.0}, "clock", Verdict.WARNING),
    ],
    ids=[
        "a server that is new enough",
        "a server that is too old",
        "commits that wait for the local disk only",
        "clocks a minute apart",
        "a clock that is ahead",
        "a clock that is behind",
    ],
)
def test_a_server_is_judged_by_what_it_says(
    change: dict[str, Any], check: str, verdict: Verdict
) -> None:
    """What a test can't make a real server say."""
    judged = checkup.judge_postgresql_server(replace(SERVER, **change))
    assert {finding.check: finding.verdict for finding in judged}[check] is verdict


TABLE = PostgreSQLTable(
    unlogged=False,
    autovacuum_off=False,
    fillfactor=50,
    dead=100_000,
    due_at=50_000.0,
    vacuumed=7200.0,
)


@pytest.mark.parametrize(
    ("change", "verdict", "said"),
    [
        ({}, Verdict.OK, "100000 dead rows; vacuumed 2 hours ago"),
        ({"dead": 100_001, "vacuumed": None}, Verdict.WARNING, "100001 dead rows; vacuumed never"),
        ({"dead": 20_000, "due_at": 50.0}, Verdict.OK, "20000 dead rows; vacuumed 2 hours ago"),
    ],
    ids=["keeps up", "lags behind", "few in a small table"],
)
def test_autovacuum_lags_when_there_are_twice_as_many_dead_rows_as_begin_one(
    change: dict[str, Any], verdict: Verdict, said: str
) -> None:
    judged = checkup.judge_postgresql_table(replace(TABLE, **change))
    finding = {finding.check: finding for finding in judged}["autovacuum's lag"]
    assert (finding.verdict, finding.found) == (verdict, said)
    assert (finding.advice is None) is (verdict is Verdict.OK)


def test_autovacuum_is_due_by_the_table_s_own_settings(
    sound: str, sound_server: PostgresServer
) -> None:
    database = database_of(sound)
    sound_server.execute(
        "ALTER TABLE idempotency_keys SET (autovacuum_enabled = off,"
        " autovacuum_vacuum_scale_factor = 0.5, autovacuum_vacuum_threshold = 7)",
        database,
    )
    add_rows(sound, 100)
    sound_server.execute("VACUUM ANALYZE idempotency_keys", database)
    with connect(sound) as connection:
        table = checkup.read_postgresql_table(connection)
    assert table is not None
    assert table.due_at == 57.0
    assert table.vacuumed is not None


@pytest.mark.parametrize(
    ("pooler", "carried", "verdict"),
    [(False, True, Verdict.OK), (True, True, Verdict.OK), (True, False, Verdict.WARNING)],
    ids=["none", "carries prepared statements over", "does not"],
)
def test_a_pooler_is_judged_by_what_it_does_with_prepared_statements(
    pooler: bool, carried: bool, verdict: Verdict
) -> None:
    assert checkup.judge_pooler(pooler, carried).verdict is verdict


@pytest.mark.parametrize(
    ("change", "check", "verdict"),
    [
        ({"version": "3.24.0"}, "library", Verdict.OK),
        ({"version": "3.23.9"}, "library", Verdict.FAIL),
        ({"version": "3.100.0"}, "library", Verdict.OK),
        ({"synchronous": 1}, "synchronous", Verdict.FAIL),
        ({"synchronous": 3}, "synchronous", Verdict.OK),
    ],
    ids=["new enough", "too old", "of three digits", "synchronous normal", "synchronous extra"],
)
def test_a_file_is_judged_by_what_sqlite_says(
    change: dict[str, Any], check: str, verdict: Verdict
) -> None:
    file = SQLiteFile(version="3.40.1", journal_mode="wal", synchronous=2)
    judged = checkup.judge_sqlite_file(replace(file, **change))
    assert {finding.check: finding.verdict for finding in judged}[check] is verdict


@pytest.mark.parametrize(
    ("revision", "has_table", "made_on_first_use", "verdict", "said"),
    [
        (HEAD, True, False, Verdict.OK, HEAD),
        (None, False, True, Verdict.WARNING, "missing"),
        (None, False, False, Verdict.FAIL, "missing"),
        (None, True, False, Verdict.FAIL, "its revision is not in wsgi_idempotency_version"),
        ("ae1027a6acf", True, True, Verdict.FAIL, "is not a revision of ours"),
    ],
    ids=["right", "not made yet", "missing", "of unknown revision", "somebody else's"],
)
def test_a_schema_is_judged_by_its_revision(
    revision: str | None, has_table: bool, made_on_first_use: bool, verdict: Verdict, said: str
) -> None:
    judged = checkup.judge_schema(revision, has_table, made_on_first_use)
    assert judged.verdict is verdict
    assert said in judged.found


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.04, "0.0 seconds"), (119, "119.0 seconds"), (120, "2 minutes"), (7199, "120 minutes"),
     (7200, "2 hours"), (172800, "2 days")],
)  # fmt: skip
def test_a_duration_is_written_for_people(seconds: float, said: str) -> None:
    assert checkup.span(seconds) == said


# ---------------------------------------------------------------------- purge


def test_purge_deletes_what_has_expired_and_nothing_else(database: str) -> None:
    add_rows(database, 3)
    add_rows(database, 2, state="released")
    add_rows(database, 2, state="claimed", lapse="release")
    add_rows(database, 1, expired=-60)
    add_rows(database, 1, state="held")
    add_rows(database, 1, state="claimed", lapse="hold")
    done = run("purge", "--database", database)
    assert (done.returncode, done.stdout) == (0, "7 expired rows deleted\n")
    assert done.stderr == "", "there is no terminal to show a bar on"
    assert count_rows(database) == 3


def test_purge_goes_on_until_a_batch_is_not_full(database: str) -> None:
    add_rows(database, 5)
    done = invoke("purge", "--database", database, "--batch", "2", "--sleep", "0")
    assert done.output == "5 expired rows deleted\n"
    assert count_rows(database) == 0


def test_purge_stops_after_so_many_batches(database: str) -> None:
    add_rows(database, 5)
    limits = ("--batch", "2", "--sleep", "0", "--max-batches", "2")
    done = invoke("purge", "--database", database, *limits)
    assert done.output == "4 expired rows deleted\n"
    assert count_rows(database) == 1


def test_purge_rests_between_batches(database: str) -> None:
    add_rows(database, 3)
    started = time.monotonic()
    invoke("purge", "--database", database, "--batch", "1", "--sleep", "0.1", "--max-batches", "3")
    assert time.monotonic() - started > 0.2


@pytest.mark.parametrize(
    "arguments",
    [["--batch", "0"], ["--batch", "many"], ["--max-batches", "0"], ["--sleep", "-1"],
     ["--sleep", "nan"], ["--sleep", "inf"], ["--sleep", "3601"]],
    ids=" ".join,
)  # fmt: skip
def test_purge_refuses_nonsense(arguments: list[str]) -> None:
    done = invoke("purge", "--database", NOBODY, *arguments)
    assert done.exit_code == 2
    assert f"Invalid value for '{arguments[0]}'" in done.stderr


def test_purge_says_that_there_is_no_such_file_and_makes_none(sqlite_url: str) -> None:
    done = invoke("purge", "--database", sqlite_url)
    assert done.exit_code == 1
    assert "doesn't exist. Is the path right?" in done.stderr
    assert not Path(make_url(sqlite_url).database or "").exists()


def test_purge_says_that_the_schema_is_missing(pg_url: str) -> None:
    done = invoke("purge", "--database", pg_url)
    assert (done.exit_code, done.stdout) == (1, "")
    assert "The schema is missing" in done.stderr
    assert "Run: wsgi-idempotency upgrade" in done.stderr


def test_purge_says_that_it_may_not(sound: str, sound_server: PostgresServer) -> None:
    granted = "GRANT SELECT ON wsgi_idempotency_version TO little"
    with role(sound_server, sound, granted) as little:
        done = invoke("purge", "--database", little)
    assert (done.exit_code, done.stdout) == (1, "0 expired rows deleted\n")
    assert "permission denied for table idempotency_keys" in done.stderr
    assert "To see what is wrong, run: wsgi-idempotency check" in done.stderr


class Terminal:
    """The command with its errors on a terminal, as a person has it."""

    def __init__(self, *arguments: str) -> None:
        self._master, slave = os.openpty()
        self.process = subprocess.Popen(
            [COMMAND, *arguments], stdout=subprocess.PIPE, stderr=slave, text=True
        )
        os.close(slave)
        self.screen = ""

    def read_until(self, text: str) -> None:
        while text not in self.screen:
            assert self._read(), self.screen

    def finish(self) -> tuple[int, str]:
        """The exit status, and what was printed beside the terminal."""
        output = self.process.communicate()[0]
        while self._read():
            pass
        return self.process.returncode, output

    def _read(self) -> bool:
        try:
            data = os.read(self._master, 1024)
        except OSError:  # EIO: the other side has closed it
            return False
        self.screen += data.decode()
        return bool(data)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *exc_info: object) -> None:
        with self.process:
            self.process.kill()
        os.close(self._master)


def test_purge_shows_a_bar_on_a_terminal(database: str) -> None:
    add_rows(database, 4)
    add_rows(database, 4, state="held")
    limits = ("--batch", "1", "--sleep", "0")
    with Terminal("purge", "--database", database, *limits) as terminal:
        assert terminal.finish() == (0, "4 expired rows deleted\n")
    for part in ("Deleting", "25%", "50%", "75%", "100%"):
        assert part in terminal.screen


def test_the_bar_is_full_after_the_last_of_so_many_batches(database: str) -> None:
    add_rows(database, 5)
    limits = ("--batch", "2", "--max-batches", "1")
    with Terminal("purge", "--database", database, *limits) as terminal:
        assert terminal.finish() == (0, "2 expired rows deleted\n")
    assert "100%" in terminal.screen


def test_a_purge_that_is_interrupted_says_how_far_it_came(database: str) -> None:
    add_rows(database, 5)
    # Not for ever: a signal that comes between Python's last look for one and the system call
    # is seen when the rest is over.
    limits = ("--batch", "1", "--sleep", "20")
    with Terminal("purge", "--database", database, *limits) as terminal:
        terminal.read_until("20%")
        terminal.process.send_signal(signal.SIGINT)
        assert terminal.finish() == (130, "1 expired rows deleted\n")
    assert "Interrupted." in terminal.screen
    assert "Traceback" not in terminal.screen
    assert count_rows(database) == 4


def test_a_purge_that_loses_its_database_says_so(
    postgres_server: PostgresServer, pg_database: str
) -> None:
    add_rows(pg_database, 3)
    limits = ("--batch", "1", "--sleep", "0.2")
    with Terminal("purge", "--database", pg_database, *limits) as terminal:
        terminal.read_until("33%")
        postgres_server.stop("immediate")
        status, output = terminal.finish()
    postgres_server.start()
    assert status == 1
    assert output.endswith("expired rows deleted\n")
    assert "run: wsgi-idempotency check" in terminal.screen
    assert "Traceback" not in terminal.screen
