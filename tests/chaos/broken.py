"""Stores with one promise missing each, to see the checker miss it."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from wsgi_idempotency import SQLStore
from wsgi_idempotency.records import Lapse
from wsgi_idempotency.stores.transactions import SQLTransaction


class Unfenced(SQLStore):
    """Whoever ends an operation ends it for whoever holds the claim: no token is checked."""

    def _held_by(self, digest, token):
        record = self.lookup(digest)
        return token if record is None else record.token

    def complete(self, digest, token, completion):
        return super().complete(digest, self._held_by(digest, token), completion)

    def release(self, digest, token):
        return super().release(digest, self._held_by(digest, token))

    def forget(self, digest, token):
        return super().forget(digest, self._held_by(digest, token))

    def hold(self, digest, token):
        return super().hold(digest, self._held_by(digest, token))

    def renew(self, claims):
        claims = list(claims)
        super().renew(
            [(digest, self._held_by(digest, token), lease) for digest, token, lease in claims]
        )
        return {token for _, token, _ in claims}


class Unheld(SQLStore):
    """Every lapse is released, whatever the policy says."""

    def claim(self, claim):
        return super().claim(replace(claim, lapse=Lapse.RELEASE))


class Deaf(SQLStore):
    """No lease is ever renewed."""

    def renew(self, claims):
        return {token for _, token, _ in claims}


class Forgetful(SQLStore):
    """What can't be replayed is not remembered either."""

    def complete(self, digest, token, completion):
        if completion.body is None:
            return self.release(digest, token)
        return super().complete(digest, token, completion)


class Careless(SQLStore):
    """What is stored is not quite what was sent."""

    def complete(self, digest, token, completion):
        if completion.body is not None:
            completion = replace(completion, body=completion.body + b" ")
        return super().complete(digest, token, completion)


class _Beside(SQLTransaction):
    @property
    def connection(self):
        return self._store.engine.connect()


class Beside(SQLStore):
    """What the application writes is committed by itself, and the response by itself."""

    def begin(self, claim, **options):
        transaction = super().begin(claim, **options)
        if transaction is not None:
            transaction.__class__ = _Beside
        return transaction


class Unlocked(SQLStore):
    """No transaction meets another one: neither in the key's lock nor in the primary key."""

    def begin(self, claim, **options):
        return super().begin(replace(claim, digest=os.urandom(32)), **options)


BROKEN = {
    "unfenced": Unfenced,
    "unheld": Unheld,
    "deaf": Deaf,
    "forgetful": Forgetful,
    "careless": Careless,
    "beside": Beside,
    "unlocked": Unlocked,
}


def store(how: str | None, database: str, **options: Any) -> SQLStore:
    """A store that is broken in one way; sound if None."""
    return (BROKEN[how] if how else SQLStore)(database, **options)
