"""Options of a store that are of another type than they are for, such as a setting's text."""

from __future__ import annotations

from typing import Any

import pytest

from wsgi_idempotency import SQLStore
from wsgi_idempotency.errors import ConfigurationError


@pytest.mark.parametrize(
    "options",
    [{"timeout": "5"}, {"pool_size": "5"}, {"max_transactions": "5"}, {"prepare": "no"}],
    ids=lambda options: f"a text for {next(iter(options))}",
)
def test_a_text_is_refused(options: dict[str, Any]) -> None:
    """And never taken for what it isn't: ``prepare="no"`` would prepare."""
    with pytest.raises(ConfigurationError, match=r"use (seconds|at least|True or False)"):
        SQLStore("sqlite:///keys.db", **options)
