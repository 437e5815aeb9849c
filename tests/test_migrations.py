"""The schema as Alembic makes it: the models' equal, whoever runs it, however often."""

from __future__ import annotations

import logging
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from textwrap import indent
from typing import TypeVar

import psycopg
import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import Script, ScriptDirectory
from servers.postgres import Postgres, database_of
from sqlalchemy import Column, Integer, MetaData, Table, create_engine, inspect, update
from sqlalchemy.engine import Connection, make_url
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool

from wsgi_idempotency.errors import ConfigurationError, SchemaError
from wsgi_idempotency.schema import POSTGRESQL_LOCK, Upgrade, connect, upgrade, upgrade_connection
from wsgi_idempotency.stores import tables
from wsgi_idempotency.stores.sql import SQLStore, database_url

CHECKOUT = Path(__file__).parents[1]

PROGRAMS = Path(sys.executable).parent

T = TypeVar("T")


@pytest.fixture(params=["pg_url", "sqlite_url"], ids=["on PostgreSQL", "on SQLite"])
def url(request: pytest.FixtureRequest) -> str:
    """The URL of a database with nothing in it."""
    found: str = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def another_pg_url(on_postgresql: None, postgres: Postgres) -> Iterator[str]:
    """A second database with nothing in it, to compare with."""
    url = postgres.create_database()
    yield url
    postgres.drop_database(url)


# What a database says of its tables, in the order it keeps them: columns with type, NOT NULL
# and default; constraints and indexes with their text; storage.
POSTGRESQL_CATALOG = """
    SELECT 'column', c.relname, lpad(a.attnum::text, 3, '0'), a.attname,
           format_type(a.atttypid, a.atttypmod), a.attnotnull::text,
           coalesce(pg_get_expr(d.adbin, d.adrelid), '')
    FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid
         LEFT JOIN pg_attrdef d ON (d.adrelid, d.adnum) = (a.attrelid, a.attnum)
    WHERE c.relnamespace = 'public'::regnamespace AND c.relkind = 'r' AND a.attnum > 0
UNION ALL
    SELECT 'constraint', conrelid::regclass::text, conname, contype::text,
           pg_get_constraintdef(oid), convalidated::text, ''
    FROM pg_constraint WHERE connamespace = 'public'::regnamespace AND contype <> 'n'
UNION ALL
    SELECT 'index', tablename, indexname, indexdef, '', '', ''
    FROM pg_indexes WHERE schemaname = 'public'
UNION ALL
    SELECT 'table', relname, relpersistence::text, coalesce(reloptions::text, ''), '', '', ''
    FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind = 'r'
ORDER BY 1, 2, 3"""

SQLITE_CATALOG = """
    SELECT type, tbl_name, name, coalesce(sql, '') FROM sqlite_master ORDER BY 1, 2, 3"""


def catalog(url: str) -> list[tuple[str, ...]]:
    """Everything a database says of its tables."""
    with connect(url) as connection:
        postgresql = connection.dialect.name == "postgresql"
        rows = connection.exec_driver_sql(POSTGRESQL_CATALOG if postgresql else SQLITE_CATALOG)
        return [tuple(in_one_order(str(value)) for value in row) for row in rows]


def in_one_order(text: str) -> str:
    """A statement without its line breaks, and with its constraints sorted."""
    columns, *constraints = re.sub(r"\s+", " ", text).removesuffix(" )").split(", CONSTRAINT ")
    return ", CONSTRAINT ".join([columns, *sorted(constraints)])


def create_all(url: str) -> None:
    """Make the tables from the models alone."""
    with connect(url) as connection, connection.begin():
        tables.metadata.create_all(connection)
        tables.version_table.create(connection)


def table_names(url: str) -> set[str]:
    with connect(url) as connection:
        return set(inspect(connection).get_table_names())


def revision(url: str) -> str | None:
    with connect(url) as connection:
        found: str | None = connection.scalar(tables.version_table.select())
        return found


def our_config(connection: Connection) -> Config:
    """What an application has that runs our migrations as the Alembic cookbook says."""
    config = Config()
    config.set_main_option("script_location", "wsgi_idempotency.migrations:")
    config.attributes["connection"] = connection
    return config


def run(
    *arguments: str | Path, environ: dict[str, str] | None = None, cwd: Path = CHECKOUT
) -> subprocess.CompletedProcess[str]:
    """Run a program of this environment to its end."""
    clean = {k: v for k, v in os.environ.items() if k != "WSGI_IDEMPOTENCY_DATABASE"}
    return subprocess.run(
        arguments, cwd=cwd, env=clean | (environ or {}), capture_output=True, text=True, check=False
    )


