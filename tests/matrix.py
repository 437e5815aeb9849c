"""Tables of what was tested, as the documentation has them.

A test that fills a cell of one reports it; ``pytest --matrix`` prints the tables, ready for the
page. The page is also what the tests go by: a cell that says something else than the run fails.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"

#: The property of a test's report that says which cell of which table it fills.
PROPERTY = "matrix"

DONE = "yes"


@functools.cache
def documented(page: str) -> dict[str, dict[str, str]]:
    """The cells of the last table on a page, by row and column."""
    tables = re.findall(r"(?:^\|.*\n)+", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE)
    head, _, *rows = [_cells(line) for line in tables[-1].splitlines()]
    return {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rows}


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split(" | ")]


def fill(node: pytest.Item, page: str, row: str, column: str, cell: str) -> None:
    """Report what a cell of a page's table is to say."""
    node.user_properties.append((PROPERTY, (page, row, column, cell)))


def tables(reports: Iterable[pytest.TestReport]) -> dict[str, list[str]]:
    """The lines of each page's table, in the order of the tests."""
    found: dict[str, dict[str, dict[str, str]]] = {}
    for report in reports:
        for page, row, column, cell in dict.fromkeys(
            tuple(value) for name, value in report.user_properties if name == PROPERTY
        ):
            found.setdefault(page, {}).setdefault(row, {})[column] = cell
    return {page: list(_lines(rows)) for page, rows in found.items()}


def _lines(rows: dict[str, dict[str, str]]) -> Iterable[str]:
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    yield f"| case | {' | '.join(columns)} |"
    yield "|---" * (len(columns) + 1) + "|"
    for row, cells in rows.items():
        yield f"| {row} | {' | '.join(cells.get(column, '') for column in columns)} |"
