"""The errors that whoever uses this package may want to catch."""

from __future__ import annotations


class IdempotencyError(Exception):
    """Raised when this package can't do what it was asked; the base of all its errors."""


class ConfigurationError(IdempotencyError, ValueError):
    """Raised at construction when an option's value makes no sense or breaks a promise."""


class InvalidKey(IdempotencyError, ValueError):
    """Raised by a key source when the request carries a key that its grammar refuses."""


class BodyError(IdempotencyError):
    """Raised when the request body can't be taken in full; the base of the errors that say why."""


class LengthRequired(BodyError):
    """Raised when neither Content-Length nor the server says where the request body ends."""


class BodyTooLarge(BodyError):
    """Raised when the request body is larger than ``max_request_bytes``."""


class IncompleteBody(BodyError):
    """Raised when the request body ends before its announced length: the client went away."""


class StoreError(IdempotencyError):
    """Raised when a store could not do what was asked; the base of the errors that say why."""


class StoreUnavailable(StoreError):
    """Raised when a store can't be reached, has no connection free, or gives no answer in time."""


class AnswerLost(StoreUnavailable):
    """Raised when a store broke off while it was asked: it may or may not have done it."""


class Disconnected(AnswerLost):
    """Raised when the connection turned out to be broken: on a new one the store may answer."""


class SchemaError(StoreUnavailable):
    """Raised when the store's schema is missing or older than this release needs."""


class NotResolvable(StoreError):
    """Raised when an operation can't be resolved now: it is in flight, completed or gone, or
    it has changed since it was looked at."""


class NotStorable(StoreError):
    """Raised when a store refuses a record because of its size or content."""


class CorruptRecord(StoreError):
    """Raised when a stored response can't be decoded; the operation still counts as done."""


class TransactionError(StoreError):
    """Raised when a transaction that holds a key could not be committed; the base of the
    errors that say why."""


class TransactionConflict(TransactionError):
    """Raised when a serialization failure or a deadlock undid a transaction: try it again."""


class TransactionFailed(TransactionError):
    """Raised when a transaction can't be committed because of what was done with it."""


class CommitUnknown(TransactionError):
    """Raised when the answer to a COMMIT was lost and can't be found out."""


class NoTransaction(IdempotencyError, RuntimeError):
    """Raised when a handler asks for its transaction and its policy has none."""


class ClaimLost(IdempotencyError):
    """Raised when a handler goes on with an operation that somebody else has taken over."""


class StepRefused(IdempotencyError, RuntimeError):
    """Raised when a step can't be run: it is inside another, it has run in this attempt
    already, or the policy or the store has no steps. Its function is not called."""


class StepNotStorable(IdempotencyError, ValueError):
    """Raised when what a step's function returned is not JSON or too large: it has run, and
    is not recorded."""


class GuardRefused(IdempotencyError, RuntimeError):
    """Raised when a session can't be guarded: the policy or the store doesn't allow it, or the
    session's database is not the store's."""


class ForeignWrite(UserWarning):
    """Warned of, in development, when a handler that runs in a transaction writes on another
    connection: that is committed by itself, whatever becomes of the operation."""
