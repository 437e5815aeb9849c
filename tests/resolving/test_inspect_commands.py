"""The commands that look at the table: stats, list --state, show with its response."""

from __future__ import annotations

import base64
import gzip
import json
import re
from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from apps.shop import query
from click.testing import CliRunner, Result
from servers.postgres import database_of
from table import add_rows
from unresolved import age_rows, held, lapsed

from wsgi_idempotency import SQLStore
from wsgi_idempotency.cli import main
from wsgi_idempotency.inspect_commands import BINARY_SHOWN, LARGEST_SHOWN, in_bytes
from wsgi_idempotency.records import Claimed, Completion, Lapse, StoredResponse
from wsgi_idempotency.stores.inspecting import KINDS, Inspector
from wsgi_idempotency.stores.resolving import Resolution, Resolver
from wsgi_idempotency.testing import make_claim

Command = Callable[..., Result]


@pytest.fixture
def command(database: str, store: SQLStore) -> Command:
    """The command, on a database that has our schema."""

    def call(*arguments: str) -> Result:
        runner = CliRunner(env={"WSGI_IDEMPOTENCY_DATABASE": database})
        return runner.invoke(main, arguments)

    return call


def completed(
    store: SQLStore,
    key: str = "a key",
    body: bytes | None = b"done",
    headers: tuple[tuple[str, str], ...] = (),
    **changes: Any,
) -> bytes:
    claim = make_claim(key, **changes)
    assert store.claim(claim) == Claimed(1)
    reason = "streamed" if body is None else None
    assert store.complete(claim.digest, claim.token, Completion("201 Made", headers, body, reason))
    return claim.digest


def one_of_each(store: SQLStore) -> None:
    """Operations of every kind; the key says which."""
    completed(store, "live", path="/pay/1")
    completed(store, "expired", path="/pay/2", retention=-60.0)
    claim = make_claim("released", path="/pay/3")
    store.claim(claim)
    store.release(claim.digest, claim.token)
    store.claim(make_claim("in flight", path="/pay/4"))
    held(store, "held", path="/pay/5", scope="user:ann")
    lapsed(store, "lapsed, held", path="/pay/6", lapse=Lapse.HOLD)
    lapsed(store, "lapsed", path="/refund", retention=3600.0)


# ---------------------------------------------------------------------- stats


