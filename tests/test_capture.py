"""An application's answer, held back until it is known what becomes of it (cases 31-33)."""

from __future__ import annotations

import gc
import io
import sys
import weakref
from contextvars import ContextVar
from typing import TYPE_CHECKING

import pytest

from wsgi_idempotency.capture import (
    STREAMED,
    TOO_LARGE,
    Capture,
    Dropped,
    InvalidApplication,
    Passing,
    Whole,
    play,
)
from wsgi_idempotency.operation import Operation
from wsgi_idempotency.records import StoredResponse
from wsgi_idempotency.testing import make_claim

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

TEXT = [("Content-Type", "text/plain")]


class Server:
    """What a server gives an application, and what it has been told."""

    def __init__(self, *, has_write: bool = True) -> None:
        self.heads: list[tuple[str, list[tuple[str, str]]]] = []
        self.sent: list[bytes] = []
        self.has_write = has_write

    def start_response(self, status, headers, exc_info=None):
        if exc_info is not None and self.sent:
            raise exc_info[1]
        self.heads.append((status, headers))
        return self.sent.append if self.has_write else None


class Run:
    """One run of an application, and what was asked of the middleware meanwhile."""

    def __init__(self, *, limit: int = 100, let_out: bool = True, has_write: bool = True) -> None:
        self.server = Server(has_write=has_write)
        self.let_out = let_out
        self.reasons: list[tuple[str, list[tuple[str, str]], str]] = []
        self.over = 0
        self.running: ContextVar[Operation] = ContextVar("running")
        self.operation = Operation(make_claim(), key="k", scope="s", attempt=1, secret=None)
        self.capture = Capture(
            limit=limit,
            start_response=self.server.start_response,
            operation=self.operation,
            running=self.running,
            before_first_byte=self.before_first_byte,
            after_last_byte=self.after_last_byte,
        )

    def before_first_byte(self, status, headers, reason):
        assert self.server.heads == [], "its head is out already"
        self.reasons.append((status, headers, reason))
        return self.let_out

    def after_last_byte(self):
        self.over += 1

    def __call__(self, app, environ=None):
        return self.capture.run(app, {} if environ is None else environ)


class Chunks:
    """An iterable that counts how often it is closed."""

    def __init__(
        self,
        chunks: Iterable[bytes],
        error: BaseException | None = None,
        watch: Callable[[], object] = lambda: None,
    ) -> None:
        self.chunks, self.error, self.watch, self.closed = iter(chunks), error, watch, 0

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        self.watch()
        return next(self.chunks)

    def close(self) -> None:
        self.closed += 1
        self.watch()
        if self.error is not None:
            raise self.error


def answering(chunks, headers=TEXT, status="200 OK"):
    def app(environ, start_response):
        start_response(status, list(headers))
        return chunks

    return app


# ------------------------------------------------------------------ held back


@pytest.mark.parametrize(
    "chunks",
    [
        [b"ab", b"", b"c"],
        (b"abc",),
        iter([b"a", b"bc"]),
        (chunk for chunk in (b"", b"abc")),
        Chunks([b"abc"]),
    ],
    ids=["a list", "a tuple", "an iterator", "a generator", "an object"],
)
def test_an_answer_is_held_back_in_full(chunks):
    run = Run()
    assert run(answering(chunks)) == Whole("200 OK", TEXT, b"abc")
    assert (run.server.heads, run.server.sent, run.reasons, run.over) == ([], [], [], 0)


def test_what_is_written_comes_before_what_is_iterated():
    def app(environ, start_response):
        write = start_response("200 OK", TEXT)
        assert write(b"a") is None
        write(b"b")
        return [b"c"]

    assert Run()(app).body == b"abc"


def test_a_head_may_come_as_late_as_the_first_chunk():
    def app(environ, start_response):
        yield b""
        start_response("200 OK", TEXT)
        yield b"a"

    assert Run()(app) == Whole("200 OK", TEXT, b"a")


