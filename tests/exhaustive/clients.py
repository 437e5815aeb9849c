"""The real middleware as a state machine: what it asks next, given what it was answered.

A client is one request. Where it stands is the list of the answers it has had, since
everything the middleware does follows from them: to know what it asks next, it is run again
from the start with those answers. It asks its store, the clock (to sleep), the heartbeat's
thread (to start) and its handler (to end); nothing else of it is replaced.
"""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

from exhaustive.database import Granted, Result, Row, Wanted, bytes_of, record
from wsgi_idempotency import (
    IdempotencyMiddleware,
    MemoryStore,
    Policy,
    SQLStore,
    everyone,
    middleware,
)
from wsgi_idempotency.errors import AnswerLost, CommitUnknown, Disconnected, StoreUnavailable
from wsgi_idempotency.records import Claim, Claimed, Completion, Record

# What a client asks. A question is a tuple whose first item is one of these.
CLAIM = "claim"
TAKE_OVER = "take over"
LOOKUP = "look up"
COMPLETE = "complete"
RELEASE = "release"
FORGET = "forget"
HOLD = "hold"
THREAD = "start the heartbeat's thread"
SLEEP = "sleep"
HANDLER = "run the handler"
STREAM = "send the rest"
ANSWERED = "answered"

# In transaction mode.
BEGIN = "begin"
TAKE_OVER_WITHIN = "take over, within the transaction"
WRITE = "write, within the transaction"
COMMIT = "commit"
ROLLBACK = "roll back"

Question = tuple[Any, ...]

#: Questions that are statements of the store.
STATEMENTS = frozenset({CLAIM, TAKE_OVER, LOOKUP, COMPLETE, RELEASE, FORGET, HOLD})

# Answers that are raised.
LOST = "the answer is lost"
DISCONNECTED = "the connection breaks, and a new one may answer"
INTERRUPTED = "an interrupt comes instead of the answer"
NO_THREAD = "no thread can be started"
UNDONE = "the connection was lost before the commit"
UNKNOWN = "whether it was committed can't be told"

# How a handler may end.
CREATED = "201 Created"
REFUSED = "400 Bad Request"
FAILED = "500 Internal Server Error"
RAISES = "raises"
STREAMS = "201 and an event stream"
STREAMS_FAILED = "500 and an event stream"


class Duty(NamedTuple):
    """A statement that a heartbeat has been left with.

    :param undo: it is to undo a claim; otherwise it ends an operation.
    :param then: the duty that comes after it, where it had an effect, and where it had none.
    """

    question: Question
    undo: bool
    then: tuple[Duty | None, Duty | None] = (None, None)


@dataclass(eq=False, slots=True)
class Node:
    """Where a client stands.

    :param question: what it asks next.
    :param kept: whether its heartbeat renews its claim.
    :param duties: what its heartbeat has been left with.
    """

    client: Client
    answers: tuple[Any, ...]
    question: Question
    kept: bool = False
    duties: tuple[Duty, ...] = ()
    _next: dict[Any, Node] = field(default_factory=dict)

    def after(self, answer: Any) -> Node:
        """Where it stands once it has this answer."""
        node = self._next.get(answer)
        if node is None:
            node = self._next[answer] = self.client.node((*self.answers, answer))
        return node