def alembic(*arguments: str, environ: dict[str, str] | None = None) -> str:
    """Run Alembic's own command from the checkout; what it prints."""
    done = run(PROGRAMS / "alembic", *arguments, environ=environ)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def at_once(*calls: Callable[[], T]) -> list[T]:
    """Call each on a thread of its own, all let go at one moment."""
    barrier = threading.Barrier(len(calls))

    def let_go(call: Callable[[], T]) -> T:
        barrier.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(let_go, call) for call in calls]]


# ---------------------------------------------------------------------- equal to the models


def test_models_and_migrations_are_one_schema_on_postgresql(
    pg_url: str, another_pg_url: str
) -> None:
    """Columns in their order, types, constraints by name and text, indexes, storage."""
    upgrade(pg_url)
    create_all(another_pg_url)
    assert catalog(pg_url) == catalog(another_pg_url)
    kinds = {row[0] for row in catalog(pg_url)}
    assert kinds == {"column", "constraint", "index", "table"}


def test_models_and_migrations_are_one_schema_on_sqlite(tmp_path: Path) -> None:
    migrated, modelled = (f"sqlite:///{tmp_path / name}.db" for name in "ab")
    upgrade(migrated)
    create_all(modelled)
    assert catalog(migrated) == catalog(modelled)
    assert len(catalog(migrated)) == 10  # four tables, four keys, two indexes


def test_alembic_sees_nothing_to_change(url: str) -> None:
    upgrade(url)
    with connect(url) as connection:
        context = MigrationContext.configure(
            connection,
            opts={"version_table": tables.VERSION_TABLE, "compare_server_default": True},
        )
        assert compare_metadata(context, tables.metadata) == []


def test_a_store_that_makes_its_tables_leaves_nothing_to_upgrade(tmp_path: Path) -> None:
    used, upgraded = (f"sqlite:///{tmp_path / name}.db" for name in "ab")
    store = SQLStore(used)
    store.check()
    store.close()
    assert upgrade(used) == Upgrade(tables.SCHEMA_REVISION, tables.SCHEMA_REVISION)
    upgrade(upgraded)
    assert catalog(used) == catalog(upgraded)


def test_revisions_are_numbered_and_the_last_is_what_this_release_needs() -> None:
    """A store tells a newer schema from an older one by its number."""
    config = Config()
    config.set_main_option("script_location", "wsgi_idempotency.migrations:")
    revisions = [script.revision for script in ScriptDirectory.from_config(config).walk_revisions()]
    numbers = range(len(revisions), 0, -1)
    assert revisions == [f"{number:04}" for number in numbers]
    assert revisions[0] == tables.SCHEMA_REVISION


# ---------------------------------------------------------------------- up, down, up


def test_upgrading_twice_is_upgrading_once(url: str) -> None:
    assert upgrade(url) == Upgrade(None, tables.SCHEMA_REVISION)
    before = catalog(url)
    assert upgrade(url) == Upgrade(tables.SCHEMA_REVISION, tables.SCHEMA_REVISION)
    assert catalog(url) == before


def test_up_and_down_and_up_again(url: str) -> None:
    upgrade(url)
    before = catalog(url)
    with connect(url) as connection, connection.begin():
        command.downgrade(our_config(connection), "base")
    assert table_names(url) == {tables.VERSION_TABLE}
    assert revision(url) is None
    assert upgrade(url) == Upgrade(None, tables.SCHEMA_REVISION)
    assert catalog(url) == before


@pytest.mark.parametrize("by", ["the command", "Alembic's command"])
def test_an_upgrade_that_fails_leaves_nothing_behind(url: str, by: str) -> None:
    """All statements of a revision, and the version table, are one transaction."""
    with connect(url) as connection, connection.begin():
        in_the_way = Table("ix_idempotency_keys_expires_at", MetaData(), Column("id", Integer))
        in_the_way.create(connection)
    if by == "the command":
        with pytest.raises(SQLAlchemyError, match="ix_idempotency_keys_expires_at"):
            upgrade(url)
    else:
        failed = run(PROGRAMS / "alembic", "-x", f"database={url}", "upgrade", "head")
        assert failed.returncode != 0
        assert "ix_idempotency_keys_expires_at" in failed.stderr
    assert table_names(url) == {"ix_idempotency_keys_expires_at"}


def test_a_schema_of_a_later_release_is_left_alone(url: str) -> None:
    """Hosts are upgraded one by one, and each may run the command."""
    upgrade(url)
    with connect(url) as connection, connection.begin():
        connection.execute(update(tables.version_table).values(version_num="9999"))
    assert upgrade(url) == Upgrade("9999", "9999")
    assert revision(url) == "9999"


