"""The tutorial, followed to the letter: its files written, its commands run, what they print."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import distribution, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from servers import KILL_GROUP, Watchdog, http

PAGE = Path(__file__).parent.parent / "docs" / "tutorial.md"

#: What the second terminal says when a block of it is done.
DONE = "=== done ==="

#: Where a reader's own things are, in the page's words.
ADDRESS = "127.0.0.1:8000"
DATABASE = "postgresql+psycopg://localhost/shop"


@dataclass(frozen=True)
class Block:
    """A fenced block of the page.

    :param kind: its language.
    :param caption: the file it is, or the terminal it is for.
    """

    kind: str
    caption: str
    text: str


def blocks(page: str) -> list[Block]:
    found = re.finditer(
        r"^```(?:\{code-block\} )?(\w+)\n(?::caption: ([^\n]*)\n\n)?(.*?)^```$", page, re.M | re.S
    )
    return [Block(match[1], match[2] or "", match[3]) for match in found]


class Reader:
    """Somebody with two terminals, who does what the page says.

    :param folder: an empty one.
    :param database: the URL of theirs.
    """

    def __init__(self, folder: Path, database: str) -> None:
        self._folder = folder
        self.database = database
        self._server: subprocess.Popen[bytes] | None = None
        self._logs = 0
        # One for all servers, so that they have one address; gunicorn is handed it.
        self._socket = socket.create_server(("127.0.0.1", 0))
        host, port = self._socket.getsockname()
        self._address = f"{host}:{port}"
        self.installed: list[str] = []
        (folder / ".venv").symlink_to(sys.prefix)
        environment = {name: value for name, value in os.environ.items() if "DATABASE" not in name}
        environment["GUNICORN_CMD_ARGS"] = f"--bind fd://{self._socket.fileno()}"
        self._environment = environment
        self._second = subprocess.Popen(
            ["bash"],
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def install(self, text: str) -> None:
        """The environment of this test is the one that was made and filled."""
        line = text.splitlines()[-1]
        assert line.startswith(".venv/bin/pip install ")
        self.installed = line.replace('"', "").split()[2:]

    def first_terminal(self, text: str) -> None:
        """End the server that runs, as Ctrl-C does, and start another; returns when it is ready."""
        self.end_server()
        log = self._folder / f"server-{self._logs}.log"
        self._logs += 1
        *before, last = text.replace(DATABASE, self.database).splitlines()
        with log.open("wb") as output:
            self._server = subprocess.Popen(
                ["bash", "-ec", "\n".join([*before, f"exec {last}"])],
                cwd=self._folder,
                env=self._environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=[self._socket.fileno()],
                start_new_session=True,
            )
        self._watchdog = Watchdog(KILL_GROUP, str(self._server.pid))
        deadline = time.monotonic() + http.START_TIMEOUT
        while "Booting worker" not in (said := log.read_text()):
            assert self._server.poll() is None, said
            assert time.monotonic() < deadline, said
            time.sleep(0.02)

    def second_terminal(self, text: str) -> str:
        """What it prints."""
        stdin, stdout = self._second.stdin, self._second.stdout
        assert stdin is not None
        assert stdout is not None
        text = text.replace(ADDRESS, self._address).replace(DATABASE, self.database)
        stdin.write(f"{text}\necho; echo '{DONE}'\n")
        stdin.flush()
        said = []
        for line in iter(stdout.readline, f"{DONE}\n"):
            assert line, "".join(said)
            said.append(line)
        return "".join(said)

    def end_server(self) -> None:
        if self._server is None:
            return
        if self._server.poll() is None:
            os.killpg(self._server.pid, signal.SIGINT)
            self._server.wait(30)
        self._server = None
        self._watchdog.dismiss()

    def close(self) -> None:
        try:
            self.end_server()
        finally:
            self._socket.close()
            self._second.communicate(timeout=30)


@pytest.fixture
def reader(tmp_path: Path, pg_url: str) -> Iterator[Reader]:
    with closing(Reader(tmp_path, pg_url)) as reader:
        yield reader


def as_printed(expected: str) -> str:
    """A pattern of an output; "..." stands for anything, blank lines don't count."""
    lines = [line.rstrip() for line in expected.splitlines() if line.strip()]
    parts = re.split(r"(?<!\.)\.\.\.(?!\.)", "\n".join(lines))
    return ".*".join(map(re.escape, parts))


def test_the_tutorial_does_what_it_says(reader: Reader, tmp_path: Path) -> None:
    """From an empty folder to a shop on PostgreSQL that no crash makes charge twice."""
    said, compared = "", 0
    for block in blocks(PAGE.read_text()):
        if block.kind == "python":
            (tmp_path / block.caption).write_text(block.text)
        elif block.caption == "first terminal":
            reader.first_terminal(block.text)
        elif block.caption == "second terminal":
            said = reader.second_terminal(block.text)
        elif block.kind == "sh":
            reader.install(block.text)
        else:
            lines = "\n".join(line.rstrip() for line in said.splitlines() if line.strip())
            expected = as_printed(block.text.replace(DATABASE, reader.database))
            assert re.fullmatch(expected, lines, re.S), said
            compared += 1
    assert compared > 8


def test_what_the_tutorial_installs_is_what_it_needs() -> None:
    """Each name of the pip line is one that is installed here, and the extra is one of ours."""
    [line] = re.findall(r"^\.venv/bin/pip install (.*)$", PAGE.read_text(), re.M)
    ours, *others = (
        Requirement(name) for name in line.replace('"../', "").replace('"', "").split()
    )
    assert ours.name == "wsgi-idempotency"
    extras = distribution("wsgi-idempotency").metadata.get_all("Provides-Extra", [])
    assert ours.extras <= set(extras)
    for other in others:
        assert distribution(other.name)
    assert requires("wsgi-idempotency")