def test_stats_count_what_rows_mean_now_by_route_for_programs(
    database: str, store: SQLStore, command: Command
) -> None:
    one_of_each(store)
    query(database, "UPDATE idempotency_keys SET attempt = 4 WHERE idempotency_key = 'released'")
    age_rows(database, 20)
    done = command("stats", "--json")
    assert (done.exit_code, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    pay = {"live": 1, "in-flight": 1, "released": 1, "held": 2, "lapsed": 0, "expired": 1}
    refund = dict.fromkeys(pay, 0) | {"lapsed": 1}
    assert found["rows"] == {state: pay[state] + refund[state] for state in pay}
    by_route = {(route["method"], route["path"]): route for route in found["routes"]}
    assert list(by_route) == [("POST", "/pay/*"), ("POST", "/refund")]
    assert by_route["POST", "/pay/*"]["rows"] == pay
    assert by_route["POST", "/refund"]["rows"] == refund
    assert (found["reruns"], by_route["POST", "/pay/*"]["reruns"]) == (3, 3)
    assert found["replays"] is None
    assert 20 <= found["oldest_seconds"] < 160
    assert 80 <= found["oldest_expired_seconds"] < 220
    assert sum(found["bytes"].values()) > 8192
    assert found["more_routes"] == 0
    assert "://" in found["database"]


def test_a_time_limit_for_requests_may_be_lifted_for_stats_alone(
    pg_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the documentation has it, by PGOPTIONS; a limit of the role's does as the database's."""
    database = f"DATABASE {database_of(pg_database)}"
    runner = CliRunner(env={"WSGI_IDEMPOTENCY_DATABASE": pg_database})
    query(pg_database, f"ALTER {database} SET statement_timeout = '100ms'")
    try:
        with psycopg.connect(pg_database.replace("+psycopg", "")) as locking:
            locking.execute("LOCK TABLE idempotency_keys IN ACCESS EXCLUSIVE MODE")
            ended = runner.invoke(main, ["stats"])
        monkeypatch.setenv("PGOPTIONS", "-c statement_timeout=0")
        lifted = query(pg_database, "SHOW statement_timeout")
        done = runner.invoke(main, ["stats"])
    finally:
        query(pg_database, f"ALTER {database} RESET statement_timeout")
    assert ended.exit_code == 1
    assert "canceling statement due to statement timeout" in ended.output
    assert (lifted, done.exit_code) == ([{"statement_timeout": "0"}], 0)


def test_stats_are_a_table_for_people(store: SQLStore, command: Command) -> None:
    one_of_each(store)
    lines = command("stats").stdout.splitlines()
    assert [line.split() for line in lines[2:6]] == [
        ["live", "in-flight", "released", "held", "lapsed", "expired", "reruns"],
        ["POST", "/pay/*", "1", "1", "1", "2", "0", "1", "0"],
        ["POST", "/refund", "0", "0", "0", "0", "1", "0", "0"],
        ["all", "1", "1", "1", "2", "1", "1", "0"],
    ]
    facts = dict(re.split(" {2,}", line, maxsplit=1) for line in lines[7:])
    assert list(facts) == ["reruns", "replays", "oldest", "to be purged", "size"]
    assert "wsgi_idempotency_duplicates_prevented_total" in facts["replays"]
    assert re.fullmatch(r"claimed \d\.\d seconds ago", facts["oldest"])
    assert re.fullmatch(r"since \d+(\.\d)? seconds", facts["to be purged"])


def test_a_path_in_stats_moves_no_cursor(database: str, command: Command) -> None:
    add_rows(database, 1, path="/\x1b[2J\r\u202e", expired=-60)
    said = command("stats").stdout
    assert "POST /\\x1b[2J\\x0d\\u202e " in said
    assert all(line.isprintable() for line in said.splitlines())


def test_stats_of_one_route_have_no_sum(database: str, command: Command) -> None:
    add_rows(database, 2, expired=-60)
    assert [line.split() for line in command("stats").stdout.splitlines()[3:5]] == [
        ["POST", "/", "2", "0", "0", "0", "0", "0", "0"],
        [],
    ]


def test_what_was_done_before_its_worker_died_is_live(database: str, store: SQLStore) -> None:
    """Its effects are committed, and nobody runs it again."""
    lapsed(store, lapse=Lapse.HOLD)
    query(database, "UPDATE idempotency_keys SET effects_at = created_at")
    assert [row.key for row in Inspector(store).operations(kinds=["live"])] == ["a key"]


def test_stats_of_an_empty_table(command: Command) -> None:
    lines = command("stats").stdout.splitlines()
    assert lines[3].split() == ["all", *["0"] * 7]
    assert any(re.fullmatch("oldest +there is none", line) for line in lines)
    assert any(re.fullmatch("to be purged +none", line) for line in lines)
    found = json.loads(command("stats", "--json").stdout)
    assert (found["oldest_seconds"], found["oldest_expired_seconds"]) == (None, None)


def test_stats_leave_out_small_routes_but_not_their_rows(database: str, command: Command) -> None:
    for count, path in ((3, "/a"), (2, "/b"), (1, "/c")):
        add_rows(database, count, path=path, expired=-60)
    lines = [line.split() for line in command("stats", "--top", "1").stdout.splitlines()[3:6]]
    assert [line[:3] for line in lines] == [["POST", "/a", "3"], ["2", "others", "3"],
                                            ["all", "6", "0"]]  # fmt: skip
    found = json.loads(command("stats", "--top", "1", "--json").stdout)
    assert (len(found["routes"]), found["more_routes"], found["rows"]["live"]) == (1, 2, 6)


@pytest.mark.parametrize(
    ("paths", "shown"),
    [
        (["/orders/1/pay", "/orders/22/pay"], ["/orders/*/pay"]),
        (["/1", "/2"], ["/*"]),
        (["/x/8e03978e-40d5-43dd-bc93-6894a57f9324"], ["/x/*"]),
        (["/x/0123456789abcdef01234567"], ["/x/*"]),
        (["/x/ch_1OqPmK2eZvKYlo2C"], ["/x/*"]),
        (["/v1/charges", "/v2/charges"], ["/v1/charges", "/v2/charges"]),
        (["/checkout-session-new", "/a1"], ["/a1", "/checkout-session-new"]),
    ],
    ids=["numbers", "at the end", "a UUID", "hexadecimal", "a random name", "a version", "words"],
)
def test_parts_of_a_path_that_name_one_among_many_count_as_one(
    database: str, store: SQLStore, paths: list[str], shown: list[str]
) -> None:
    for path in paths:
        add_rows(database, 1, path=path)
    assert [route.path for route in Inspector(store).routes()] == shown


@pytest.mark.parametrize(
    ("size", "shown"),
    [(0, "0 bytes"), (2048, "2.0 KiB"), (3 << 19, "1.5 MiB"), (5 << 30, "5.0 GiB")],
)
def test_a_size_for_people(size: int, shown: str) -> None:
    assert in_bytes(size) == shown


# ---------------------------------------------------------------------- list


@pytest.mark.parametrize(
    ("options", "keys"),
    [
        (["--state", "live"], ["live"]),
        (["--state", "in-flight"], ["in flight"]),
        (["--state", "released"], ["released"]),
        (["--state", "held"], ["held", "lapsed, held"]),
        (["--state", "lapsed"], ["lapsed"]),
        (["--state", "expired"], ["expired"]),
        (["--state", "live", "--state", "expired"], ["expired", "live"]),
        (["--state", "live", "--lapsed"], ["lapsed", "lapsed, held", "live"]),
        (["--held", "--scope", "user:ann"], ["held"]),
        (["--held", "--scope", "user:eve"], []),
    ],
    ids=" ".join,
)
def test_list_shows_what_is_in_a_state(
    store: SQLStore, command: Command, options: list[str], keys: list[str]
) -> None:
    one_of_each(store)
    found = json.loads(command("list", "--json", *options).stdout)["operations"]
    assert sorted(operation["key"] for operation in found) == keys


def test_every_row_means_exactly_one_thing(store: SQLStore) -> None:
    one_of_each(store)
    inspector = Inspector(store)
    for kind in KINDS:
        assert [row.key for row in inspector.operations(kinds=[kind])] == [kind]
    (pay, refund) = inspector.routes()
    assert pay.rows + refund.rows == len(KINDS)


def test_list_shows_what_is_older(database: str, store: SQLStore, command: Command) -> None:
    for key in ("a", "b", "c"):
        held(store, key)
    age_rows(database, 1800, each=3600)
    for older_than, keys in (("0", ["a", "b", "c"]), ("1 h", ["a", "b"]), ("3h", [])):
        found = json.loads(command("list", "--json", "--older-than", older_than).stdout)
        assert [operation["key"] for operation in found["operations"]] == keys


def test_list_refuses_a_duration_that_is_none(command: Command) -> None:
    done = command("list", "--older-than", "long")
    assert done.exit_code == 2
    assert "use one like 30 s" in " ".join(done.stderr.split())


def test_long_texts_do_not_make_a_table_wide(store: SQLStore, command: Command) -> None:
    held(store, "k" * 2000, path="/" + "p" * 5000)
    assert max(map(len, command("list").stdout.splitlines())) < 320


# ---------------------------------------------------------------------- show


def test_show_tells_what_happened_in_order(
    database: str, store: SQLStore, command: Command
) -> None:
    claim = lapsed(store, retention=3600.0)
    age_rows(database, 7200)
    Resolver(store).resolve(
        claim.digest, claim.token, Resolution.RELEASE, actor="ann", reason="no trace of it"
    )
    history = command("show", "a key").stdout.split("\n\n")[1].splitlines()
    moment = r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00"
    assert len(history) == 2
    assert re.fullmatch(f"{moment} claimed first", history[0])
    assert re.fullmatch(f"{moment} released after attempt 1 by ann: no trace of it", history[1])


def test_a_completion_by_a_person_is_told_once(store: SQLStore, command: Command) -> None:
    claim = held(store)
    Resolver(store).resolve(
        claim.digest, claim.token, Resolution.COMPLETE, actor="ann", reason="the bank has it",
        response=StoredResponse("201 Created", (), b"7"),
    )  # fmt: skip
    history = command("show", "a key").stdout.split("\n\n")[1].splitlines()
    assert [line.split(" ", 1)[1] for line in history] == [
        "claimed first",
        "completed with 201 Created after attempt 1 by ann: the bank has it",
    ]


def test_show_tells_which_steps_were_done(store: SQLStore, command: Command) -> None:
    claim = make_claim()
    store.claim(claim)
    for name in ("charge", "ma\x1bil"):
        assert store.record_step(claim.digest, claim.token, name, "1")
    history = command("show", "a key").stdout.split("\n\n")[1].splitlines()
    assert [line.split(" ", 1)[1] for line in history] == [
        "claimed first",
        "attempt 1 did step charge",
        "attempt 1 did step ma\\x1bil",
    ]
    steps = json.loads(command("show", "a key", "--json").stdout)["steps"]
    assert [(step["name"], step["attempt"]) for step in steps] == [("charge", 1), ("ma\x1bil", 1)]


@pytest.mark.parametrize(
    ("arrange", "history"),
    [
        (completed, ["claimed first", "completed with 201 Made"]),
        (
            lambda store: completed(store, retention=-60.0),
            ["its retention was over", "claimed first", "completed with 201 Made"],
        ),
        (lapsed, ["claimed first", "the lease of attempt 1 ran out"]),
        (held, ["claimed first"]),
    ],
    ids=["completed", "expired", "lapsed", "held"],
)
def test_show_tells_what_the_row_has(
    store: SQLStore, command: Command, arrange: Callable[[SQLStore], object], history: list[str]
) -> None:
    arrange(store)
    lines = command("show", "a key").stdout.split("\n\n")[1].splitlines()
    assert [line.split(" ", 1)[1] for line in lines] == history


def test_show_has_the_response_and_how_large_its_body_is(store: SQLStore, command: Command) -> None:
    completed(store, body=b"secret", headers=(("Link", "<1>"), ("Link", "<2>")))
    said = command("show", "a key").stdout
    assert said.endswith("\n\n201 Made\nLink: <1>\nLink: <2>\n\n6 bytes; --body shows them\n")
    assert "secret" not in said
    found = json.loads(command("show", "a key", "--json").stdout)
    assert found["response"] == {
        "status": "201 Made",
        "headers": [["Link", "<1>"], ["Link", "<2>"]],
    }


JSON = (("Content-Type", "application/json"),)
TEXT = (("Content-Type", "text/plain; charset=latin-1"),)
ZIPPED = (("Content-Encoding", "gzip"), *JSON)


@pytest.mark.parametrize(
    ("headers", "body", "shown"),
    [
        (JSON, b'{"id": 7, "n": "\xc3\xa9"}', '{\n  "id": 7,\n  "n": "é"\n}'),
        (JSON, b'{"id": ', '{"id": '),
        (ZIPPED, gzip.compress(b"[1]"), "[\n  1\n]"),
        (ZIPPED, b"not gzip", f"00000000  6e 6f 74 20 67 7a 69 70{' ' * 26}|not gzip|"),
        (TEXT, b"caf\xe9\ttwo\nlines", "café    two\nlines"),
        ((), b"a\x1b[2Jb\x07\r\xe2\x80\xae", "a\\x1b[2Jb\\x07\n\\u202e"),
        ((), b"\x00\xff", "00000000  00 ff                                            |..|"),
        ((), b"\x00A", "00000000  00 41                                            |.A|"),
        ((("Content-Type", "text/plain; charset=none"),), b"a", "00000000  61"),
        ((), b"", None),
    ],
    ids=["JSON", "what is no JSON", "gzip", "what is no gzip", "another charset",
         "escape sequences", "bytes", "bytes that decode", "an unknown charset", "nothing"],
)  # fmt: skip
def test_a_body_is_shown_decoded_and_moves_no_cursor(
    store: SQLStore,
    command: Command,
    headers: tuple[tuple[str, str], ...],
    body: bytes,
    shown: str | None,
) -> None:
    completed(store, body=body, headers=headers)
    said = command("show", "a key", "--body").stdout
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", said)
    if shown is None:
        assert said.endswith("\n\n201 Made\n")
    else:
        assert f"\n\n{shown}" in said
    found = json.loads(command("show", "a key", "--body", "--json").stdout)
    assert base64.b64decode(found["response"]["body_base64"]) == body


def test_a_bomb_is_not_blown_up(store: SQLStore, command: Command) -> None:
    """What is left out is said to be, also where the cut is within a character."""
    completed(store, body=gzip.compress("x\n€\n".encode() * LARGEST_SHOWN), headers=ZIPPED)
    shown = command("show", "a key", "--body").stdout
    assert shown.count("x\n") == pytest.approx(LARGEST_SHOWN / 6, abs=10)
    assert shown.endswith(
        f"\nand more than these {LARGEST_SHOWN} bytes; --json has them, compressed\n"
    )


def test_a_long_run_of_bytes_is_cut(store: SQLStore, command: Command) -> None:
    completed(store, body=b"\xff" * (BINARY_SHOWN + 5))
    assert command("show", "a key", "--body").stdout.endswith(
        "\nand 5 more bytes; --json has them all\n"
    )


def test_what_can_not_be_replayed_has_no_body_to_show(store: SQLStore, command: Command) -> None:
    completed(store, body=None)
    assert command("show", "a key", "--body").stdout.endswith("\n\n201 Made\n")
    found = json.loads(command("show", "a key", "--body", "--json").stdout)
    assert found["response"] == {"status": "201 Made", "headers": []}


def test_a_response_that_is_damaged_is_left_out(
    database: str, store: SQLStore, command: Command
) -> None:
    digest = completed(store)
    query(database, "UPDATE idempotency_keys SET response_headers = 'x'")
    said = command("show", digest.hex()).stdout
    assert "state" in said
    assert "--body shows them" not in said
