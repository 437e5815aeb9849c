"""What the README shows is what the examples are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_python_code_is_a_part_of_the_example() -> None:
    [code] = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert code in (ROOT / "examples" / "flask_shop.py").read_text()


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\((?!https?:)([^)#]+)", README))))
def test_a_link_leads_to_a_file_that_is_there(link: str) -> None:
    assert (ROOT / link).is_file()


@pytest.mark.parametrize(
    ("name", "path"), sorted(set(re.findall(r"\[(test_\w+\.py)\]\(([^)]+)\)", README)))
)
def test_a_promise_names_the_tests_it_links_to(name: str, path: str) -> None:
    assert path == f"tests/{name}"