def test_a_file_is_sent_by_a_wrapper_that_anybody_can_iterate():
    """The server's own may be an object that only the server knows how to send."""
    file = io.BytesIO(b"a" * 50)
    run = Run()

    def app(environ, start_response):
        start_response("200 OK", TEXT)
        return environ["wsgi.file_wrapper"](file, 7)

    assert run(app, {"wsgi.file_wrapper": object}).body == b"a" * 50
    assert file.closed


def test_a_restart_replaces_what_was_begun_and_keeps_nothing_of_the_exception():
    class Mistake(Exception):
        pass

    died = []

    def app(environ, start_response):
        start_response("200 OK", TEXT)(b"begun")
        try:
            raise Mistake
        except Mistake as mistake:
            died.append(weakref.ref(mistake))
            start_response("500 Oh", [("X-New", "1")], sys.exc_info())
        return [b"new"]

    gc.disable()
    try:
        run = Run()
        assert run(app) == Whole("500 Oh", [("X-New", "1")], b"new")
        assert died[0]() is None
    finally:
        gc.enable()


def test_a_restart_begins_again_at_nothing():
    def app(environ, start_response):
        start_response("200 OK", TEXT)(b"x" * 100)
        start_response("500 Oh", TEXT, (None, None, None))
        return [b"y" * 100]

    assert Run(limit=100)(app).body == b"y" * 100


def test_the_headers_are_those_of_the_moment():
    """An application may reuse its list, and the server may change the one it is given."""
    headers = list(TEXT)

    def app(environ, start_response):
        start_response("200 OK", headers)
        headers.append(("X-Later", "1"))
        return []

    assert Run()(app).headers == TEXT


# ------------------------------------------------------------------ broken applications


def not_started(environ, start_response):
    return []


def chunk_first(environ, start_response):
    return [b"x"]


def started_twice(environ, start_response):
    start_response("200 OK", TEXT)
    start_response("200 OK", TEXT)
    return []


def text(environ, start_response):
    start_response("200 OK", TEXT)
    return ["text"]


@pytest.mark.parametrize(
    ("app", "told"),
    [
        (not_started, "did not call start_response"),
        (chunk_first, "did not call start_response"),
        (started_twice, "again without exc_info"),
        (text, "has str where bytes belong"),
        (answering([], status="fine"), "the status is 'fine'"),
        (answering([], status="20"), "the status is '20'"),
        (answering([], status=200), "the status is 200"),
    ],
    ids=["not started", "chunk first", "started twice", "text", "no number", "short", "a number"],
)
def test_an_application_that_no_server_could_serve_is_told_why(app, told):
    with pytest.raises(InvalidApplication, match=told):
        Run()(app)


def test_an_application_that_returns_nothing_fails_as_it_does_on_a_server():
    with pytest.raises(TypeError, match="not iterable"):
        Run()(answering(None))


# ------------------------------------------------------------------ close()


def test_the_iterable_is_closed_once_after_a_whole_answer():
    chunks = Chunks([b"a"])
    run = Run()
    run(answering(chunks))
    run.capture.close()
    assert (chunks.closed, run.over) == (1, 0)


@pytest.mark.parametrize("error", [RuntimeError("oops"), SystemExit()], ids=["error", "exit"])
def test_the_iterable_is_closed_once_when_it_raises(error):
    def raising():
        yield b"a"
        raise error

    chunks = Chunks(raising())
    run = Run()
    with pytest.raises(type(error)):
        run(answering(chunks))
    run.capture.close()
    assert chunks.closed == 1


def test_an_application_that_raises_has_nothing_to_close():
    def app(environ, start_response):
        raise RuntimeError("oops")

    with pytest.raises(RuntimeError, match="oops"):
        Run()(app)


def test_a_close_that_raises_costs_no_answer(caplog):
    chunks = Chunks([b"a"], error=RuntimeError("oops"))
    assert Run()(answering(chunks)).body == b"a"
    assert "close() of the application's iterable failed" in caplog.text


def test_a_close_that_is_interrupted_goes_on_to_the_server_after_all_is_settled():
    chunks = Chunks([b"x" * 200], error=SystemExit())
    run = Run()
    body = run(answering(chunks)).body
    with pytest.raises(SystemExit):
        body.close()
    assert (chunks.closed, run.over) == (1, 1)


