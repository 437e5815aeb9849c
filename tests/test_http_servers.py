"""What a client sees on the wire, on every server that people deploy.

Each test is a row of the table in docs/servers.md, each server a column. Where a server has its
own way a test says so through ``cell``, by the name of a footnote there: the page and the run
must agree on every cell, so that no deviation is left out and none is kept that is gone.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import select
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import matrix
import pytest
from apps import answers
from apps.frameworks import WAYS
from apps.gate import Gate
from apps.shop import Shop, at_gate, at_once, background, code, expect_one, replayed, until
from servers.http import (
    IN_PROCESS,
    Connection,
    Gunicorn,
    Response,
    chunked,
    request_bytes,
)
from servers.uwsgi import PROGRAM as UWSGI
from servers.uwsgi import uwsgi

from wsgi_idempotency import SQLStore
from wsgi_idempotency.schema import upgrade

PAGE = "servers.md"


@dataclass(frozen=True)
class Server:
    """A server and how it is run.

    :param options: as the server's runner takes them.
    :param at_once: how many requests it serves at the same time; None for one after the other.
    """

    runner: str
    options: Mapping[str, Any]
    one_by_one: bool = False


WARMED_UP = "apps.answers_warmed_up:app"
SERVED = "apps.answers_served:app"

SERVERS = {
    "gunicorn sync": Server("gunicorn", {"workers": 2}),
    "gunicorn gthread": Server("gunicorn", {"worker_class": "gthread", "workers": 1, "threads": 8}),
    "gunicorn gevent": Server("gunicorn", {"worker_class": "gevent", "workers": 1}),
    "gunicorn --preload": Server(
        "gunicorn", {"application": WARMED_UP, "preload": True, "workers": 2}
    ),
    "uWSGI": Server("uwsgi", {"application": WARMED_UP}),
    "waitress": Server("waitress", {}),
    "cheroot": Server("cheroot", {}),
    "werkzeug": Server("werkzeug", {"threads": 1}, one_by_one=True),
    "werkzeug threaded": Server("werkzeug", {"threads": 8}),
    "wsgiref": Server("wsgiref", {"threads": 1}, one_by_one=True),
}

KEEP_ALIVE = ("Connection", "keep-alive")

CHUNKED = ("Transfer-Encoding", "chunked")

FORM = ("Content-Type", "application/x-www-form-urlencoded")


class ServedShop(Shop):
    """The application of :mod:`apps.answers` under a server."""

    name: str
    one_by_one: bool


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(
            name,
            marks=pytest.mark.skipif(
                name == "uWSGI" and UWSGI is None, reason="pyuwsgi has no wheel for this platform"
            ),
        )
        for name in SERVERS
    ],
)
def shop(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServedShop]:
    """The application under one server after the other, for tests that use keys of their own."""
    server = SERVERS[request.param]
    folder = tmp_path_factory.mktemp("shop")
    url = f"sqlite:///{folder / 'keys.db'}"
    upgrade(url)  # there are tests that look before the first request has made the schema
    book = folder / "ledger"
    environment = {"LEDGER": str(book), "STORE": url}
    options = {"application": SERVED, **server.options}
    with ExitStack() as stack:
        if server.runner == "gunicorn":
            application = options.pop("application")
            run = Gunicorn(application, folder, environment=environment, **options)
            address = stack.enter_context(run).address
        elif server.runner == "uwsgi":
            run = uwsgi(options["application"], folder, environment=environment)
            address = stack.enter_context(run)
        else:
            store = stack.enter_context(closing(SQLStore(url)))
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            patch.setenv("LEDGER", str(book))
            app = answers.protected(store)
            run = IN_PROCESS[server.runner](app, **server.options)
            address = stack.enter_context(run)
        shop = ServedShop(address, book, url)
        shop.name, shop.one_by_one = request.param, server.one_by_one
        yield shop


class Cell:
    """What one test finds out about one server.

    :ivar notes: the documented deviations, by the names of their footnotes.
    """

    def __init__(self, notes: set[str]) -> None:
        self.notes = notes
        self.found: set[str] = set()

    def deviates(self, note: str) -> None:
        """The server has its own way, which a footnote of the page explains."""
        self.found.add(note)

    def __str__(self) -> str:
        return " ".join(f"[^{note}]" for note in sorted(self.found)) or matrix.DONE


def row_of(name: str, variant: str) -> str:
    """The row that a test fills, from its name and its parameter's id."""
    return name.removeprefix("test_").replace("_", " ") + (f": {variant}" if variant else "")


@pytest.fixture(autouse=True)
def cell(request: pytest.FixtureRequest) -> Iterator[Cell | None]:
    """The cell of the table that a test of a server fills, and which must say what it finds."""
    if "shop" not in request.fixturenames:
        yield None
        return
    shop = request.getfixturevalue("shop")
    variant = request.node.name.partition("[")[2].removesuffix("]")
    variant = variant.removeprefix(shop.name).removeprefix("-")
    row = row_of(request.node.originalname, variant)
    text = matrix.documented(PAGE).get(row, {}).get(shop.name, "")
    cell = Cell(set(text.replace("[^", "").replace("]", "").split()) - {matrix.DONE})
    yield cell
    matrix.fill(request.node, PAGE, row, shop.name, str(cell))
    assert text == str(cell), f"docs/{PAGE} has another cell for {row!r} on {shop.name}"