def test_a_table_of_unknown_revision_is_not_touched(url: str) -> None:
    with connect(url) as connection, connection.begin():
        tables.metadata.create_all(connection)
    with pytest.raises(SchemaError, match="its revision is not in wsgi_idempotency_version"):
        upgrade(url)
    assert table_names(url) == set(tables.metadata.tables)


@pytest.mark.parametrize("wrong", ["mysql://localhost/shop", "sqlite://", "shop.db"])
def test_a_database_of_another_kind_is_refused(wrong: str) -> None:
    with pytest.raises(ConfigurationError):
        upgrade(wrong)


# ---------------------------------------------------------------------- the release before


def test_the_table_of_resolutions_comes_without_a_change_to_the_keys(url: str) -> None:
    """Processes of the release before go on serving beside it."""
    upgrade(url, "0001")
    before = [row for row in catalog(url) if row[1] == "idempotency_keys"]
    assert before
    upgrade(url, "0002")
    assert [row for row in catalog(url) if row[1] == "idempotency_keys"] == before
    assert {"idempotency_resolutions"} < table_names(url)


def test_a_file_of_an_earlier_release_names_the_command_that_brings_it_up(sqlite_url: str) -> None:
    """A store makes what is missing, and leaves what is old to a person."""
    upgrade(sqlite_url, "0001")
    store = SQLStore(sqlite_url)
    with pytest.raises(SchemaError) as refused:
        store.check()
    command = f"wsgi-idempotency upgrade --database {sqlite_url}"
    assert str(refused.value).endswith(f". Run: {command}")
    assert "The schema is at 0001" in str(refused.value)
    done = run(PROGRAMS / "wsgi-idempotency", *command.split()[1:])
    assert done.returncode == 0, done.stderr
    store.check()
    store.close()


# ---------------------------------------------------------------------- two at once


def test_upgrades_at_once_make_one_schema(url: str) -> None:
    """One makes it; the others wait, and find it made."""
    done = at_once(*[lambda: upgrade(url)] * 4)
    befores = sorted(found.before or "none" for found in done)
    assert befores == [*[tables.SCHEMA_REVISION] * 3, "none"]
    assert {found.after for found in done} == {tables.SCHEMA_REVISION}
    assert revision(url) == tables.SCHEMA_REVISION


def test_several_databases_may_be_upgraded_at_once(tmp_path: Path) -> None:
    """On threads of one process, where Alembic has one context for all of them."""
    urls = [f"sqlite:///{tmp_path / str(number)}.db" for number in range(4)]
    at_once(*[partial(upgrade, url) for url in urls])
    assert [revision(url) for url in urls] == [tables.SCHEMA_REVISION] * 4


def test_an_upgrade_and_a_first_request_at_once_make_one_schema(sqlite_url: str) -> None:
    """On SQLite the store makes its tables itself."""
    store = SQLStore(sqlite_url)
    at_once(store.check, lambda: upgrade(sqlite_url))
    store.close()
    assert revision(sqlite_url) == tables.SCHEMA_REVISION


@pytest.mark.parametrize("isolation", ["read committed", "repeatable read", "serializable"])
def test_an_upgrade_looks_only_once_it_has_the_lock(
    pg_url: str, postgres: Postgres, isolation: str
) -> None:
    """Two that wait for a third: whichever is let in second sees what the first has made,
    whatever isolation the database has by default."""
    with postgres.connect() as admin:
        name = psycopg.sql.Identifier(database_of(pg_url))
        setting = psycopg.sql.SQL("ALTER DATABASE {} SET default_transaction_isolation = {}")
        admin.execute(setting.format(name, isolation))
    waiters = """
        SELECT count(*) FROM pg_locks JOIN pg_database ON pg_database.oid = database
        WHERE locktype = 'advisory' AND NOT granted AND datname = current_database()"""
    with (
        ThreadPoolExecutor(2) as pool,
        postgres.connect(database_of(pg_url)) as third,
        postgres.connect(database_of(pg_url)) as onlooker,
    ):
        with third.transaction():
            third.execute(POSTGRESQL_LOCK)
            two: list[Future[Upgrade]] = [pool.submit(upgrade, pg_url) for _ in range(2)]
            while onlooker.execute(waiters).fetchone() != (2,):
                assert not any(one.done() for one in two)
        befores = [one.result().before for one in two]
    assert sorted(befores, key=str) == [tables.SCHEMA_REVISION, None]


# ---------------------------------------------------------------------- the caller's connection


