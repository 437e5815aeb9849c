"""What the documentation says of the package is what the package says of itself."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest
from sqlalchemy import Table

import wsgi_idempotency
from wsgi_idempotency import Outcome, hold_unknown, store_everything, store_success
from wsgi_idempotency.cli import main
from wsgi_idempotency.problems import CODES, problem
from wsgi_idempotency.protocol import NEVER_AN_OUTCOME
from wsgi_idempotency.settings import OPTIONS
from wsgi_idempotency.stores.tables import (
    idempotency_keys,
    idempotency_resolutions,
    idempotency_steps,
)

CHECKOUT = Path(__file__).parent.parent


def page(name: str) -> str:
    return (CHECKOUT / "docs" / name).read_text(encoding="utf-8")


def section(text: str, title: str) -> str:
    """The part of a Markdown page under a heading, up to the next one."""
    found = re.search(rf"^#+ {re.escape(title)}$(.*?)(?=^#|\Z)", text, re.DOTALL | re.MULTILINE)
    assert found is not None, f"there is no section {title!r}"
    return found[1]


def rows(text: str) -> list[list[str]]:
    """The cells of Markdown tables, without their heads."""
    lines = [line.strip("|").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in cells] for cells in lines if "---" not in cells[0]]


def test_every_problem_is_in_the_contract_with_its_status_and_whether_to_retry() -> None:
    documented = {
        code.strip("`"): (int(status), retry == "yes")
        for code, status, retry, *_ in rows(section(page("http-contract.md"), "Errors"))
        if code.startswith("`")
    }
    assert documented == {code: (problem(code).status, problem(code).retryable) for code in CODES}


@pytest.mark.parametrize(
    ("column", "outcomes"),
    list(enumerate([store_success, store_everything, hold_unknown], start=1)),
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_table_of_outcomes_is_what_the_function_does(column: int, outcomes) -> None:
    cases = {
        "2xx or 3xx": [Outcome(status=status) for status in (200, 201, 299, 303, 399)],
        "4xx": [Outcome(status=status) for status in (400, 404, 422, 499)],
        "5xx": [Outcome(status=status) for status in (500, 503, 599)],
        "an exception": [Outcome(exception=ValueError())],
        "nothing: the worker died": [Outcome(lapsed=True)],
    }
    table = {
        row[0]: row[column] for row in rows(section(page("guarantees.md"), "What an outcome does"))
    }
    table.pop("the handler ended with")
    assert table == {
        case: "/".join({outcomes(outcome).name for outcome in some}) for case, some in cases.items()
    }


def test_the_statuses_that_are_never_an_outcome_are_all_named() -> None:
    text = section(page("guarantees.md"), "What an outcome does")
    (sentence,) = re.findall(r"1xx, ([0-9, and]+) are forgotten", text)
    named = {int(status) for status in re.findall(r"\d+", sentence)}
    assert named | set(range(100, 200)) == NEVER_AN_OUTCOME


@pytest.mark.parametrize(
    "table",
    [idempotency_keys, idempotency_steps, idempotency_resolutions],
    ids=lambda table: table.name,
)
def test_every_column_of_a_table_is_in_the_schema_page(table: Table) -> None:
    cells = [row[0] for row in rows(section(page("schema.md"), table.name))]
    documented = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    assert documented == {column.name for column in table.columns}


@pytest.mark.parametrize("name", wsgi_idempotency.__all__)
def test_every_public_name_is_in_the_reference(name: str) -> None:
    text = page("reference.rst")
    assert re.search(
        rf"^(\.\. (auto|py:)\w+:: | +)(wsgi_idempotency\.)?{name}$", text, re.MULTILINE
    )


@pytest.mark.parametrize("name", main.commands)
def test_every_command_and_its_options_are_on_the_page_of_the_command(name: str) -> None:
    with click.Context(main) as context:
        _, command, _ = main.resolve_command(context, [name])
    assert command is not None
    text = page("command.md").partition("\n## ")[0] + section(page("command.md"), name)
    options = {
        option
        for parameter in command.params
        for option in parameter.opts
        if isinstance(parameter, click.Option)
    }
    assert {option for option in options if f"`{option}" not in text} == set()
    assert set(re.findall(r"`(--\w[\w-]*)", section(page("command.md"), name))) <= options


@pytest.mark.parametrize("name", ["settings.md", "defaults.md"])
def test_every_option_is_on_the_pages_about_options(name: str) -> None:
    """Each policy's and the middleware's; only the store has no default to explain."""
    documented = set(re.findall(r"`(\w+)`", page(name)))
    assert set(OPTIONS) - {"store", "policy", "routes"} - documented == set()


def test_the_page_of_settings_has_no_option_that_there_is_not() -> None:
    (table,) = re.findall(r"^\| setting .*?\n\n", page("settings.md"), re.DOTALL | re.MULTILINE)
    cells = [row[0] for row in rows(table)[1:]]
    assert {name for cell in cells for name in re.findall(r"`(\w+)`", cell)} == set(OPTIONS)


def test_the_version_has_its_section_in_the_change_log() -> None:
    from importlib.metadata import version

    changes = (CHECKOUT / "CHANGES.md").read_text(encoding="utf-8")
    assert f"\n## {version('wsgi-idempotency')} " in changes