@pytest.fixture
def key(request: pytest.FixtureRequest) -> str:
    """A key of the test's own."""
    return hashlib.sha256(request.node.name.encode()).hexdigest()[:12]


def decodes_chunks(shop: Shop, key: str, cell: Cell) -> bool:
    """Whether the server does: what it can't end is refused."""
    with shop.connect() as connection:
        connection.send(head(key, CHUNKED, ("Connection", "close")) + chunked(b"pay"))
        response = connection.receive()
    assert response.status == 201 or code(response) == "LENGTH_REQUIRED"
    if response.status != 201:
        cell.deviates("length")
    return response.status == 201


def head(key: str, *headers: tuple[str, str], target: str = "/pay") -> bytes:
    """The head of a request whose body is sent by hand."""
    return request_bytes("POST", target, [("Idempotency-Key", key), *headers])


def exchange(shop: Shop, request: bytes) -> Response | None:
    """Send bytes on a connection of its own; None when the server ends it without an answer."""
    with shop.connect() as connection:
        connection.send(request)
        try:
            return connection.receive()
        except (ConnectionError, ValueError):
            return None


def closing_head(key: str, *headers: tuple[str, str], target: str = "/pay") -> bytes:
    return head(key, ("Connection", "close"), *headers, target=target)


class Client:
    """A client that keeps its connection for as long as the server does."""

    def __init__(self, shop: ServedShop, cell: Cell) -> None:
        self._shop = shop
        self._cell = cell
        self._connection: Connection | None = None

    def post(self, key: str, *headers: tuple[str, str]) -> Response:
        if self._connection is None:
            self._connection = self._shop.connect()
        fields = [("Idempotency-Key", key), KEEP_ALIVE, *headers]
        response = self._connection.request("POST", "/pay", fields, b"pay")
        default = "keep-alive" if response.version == "HTTP/1.1" else "close"
        closes = (response.header("Connection") or default).lower() == "close"
        if not closes and self._cell.notes & {"closes"}:
            closes = True
            self._cell.deviates("closes")
        if closes:
            assert self._connection.at_end(), "more came than the response that was announced"
            self.close()
        return response

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


@pytest.mark.parametrize(
    "status",
    [
        "204 No Content",
        "205 Reset Content",
        "303 See Other",
        "304 Not Modified",
        "201 Created",
    ],
)
def test_a_response_without_a_body_is_replayed_and_the_connection_stays_in_step(
    shop: ServedShop, cell: Cell, key: str, status: str
) -> None:
    """What follows on the same connection is the next response, from its first byte on."""
    with closing(Client(shop, cell)) as client:
        first = client.post(key, ("X-Status", status), ("X-Size", "0"))
        again = client.post(key)
        third = client.post(key)
        other = client.post(f"{key}-other")
    for response in (first, again, third):
        assert f"{response.status} {response.reason}" == status
        assert response.body == b""
    assert (replayed(first), replayed(again), replayed(third)) == (False, True, True)
    assert again.header("Location") == first.header("Location")
    assert again.header("ETag") == first.header("ETag")
    assert again.header("Content-Type") == first.header("Content-Type")
    assert again.header("Transfer-Encoding") is None
    if status[:3] in ("204", "304"):
        # wsgiref alone adds one.
        assert again.header("Content-Length") == first.header("Content-Length")
    else:
        assert again.header("Content-Length") == "0"
    assert (other.status, replayed(other)) == (201, False)
    assert len(shop.executions(key)) == len(shop.executions(f"{key}-other")) == 1


def test_a_body_of_10_mb_is_the_same_with_a_length_and_in_chunks(
    shop: ServedShop, cell: Cell, key: str
) -> None:
    """Also in chunks of other sizes; and one byte makes another request of it."""
    body = os.urandom(10_000_000)
    first = shop.post(key, body=body)
    assert first.status == 201
    chunks = decodes_chunks(shop, f"{key}-chunks", cell)
    for size in (1 << 20, 65_537):
        pieces = [body[start : start + size] for start in range(0, len(body), size)]
        with shop.connect() as connection:
            connection.send(head(key, CHUNKED) + (chunked(*pieces) if chunks else b""))
            again = connection.receive()
        if chunks:
            assert (replayed(again), again.body) == (True, first.body)
        else:
            assert (again.status, code(again)) == (411, "LENGTH_REQUIRED")
    assert replayed(shop.post(key, body=body))
    assert code(shop.post(key, body=body[:-1] + bytes([body[-1] ^ 1]))) == "FINGERPRINT_MISMATCH"
    assert len(shop.executions(key)) == 1


def test_no_body_and_an_empty_one_are_the_same(shop: ServedShop, cell: Cell, key: str) -> None:
    requests = [
        head(key),
        head(key, ("Content-Length", "0")),
    ]
    if decodes_chunks(shop, f"{key}-chunks", cell):
        requests.append(head(key, CHUNKED) + chunked())
    answers = []
    for request in requests:
        with shop.connect() as connection:
            connection.send(request)
            answers.append(connection.receive())
    assert [replayed(answer) for answer in answers] == [False] + [True] * (len(answers) - 1)
    assert {answer.status for answer in answers} == {201}
    assert len(shop.executions(key)) == 1


