"""What an operator asks of the table as a whole: how much there is of what, and where.

A serving process sends none of these statements. As in ``resolving.py`` nothing is indexed for
them: each reads the table once, and changes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from wsgi_idempotency.stores.resolving import _LITE_DETAILS, _PG_DETAILS, Details, _details
from wsgi_idempotency.stores.sql import (
    _LITE_EXPIRED,
    _LITE_NOW,
    _PG_EXPIRED,
    SQLStore,
    _Run,
    _storable,
)

#: What a row may mean now; each means exactly one of these. Live is what is done, also if its
#: worker died before it could record a response.
KINDS = ("live", "in flight", "released", "held", "lapsed, held", "lapsed", "expired")

_KIND = """
    CASE WHEN {expired} THEN 'expired'
         WHEN state = 'completed' OR (state = 'released' AND effects_at IS NOT NULL) THEN 'live'
         WHEN state = 'released' THEN 'released'
         WHEN state = 'held' THEN 'held'
         WHEN lease_until > {now} THEN 'in flight'
         WHEN effects_at IS NOT NULL THEN 'live'
         WHEN lapse = 'hold' THEN 'lapsed, held'
         ELSE 'lapsed' END"""

_PG_KIND = _KIND.format(expired=_PG_EXPIRED, now="now()")
_LITE_KIND = _KIND.format(expired=_LITE_EXPIRED, now=_LITE_NOW)

# By the whole path: of the paths of one route there are as many as there are orders, and what
# they have in common is found afterwards, once for each path.
_COUNTS = """
    SELECT method, path, {kind} AS kind, count(*), sum(attempt - 1), min(created_at)
    FROM idempotency_keys GROUP BY method, path, {kind}"""

_LIST = """
    SELECT {details} FROM idempotency_keys
    WHERE {kind} IN ({kinds}) AND created_at <= {before} AND ({scope} IS NULL OR scope = {scope})
    ORDER BY created_at, key_digest LIMIT {limit}"""

#: A part of a path that names one thing among many: with a digit and nothing but digits, or
#: longer and as random names are.
_NAMED = (
    r"/(?:[0-9]+"
    r"|[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}"
    r"|[0-9a-fA-F]{12,}"
    r"|(?=[^/]*[0-9])[0-9A-Za-z_-]{16,})(?=/|$)"
)

_PG_COUNTS = f"""
    SELECT method, regexp_replace(path, %(named)s, '/*', 'g') AS route, kind, sum(count)::bigint,
        sum(sum)::bigint, extract(epoch FROM now() - min(min))::float8
    FROM ({_COUNTS.format(kind=_PG_KIND)}) AS by_path GROUP BY method, route, kind"""

_LITE_COUNTS = f"""
    SELECT method, path, kind, "count(*)", "sum(attempt - 1)",
        {_LITE_NOW} - "min(created_at)" FROM ({_COUNTS.format(kind=_LITE_KIND)})"""

_PG_SIZES = """
    SELECT 'table', pg_relation_size(oid) FROM pg_class WHERE oid = 'idempotency_keys'::regclass
    UNION ALL SELECT 'TOAST', pg_total_relation_size(reltoastrelid)
        FROM pg_class WHERE oid = 'idempotency_keys'::regclass
    UNION ALL SELECT 'index ' || indexrelid::regclass::text, pg_relation_size(indexrelid)
        FROM pg_index WHERE indrelid = 'idempotency_keys'::regclass"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """What there is of operations of one method and one kind of path.

    :param path: with ``*`` for each part that names one thing among many.
    :param counts: rows by their kind, each of :data:`KINDS`.
    :param reruns: attempts beyond the first, of the rows that are there.
    :param oldest: seconds since the oldest was claimed first.
    """

    method: str
    path: str
    counts: Mapping[str, int]
    reruns: int
    oldest: float

    @property
    def rows(self) -> int:
        """Of all kinds."""
        return sum(self.counts.values())


class Inspector:
    """Counts and lists what is in a database.

    :param store: where it is. Its ``timeout`` bounds each call, and a large table takes longer
        to read than the 5 s that are enough to serve.
    """

    def __init__(self, store: SQLStore) -> None:
        self.store = store
        self._postgresql = store._postgresql

    def routes(self) -> list[Route]:
        """What there is by method and path, the most rows first. Reads the whole table."""
        if self._postgresql:
            found = self._fetch(_PG_COUNTS, {"named": _NAMED})
        else:
            found = self._fetch(_LITE_COUNTS, {})
        return _routes(
            (method, path if self._postgresql else re.sub(_NAMED, "/*", path), *rest)
            for method, path, *rest in map(tuple, found)
        )

    def sizes(self) -> dict[str, int]:
        """Bytes. On PostgreSQL of the table, its TOAST and each index; on SQLite of the file,
        and of what in it is free."""
        if self._postgresql:
            return {str(name): int(size or 0) for name, size in self._fetch(_PG_SIZES, {})}
        pragmas = {
            name: self._fetch(f"PRAGMA {name}", {})[0][0]
            for name in ("page_size", "page_count", "freelist_count")
        }
        return {
            "file": pragmas["page_size"] * pragmas["page_count"],
            "free in the file": pragmas["page_size"] * pragmas["freelist_count"],
        }

    def operations(
        self,
        *,
        kinds: Collection[str] = KINDS,
        older_than: float = 0.0,
        scope: str | None = None,
        limit: int = 100,
    ) -> list[Details]:
        """List operations, the oldest first. Reads the whole table.

        :param kinds: some of :data:`KINDS`.
        :param older_than: seconds since they were claimed first, at least.
        :param scope: as the column ``scope`` has it; None for every scope.
        :param limit: rows at most.
        """
        params: dict[str, Any] = {
            "older_than": float(older_than),
            "scope": None if scope is None else _storable(scope),
            "limit": limit,
        }
        kinds = sorted(kinds)
        params |= {f"kind{number}": kind for number, kind in enumerate(kinds)}
        names = [f"kind{number}" for number in range(len(kinds))]
        if self._postgresql:
            statement = _LIST.format(
                details=_PG_DETAILS,
                kind=_PG_KIND,
                kinds=", ".join(f"%({name})s" for name in names),
                before="now() - make_interval(secs => %(older_than)s)",
                scope="%(scope)s::text",
                limit="%(limit)s",
            )
        else:
            statement = _LIST.format(
                details=_LITE_DETAILS,
                kind=_LITE_KIND,
                kinds=", ".join(f":{name}" for name in names),
                before=f"{_LITE_NOW} - :older_than",
                scope=":scope",
                limit=":limit",
            )
        return [_details(tuple(row)) for row in self._fetch(statement, params)]

    def _fetch(self, statement: str, params: Mapping[str, Any]) -> list[Any]:
        def work(run: _Run) -> list[Any]:
            return run(statement, params).fetchall()

        return self.store._call(work)


def _routes(rows: Iterable[tuple[Any, ...]]) -> list[Route]:
    counts: dict[tuple[str, str], dict[str, int]] = {}
    reruns: dict[tuple[str, str], int] = {}
    oldest: dict[tuple[str, str], float] = {}
    for method, path, kind, count, again, age in rows:
        of = method, path
        by_kind = counts.setdefault(of, dict.fromkeys(KINDS, 0))
        by_kind[kind] += count
        reruns[of] = reruns.get(of, 0) + again
        oldest[of] = max(oldest.get(of, 0.0), age)
    routes = [
        Route(method=of[0], path=of[1], counts=counts[of], reruns=reruns[of], oldest=oldest[of])
        for of in counts
    ]
    return sorted(routes, key=lambda route: (-route.rows, route.path, route.method))
