"""Flask-SQLAlchemy: a session that joins the transaction of a protected request.

.. code-block:: python

    from wsgi_idempotency.contrib.flask_sqlalchemy import JoiningSession

    db = SQLAlchemy(app, session_options={"class_": JoiningSession})
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakSet

from flask import request_tearing_down
from flask_sqlalchemy.session import Session

from wsgi_idempotency.operation import Operation, running

if TYPE_CHECKING:
    from flask_sqlalchemy import SQLAlchemy
    from sqlalchemy import Connection, Engine


class JoiningSession(Session):
    """``db.session`` as ever; where a policy with ``transaction=True`` runs the request, on
    ``current_operation.connection``, so that what it commits is committed with the response.

    ``commit()`` and ``rollback()`` keep their meaning, on savepoints. Everywhere else (requests
    without a key, other policies, the command line, other threads) it is Flask-SQLAlchemy's own.

    It joins what the binds named in :attr:`joins` serve. They must be in the database of the
    middleware's store: its connection is used in place of theirs.
    """

    #: Keys of ``SQLALCHEMY_BINDS``; None is ``SQLALCHEMY_DATABASE_URI``.
    joins: frozenset[str | None] = frozenset({None})

    def __init__(self, db: SQLAlchemy, **options: Any) -> None:
        super().__init__(db, **{"join_transaction_mode": "create_savepoint", **options})

    def get_bind(
        self,
        mapper: Any | None = None,
        clause: Any | None = None,
        bind: Engine | Connection | None = None,
        **options: Any,
    ) -> Engine | Connection:
        """The connection of the operation that runs in this thread, or what it was.

        :raises TransactionFailed: the operation's connection can't be used here.
        """
        bind = super().get_bind(mapper, clause, bind, **options)
        operation = running.get(None)
        if operation is None or operation.ended or not operation.transactional:
            return bind
        if not any(bind is self._db.engines.get(key) for key in self.joins):
            return bind
        _joined.setdefault(operation, WeakSet()).add(self)
        connection: Connection = operation.connection
        return connection


_joined: WeakKeyDictionary[Operation, WeakSet[Session]] = WeakKeyDictionary()


def _leave(sender: object, **_: object) -> None:
    """A session lives as long as its application context, which may be around the request:
    in tests, in a shell. It must not keep the connection."""
    operation = running.get(None)
    for session in _joined.pop(operation, ()) if operation is not None else ():
        session.close()


request_tearing_down.connect(_leave)