#: Uploads that are not whole.
PARTS = {
    "nothing of a body with a length": (("Content-Length", "100000"), b""),
    "half of a body with a length": (("Content-Length", "100000"), b"x" * 50_000),
    "all but a byte of a body with a length": (("Content-Length", "100000"), b"x" * 99_999),
    "nothing of a chunked body": (CHUNKED, b""),
    "the middle of a chunk's size": (CHUNKED, b"5\r\nhello\r\n1"),
    "the middle of a chunk": (CHUNKED, b"5\r\nhello\r\n5\r\nwor"),
    "the end of a chunk": (CHUNKED, b"5\r\nhello\r\n5\r\nworld\r\n"),
}


def hang_up(connection: Connection) -> None:
    """End our side, and wait until the server has ended its own: it is done with us then."""
    connection.socket.shutdown(socket.SHUT_WR)
    while connection.socket.recv(65536):
        pass
    connection.close()


@pytest.mark.parametrize("leave", [hang_up, Connection.abort], ids=["hangs up", "resets"])
def test_nothing_runs_for_a_client_that_left_before_its_body_was_whole(
    shop: ServedShop, cell: Cell, key: str, leave: Callable[[Connection], None]
) -> None:
    """Its operation is not even claimed: the same key with the whole body is the first."""
    chunks = decodes_chunks(shop, f"{key}-chunks", cell)
    for number, (length, sent) in enumerate(PARTS.values()):
        ours = f"{key}-{number}"
        connection = shop.connect()
        # What the server wouldn't read it would take for the next request.
        connection.send(head(ours, length) + (sent if chunks or length != CHUNKED else b""))
        leave(connection)
        assert shop.executions(ours) == []
        assert ours not in {row["idempotency_key"] for row in shop.rows()}
        whole = shop.post(ours)
        assert (whole.status, replayed(whole)) == (201, False)
        assert shop.attempts(ours) == [1]


def replay_of(shop: ServedShop, key: str) -> Response:
    """The replay, as soon as the operation is done."""

    def ask() -> Response | None:
        response = shop.post(key)
        assert response.status == 201 or code(response) == "CONFLICT"
        return response if response.status == 201 else None

    response = until(ask)
    assert replayed(response)
    return response


def test_what_a_client_did_not_wait_for_is_recorded(
    shop: ServedShop, cell: Cell, key: str, gate: Gate
) -> None:
    """It left while the handler ran; its retry gets the response."""
    connection = shop.connect()
    connection.send(head(key, at_gate(gate), ("Content-Length", "3")) + b"pay")
    running = gate.arrival()
    connection.abort()
    running.let_pass()
    response = replay_of(shop, key)
    [execution] = shop.executions(key)
    assert execution["execution"].encode() in response.body
    assert execution["attempt"] == 1


def test_what_a_client_did_not_read_to_its_end_is_recorded(
    shop: ServedShop, cell: Cell, key: str
) -> None:
    """It left after the first bytes of a response that no socket's buffer holds; its retry
    gets all of it."""
    size = 4_000_000
    connection = shop.connect()
    connection.send(head(key, ("X-Size", str(size)), ("Content-Length", "3")) + b"pay")
    assert connection.socket.recv(100)
    connection.abort()
    response = replay_of(shop, key)
    [execution] = shop.executions(key)
    assert len(response.body) == size
    assert execution["execution"].encode() in response.body


# ------------------------------------------------------------------ keys


def test_a_key_may_be_quoted_or_bare(shop: ServedShop, key: str) -> None:
    for number, (first, again, stored) in enumerate(
        [
            (f'"{key}"', key, key),
            (f'"{key}-1";v=1', f'"{key}-1"', f"{key}-1"),
            (f"  {key}-2 ", f'"{key}-2"', f"{key}-2"),
            (f'"a\\"{key}\\\\"', f'"a\\"{key}\\\\";w', f'a"{key}\\'),
        ]
    ):
        answers = [shop.post(sent) for sent in (first, again)]
        assert [replayed(answer) for answer in answers] == [False, True], number
        assert stored in {row["idempotency_key"] for row in shop.rows()}


def test_keys_as_sdks_make_them_are_accepted(shop: ServedShop, key: str) -> None:
    unique = "0a1b2c3d-4e5f-4a6b-8c7d-" + key
    for sent in (unique, f"stripe-node-retry-{unique}", f"stainless-python-retry-{unique}",
                 f"auto_{unique}", f'"{unique}-q"'):  # fmt: skip
        answers = [shop.post(sent) for _ in range(2)]
        assert [(answer.status, replayed(answer)) for answer in answers] == [
            (201, False),
            (201, True),
        ]


def test_keys_that_differ_in_case_are_two(shop: ServedShop, key: str) -> None:
    answers = [shop.post(sent) for sent in (f"{key}-a", f"{key}-A")]
    assert [(answer.status, replayed(answer)) for answer in answers] == [(201, False)] * 2


def test_a_key_that_is_too_long_is_refused(shop: ServedShop, key: str) -> None:
    longest = key.ljust(256, "k")
    assert shop.post(longest).status == 201
    for size in (257, 2000):
        assert code(shop.post(key.ljust(size, "k"))) == "KEY_TOO_LONG"
    assert {len(line["key"]) for line in shop.executions() if line["key"].startswith(key)} == {256}


@pytest.mark.parametrize("size", [20_000, 100_000], ids=["20 KB", "100 KB"])
def test_a_head_that_no_server_need_take_never_runs(
    shop: ServedShop, cell: Cell, key: str, size: int
) -> None:
    before = len(shop.lines)
    answer = exchange(shop, closing_head(key.ljust(size, "k"), ("Content-Length", "3")) + b"pay")
    if answer is None:
        cell.deviates("hangs-up")
    elif code(answer) != "KEY_TOO_LONG":
        assert 400 <= answer.status < 500
        cell.deviates("refuses")
    assert len(shop.lines) == before


