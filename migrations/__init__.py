"""Alembic's revisions of our schema; in the wheel as ``wsgi_idempotency.migrations``."""