def test_the_operation_is_current_whenever_the_application_runs_and_at_no_other_time():
    run = Run(limit=2)
    seen = []

    def watch():
        seen.append(run.running.get(None))

    chunks = Chunks([b"ab", b"cd", b"ef"], watch=watch)

    def app(environ, start_response):
        watch()
        start_response("200 OK", TEXT)
        return chunks

    body = run(app).body
    for _ in body:
        assert run.running.get(None) is None
    body.close()
    assert run.running.get(None) is None
    assert seen == [run.operation] * 6  # the call, three chunks, the end, close()


# ------------------------------------------------------------------ passed on


def test_an_answer_over_the_limit_passes_from_the_chunk_that_is_too_much():
    run = Run(limit=3)
    taken = []
    chunks = Chunks([b"ab", b"c", b"d", b"ef"], watch=lambda: taken.append(1))
    answer = run(answering(chunks))
    assert isinstance(answer, Passing)
    assert run.reasons == [("200 OK", TEXT, TOO_LARGE)]
    assert run.server.heads == [("200 OK", TEXT)]
    assert len(taken) == 3
    assert b"".join(answer.body) == b"abcdef"
    assert run.over == 0
    answer.body.close()
    answer.body.close()
    assert (chunks.closed, run.over) == (1, 1)


def test_an_answer_of_the_limit_is_held_back():
    assert Run(limit=3)(answering([b"ab", b"c"])).body == b"abc"


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (("content-type", "text/event-stream"), STREAMED),
        (("Content-Type", "Text/Event-Stream ; charset=utf-8"), STREAMED),
        (("Content-Length", "101"), TOO_LARGE),
    ],
    ids=["an event stream", "its parameters", "an announced length"],
)
def test_what_the_headers_announce_passes_with_its_first_byte(header, reason):
    run = Run()
    taken = []
    answer = run(answering(Chunks([b"", b"a", b"b"], watch=lambda: taken.append(1)), [header]))
    assert isinstance(answer, Passing)
    assert run.reasons == [("200 OK", [header], reason)]
    assert len(taken) == 2
    chunks = iter(answer.body)
    assert next(chunks) == b"a"
    assert len(taken) == 2
    assert list(chunks) == [b"b"]


@pytest.mark.parametrize(
    "header",
    [
        ("Content-Type", "text/event-stream-not"),
        ("Content-Length", "100"),
        ("Content-Length", "-5"),
        ("X-Content-Length", "1000"),
    ],
    ids=repr,
)
def test_what_the_headers_do_not_announce_is_held_back(header):
    assert isinstance(Run()(answering([b"a"], [header])), Whole)


@pytest.mark.parametrize(
    "header", [("X-Three", "1", "2"), ("X-None", None), ["X-List", "1"], "X-Text"], ids=repr
)
def test_a_head_that_no_server_could_send_is_held_back_all_the_same(header):
    """The handler has run: whether that counts is not for its headers to say."""
    assert Run()(answering([b"a"], [header])) == Whole("200 OK", [header], b"a")


def test_a_client_that_goes_away_closes_the_iterable_where_it_stands():
    chunks = Chunks([b"x" * 200] * 10)
    run = Run()
    body = run(answering(chunks)).body
    next(iter(body))
    body.close()
    assert (chunks.closed, run.over) == (1, 1)
    assert list(body) == []


def test_what_a_passing_answer_raises_reaches_the_server_which_closes_it():
    def raising():
        yield b"x" * 200
        raise RuntimeError("oops")

    chunks = Chunks(raising())
    run = Run()
    body = run(answering(chunks)).body
    with pytest.raises(RuntimeError, match="oops"):
        list(body)
    assert run.over == 0
    body.close()
    assert (chunks.closed, run.over) == (1, 1)


def test_writes_pass_as_they_come_once_they_are_too_many():
    run = Run(limit=3)

    def app(environ, start_response):
        write = start_response("200 OK", TEXT)
        for chunk, sent in ((b"ab", []), (b"cd", [b"abcd"]), (b"ef", [b"abcd", b"ef"])):
            write(chunk)
            assert run.server.sent == sent
        write(b"")
        return [b"g"]

    assert b"".join(run(app).body) == b"g"
    assert run.server.sent == [b"abcd", b"ef"]