def test_a_malformed_key_is_refused(shop: ServedShop) -> None:
    before = len(shop.lines)
    for sent in ("", '""', "   ", '"  "', '"open', '"\\n"', 'a"b', "a,b", "a b", "\xe9", '"\xe9"',
                 "\xff\xfe", '"a", "b"', '"a" b'):  # fmt: skip
        answer = shop.post(sent)
        assert (answer.status, code(answer)) == (400, "INVALID_KEY"), repr(sent)
    assert len(shop.lines) == before


def test_a_key_in_two_fields_is_refused(shop: ServedShop, cell: Cell, key: str) -> None:
    for fields in ((key, key), (key, f"{key}-2"), (f'"{key}"', f'"{key}-2"')):
        answer = shop.post(fields[0], ("Idempotency-Key", fields[1]))
        if code(answer) != "INVALID_KEY":
            cell.deviates("last")
    sent = {*shop.attempts(key), *shop.attempts(f"{key}-2")}
    assert sent == ({1} if "last" in cell.found else set())


@pytest.mark.parametrize(
    "sent",
    [b"a\0b", b"a\x01b", b"a\x7fb", b"a\r\n b", b"a\nb", b"a\rb"],
    ids=["NUL", "a control character", "DEL", "a folded line", "a bare LF", "a bare CR"],
)
def test_a_key_with_bytes_that_http_forbids_never_runs(
    shop: ServedShop, cell: Cell, key: str, sent: bytes
) -> None:
    before = len(shop.lines)
    request = closing_head(f"{key}KEY", ("Content-Length", "3")) + b"pay"
    answer = exchange(shop, request.replace(b"KEY", sent))
    if answer is None:
        cell.deviates("hangs-up")
    elif answer.status == 201:
        [line] = [line for line in shop.lines[before:] if line["what"] == "begun"]
        cell.deviates({"b": "folded", f"{key}a": "cuts"}[line["key"]])
        return
    elif code(answer) != "INVALID_KEY":
        assert 400 <= answer.status < 500
        cell.deviates("refuses")
    assert len(shop.lines) == before


def test_a_field_spelled_with_an_underscore_replaces_none(
    shop: ServedShop, cell: Cell, key: str
) -> None:
    """CGI has one name for both spellings, so that somebody who may only send the one could
    pass for the other."""
    alone = exchange(
        shop,
        request_bytes("POST", "/pay", [("Idempotency_Key", key), ("Connection", "close")], b"pay"),
    )
    assert alone is not None
    if shop.attempts(key) == [1]:
        cell.deviates("underscore")
    else:
        assert alone.status == 400 or shop.lines[-2]["key"] is None
        assert key not in {row["idempotency_key"] for row in shop.rows()}
    for number, names in enumerate(
        [("Idempotency-Key", "Idempotency_Key"), ("Idempotency_Key", "Idempotency-Key")]
    ):
        fields = [(name, f"{key}-{number}{name[11]}") for name in names]
        answer = exchange(
            shop, request_bytes("POST", "/pay", [*fields, ("Connection", "close")], b"pay")
        )
        assert answer is not None
        assert answer.status == 201 or 400 <= answer.status < 500
        if shop.executions(f"{key}-{number}_"):
            cell.deviates("overrides")


def test_other_methods_pass_untouched(shop: ServedShop, key: str) -> None:
    for method in ("GET", "HEAD", "PUT", "DELETE", "OPTIONS"):
        for _ in range(2):
            with shop.connect() as connection:
                fields = [("Idempotency-Key", key), ("Connection", "close")]
                answer = connection.request(method, "/pay", fields, b"")
            assert answer.status in (200, 201)
            assert not replayed(answer)
    assert set(shop.attempts(key)) == {None}
    assert key not in {row["idempotency_key"] for row in shop.rows()}


# ------------------------------------------------------------------ replays


def shaped(shop: Shop, key: str, shape: str) -> Response:
    return shop.post(key, ("X-Shape", shape))


def kept(response: Response) -> list[tuple[str, str]]:
    """The fields that are the application's, in order."""
    names = {name.lower() for name, _ in answers.KEPT}
    return [pair for pair in response.headers if pair[0].lower() in names]


def test_a_replay_is_what_was_sent_byte_for_byte(shop: ServedShop, cell: Cell, key: str) -> None:
    first, again = (shaped(shop, key, "an artifact") for _ in range(2))
    for answer in (first, again):
        assert f"{answer.status} {answer.reason}" == "201 Made It"
        assert answer.body == answers.ARTIFACT
        assert answer.header("Content-Length") == str(len(answers.ARTIFACT))
        if kept(answer) != answers.KEPT:
            assert kept(answer) == sorted((name.title(), value) for name, value in answers.KEPT)
            cell.deviates("sorts")
    assert (replayed(first), replayed(again)) == (False, True)
    assert shop.attempts(key) == [1]


def test_what_is_of_one_request_or_message_is_not_replayed(
    shop: ServedShop, cell: Cell, key: str
) -> None:
    first, again = (shaped(shop, key, "of one request") for _ in range(2))
    sent = [pair for pair in first.headers if pair[0] in dict(answers.OF_THE_REQUEST)]
    assert sorted(sent) == sorted(answers.OF_THE_REQUEST)
    assert [name for name, _ in answers.OF_THE_REQUEST if again.all(name)] == []
    assert again.body == first.body
    for answer in (first, again):
        dates = len(answer.all("Date"))
        assert dates <= 1
        if not dates:
            cell.deviates("date")


