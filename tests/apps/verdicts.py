"""Verdicts that write a line into a ledger each time they are asked."""

from __future__ import annotations

import itertools
import json
import os

from apps.gate import wait_at
from wsgi_idempotency import Completed, NotExecuted, StillUnknown
from wsgi_idempotency.records import StoredResponse

looks = itertools.count(1)


def write(record):
    line = json.dumps({"pid": os.getpid(), "key": record.key, "attempt": record.attempt})
    ledger = os.open(os.environ["LEDGER"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(ledger, line.encode() + b"\n")  # one write: lines of several processes don't mix
    os.close(ledger)


def answer(record):
    write(record)
    if record.key.startswith("done"):
        return Completed(StoredResponse("201 Created", (), record.key.encode()), "in the books")
    if record.key.startswith("fails"):
        raise RuntimeError("the books are closed")
    return NotExecuted if record.key.startswith("never") else StillUnknown("too early")


def answer_after_the_first_at_a_gate(record):
    if next(looks) == 1:
        wait_at(os.environ["GATE"], {"pid": os.getpid(), "attempt": record.attempt})
    return answer(record)
