"""What the shell completes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = Path(sys.executable).with_name("wsgi-idempotency")
PAGE = Path(__file__).parent.parent / "docs" / "command.md"


def complete(instruction: str, line: str = "", word: int = 0) -> str:
    """What the command prints for a shell."""
    # The variable of the documentation, which click makes of the command's name.
    (variable,) = re.findall(r"(_\w+)=bash_source wsgi-idempotency", PAGE.read_text())
    environment = {variable: instruction, "COMP_WORDS": line, "COMP_CWORD": str(word)}
    done = subprocess.run(
        [COMMAND], env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    return done.stdout


@pytest.mark.parametrize(
    ("line", "word", "found"),
    [
        ("wsgi-idempotency st", 1, ["stats"]),
        ("wsgi-idempotency list --st", 2, ["--state"]),
        ("wsgi-idempotency list --state l", 3, ["live", "lapsed"]),
        ("wsgi-idempotency purge --for", 2, ["--forever"]),
    ],
    ids=["a command", "an option", "a value", "an option of a command in another file"],
)
def test_bash_completes(line: str, word: int, found: list[str]) -> None:
    said = complete("bash_complete", line, word).splitlines()
    assert [entry.partition(",")[2] for entry in said] == found


def test_the_line_of_the_documentation_is_a_script_that_bash_understands() -> None:
    script = complete("zsh_source")
    assert "#compdef wsgi-idempotency" in script
