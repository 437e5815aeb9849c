"""The ``wsgi-idempotency demo`` command: a shop to double-tap, with protection and without."""

from wsgi_idempotency.demo.command import demo

__all__ = ["demo"]
