"""Fixtures every test may use: databases, and the server they are on."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import matrix
import pytest
from apps.gate import Gate
from servers.postgres import (
    Postgres,
    PostgresServer,
    database_of,
    postgres_for_tests,
    private_postgres,
)

from wsgi_idempotency.schema import upgrade
from wsgi_idempotency.stores.tables import metadata

# How long an example takes says something of this machine's other load, and nothing of ours.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")

# A shell starts what it puts into the background with SIGINT ignored, nohup with SIGHUP, and
# so would every command be that a test starts and interrupts. What we handle it doesn't inherit.
for number, handler in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGHUP, lambda *_: None),
):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)

#: The version of the server that a test ran on, as a property of its report.
PROPERTY = "postgresql"

running_version = pytest.StashKey[str]()


@pytest.fixture(scope="session")
def postgres(pytestconfig: pytest.Config) -> Iterator[Postgres]:
    """A PostgreSQL server, shared by the tests of a session: don't stop this one."""
    server = postgres_for_tests()
    pytestconfig.stash[running_version] = server.version
    yield server
    server.close()


@pytest.fixture(scope="session")
def own_server(postgres: Postgres) -> Iterator[PostgresServer]:
    """A server of ours, even when the environment names one of somebody else's."""
    if isinstance(postgres, PostgresServer):
        yield postgres
        return
    server = private_postgres()
    yield server
    server.close()


@pytest.fixture
def on_postgresql(request: pytest.FixtureRequest) -> None:
    """Mark a test that asks for its database only while it runs."""
    request.node.add_marker(pytest.mark.postgresql)


@pytest.fixture
def postgres_server(on_postgresql: None, own_server: PostgresServer) -> Iterator[PostgresServer]:
    """A server that a test may stop, crash, restart and read the log of."""
    yield own_server
    if not own_server.running:
        own_server.start()


@pytest.fixture
def pg_url(on_postgresql: None, postgres: Postgres) -> Iterator[str]:
    """The URL of a fresh database with nothing in it."""
    url = postgres.create_database()
    yield url
    postgres.drop_database(url)


@pytest.fixture(scope="session")
def schema_template(postgres: Postgres) -> Iterator[str]:
    """The name of a database that has our schema, for copying."""
    url = postgres.create_database()
    upgrade(url)
    yield database_of(url)
    postgres.drop_database(url)


@pytest.fixture
def pg_database(on_postgresql: None, postgres: Postgres, schema_template: str) -> Iterator[str]:
    """The URL of a fresh database that has our schema and no row."""
    url = postgres.create_database(schema_template)
    yield url
    postgres.drop_database(url)


@pytest.fixture(scope="module")
def module_database(postgres: Postgres, schema_template: str) -> Iterator[str]:
    """The URL of a database that has our schema: one for all tests of a file, since to make and
    drop one takes longer than most tests."""
    url = postgres.create_database(schema_template)
    yield url
    postgres.drop_database(url)


@pytest.fixture
def emptied_database(on_postgresql: None, postgres: Postgres, module_database: str) -> str:
    """The file's database, with no row of ours: ``pg_database`` where a file says so."""
    tables = ", ".join(metadata.tables)
    postgres.execute(f"TRUNCATE {tables}", database_of(module_database))
    return module_database


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """The URL of an SQLite file that doesn't exist yet."""
    return f"sqlite:///{tmp_path / 'keys.db'}"


@pytest.fixture(params=["PostgreSQL", "SQLite"])
def database(request: pytest.FixtureRequest) -> str:
    """The URL of a database with no row, on either of the two."""
    name = {"PostgreSQL": "pg_database", "SQLite": "sqlite_url"}[request.param]
    url: str = request.getfixturevalue(name)
    return url


@pytest.fixture
def gate() -> Iterator[Gate]:
    """Where a handler waits until the test lets it pass."""
    with Gate() as gate:
        yield gate


#: Files whose tests stay in one worker of pytest-xdist, as they share what takes long to start.
TOGETHER = {
    "test_clients.py",
    "test_crash_points.py",
    "test_frameworks.py",
    "test_http_servers.py",
    "test_monitoring.py",
    "test_packaging.py",
}

#: Files of which each class stays in one.
CLASSES_TOGETHER = {"test_store_conformance.py"}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Deal out single tests, except for those that stay together, which come first."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path, *names = nodeid.split("::")
            file = path.rpartition("/")[2]
            if file in TOGETHER:
                return path
            if file in CLASSES_TOGETHER:
                return f"{path}::{names[0]}"
            return nodeid

    return Scheduling(config, log)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--matrix", action="store_true", help="print the documentation's tables from this run"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "postgresql: runs on PostgreSQL; set by the fixtures")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what runs on PostgreSQL, so that ``-m postgresql`` finds it."""
    for item in items:
        if "postgres" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.postgresql)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    """Put the server's version into the report of a test that ran on it."""
    if call.when == "call" and item.get_closest_marker("postgresql"):
        item.user_properties.append((PROPERTY, item.config.stash[running_version]))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many tests ran on PostgreSQL, and on which; and print the tables asked for."""
    if terminalreporter.config.getoption("--matrix"):
        reports = [
            report
            for outcome in ("", "passed", "failed", "error")
            for report in terminalreporter.getreports(outcome)
        ]
        for page, lines in matrix.tables(reports).items():
            terminalreporter.write_line(f"\ndocs/{page}:\n")
            for line in lines:
                terminalreporter.write_line(line)
    versions = Counter(
        version
        for outcome in ("passed", "failed", "xfailed", "xpassed")
        for report in terminalreporter.getreports(outcome)
        if report.when == "call"
        for name, version in report.user_properties
        if name == PROPERTY
    )
    for version, tests in versions.items() or {"": 0}.items():
        terminalreporter.write_line(f"{tests} tests ran on PostgreSQL {version}".rstrip())