class Client:
    """One request of a policy, for every history of answers.

    :param number: names the client, its token and its execution.
    :param payload: the body of its request.
    :param threads_fail: whether the start of the heartbeat's thread is asked about.
    """

    def __init__(
        self, number: int, policy: Policy, *, payload: bytes = b"pay", threads_fail: bool = False
    ) -> None:
        self.number = number
        self.payload = payload
        self.lapse = policy.lapse.value
        self._threads_fail = threads_fail
        self.transacts = policy.transaction
        # Never asked: each run has a store of its own.
        store = SQLStore("sqlite:///nothing.db", create=False) if self.transacts else MemoryStore()
        self._middleware = IdempotencyMiddleware(self._app, store, scope=everyone, policy=policy)
        self._run: _Run
        self._loop: dict[tuple[bool, bool], Node] = {}
        self.start = self.node(())
        self.ended = Node(self, (), (ANSWERED,))
        self.dead = Node(self, (), (ANSWERED,))
        self.gave_up = Node(self, (), (ANSWERED,))
        self.told_undone = Node(self, (), (ANSWERED,))

    def node(self, answers: tuple[Any, ...]) -> Node:
        node = self._replay(answers)
        if node.question[0] not in (CLAIM, BEGIN):
            return node
        # The loop of the claim begins anew. It knows nothing of its earlier rounds but whether
        # it has begun to wait, and whether a connection has broken: what differs in the claim
        # itself is asked and compared. How many races it has lost in a row is left out.
        waits = SLEEP in self._run.asked or node.question[-1] is True
        doubtful = DISCONNECTED in answers
        if answers and answers[-1] == DISCONNECTED:
            return node  # the next one breaks for good
        first = self._loop.setdefault((waits, doubtful), node)
        assert first.question == node.question
        return first

    def _replay(self, answers: tuple[Any, ...]) -> Node:
        run = self._run = _Run(answers, bytes_of(self.number), self.lapse, self._threads_fail)
        self._middleware.store = run
        self._middleware.heartbeat = run  # type: ignore[assignment]
        try:
            with run.world():
                told = self._answer_of(run)
        except _NotYet:
            assert run.open is not None
            return Node(self, answers, run.open, run.kept, tuple(run.duties))
        except (RuntimeError, _Interrupt, AnswerLost) as exc:
            told = (ANSWERED, None, str(exc), False)
        return Node(self, answers, told, run.kept, tuple(run.duties))

    def _answer_of(self, run: _Run) -> Question:
        """Ask as a server does."""
        told: list[Any] = []
        iterable = self._middleware(
            {
                "REQUEST_METHOD": "POST",
                "SCRIPT_NAME": "",
                "PATH_INFO": "/pay",
                "QUERY_STRING": "",
                "CONTENT_TYPE": "text/plain",
                "CONTENT_LENGTH": str(len(self.payload)),
                "HTTP_IDEMPOTENCY_KEY": "k",
                "wsgi.input": io.BytesIO(self.payload),
                "wsgi.url_scheme": "http",
                "SERVER_NAME": "localhost",
                "SERVER_PORT": "80",
                "SERVER_PROTOCOL": "HTTP/1.1",
            },
            lambda status, headers, exc_info=None: told.extend((status, headers)),
        )
        try:
            body = b"".join(iterable)
        finally:
            close: Callable[[], None] = getattr(iterable, "close", lambda: None)
            close()
        run.ask_nothing()
        status, headers = told
        replayed = ("Idempotency-Replayed", "true") in headers
        return ANSWERED, int(status[:3]), body, replayed

    def _app(self, environ: Any, start_response: Any) -> Iterable[bytes]:
        """The handler: its answer says which client's it was."""
        run = self._run
        operation = environ["wsgi_idempotency.operation"]
        if self.transacts:
            operation.connection(run)
        end = run.ask(HANDLER, operation.attempt)
        if end == RAISES:
            raise RuntimeError("the handler raises")
        body = bytes([self.number])
        if end in (STREAMS, STREAMS_FAILED):
            start_response(end[:3] + " Streaming", [("Content-Type", "text/event-stream")])
            return self._stream(body)
        start_response(end, [("Content-Type", "text/plain")])
        return [body]

    def _stream(self, body: bytes) -> Iterator[bytes]:
        yield body
        self._run.ask(STREAM)


class _NotYet(BaseException):
    """Ends a run where its answers end."""


class _Interrupt(BaseException):
    """As SystemExit and GreenletExit interrupt a thread that waits for an answer."""


class _Asked(Exception):
    """Carries what a duty of the heartbeat would ask."""


