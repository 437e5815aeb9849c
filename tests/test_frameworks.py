"""The same behaviours in every framework, wrapped as its users wrap it, over sockets."""

from __future__ import annotations

import hashlib
import itertools
import re
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import matrix
import pytest
from apps.frameworks import WAYS, streamed
from apps.shop import replayed
from servers.http import Connection, Gunicorn, Response, chunked, request_bytes

EXAMPLES = Path(__file__).parent.parent / "examples"

FRAMEWORKS = {
    "Flask": "apps.frameworks.flask_app:app",
    "Pyramid": "apps.frameworks.pyramid_app:app",
    "Bottle": "apps.frameworks.bottle_app:application",
    "Django": "apps.frameworks.django_app:application",
    "Falcon": "apps.frameworks.falcon_app:application",
}

CHUNKED = ("Transfer-Encoding", "chunked")
FORM = ("Content-Type", "application/x-www-form-urlencoded")


@dataclass
class Site:
    """A framework's application under gunicorn."""

    server: Gunicorn
    runs: Path
    numbers: Iterator[int]

    def new_key(self) -> str:
        return f"key-{next(self.numbers)}"

    def post(
        self, path: str, key: str, *headers: tuple[str, str], body: bytes = b"", pieces: int = 0
    ) -> Response:
        """Send a request on a connection of its own.

        :param pieces: chunks to send the body in; 0 for a body with a length.
        """
        fields = [
            ("Idempotency-Key", key),
            ("Authorization", "Bearer alice"),
            ("Connection", "close"),
            *headers,
        ]
        with Connection(self.server.address) as connection:
            if not pieces:
                return connection.request("POST", path, fields, body)
            size = len(body) // pieces + 1
            chunks = [body[start : start + size] for start in range(0, len(body), size)]
            head = request_bytes("POST", path, [*fields, CHUNKED])
            connection.send(head + chunked(*chunks))
            return connection.receive()

    def ran(self, key: str) -> int:
        """How often a view has run for a key."""
        return self.runs.read_text().splitlines().count(key) if self.runs.exists() else 0