def test_a_connection_that_is_handed_over_stays_the_callers(url: str) -> None:
    """What is done on it is undone with the caller's transaction."""
    with connect(url) as connection, connection.begin() as transaction:
        upgrade_connection(connection)
        assert inspect(connection).has_table("idempotency_keys")
        transaction.rollback()
    assert table_names(url) == set()


def test_a_connection_may_be_handed_to_alembic_as_its_cookbook_says(url: str) -> None:
    engine = create_engine(database_url(url), poolclass=NullPool)
    with engine.begin() as connection:
        command.upgrade(our_config(connection), "head")
    assert revision(url) == tables.SCHEMA_REVISION


def test_logging_is_left_alone_unless_alembic_is_the_program(url: str) -> None:
    """alembic.ini has a section on logging; it is for Alembic's own command line."""
    bystander = logging.getLogger("test_migrations.bystander")
    handlers = list(logging.getLogger().handlers)
    with connect(url) as connection, connection.begin():
        config = Config(CHECKOUT / "alembic.ini")
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
    assert logging.getLogger().handlers == handlers
    assert not bystander.disabled


# ---------------------------------------------------------------------- alembic's command line


def test_alembic_upgrades_from_the_checkout(url: str) -> None:
    alembic("-x", f"database={url}", "upgrade", "head")
    assert alembic("-x", f"database={url}", "current") == f"{tables.SCHEMA_REVISION} (head)\n"
    assert "No new upgrade operations" in alembic("-x", f"database={url}", "check")
    alembic("-x", f"database={url}", "downgrade", "base")
    assert table_names(url) == {tables.VERSION_TABLE}


def test_alembic_takes_the_database_of_the_environment(url: str) -> None:
    alembic("upgrade", "head", environ={"WSGI_IDEMPOTENCY_DATABASE": url})
    assert revision(url) == tables.SCHEMA_REVISION


def test_alembic_takes_the_database_of_the_ini_file(url: str, tmp_path: Path) -> None:
    """There a % is written twice."""
    address = make_url(url)
    if address.get_backend_name() == "postgresql":
        address = address.set(password="100%")
        assert "%" in address.render_as_string(hide_password=False)
    doubled = address.render_as_string(hide_password=False).replace("%", "%%")
    ini = (CHECKOUT / "alembic.ini").read_text()
    (tmp_path / "alembic.ini").write_text(
        re.sub("(?m)^# sqlalchemy.url = .*", lambda _: f"sqlalchemy.url = {doubled}", ini)
    )
    alembic("-c", str(tmp_path / "alembic.ini"), "upgrade", "head")
    assert revision(url) == tables.SCHEMA_REVISION


def test_alembic_needs_no_section_on_logging(sqlite_url: str, tmp_path: Path) -> None:
    ini = tmp_path / "alembic.ini"
    ini.write_text("[alembic]\nscript_location = wsgi_idempotency.migrations:\n")
    alembic("-c", str(ini), "-x", f"database={sqlite_url}", "upgrade", "head")
    assert revision(sqlite_url) == tables.SCHEMA_REVISION


def test_alembic_says_what_it_does_and_disables_no_logger(sqlite_url: str) -> None:
    program = f"""
import logging
from alembic.config import main
bystander = logging.getLogger("bystander")
main(["-x", "database={sqlite_url}", "upgrade", "head"])
assert not bystander.disabled
"""
    done = run(sys.executable, "-I", "-c", program)
    assert done.returncode == 0, done.stderr
    assert "Running upgrade  -> 0001" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["upgrade", "head"], "Which database? Give alembic -x database=URL"),
        (["-x", "database=mysql://localhost/shop", "upgrade", "head"], "mysql is not supported"),
    ],
    ids=["no database", "a database of another kind"],
)
def test_alembic_says_which_database_it_needs(arguments: list[str], expected: str) -> None:
    done = run(PROGRAMS / "alembic", *arguments)
    assert done.returncode != 0
    assert expected in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_alembic_writes_the_statements_for_somebody_else_to_run(url: str) -> None:
    script = alembic("-x", f"database={url}", "upgrade", "head", "--sql")
    if url.startswith("sqlite"):
        with closing(sqlite3.connect(make_url(url).database or "")) as connection:
            connection.executescript(script)
    else:
        address = make_url(url).set(drivername="postgresql")
        with psycopg.connect(address.render_as_string(hide_password=False)) as connection:
            connection.execute(script)
    by_hand = catalog(url)
    assert upgrade(url) == Upgrade(tables.SCHEMA_REVISION, tables.SCHEMA_REVISION)
    assert ("table", "idempotency_keys") in {row[:2] for row in by_hand}


