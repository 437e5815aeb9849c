"""The request body: bounded, read once, handed on intact (cases 11, 14, 29)."""

from __future__ import annotations

import gc
import io
import os
import warnings
import weakref

import pytest

from wsgi_idempotency.body import Body
from wsgi_idempotency.errors import BodyTooLarge, IncompleteBody, LengthRequired


def environ_of(data: bytes, **more):
    return {"CONTENT_LENGTH": str(len(data)), "wsgi.input": io.BytesIO(data), **more}


@pytest.mark.parametrize("size", [0, 1, 70_000, 1024 * 1024, 3_000_000])
def test_the_application_gets_a_stream_of_every_byte(size):
    data = bytes(range(256)) * (size // 256) + b"\n" * (size % 256)
    environ = environ_of(data)
    body = Body(environ, limit=4_000_000)
    assert body.bytes() == data
    assert b"".join(body.chunks()) == data
    body.hand_on()
    assert environ["wsgi.input"].read() == data
    assert environ["CONTENT_LENGTH"] == str(len(data))
    assert environ["wsgi.input_terminated"] is True
    assert isinstance(environ["wsgi.input"], io.BytesIO) is (size <= 1024 * 1024)
    body.hand_on()
    assert b"".join(iter(environ["wsgi.input"])) == data
    del environ, body
    gc.collect()  # a spool left open would warn, and warnings are errors


def test_a_spool_that_ends_in_a_reference_cycle_closes_its_file_in_silence():
    """As in the traceback of a handler that failed; whoever of the cycle is finalized first."""
    body = Body(environ_of(b"x" * 2_000_000), limit=4_000_000)
    body.read()
    file = weakref.ref(body._spool)
    descriptor = body._spool.fileno()
    cycle = [body._spool]
    cycle.append(cycle)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        del body, cycle
        gc.collect()
    assert (file(), caught) == (None, [])
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_a_body_is_made_of_bytes_that_are_there():
    body = Body.of_bytes(b"abc")
    assert (body.bytes(), list(body.chunks())) == (b"abc", [b"abc"])
    assert body.bytes() is body.bytes()


def test_nothing_is_read_nor_changed_until_somebody_asks():
    stream = io.BytesIO(b"abc")
    environ = {"CONTENT_LENGTH": "3", "wsgi.input": stream}
    Body(environ, limit=10).hand_on()
    assert environ == {"CONTENT_LENGTH": "3", "wsgi.input": stream}
    assert stream.tell() == 0


def test_only_the_announced_bytes_are_read():
    environ = environ_of(b"abcdef", CONTENT_LENGTH="3")
    assert Body(environ, limit=10).bytes() == b"abc"
    assert environ["wsgi.input"].read() == b"def"


def test_zeros_before_a_length_mean_nothing():
    assert Body(environ_of(b"abc", CONTENT_LENGTH="0" * 5000 + "3"), limit=10).bytes() == b"abc"
    assert Body(environ_of(b"abc", CONTENT_LENGTH="0" * 5000), limit=10).bytes() == b""


def test_a_chunked_body_is_read_to_its_end_where_the_server_ends_it():
    environ = {
        "HTTP_TRANSFER_ENCODING": "chunked",
        "CONTENT_LENGTH": "1",
        "wsgi.input_terminated": True,
        "wsgi.input": io.BytesIO(b"abc"),
    }
    body = Body(environ, limit=10)
    assert body.bytes() == b"abc"
    body.hand_on()
    assert environ["CONTENT_LENGTH"] == "3"
    assert "HTTP_TRANSFER_ENCODING" not in environ


def test_a_chunked_body_that_nobody_ends_needs_a_length():
    environ = {"HTTP_TRANSFER_ENCODING": "chunked", "wsgi.input": io.BytesIO(b"abc")}
    with pytest.raises(LengthRequired):
        Body(environ, limit=10).read()


@pytest.mark.parametrize("length", ["-1", "+5", "5, 5", "1e3", "٣", "abc"])
def test_a_length_that_is_no_number_is_refused(length):
    with pytest.raises(LengthRequired):
        Body(environ_of(b"abc", CONTENT_LENGTH=length), limit=10).read()


@pytest.mark.parametrize("absent", ["", " ", None])
def test_no_length_is_an_empty_body(absent):
    environ = environ_of(b"abc", CONTENT_LENGTH=absent)
    assert Body(environ, limit=10).bytes() == b""


def test_no_length_reads_to_the_end_where_the_server_ends_it():
    environ = {"wsgi.input": io.BytesIO(b"abc"), "wsgi.input_terminated": True}
    assert Body(environ, limit=10).bytes() == b"abc"


@pytest.mark.parametrize("length", ["11", "9" * 5000], ids=["one more", "astronomical"])
def test_an_announced_body_over_the_limit_is_refused_unread(length):
    environ = environ_of(b"x" * 20, CONTENT_LENGTH=length)
    with pytest.raises(BodyTooLarge):
        Body(environ, limit=10).read()
    assert environ["wsgi.input"].tell() == 0


def test_a_body_without_length_over_the_limit_is_refused():
    environ = {"wsgi.input": io.BytesIO(b"x" * 11), "wsgi.input_terminated": True}
    with pytest.raises(BodyTooLarge):
        Body(environ, limit=10).read()


def test_a_body_that_ends_early_is_incomplete():
    with pytest.raises(IncompleteBody):
        Body(environ_of(b"abc", CONTENT_LENGTH="4"), limit=10).read()


def test_a_broken_connection_is_an_incomplete_body():
    class Broken(io.BytesIO):
        def read(self, size=-1):
            raise OSError("reset by peer")

    with pytest.raises(IncompleteBody):
        Body({"CONTENT_LENGTH": "4", "wsgi.input": Broken()}, limit=10).read()