@pytest.fixture(scope="module", params=FRAMEWORKS)
def site(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp(request.param)
    environment = {
        "RUNS": str(folder / "runs"),
        "SHOP_DATABASE": f"sqlite:///{folder / 'shop.db'}",
        "SHOP_FILE": str(folder / "shop.db"),
        "KEYS_DATABASE": f"sqlite:///{folder / 'keys.db'}",
    }
    if request.param == "Pyramid":
        text = (EXAMPLES / "pyramid_shop.ini").read_text()
        ours = "wsgi_idempotency.contrib.pyramid"
        assert ours in text
        text = text.replace(ours, f"{ours} apps.frameworks.pyramid_views")
        (folder / "shop.ini").write_text(text)
        environment["INI"] = str(folder / "shop.ini")
    with Gunicorn(
        FRAMEWORKS[request.param],
        folder,
        workers=1,
        environment=environment,
        folders=[EXAMPLES],
    ) as server:
        yield Site(server, folder / "runs", itertools.count())


BODY = b"".join(b"line %d\r\n" % number for number in range(20_000)) + bytes(range(256))


def read_by(way: str, pieces: int) -> Callable[[Site], None]:
    def case(site: Site) -> None:
        key = site.new_key()
        answers = [site.post(f"/read/{way}", key, body=BODY, pieces=pieces) for _ in range(2)]
        assert {answer.body for answer in answers} == {hashlib.sha256(BODY).hexdigest().encode()}
        assert [replayed(answer) for answer in answers] == [False, True]
        assert site.ran(key) == 1

    return case


def a_form_is_parsed(site: Site) -> None:
    key = site.new_key()
    body = b"name=J%C3%BCrgen&amount=42"
    answers = [site.post("/form", key, FORM, body=body, pieces=n) for n in (0, 2)]
    assert [answer.body for answer in answers] == ["name=Jürgen&amount=42".encode()] * 2
    assert [replayed(answer) for answer in answers] == [False, True]
    assert site.ran(key) == 1


FILE = bytes(range(256)) * 4096 * 8  # 8 MiB


def an_upload_of_8_mib_retried_with_a_new_boundary_is_replayed(pieces: int) -> Callable:
    def case(site: Site) -> None:
        key = site.new_key()
        answers = []
        for boundary in (b"first-5f3a", b"second-91c0"):
            body = (
                b"".join(
                    b"--%s\r\n%s\r\n\r\n%s\r\n" % (boundary, head, content)
                    for head, content in (
                        (b'Content-Disposition: form-data; name="name"', b"alice"),
                        (
                            b'Content-Disposition: form-data; name="file"; filename="a.bin"\r\n'
                            b"Content-Type: application/octet-stream",
                            FILE,
                        ),
                    )
                )
                + b"--%s--\r\n" % boundary
            )
            media_type = ("Content-Type", f"multipart/form-data; boundary={boundary.decode()}")
            answers.append(site.post("/upload", key, media_type, body=body, pieces=pieces))
        assert [replayed(answer) for answer in answers] == [False, True]
        expected = hashlib.sha256(FILE).hexdigest() + "alice"
        assert {answer.body for answer in answers} == {expected.encode()}
        assert site.ran(key) == 1

    return case


def a_2xx_is_replayed(site: Site) -> None:
    key = site.new_key()
    first, again = (site.post("/status/201", key) for _ in range(2))
    assert (first.status, replayed(first), again.status, replayed(again)) == (201, False, 201, True)
    assert (again.reason, again.body) == (first.reason, first.body)
    assert again.header("Content-Type") == first.header("Content-Type")
    assert site.ran(key) == 1


def an_empty_204_is_replayed(site: Site) -> None:
    key = site.new_key()
    first, again = (site.post("/status/204", key) for _ in range(2))
    assert (again.status, replayed(again), again.body) == (204, True, b"")
    assert again.header("Content-Type") == first.header("Content-Type")
    assert site.ran(key) == 1


def a_303_is_replayed_with_its_location(site: Site) -> None:
    key = site.new_key()
    first, again = (site.post("/redirects", key) for _ in range(2))
    assert (first.status, again.status, replayed(again)) == (303, 303, True)
    assert re.fullmatch(r"(http://localhost)?/charges/1", first.header("Location") or "")
    assert again.header("Location") == first.header("Location")
    assert site.ran(key) == 1


def runs_again_after(path: str, statuses: set[int]) -> Callable[[Site], None]:
    def case(site: Site) -> None:
        key = site.new_key()
        for attempt in (1, 2):
            answer = site.post(path, key)
            assert answer.status in statuses
            assert not replayed(answer)
            assert answer.header("Content-Type") != "application/problem+json"
            assert site.ran(key) == attempt

    return case


def a_streamed_response_is_replayed_whole(site: Site) -> None:
    key = site.new_key()
    answers = [site.post("/streams", key) for _ in range(2)]
    assert {answer.body for answer in answers} == {b"".join(streamed())}
    assert [replayed(answer) for answer in answers] == [False, True]
    assert site.ran(key) == 1


def another_payload_is_refused(site: Site) -> None:
    key = site.new_key()
    answers = [site.post("/form", key, FORM, body=b"amount=%d" % n) for n in (42, 43)]
    assert [answer.status for answer in answers] == [200, 422]
    assert site.ran(key) == 1


def the_example_charges_once(site: Site) -> None:
    key, other = site.new_key(), site.new_key()
    answers = [site.post("/charges", k, FORM, body=b"amount=42") for k in (key, key, other)]
    assert {answer.status for answer in answers} == {201}
    assert answers[0].body == answers[1].body != answers[2].body
    assert [site.ran(key), site.ran(other)] == [1, 1]
    assert site.post("/charges", site.new_key(), FORM, body=b"amount=much").status == 400


CASES: dict[str, Callable[[Site], None]] = {
    "the example charges once": the_example_charges_once,
    **{
        f"a body read by {name}, {how}": read_by(way, pieces)
        for (way, name) in zip(
            WAYS, ("`read()`", "`read(n)`", "`readline()`", "iteration"), strict=True
        )
        for how, pieces in (("with a length", 0), ("chunked", 7))
    },
    "a form is parsed": a_form_is_parsed,
    "8 MiB uploaded, retried with a new boundary": (
        an_upload_of_8_mib_retried_with_a_new_boundary_is_replayed(0)
    ),
    "8 MiB uploaded chunked, retried with a new boundary": (
        an_upload_of_8_mib_retried_with_a_new_boundary_is_replayed(9)
    ),
    "another payload is refused": another_payload_is_refused,
    "a 2xx is replayed": a_2xx_is_replayed,
    "an empty 204 is replayed": an_empty_204_is_replayed,
    "a 303 is replayed with its `Location`": a_303_is_replayed_with_its_location,
    "a streamed response is replayed whole": a_streamed_response_is_replayed_whole,
    "runs again after a 4xx": runs_again_after("/status/409", {409}),
    "runs again after the framework's own 4xx": runs_again_after("/refuses", {400, 422}),
    "runs again after a 5xx": runs_again_after("/status/503", {503}),
    "runs again after an exception": runs_again_after("/raises", {500}),
}


@pytest.mark.parametrize("case", CASES)
def test_in_this_framework(request: pytest.FixtureRequest, site: Site, case: str) -> None:
    CASES[case](site)
    framework = request.node.callspec.params["site"]
    matrix.fill(request.node, "frameworks.md", case, framework, matrix.DONE)


def test_the_documented_matrix_is_what_is_tested() -> None:
    """Every cell of it is a test above; this one only compares the names."""
    cells = dict.fromkeys(FRAMEWORKS, matrix.DONE)
    assert matrix.documented("frameworks.md") == dict.fromkeys(CASES, cells)
    assert list(matrix.documented("frameworks.md")) == list(CASES)


@pytest.mark.parametrize("name", ["pyramid_shop.ini", "paste_shop.ini"])
def test_an_ini_file_of_the_examples_serves_a_shop_that_charges_once(
    name: str, tmp_path: Path
) -> None:
    """Copied to a folder of its own, since the databases are made beside it."""
    shutil.copy(EXAMPLES / name, tmp_path / name)
    with Gunicorn(
        "apps.frameworks.pyramid_app:app",
        tmp_path,
        workers=1,
        environment={"INI": str(tmp_path / name)},
        folders=[EXAMPLES],
    ) as server:
        site = Site(server, tmp_path / "runs", itertools.count())
        answers = [site.post("/charges", "k", FORM, body=b"amount=42") for _ in range(2)]
    assert [(answer.status, replayed(answer)) for answer in answers] == [(201, False), (201, True)]
    with closing(sqlite3.connect(tmp_path / "shop.db")) as shop:
        assert shop.execute("SELECT amount FROM charges").fetchall() == [(42,)]