def test_a_2xx_or_3xx_is_kept_a_4xx_forgotten_and_a_5xx_released(
    shop: ServedShop, key: str
) -> None:
    for status, again, other in (
        ("299 Fine", ("299", True), "FINGERPRINT_MISMATCH"),
        ("303 See Other", ("303", True), "FINGERPRINT_MISMATCH"),
        ("400 Bad", ("201", False), "FINGERPRINT_MISMATCH"),
        ("500 Oh", ("201", False), "FINGERPRINT_MISMATCH"),
    ):
        ours = f"{key}-{status[:3]}"
        assert shop.post(ours, ("X-Status", status)).status == int(status[:3])
        if status[0] == "5":
            assert code(shop.post(ours, body=b"other")) == other
        answer = shop.post(ours)
        assert (str(answer.status), replayed(answer)) == again
        assert code(shop.post(ours, body=b"other")) == other
    corrected = [shop.post(f"{key}-c", ("X-Status", "422 No"), body=b"wrong"),
                 shop.post(f"{key}-c", body=b"right")]  # fmt: skip
    assert [answer.status for answer in corrected] == [422, 201]


@pytest.mark.parametrize("way", WAYS)
def test_the_application_reads_the_body_in_its_own_way(
    shop: ServedShop, cell: Cell, key: str, way: str
) -> None:
    body = b"".join(b"line %d\n" % number for number in range(10_000)) + bytes(range(256))
    expected = hashlib.sha256(body).hexdigest().encode()
    answers = [shop.post(key, ("X-Read", way), body=body)]
    if decodes_chunks(shop, f"{key}-chunks", cell):
        request = closing_head(key, ("X-Read", way), CHUNKED) + chunked(body[:99], body[99:])
        again, other = exchange(shop, request), exchange(shop, request.replace(b"Key: ", b"Key: c"))
        assert again is not None
        assert replayed(again)
        answers += [again, other]
    assert {answer.body for answer in answers if answer is not None} == {expected}


# ------------------------------------------------------------------ fingerprints


def test_another_body_query_or_media_type_is_another_request(shop: ServedShop, key: str) -> None:
    def post(target: str = "/pay?a=1", media_type: str = FORM[1], body: bytes = b"a=1") -> Response:
        fields = ("Content-Type", media_type), ("Content-Length", str(len(body)))
        answer = exchange(shop, closing_head(key, *fields, target=target) + body)
        assert answer is not None
        return answer

    assert not replayed(post())
    for other in (
        post(body=b"a=2"),
        post(target="/pay?a=2"),
        post(target="/pay"),
        post(media_type="text/plain"),
    ):
        assert (other.status, code(other)) == (422, "FINGERPRINT_MISMATCH")
    assert replayed(post())
    assert replayed(post(media_type="Application/X-WWW-Form-urlencoded"))
    assert shop.attempts(key) == [1]


def test_where_path_and_key_meet_makes_a_difference(shop: ServedShop, key: str) -> None:
    requests = [(f"/{key}", "b:c"), (f"/{key}:b", "c"), (f"/{key}:", "b:c"), (f"/{key}", "bc")]
    for target, sent in requests:
        answer = exchange(shop, closing_head(sent, ("Content-Length", "0"), target=target))
        assert answer is not None
        assert (answer.status, replayed(answer)) == (201, False)


def test_requests_are_the_same_if_the_application_sees_one_path(shop: ServedShop, key: str) -> None:
    """However it is spelled: with percent-encoding, doubled slashes, dots or a host in front."""
    seen: dict[str, str] = {}
    for target in ("/a/b", "/a%2Fb", "/a%2fb", "/%61/b", "/a//b", "//a/b", "/a/./b", "/a/x/../b",
                   "/a/b/", "/a/b;v=1", "/A/b", "http://elsewhere.example/a/b", "/a/%C3%A9",
                   "/a/%FF", "/a/%00"):  # fmt: skip
        answer = exchange(shop, closing_head(key, ("Content-Length", "0"), target=target))
        assert answer is not None, target
        if answer.status == 400 and answer.header("X-Path") is None:
            continue  # the server has none of it
        assert answer.status == 201, target
        path = answer.header("X-Path")
        assert path is not None
        assert replayed(answer) == (path in seen.values()), (target, seen)
        seen[target] = path
    assert "/a/b" in seen
    assert len(shop.executions(key)) == len(set(seen.values()))


def test_bytes_in_a_target_that_are_not_ascii_break_nothing(
    shop: ServedShop, cell: Cell, key: str
) -> None:
    request = closing_head(key, ("Content-Length", "0"), target="/caf\xc3\xa9?q=\xff")
    answers = [exchange(shop, request) for _ in range(2)]
    assert None not in answers
    if answers[0].status == 400 and not code(answers[0]):
        cell.deviates("refuses")
        assert shop.executions(key) == []
    else:
        assert [(answer.status, replayed(answer)) for answer in answers] == [
            (201, False),
            (201, True),
        ]