def test_alembic_writes_a_new_revision_with_its_number(sqlite_url: str, tmp_path: Path) -> None:
    """For whoever works on the schema: the template is whole."""
    folder = tmp_path / "migrations"
    shutil.copytree(CHECKOUT / "migrations", folder)
    ini = (CHECKOUT / "alembic.ini").read_text()
    location = f"script_location = {folder}"
    (tmp_path / "alembic.ini").write_text(re.sub("(?m)^script_location = .*", location, ini))
    upgrade(sqlite_url)
    alembic(
        "-c", str(tmp_path / "alembic.ini"), "-x", f"database={sqlite_url}",
        "revision", "--autogenerate", "--rev-id", "9999", "-m", "Change nothing",
    )  # fmt: skip
    made = (folder / "versions" / "9999_change_nothing.py").read_text()
    assert '"""Change nothing."""' in made
    assert f"down_revision = '{tables.SCHEMA_REVISION}'" in made
    assert "op." not in made.replace("from alembic import op", "")


# ---------------------------------------------------------------------- an app with its own Alembic

APP_ENV = """
from alembic import context
from sqlalchemy import Column, Integer, MetaData, NullPool, Table, create_engine

target_metadata = MetaData()
Table("orders", target_metadata, Column("id", Integer, primary_key=True))

with create_engine({url!r}, poolclass=NullPool).connect() as connection:
{configure}
    with context.begin_transaction():
        context.run_migrations()
"""


def from_the_docs(containing: str) -> str:
    """The example of docs/own-alembic.md that has a certain text."""
    page = (CHECKOUT / "docs" / "own-alembic.md").read_text()
    (code,) = (
        code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if containing in code
    )
    return str(code)


class App:
    """An application with migrations of its own, in the database that our tables are in.

    :param configure: how its env.py configures Alembic.
    """

    def __init__(self, folder: Path, url: str, configure: str) -> None:
        self.migrations = folder / "migrations"
        ini = folder / "app.ini"
        command.init(Config(ini), str(self.migrations))
        address = database_url(url).render_as_string(hide_password=False)
        env = APP_ENV.format(url=address, configure=indent(configure, " " * 4))
        (self.migrations / "env.py").write_text(env)
        self._config = Config(ini)

    def autogenerate(self) -> str:
        """Let Alembic compare the models with the database; the file it writes."""
        script = command.revision(self._config, autogenerate=True)
        assert isinstance(script, Script)
        return Path(script.path).read_text()

    def upgrade(self) -> None:
        command.upgrade(self._config, "head")


def test_an_apps_autogenerate_would_drop_our_tables(url: str, tmp_path: Path) -> None:
    """Why there is a helper: this is what it is for."""
    upgrade(url)
    made = App(
        tmp_path, url, "context.configure(connection=connection, target_metadata=target_metadata)"
    ).autogenerate()
    assert "op.drop_table('idempotency_keys')" in made


def test_an_apps_autogenerate_leaves_our_tables_alone_with_include_name(
    url: str, tmp_path: Path
) -> None:
    upgrade(url)
    app = App(tmp_path, url, from_the_docs("include_name"))
    made = app.autogenerate()
    assert "op.create_table('orders'" in made
    assert "idempotency" not in made
    app.upgrade()
    assert table_names(url) == {"orders", "alembic_version", *tables.OUR_TABLES}
    assert upgrade(url) == Upgrade(tables.SCHEMA_REVISION, tables.SCHEMA_REVISION)


def test_an_app_may_make_our_tables_with_its_own_migrations(
    url: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """By our MetaData beside its own, and our revision written by hand."""
    app = App(tmp_path, url, from_the_docs("tables.metadata"))
    made = app.autogenerate()
    (path,) = (app.migrations / "versions").glob("*.py")
    end = "    # ### end Alembic commands ###\n"
    by_hand = from_the_docs("INSERT INTO")
    if not url.startswith("sqlite"):
        by_hand += from_the_docs("fillfactor")
    path.write_text(made.replace(end, end + indent(by_hand, " " * 4), 1))
    app.upgrade()

    store = SQLStore(url, create=False)
    store.check()
    store.close()
    assert upgrade(url) == Upgrade(tables.SCHEMA_REVISION, tables.SCHEMA_REVISION)
    assert "op." not in app.autogenerate().replace("from alembic import op", "")

    if url.startswith("sqlite"):
        ours = f"sqlite:///{tmp_path / 'ours.db'}"
    else:
        ours = request.getfixturevalue("another_pg_url")
    upgrade(ours)
    assert [row for row in catalog(url) if row[1] in tables.OUR_TABLES] == catalog(ours)
