"""What a handler sees: keys for its own calls, and a say in what becomes of its response."""

from __future__ import annotations

import dataclasses
import threading
import uuid

import pytest

from wsgi_idempotency import FORGET, HOLD, RELEASE, STORE, current_operation
from wsgi_idempotency.operation import Operation, running
from wsgi_idempotency.testing import make_claim

CLAIM = make_claim(fingerprint=b"payload")


def operation(*, secret=None, attempt=1, **changes) -> Operation:
    claim = dataclasses.replace(CLAIM, **changes)
    return Operation(claim, key="k-1234", scope="alice", attempt=attempt, secret=secret)


def test_a_derived_key_is_the_same_on_every_attempt():
    """Also in another process, years later: this one was made by the first release."""
    again = operation(token=b"another".ljust(16), attempt=2, lease=1.0)
    assert operation().derive_key("charge") == again.derive_key("charge")
    assert operation().derive_key("charge") == "fbbacc14-7af2-890f-bf53-fca79a8c815e"


@pytest.mark.parametrize(
    ("other", "name"),
    [
        (operation(), "refund"),
        (operation(fingerprint=b"other payload"), "charge"),
        (operation(digest=b"o" * 32), "charge"),
        (operation(secret=b"s" * 16), "charge"),
        (operation(fingerprint=b"payloadc"), "harge"),
    ],
    ids=[
        "another name",
        "another payload",
        "another operation",
        "another secret",
        "the same bytes cut elsewhere",
    ],
)
def test_anything_else_derives_another_key(other, name):
    assert other.derive_key(name) != operation().derive_key("charge")


def test_a_derived_key_is_a_uuid_of_version_8():
    for name in map(str, range(100)):
        key = operation().derive_key(name)
        assert str(uuid.UUID(key)) == key
        assert (uuid.UUID(key).version, uuid.UUID(key).variant) == (8, uuid.RFC_4122)


def test_a_derived_key_says_what_it_is_for():
    with pytest.raises(ValueError, match="needs a name"):
        operation().derive_key("")


@pytest.mark.parametrize(
    ("method", "action"),
    [("store", STORE), ("forget", FORGET), ("release", RELEASE), ("hold", HOLD)],
)
def test_a_handler_overrules_the_policy_and_the_last_word_counts(method, action):
    mine = operation()
    assert mine.overrule is None
    mine.forget()
    getattr(mine, method)()
    assert mine.overrule is action


def test_an_operation_can_be_logged():
    """By its digest, which is in the table; never by its key, which may be a secret."""
    assert repr(operation(attempt=3)) == f"<Operation {CLAIM.digest.hex()} attempt 3>"


def test_the_current_operation_is_that_of_its_thread():
    assert not current_operation
    with pytest.raises(RuntimeError, match="its route has no policy"):
        _ = current_operation.key
    token = running.set(operation())
    seen = []
    thread = threading.Thread(target=lambda: seen.append(bool(current_operation)))
    thread.start()
    thread.join()
    assert (current_operation.key, current_operation.scope) == ("k-1234", "alice")
    assert (current_operation.attempt, current_operation.lost) == (1, False)
    running.reset(token)
    assert seen == [False]
    assert not current_operation