def test_a_multipart_body_with_a_new_boundary_is_the_same(shop: ServedShop, key: str) -> None:
    def body(boundary: str, amount: str = "42") -> bytes:
        return (
            f'--{boundary}\r\nContent-Disposition: form-data; name="amount"\r\n\r\n{amount}\r\n'
            f"--{boundary}--\r\n"
        ).encode()

    answers = [
        shop.post(
            key,
            ("Content-Type", f"multipart/form-data; boundary={boundary}"),
            body=body(boundary, amount),
        )
        for boundary, amount in (("first", "42"), ("second", "42"), ("third", "43"))
    ]
    assert [(answer.status, replayed(answer)) for answer in answers] == [
        (201, False),
        (201, True),
        (422, False),
    ]


def test_json_in_another_order_is_another_request(shop: ServedShop, key: str) -> None:
    media_type = ("Content-Type", "application/json")
    answers = [
        shop.post(key, media_type, body=body)
        for body in (b'{"a":1,"b":2}', b'{"b":2,"a":1}', b'{"a":1,"b":2}')
    ]
    assert [(answer.status, replayed(answer)) for answer in answers] == [
        (201, False),
        (422, False),
        (201, True),
    ]


def test_a_compressed_body_is_compared_as_it_was_sent(shop: ServedShop, key: str) -> None:
    """Compressed again at another second it has other bytes."""
    encoded = ("Content-Encoding", "gzip")
    bodies = [gzip.compress(b"pay" * 999, mtime=mtime) for mtime in (1, 1, 2)]
    answers = [shop.post(key, encoded, body=body) for body in bodies]
    assert [(answer.status, replayed(answer)) for answer in answers] == [
        (201, False),
        (201, True),
        (422, False),
    ]


def test_what_changes_with_each_try_changes_nothing(shop: ServedShop, key: str) -> None:
    answers = [
        shop.post(
            key,
            ("User-Agent", f"client/{number}"),
            ("traceparent", f"00-{number:032x}-{number:016x}-01"),
            ("X-Stainless-Retry-Count", str(number)),
        )
        for number in range(1, 4)
    ]
    assert [replayed(answer) for answer in answers] == [False, True, True]


def test_an_extractor_that_raises_refuses(shop: ServedShop, key: str) -> None:
    answer = shop.post(key, ("X-Scope", "raises"))
    assert (answer.status, code(answer)) == (500, "EXTRACTOR_FAILED")
    assert shop.executions(key) == []


# ------------------------------------------------------------------ at the same time


def test_a_duplicate_in_flight_is_refused_at_once(
    shop: ServedShop, cell: Cell, key: str, gate: Gate
) -> None:
    """And so is another request with its key, without waiting for the first."""
    with background(partial(shop.post, key, at_gate(gate))) as first:
        running = gate.arrival()
        same, other = partial(shop.post, key), partial(shop.post, key, body=b"other")
        if shop.one_by_one:
            cell.deviates("one")
            with shop.connect() as connection:
                connection.send(closing_head(key, ("Content-Length", "3")) + b"pay")
                assert select.select([connection.socket], [], [], 0.2)[0] == []
                running.let_pass()
                assert replayed(connection.receive())
            assert code(other()) == "FINGERPRINT_MISMATCH"
        else:
            assert code(same()) == "CONFLICT"
            assert code(other()) == "FINGERPRINT_MISMATCH"
            running.let_pass()
        assert first().status == 201
    assert replayed(shop.post(key))
    assert shop.attempts(key) == [1]


def test_of_duplicates_at_once_one_runs(shop: ServedShop, key: str) -> None:
    expect_one(at_once(16, lambda _: shop.post(key)))
    assert shop.attempts(key) == [1]


# ------------------------------------------------------------------ every way to answer

WHOLE = [
    "a list", "a tuple", "a generator", "an iterator to close", "a file", "write alone",
    "write and a list", "a late start", "a restart",
]  # fmt: skip


def test_every_way_to_answer_is_replayed(shop: ServedShop, key: str) -> None:
    for number, shape in enumerate(WHOLE):
        ours = f"{key}-{number}"
        first, again = (shaped(shop, ours, shape) for _ in range(2))
        assert first.body == again.body == b"".join(answers.PIECES), shape
        assert (first.status, replayed(first)) == (201, False), shape
        assert (again.status, replayed(again)) == (201, True), shape
        assert kept(again) == kept(first), shape
        assert again.header("X-Not") is None
        assert shop.attempts(ours) == [1]
    closed = [line["key"] for line in shop.lines if line["what"] == "closed"]
    assert closed.count(f"{key}-{WHOLE.index('an iterator to close')}") == 1


@pytest.mark.parametrize("shape", ["no start", "a failure after three pieces"])
def test_an_application_that_fails_is_closed_and_runs_again(
    shop: ServedShop, key: str, shape: str
) -> None:
    request = closing_head(key, ("X-Shape", shape), ("Content-Length", "3")) + b"pay"
    for attempt in (1, 2):
        answer = exchange(shop, request)
        assert answer is None or answer.status == 500
        assert shop.attempts(key) == list(range(1, attempt + 1))
    assert [line["key"] for line in shop.lines if line["what"] == "closed"].count(key) == 2


def test_a_header_that_can_not_be_sent_never_runs_again(
    shop: ServedShop, cell: Cell, key: str
) -> None:
    shape = ("X-Shape", "a newline in a header")
    request = closing_head(key, shape, ("Content-Length", "3")) + b"pay"
    first = exchange(shop, request)
    if first is not None and first.all("Set-Cookie"):
        cell.deviates("splits")
    assert code(shop.post(key, shape)) == "RESPONSE_NOT_REPLAYABLE"
    assert shop.attempts(key) == [1]