def test_an_application_that_raises_after_its_first_byte_is_out_is_over():
    run = Run(limit=3)

    def app(environ, start_response):
        start_response("200 OK", TEXT)(b"abcd")
        raise RuntimeError("oops")

    with pytest.raises(RuntimeError, match="oops"):
        run(app)
    assert run.capture.passing
    assert run.over == 1


def test_after_the_first_byte_the_server_decides_on_a_restart():
    run = Run(limit=3)

    def app(environ, start_response):
        start_response("200 OK", TEXT)(b"abcd")
        with pytest.raises(InvalidApplication, match="after the first byte"):
            start_response("500 Oh", TEXT)
        try:
            raise ValueError("mine")
        except ValueError:
            start_response("500 Oh", TEXT, sys.exc_info())

    with pytest.raises(ValueError, match="mine"):
        run(app)


def test_a_server_whose_start_response_returns_nothing_can_be_sent_an_iterable():
    """As middleware does that forgets about write(): the head goes out once all the same."""
    run = Run(limit=3, has_write=False)
    assert b"".join(run(answering([b"ab", b"cd", b"ef"])).body) == b"abcdef"
    assert len(run.reasons) == len(run.server.heads) == 1


def test_no_write_is_lost_on_a_server_whose_start_response_returns_nothing():
    def app(environ, start_response):
        start_response("200 OK", TEXT)(b"abcd")
        return []

    with pytest.raises(TypeError, match="not callable"):
        Run(limit=3, has_write=False)(app)


# ------------------------------------------------------------------ dropped


@pytest.mark.parametrize("way", ["iterated", "written"])
def test_an_answer_that_is_not_let_out_is_dropped_with_all_that_follows(way):
    run = Run(limit=3, let_out=False)
    chunks = Chunks([b"abcd"] * 3)

    def app(environ, start_response):
        write = start_response("200 OK", TEXT)
        if way == "written":
            write(b"abcd")
            write(b"ef")
        return chunks

    assert isinstance(run(app), Dropped)
    assert (run.server.heads, run.server.sent) == ([], [])
    assert len(run.reasons) == 1
    assert (chunks.closed, run.over) == (1, 0)


def test_writes_that_are_dropped_may_be_all_there_is():
    run = Run(limit=3, let_out=False)

    def app(environ, start_response):
        start_response("200 OK", TEXT)(b"abcd")
        return []

    assert isinstance(run(app), Dropped)


# ------------------------------------------------------------------ played again


def played(status, body=b"body", method="POST", extra=(), headers=(("ETag", '"1"'),)):
    server = Server()
    response = StoredResponse(status, tuple(headers), body)
    sent = b"".join(play(response, extra, {"REQUEST_METHOD": method}, server.start_response))
    ((status, headers),) = server.heads
    return status, headers, sent


def test_a_stored_response_is_played_with_its_length():
    assert played("201 Made It", extra=[("X-More", "1")]) == (
        "201 Made It",
        [("ETag", '"1"'), ("X-More", "1"), ("Content-Length", "4")],
        b"body",
    )


@pytest.mark.parametrize(
    ("status", "length"),
    [
        ("204 No Content", []),
        ("304 Not Modified", []),
        ("205 Reset Content", [("Content-Length", "0")]),
    ],
)
def test_a_status_without_content_is_played_without_any(status, length):
    """RFC 9110 sections 8.6, 15.3.5, 15.3.6 and 15.4.5."""
    assert played(status) == (status, [("ETag", '"1"'), *length], b"")


def test_to_head_neither_content_nor_its_length_is_played():
    assert played("200 OK", method="HEAD") == ("200 OK", [("ETag", '"1"')], b"")


def test_what_is_added_takes_the_place_of_what_was_stored():
    _, headers, _ = played("200 OK", extra=[("X-A", "new")], headers=[("x-a", "old"), ("B", "1")])
    assert headers == [("B", "1"), ("X-A", "new"), ("Content-Length", "4")]
