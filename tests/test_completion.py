"""What the shell completes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.shell_completion import BashComplete

from wsgi_idempotency.cli import main

COMMAND = Path(sys.executable).with_name("wsgi-idempotency")
PAGE = Path(__file__).parent.parent / "docs" / "command.md"

#: The variable of the documentation; click makes it of the command's name.
(VARIABLE,) = re.findall(r"(_\w+)=bash_source wsgi-idempotency", PAGE.read_text())


@pytest.mark.parametrize(
    ("words", "begun", "found"),
    [
        ([], "st", ["stats"]),
        (["list"], "--st", ["--state"]),
        (["list", "--state"], "l", ["live", "lapsed"]),
        (["purge"], "--for", ["--forever"]),
    ],
    ids=["a command", "an option", "a value", "an option of a command in another file"],
)
def test_a_shell_completes(words: list[str], begun: str, found: list[str]) -> None:
    completion = BashComplete(main, {}, "wsgi-idempotency", VARIABLE)
    assert [item.value for item in completion.get_completions(words, begun)] == found


def test_the_installed_command_completes_as_documented() -> None:
    environment = {
        VARIABLE: "bash_complete",
        "COMP_WORDS": "wsgi-idempotency st",
        "COMP_CWORD": "1",
    }
    done = subprocess.run(
        [COMMAND], env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    assert done.stdout == "plain,stats\n"