@pytest.mark.parametrize("shape", ["a large generator", "a large file"])
def test_a_response_over_the_limit_arrives_whole_and_never_runs_again(
    shop: ServedShop, key: str, shape: str
) -> None:
    first, again = (shaped(shop, key, shape) for _ in range(2))
    assert len(first.body) == answers.LARGE
    assert first.body[::50_000] == bytes(number % 256 for number in range(100))
    assert (again.status, code(again)) == (409, "RESPONSE_NOT_REPLAYABLE")
    assert (json.loads(again.body)["original_status"], again.header("Location")) == (
        201,
        "/orders/1",
    )
    assert shop.attempts(key) == [1]
    until(lambda: shape == "a large file" or key in closed_keys(shop))


def closed_keys(shop: Shop) -> list[str]:
    return [line["key"] for line in shop.lines if line["what"] == "closed"]


def test_an_event_stream_arrives_event_by_event(
    shop: ServedShop, cell: Cell, key: str, gate: Gate
) -> None:
    """The first is there while the application waits to send the second."""
    fields = ("X-Shape", "events"), ("X-Second-Event", gate.address), ("Content-Length", "0")
    with shop.connect() as connection:
        connection.send(closing_head(key, *fields))
        received = b""
        while b"data: first\n\n" not in received:
            received += connection.socket.recv(65536)
        gate.arrival().let_pass()
        while b"data: last\n\n" not in received:
            received += connection.socket.recv(65536)
    again = exchange(shop, closing_head(key, *fields))
    assert again is not None
    assert (again.status, code(again)) == (409, "RESPONSE_NOT_REPLAYABLE")
    assert shop.attempts(key) == [1]


def test_what_the_application_puts_into_the_environ_is_seen_outside(
    shop: ServedShop, key: str
) -> None:
    first, again = (shop.post(key) for _ in range(2))
    assert first.header("X-Seen-Outside") == "what the application left"
    assert again.header("X-Seen-Outside") == "nothing"


def test_wrapped_twice_it_runs_and_claims_once(shop: ServedShop, key: str) -> None:
    requests = closing_head(key, ("Content-Length", "3"), target="/twice") + b"pay"
    first, again = (exchange(shop, requests) for _ in range(2))
    assert first is not None
    assert again is not None
    assert (replayed(first), replayed(again)) == (False, True)
    assert shop.attempts(key) == [1]
    assert len([row for row in shop.rows() if row["idempotency_key"] == key]) == 1


# ------------------------------------------------------------------ odd clients


def test_a_client_that_waits_to_be_told_to_go_on_sends_its_body(
    shop: ServedShop, cell: Cell, key: str
) -> None:
    """RFC 9110 section 10.1.1: ``Expect: 100-continue``."""
    for again in (False, True):
        with shop.connect() as connection:
            expect = ("Expect", "100-continue"), ("Content-Length", "3")
            connection.send(closing_head(key, *expect))
            patience = 0.2 if "silent" in cell.notes else 30
            if select.select([connection.socket], [], [], patience)[0]:
                interim = connection.socket.recv(25, socket.MSG_PEEK)
                assert interim.startswith(b"HTTP/1.1 100 ")
            else:
                cell.deviates("silent")
            connection.send(b"pay")
            answer = connection.receive()
        assert (answer.status, replayed(answer)) == (201, again)
    assert shop.attempts(key) == [1]


def test_a_client_that_waits_to_be_told_to_go_on_is_told_to_stop(
    shop: ServedShop, key: str
) -> None:
    """What is refused for its head is not asked for its body, or the body is not waited for."""
    with shop.connect() as connection:
        connection.send(closing_head("a,b", ("Expect", "100-continue"), ("Content-Length", "3")))
        reader = connection.socket.makefile("rb")
        with reader:
            if b" 100 " in (line := reader.readline()):
                connection.send(b"pay")
            while b" 100 " in line:
                assert reader.readline() == b"\r\n"
                line = reader.readline()
            assert line.split()[1] == b"400"


def test_a_client_of_http_1_0_is_served(shop: ServedShop, key: str) -> None:
    request = closing_head(key, ("Content-Length", "3")) + b"pay"
    answers = [exchange(shop, request.replace(b"HTTP/1.1", b"HTTP/1.0", 1)) for _ in range(2)]
    assert [(answer.status, replayed(answer)) for answer in answers if answer] == [
        (201, False),
        (201, True),
    ]


def test_requests_sent_without_waiting_are_answered_in_order(
    shop: ServedShop, cell: Cell, key: str
) -> None:
    """RFC 9112 section 9.3.2: a client may pipeline, and send again what got no answer."""
    keys = [key, key, f"{key}-2", key]
    requests = [head(sent, ("Content-Length", "3"), KEEP_ALIVE) + b"pay" for sent in keys]
    received: list[Response] = []
    with shop.connect() as connection:
        connection.send(b"".join(requests))
        connection.socket.shutdown(socket.SHUT_WR)
        try:
            while not connection.at_end():
                received.append(connection.receive())
        except ConnectionError:
            pass
    if len(received) < len(keys):
        cell.deviates("no-pipeline")
        assert len(received) == 1
    assert [replayed(answer) for answer in received] == [False, True, False, True][: len(received)]
    answers = [shop.post(sent) for sent in keys]
    assert {answer.status for answer in answers} == {201}
    assert shop.attempts(key) == shop.attempts(f"{key}-2") == [1]


