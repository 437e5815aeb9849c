"""Writes beside the transaction are warned of in development, and only there."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
from apps.charges import OpenShop, charge, opener
from sqlalchemy import text
from werkzeug.wrappers import Response

from wsgi_idempotency.errors import ForeignWrite
from wsgi_idempotency.testing import foreign_writes_warned_of


@pytest.fixture
def pg_shop(pg_database: str) -> Iterator[OpenShop]:
    """Opens shops on PostgreSQL, where two connections may write at once."""
    yield from opener(pg_database)


def beside(open_shop: OpenShop, *statements: str) -> Any:
    """A shop that charges as it should, and sends statements on another connection too."""

    def app(environ: Any, start_response: Any) -> Any:
        charge(1)
        with shop.engine.begin() as connection:
            for statement in statements:
                connection.execute(text(statement))
        return Response("sorry", 500)(environ, start_response)

    shop = open_shop(app)
    return shop


WRITE = "INSERT INTO charges (amount) VALUES (7)"


@pytest.mark.parametrize(
    "statement",
    [
        WRITE,
        "  update charges set amount = 8",
        "DELETE FROM charges",
        "WITH new AS (INSERT INTO charges (amount) VALUES (9) RETURNING id) SELECT id FROM new",
    ],
)
def test_a_write_beside_the_transaction_is_warned_of_where_it_is_made(
    pg_shop: OpenShop, statement: str
) -> None:
    shop = beside(pg_shop, "SELECT count(*) FROM charges", statement)
    with foreign_writes_warned_of(), pytest.warns(ForeignWrite) as told:
        shop.post()
    [warning] = told
    assert warning.filename == __file__
    assert "Write on current_operation.connection" in str(warning.message)


def test_each_place_is_warned_of_once(pg_shop: OpenShop) -> None:
    shop = beside(pg_shop, WRITE, "DELETE FROM charges")
    with foreign_writes_warned_of(), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default", ForeignWrite)
        for key in ("one", "two"):
            shop.post(key)
    verbs = [str(warning.message).split("this ")[1].split()[0] for warning in told]
    assert verbs == ["INSERT", "DELETE"]


def test_as_an_error_it_stops_the_handler(pg_shop: OpenShop) -> None:
    shop = beside(pg_shop, WRITE)
    with foreign_writes_warned_of(), pytest.raises(ForeignWrite):
        shop.post()
    assert (shop.amounts(), shop.rows()) == ([], [])


def test_without_it_nothing_is_said(pg_shop: OpenShop) -> None:
    """Warnings are errors here."""
    shop = beside(pg_shop, WRITE)
    with foreign_writes_warned_of(), foreign_writes_warned_of():
        pass
    assert shop.post().status_code == 500
    assert shop.amounts() == [7]


def test_reads_and_writes_outside_an_operation_are_nobody_s_business(pg_shop: OpenShop) -> None:
    shop = beside(pg_shop, "SELECT 1")
    with foreign_writes_warned_of():
        assert shop.post().status_code == 500
        with shop.engine.begin() as connection:
            connection.execute(text(WRITE))
    assert shop.amounts() == [7]


@pytest.mark.parametrize("developing", [True, False])
def test_python_s_development_mode_turns_it_on(tmp_path: Any, developing: bool) -> None:
    program = (
        "import sys; from wsgi_idempotency import *\n"
        "IdempotencyMiddleware(print, 'sqlite:///k.db', scope=everyone,"
        " policy=Policy(transaction=True))\n"
        "print('wsgi_idempotency.foreign_writes' in sys.modules)"
    )
    options = ["-X", "dev"] if developing else []
    done = subprocess.run(
        [sys.executable, *options, "-c", program], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.stdout == f"{developing}\n"