class _Run:
    """One run with the answers so far: the store, the clock and the heartbeat it sees."""

    def __init__(
        self, answers: tuple[Any, ...], token: bytes, lapse: str, threads_fail: bool
    ) -> None:
        self._answers = iter(answers)
        self._token = token
        self._lapse = lapse
        self._threads_fail = threads_fail
        self._now = 0.0
        self._looking = False
        self._pretending: bool | None = None
        self.open: Question | None = None
        self.asked: list[str] = []
        self.kept = False
        self.duties: list[Duty] = []

    def ask(self, *question: Any) -> Any:
        if self._looking:
            raise _Asked(question)
        if self._pretending is not None:
            return self._pretending
        if self.open is not None:
            raise _NotYet  # on its way out
        try:
            answer = next(self._answers)
        except StopIteration:
            self.open = question
            raise _NotYet from None
        self.asked.append(question[0])
        if answer == LOST:
            raise AnswerLost(answer)
        if answer == DISCONNECTED:
            raise Disconnected(answer)
        if answer == UNDONE:
            raise StoreUnavailable(answer)
        if answer == UNKNOWN:
            raise CommitUnknown(answer)
        if answer == INTERRUPTED:
            raise _Interrupt(answer)
        return answer

    def ask_nothing(self) -> None:
        """The request is over, and has used up its answers."""
        assert next(self._answers, None) is None

    @contextmanager
    def world(self) -> Iterator[None]:
        clock = SimpleNamespace(monotonic=lambda: self._now, sleep=self._sleep)
        machine = SimpleNamespace(urandom=lambda size: self._token, getpid=os.getpid)
        logger = logging.getLogger("wsgi_idempotency")
        was, logger.disabled = logger.disabled, True
        try:
            with (
                mock.patch.object(middleware, "time", clock),
                mock.patch.object(middleware, "os", machine),
            ):
                yield
        finally:
            logger.disabled = was

    def _sleep(self, seconds: float) -> None:
        if self.ask(SLEEP):
            self._now += 3600.0  # patience is over

    # The store.

    def claim(self, claim: Claim) -> Claimed | Record:
        return self._granted_or_record(self.ask(CLAIM, self._wanted(claim)))

    def take_over(self, claim: Claim, seen: Record) -> Claimed | None:
        answer = self.ask(TAKE_OVER, self._wanted(claim), seen.token[0])
        return None if answer is None else Claimed(answer.attempt)

    def lookup(self, digest: bytes) -> Record | None:
        answer = self.ask(LOOKUP)
        return None if answer is None else record(answer)

    def complete(self, digest: bytes, token: bytes, completion: Completion) -> bool:
        assert token == self._token
        result = Result(completion.status, completion.body, completion.not_replayable)
        return self.ask(COMPLETE, result)  # type: ignore[no-any-return]

    def release(self, digest: bytes, token: bytes) -> bool:
        assert token == self._token
        return self.ask(RELEASE)  # type: ignore[no-any-return]

    def forget(self, digest: bytes, token: bytes) -> bool:
        assert token == self._token
        return self.ask(FORGET)  # type: ignore[no-any-return]

    def hold(self, digest: bytes, token: bytes) -> bool:
        assert token == self._token
        return self.ask(HOLD)  # type: ignore[no-any-return]

    def begin(
        self, claim: Claim, *, isolation_level: str | None = None, wait: float = 0.0
    ) -> _Transaction | None:
        entered = self.ask(BEGIN, self._wanted(claim), wait > 0)
        if entered is None:
            self._now += wait  # it was for nothing
            return None
        return _Transaction(self, entered)

    def _wanted(self, claim: Claim) -> Wanted:
        assert claim.token == self._token
        assert claim.lapse.value == self._lapse
        return Wanted(claim.token[0], claim.fingerprint, claim.lapse.value)

    def _granted_or_record(self, answer: Granted | Row) -> Claimed | Record:
        if isinstance(answer, Granted):
            return Claimed(answer.attempt)
        return record(answer)

    # The heartbeat: it renews and tries again whenever it likes, which is for the search.

    def start(self, claim: Claim, operation: object, asked: float) -> None:
        if self._threads_fail and self.ask(THREAD) == NO_THREAD:
            raise RuntimeError(NO_THREAD)
        self.kept = True

    def finishing(self, claim: Claim) -> None: ...

    def stop(self, claim: Claim) -> None:
        self.kept = False

    def finish_later(self, claim: Claim, operation: object, finish: Callable[[], bool]) -> None:
        if self.open is None:
            self.kept = False  # by its duty from now on
            self.duties.append(self._duty(finish, undo=False))

    def undo_later(self, claim: Claim, undo: Callable[[], bool]) -> None:
        if self.open is None:
            self.duties.append(self._duty(undo, undo=True))

    def _duty(self, call: Callable[[], bool], *, undo: bool) -> Duty:
        self._looking = True
        try:
            call()
        except _Asked as asked:
            (question,) = asked.args
        finally:
            self._looking = False
        if undo:
            return Duty(question, undo)
        return Duty(question, undo, (self._after(call, True), self._after(call, False)))

    def _after(self, call: Callable[[], bool], done: bool) -> Duty | None:
        before = len(self.duties)
        self._pretending = done
        try:
            call()
        finally:
            self._pretending = None
        return self.duties.pop() if len(self.duties) > before else None


class _Transaction:
    """A transaction as the middleware sees it, and its connection as the handler does."""

    def __init__(self, run: _Run, entered: Granted | Row) -> None:
        self._run = run
        granted = isinstance(entered, Granted)
        self.claimed = Claimed(entered.attempt) if granted else None
        self.seen = None if granted else record(entered)

    def connection(self, run: _Run) -> None:
        """The handler's write."""
        run.ask(WRITE)

    def take_over(self, claim: Claim, seen: Record) -> Claimed | None:
        answer = self._run.ask(TAKE_OVER_WITHIN, self._run._wanted(claim), seen.token[0])
        return None if answer is None else Claimed(answer.attempt)

    def complete(self, completion: Completion) -> None:
        result = Result(completion.status, completion.body, completion.not_replayable)
        self._run.ask(COMMIT, result)

    def rollback(self) -> None:
        self._run.ask(ROLLBACK)

    def conflicted(self, exc: BaseException | None) -> bool:
        return False