SMUGGLED = b"POST /pay HTTP/1.1\r\nHost: x\r\nIdempotency-Key: %s\r\nContent-Length: 0\r\n\r\n"


def test_a_body_that_was_refused_unread_is_not_taken_for_the_next_request(
    shop: ServedShop, cell: Cell, key: str
) -> None:
    body = SMUGGLED % f"{key}-smuggled".encode()
    for bad in ("a,b", key.ljust(300, "k")):
        refused = head(bad, ("Content-Length", str(len(body))), KEEP_ALIVE) + body
        with shop.connect() as connection:
            connection.send(refused)
            answer = connection.receive()
            assert answer.status == 400
            connection.send(head(f"{key}-{len(bad)}", ("Content-Length", "3"), KEEP_ALIVE) + b"pay")
            if answer.version == "HTTP/1.0" or "close" in answer.all("Connection"):
                continue
            try:
                following = connection.receive()
            except ConnectionError:
                continue  # the server has closed it without a word
            assert (following.status, replayed(following)) == (201, False)
            assert shop.attempts(f"{key}-{len(bad)}") == [1]
    assert shop.executions(f"{key}-smuggled") == []


@pytest.mark.parametrize(
    "fields",
    [
        [("Content-Length", "3"), ("Content-Length", "5")],
        [("Content-Length", "5"), ("Content-Length", "3")],
        [("Content-Length", "3, 5")],
        [("Content-Length", "3"), CHUNKED],
        [("Content-Length", "+3")],
        [("Content-Length", "-1")],
        [("Content-Length", "0x3")],
        [("Content-Length", "3 ")],
    ],
    ids=["3 and 5", "5 and 3", "3, 5", "3 and chunked", "+3", "-1", "0x3", "3 and a blank"],
)
def test_a_length_that_can_be_read_in_two_ways_runs_in_one_at_most(
    shop: ServedShop, cell: Cell, key: str, fields: list[tuple[str, str]]
) -> None:
    """RFC 9112 section 6.3 has it refused, but for a chunked body, whose chunks count."""
    body = chunked(b"pay") if CHUNKED in fields else b"paynow"
    answer = exchange(shop, closing_head(key, *fields) + body)
    ran = [line["body"] for line in shop.executions(key)]
    if answer is None:
        cell.deviates("hangs-up")
    elif answer.status == 201:
        [found] = ran
        if CHUNKED in fields or fields == [("Content-Length", "3 ")]:
            assert found == hashlib.sha256(b"pay").hexdigest()
            return
        lengths = [int(value) for _, value in fields]
        digests = [hashlib.sha256(body[:length]).hexdigest() for length in lengths]
        cell.deviates(["first-length", "last-length"][digests.index(found)])
        return
    else:
        assert 400 <= answer.status < 500
    assert ran == []


def test_what_follows_the_last_chunk_is_not_the_body_and_no_header(
    shop: ServedShop, cell: Cell, key: str
) -> None:
    """RFC 9110 section 6.5.1: a trailer field must not be taken for a header field."""
    if not decodes_chunks(shop, f"{key}-chunks", cell):
        return
    first = shop.post(key)
    trailer = f"Idempotency-Key: {key}-trailer\r\nX-Shape: no start\r\n\r\n".encode()
    again = exchange(shop, closing_head(key, CHUNKED) + b"3;ext=1\r\npay\r\n0\r\n" + trailer)
    if again is None or again.status == 400:
        cell.deviates("trailers")
    else:
        assert (replayed(again), again.body) == (True, first.body)
    assert shop.attempts(key) == [1]
    assert shop.executions(f"{key}-trailer") == []


def test_an_upload_byte_by_byte_is_one_request(shop: ServedShop, key: str) -> None:
    with shop.connect() as connection:
        connection.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in closing_head(key, ("Content-Length", "30")) + b"x" * 30:
            connection.send(bytes([byte]))
        answer = connection.receive()
    assert (answer.status, replayed(answer)) == (201, False)
    assert replayed(shop.post(key, body=b"x" * 30))


def test_an_upload_that_stalls_keeps_nobody_from_its_key(
    shop: ServedShop, cell: Cell, key: str
) -> None:
    with shop.connect() as stalled:
        stalled.send(closing_head(key, ("Content-Length", "3")) + b"p")
        if shop.one_by_one:
            cell.deviates("one")
        else:
            answer = shop.post(key)
            assert (answer.status, replayed(answer)) == (201, False)
        stalled.send(b"ay")
        answer = stalled.receive()
    assert (answer.status, replayed(answer)) == (201, not shop.one_by_one)
    assert shop.attempts(key) == [1]


# ------------------------------------------------------------------ the page


def test_the_page_has_no_row_and_no_server_that_is_not_tested() -> None:
    ours = globals()
    for row, cells in matrix.documented(PAGE).items():
        name = "test_" + row.partition(": ")[0].replace(" ", "_")
        assert callable(ours.get(name)), row
        assert list(cells) == list(SERVERS), row


def test_each_footnote_of_the_page_is_used() -> None:
    text = (matrix.DOCS / PAGE).read_text(encoding="utf-8")
    cells = " ".join(cell for cells in matrix.documented(PAGE).values() for cell in cells.values())
    used = {name.strip("[^]") for name in cells.split() if name.startswith("[^")}
    explained = [line.partition("]")[0][2:] for line in text.splitlines() if "]:" in line]
    assert sorted(used) == sorted(explained)
