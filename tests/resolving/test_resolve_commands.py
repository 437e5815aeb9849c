"""The commands for operations of unknown outcome: what they do, say, and exit with."""

from __future__ import annotations

import json
import os
import pwd
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from apps.shop import query
from click.testing import CliRunner, Result
from servers.http import TESTS
from unresolved import OVER, age_rows, held, lapsed
from werkzeug.test import Client

from wsgi_idempotency import IdempotencyMiddleware, Policy, SQLStore, by_remote_user, hold_unknown
from wsgi_idempotency.cli import main
from wsgi_idempotency.records import Claim, Completion, Lapse, State
from wsgi_idempotency.stores.resolving import Resolver
from wsgi_idempotency.testing import make_claim

DONE = Completion("200 OK", (), b"by its worker")


@pytest.fixture
def command(database: str, store: SQLStore) -> Callable[..., Result]:
    """Call the command in this process, for the test's database."""

    def call(*arguments: str, input: bytes | None = None) -> Result:
        runner = CliRunner(env={"WSGI_IDEMPOTENCY_DATABASE": database})
        return runner.invoke(main, arguments, input=input)

    return call


Command = Callable[..., Result]


def columns(output: str) -> list[list[str]]:
    """The cells of a table, without its head."""
    head, *lines = output.splitlines()
    assert head.split() == ["age", "state", "attempt", "request", "key", "scope", "digest"]
    return [re.split(r" {2,}", line) for line in lines]


def completed(store: SQLStore, name: str = "a key") -> Claim:
    claim = make_claim(name)
    store.claim(claim)
    store.complete(claim.digest, claim.token, DONE)
    return claim


# ---------------------------------------------------------------------- the commands as such


@pytest.mark.parametrize("name", ["list", "show", "resolve", "reconcile"])
def test_a_command_that_is_loaded_is_the_one_that_help_lists(name: str) -> None:
    with click.Context(main) as context:
        found, loaded, _ = main.resolve_command(context, [name])
    assert loaded is not None
    stub = main.commands[name]
    assert loaded is not stub
    assert (found, loaded.name) == (name, name)
    assert loaded.get_short_help_str(200).rstrip(".") == stub.get_short_help_str(200).rstrip(".")


@pytest.mark.parametrize(
    "arguments",
    [["list"], ["show", "k"], ["resolve", "k", "--forget", "--reason", "so"],
     ["reconcile", "--verdict", "builtins:print"]],
    ids=lambda arguments: arguments[0],
)  # fmt: skip
class TestEveryCommand:
    def test_says_how_to_name_a_database(self, arguments: list[str]) -> None:
        done = CliRunner(env={"WSGI_IDEMPOTENCY_DATABASE": None}).invoke(main, arguments)
        assert done.exit_code == 2
        assert "Give --database URL or set WSGI_IDEMPOTENCY_DATABASE" in done.stderr

    def test_says_that_a_file_is_missing_and_makes_none(
        self, arguments: list[str], tmp_path: Path
    ) -> None:
        url = f"sqlite:///{tmp_path / 'keys.db'}"
        done = CliRunner().invoke(main, [*arguments, "--database", url])
        assert done.exit_code == 1
        assert "doesn't exist. Is the path right?" in done.stderr
        assert list(tmp_path.iterdir()) == []

    def test_says_that_nobody_listens(self, arguments: list[str]) -> None:
        url = "postgresql://shop:s3cret@127.0.0.1:1/shop"
        done = CliRunner().invoke(main, [*arguments, "--database", url])
        assert done.exit_code == 1
        assert "To see what is wrong, run: wsgi-idempotency check" in done.stderr
        assert "s3cret" not in done.output


# ---------------------------------------------------------------------- list


def test_list_shows_what_nobody_knows_for_people(
    database: str, store: SQLStore, command: Command
) -> None:
    claims = [
        held(store, "first", method="PATCH", path="/pay", scope="user:ann", key="k-1"),
        lapsed(store, "k-2", retention=86400.0),
        lapsed(store, "k-3", lapse=Lapse.HOLD),
    ]
    completed(store, "done")
    age_rows(database, 3 * 3600, each=1)
    done = command("list")
    assert (done.exit_code, done.stderr) == (0, "")
    rows = columns(done.stdout)
    assert [row[1] for row in rows] == ["held", "lapsed, to be rerun", "lapsed, held"]
    assert rows[0] == [
        "3 hours", "held", "1", "PATCH /pay", "k-1", "user:ann", claims[0].digest.hex(),
    ]  # fmt: skip
    assert [row[-1] for row in rows] == [claim.digest.hex() for claim in claims]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], ["held", "to be held", "to be released"]),
        (["--held"], ["held", "to be held"]),
        (["--lapsed"], ["to be held", "to be released"]),
        (["--held", "--lapsed"], ["held", "to be held", "to be released"]),
    ],
    ids=["neither", "held", "lapsed", "both"],
)
def test_list_shows_what_it_is_asked_for(
    store: SQLStore, command: Command, options: list[str], expected: list[str]
) -> None:
    held(store, "held")
    lapsed(store, "to be held", lapse=Lapse.HOLD)
    lapsed(store, "to be released")
    operations = json.loads(command("list", "--json", *options).stdout)["operations"]
    assert sorted(operation["key"] for operation in operations) == expected


def test_list_says_that_there_is_none(command: Command) -> None:
    assert command("list").stdout == "There is none.\n"
    assert json.loads(command("list", "--json").stdout) == {"operations": [], "more": False}


@pytest.mark.parametrize("number", [2, 3])
def test_list_says_that_there_are_more(
    database: str, store: SQLStore, command: Command, number: int
) -> None:
    for count in range(number):
        held(store, f"key {count}")
    age_rows(database, 0, each=1)
    done = command("list", "--limit", "2")
    assert [row[4] for row in columns(done.stdout)] == ["key 0", "key 1"]
    expected = "There are more than these 2; see --limit.\n" if number > 2 else ""
    assert (done.exit_code, done.stderr) == (0, expected)
    assert json.loads(command("list", "--limit", "2", "--json").stdout)["more"] is (number > 2)


def test_list_has_everything_for_programs_but_the_token(store: SQLStore, command: Command) -> None:
    claim = lapsed(store, lapse=Lapse.HOLD, retention=3600.0)
    done = command("list", "--json")
    [operation] = json.loads(done.stdout)["operations"]
    assert claim.token.hex() not in done.stdout
    assert 0 <= operation.pop("age") < 60
    created, lease, expires = (
        operation.pop(name) for name in ("created_at", "lease_until", "expires_at")
    )
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", created)
    assert created == lease < expires
    assert operation == {
        "digest": claim.digest.hex(), "state": "claimed", "held": True, "lapsed": True,
        "lapse": "hold", "effects": False, "attempt": 1, "method": "POST", "path": "/charges",
        "scope": "alice", "key": "a key", "completed_at": None, "status": None, "body_bytes": None,
        "not_replayable": None,
    }  # fmt: skip


def test_nothing_that_a_client_sent_moves_the_terminal_s_cursor(
    store: SQLStore, command: Command
) -> None:
    claim = held(store, key="a\x1b[2Jb", path="/\x07", scope="c\rd", method="P\nOST")
    for done in (command("list"), command("show", claim.digest.hex())):
        assert "a\\x1b[2Jb" in done.stdout
        assert not re.search(r"[\x00-\x09\x0b-\x1f]", done.stdout)


# ---------------------------------------------------------------------- show


def facts(output: str) -> dict[str, str]:
    """What comes before the history."""
    lines = output.partition("\n\n")[0].splitlines()
    return dict(re.split(r" {2,}", line, maxsplit=1) for line in lines)  # type: ignore[misc]


@pytest.mark.parametrize("by", ["key", "key and scope", "digest", "digest in capitals"])
def test_show_finds_an_operation(store: SQLStore, command: Command, by: str) -> None:
    claim = held(store, key="k-1", scope="user:ann")
    held(store, "another", key="K-1", scope="user:ann")
    arguments = {
        "key": ["k-1"],
        "key and scope": ["k-1", "--scope", "user:ann"],
        "digest": [claim.digest.hex()],
        "digest in capitals": [claim.digest.hex().upper()],
    }[by]
    done = command("show", *arguments)
    assert (done.exit_code, done.stderr) == (0, "")
    shown = facts(done.stdout)
    assert shown["key"] == "k-1"
    assert shown["scope"] == "user:ann"
    assert shown["digest"] == claim.digest.hex()
    assert shown["state"] == "held"
    assert shown["looked at again"].startswith("by a reconciler, not before 20")
    assert "remembered until" not in shown, "until it is resolved"


def test_show_finds_a_key_as_its_client_sent_it(database: str, store: SQLStore) -> None:
    """Whatever the middleware has made of it on the way to the table."""

    def app(environ: Any, start_response: Any) -> list[bytes]:
        raise RuntimeError("the handler fails")

    wrapped = IdempotencyMiddleware(
        app, store, scope=by_remote_user, policy=Policy(outcomes=hold_unknown, max_key_length=9999)
    )
    runner = CliRunner(env={"WSGI_IDEMPOTENCY_DATABASE": database})
    for key in ("k-1", "x" * 2000, "a{}%s:b"):
        with pytest.raises(RuntimeError):
            Client(wrapped).post(
                "/pay", headers={"Idempotency-Key": key}, environ_base={"REMOTE_USER": "ann"}
            )
        done = runner.invoke(main, ["show", key, "--scope", "user:ann"])
        assert done.exit_code == 0, done.output
        assert facts(done.stdout)["state"] == "held"


@pytest.mark.parametrize(
    ("arrange", "expected"),
    [
        (
            lambda store: lapsed(store),
            {"state": "lapsed, to be rerun", "lease": "ran out", "remembered until": "20"},
        ),
        (
            lambda store: lapsed(store, lapse=Lapse.HOLD),
            {"state": "lapsed, held", "lease": "ran out"},
        ),
        (
            lambda store: store.claim(make_claim()),
            {"state": "in flight", "lease": "runs out", "remembered until": "20"},
        ),
        (
            lambda store: store.claim(make_claim(retention=-60.0)),
            {"state": "in flight", "lease": "runs out", "remembered until": "20"},
        ),
        (completed, {"state": "completed", "completed": "20", "response": "200 OK, 13 bytes"}),
        (
            lambda store: lapsed(store, retention=-60.0),
            {"state": "lapsed, to be rerun", "remembered until": ".*, and counts as absent$"},
        ),
        (lambda store: held(store, lease=OVER), {"state": "held"}),
    ],
    ids=["lapsed", "lapsed and held", "in flight", "in flight past its retention", "completed",
         "absent", "held and due"],
)  # fmt: skip
def test_show_says_what_a_row_means(
    store: SQLStore, command: Command, arrange: Callable[[SQLStore], object], expected: Any
) -> None:
    arrange(store)
    shown = facts(command("show", "a key").stdout)
    for name, pattern in expected.items():
        assert re.match(pattern, shown[name]), shown
    assert ("absent" in shown.get("remembered until", "")) is (
        "absent" in expected.get("remembered until", "")
    )
    assert "looked at again" not in shown


def test_show_says_why_a_response_is_not_replayed(store: SQLStore, command: Command) -> None:
    claim = make_claim()
    store.claim(claim)
    store.complete(claim.digest, claim.token, Completion("200 OK", (), None, "streamed"))
    assert facts(command("show", "a key").stdout)["response"] == "200 OK, streamed"
    assert json.loads(command("show", "a key", "--json").stdout)["operation"]["body_bytes"] is None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["k"], "No operation has the key k\n"),
        (["k", "--scope", "user:eve"], "No operation has the key k in the scope user:eve\n"),
        (["ab" * 32], f"No operation has the key {'ab' * 32}\n"),
    ],
    ids=["key", "key and scope", "digest"],
)
def test_show_says_that_there_is_none(
    store: SQLStore, command: Command, arguments: list[str], said: str
) -> None:
    held(store, key="another")
    done = command("show", *arguments)
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr == f"Error: {said}"


@pytest.mark.parametrize(
    "arguments",
    [["show"], ["resolve", "--forget", "--reason", "so"]],
    ids=lambda arguments: arguments[0],
)
@pytest.mark.parametrize(("number", "said"), [(2, "2 operations"), (21, "More than 20 operations")])
def test_several_with_one_key_are_listed_and_none_is_guessed(
    store: SQLStore, command: Command, arguments: list[str], number: int, said: str
) -> None:
    for count in range(number):
        held(store, f"key {count}", key="k", scope=f"user:{count}")
    name, *options = arguments
    done = command(name, "k", *options)
    assert done.exit_code == 1
    assert len(columns(done.stdout)) == min(number, 20)
    assert f"{said} have this key. Name one by its digest, or give --scope" in done.stderr
    assert len(Resolver(store).unresolved()) == number
    assert command(name, "k", *options, "--scope", "user:1").exit_code == 0


def test_a_key_that_looks_like_a_digest_is_found_as_both(store: SQLStore, command: Command) -> None:
    """And as a key alone with its scope."""
    claim = held(store, "one")
    assert facts(command("show", claim.digest.hex()).stdout)["key"] == "one"
    held(store, "other", key=claim.digest.hex())
    done = command("show", claim.digest.hex())
    assert done.exit_code == 1
    assert "2 operations have this key" in done.stderr
    named = command("show", claim.digest.hex(), "--scope", "alice")
    assert facts(named.stdout)["key"] == claim.digest.hex()


def test_a_key_that_looks_like_a_digest_and_is_none_is_found(
    store: SQLStore, command: Command
) -> None:
    held(store, key="ab" * 32)
    assert facts(command("show", "ab" * 32).stdout)["key"] == "ab" * 32


def test_show_tells_what_was_decided_also_when_the_operation_is_gone(
    store: SQLStore, command: Command
) -> None:
    claim = held(store)
    command("resolve", "a key", "--release", "--reason", "try again", "--actor", "ann")
    command("resolve", "a key", "--forget", "--reason", "never\nmind", "--actor", "bob")
    done = command("show", claim.digest.hex())
    assert done.exit_code == 0
    gone, nothing, first, second = done.stdout.splitlines()
    assert nothing == ""
    assert gone == "There is no such operation any more."
    moment = r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00"
    assert re.fullmatch(f"{moment} released after attempt 1 by ann: try again", first)
    assert re.fullmatch(rf"{moment} forgotten after attempt 1 by bob: never\\x0amind", second)
    made = json.loads(command("show", claim.digest.hex(), "--json").stdout)
    assert made["operation"] is None
    assert [one.pop("resolved_at") < "3000" for one in made["resolutions"]] == [True, True]
    assert made["resolutions"][1] == {
        "actor": "bob", "reason": "never\nmind", "action": "forget",
        "digest": claim.digest.hex(), "scope": "alice", "key": "a key", "method": "POST",
        "path": "/charges", "attempt": 1, "status": None,
    }  # fmt: skip


# ---------------------------------------------------------------------- resolve


def test_resolve_forgets(store: SQLStore, command: Command) -> None:
    claim = held(store)
    done = command("resolve", "a key", "--forget", "--reason", "the bank has no trace")
    assert (done.exit_code, done.stderr) == (0, "")
    said = "Forgotten: POST /charges, key a key, scope alice. The key is fresh.\n"
    assert done.stdout == said
    assert store.lookup(claim.digest) is None
    [made] = Resolver(store).resolutions(claim.digest)
    assert made.reason == "the bank has no trace"
    assert made.actor == pwd.getpwuid(os.getuid()).pw_name


def test_resolve_releases(store: SQLStore, command: Command) -> None:
    claim = lapsed(store, lapse=Lapse.HOLD)
    done = command("resolve", claim.digest.hex(), "--release", "--reason", "so", "--actor", "ann")
    assert done.exit_code == 0
    assert done.stdout.endswith("scope alice. The same request may run again.\n")
    record = store.lookup(claim.digest)
    assert record is not None
    assert record.state is State.RELEASED
    assert [made.actor for made in Resolver(store).resolutions(claim.digest)] == ["ann"]


def test_resolve_completes(store: SQLStore, command: Command, tmp_path: Path) -> None:
    claim = held(store)
    (tmp_path / "body").write_bytes(b'{"id": 1}\x00')
    done = command(
        "resolve", "a key", "--complete", "--status", "201", "--body-file", str(tmp_path / "body"),
        "--header", "Content-Type: application/json", "--header", "Link:<1>", "--header",
        "Link: <2>", "--header", "Set-Cookie: a=b", "--header", "Date: today",
        "--reason", "receipt 7",
    )  # fmt: skip
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout == (
        "Completed: POST /charges, key a key, scope alice. Retries get 201 Created from now on.\n"
        "Never replayed, and left out: Set-Cookie, Date.\n"
    )
    record = store.lookup(claim.digest)
    assert record is not None
    assert (record.status, record.body) == ("201 Created", b'{"id": 1}\x00')
    assert record.headers == (
        ("Content-Type", "application/json"), ("Link", "<1>"), ("Link", "<2>"),
    )  # fmt: skip
    assert "completed with 201 Created after attempt 1 by" in command("show", "a key").stdout


@pytest.mark.parametrize(
    ("arguments", "status", "body"),
    [
        (["--status", "201 Made It", "--body-file", "-"], "201 Made It", b"from standard input"),
        (["--status", "204"], "204 No Content", b""),
        (["--status", "303", "--body-file", "/dev/null"], "303 See Other", b""),
        (["--status", "299", "--body-file", "-"], "299 ", b"from standard input"),
    ],
    ids=["with its own reason", "without a body", "with an empty body", "without a usual reason"],
)
def test_resolve_completes_with_any_status(
    store: SQLStore, command: Command, arguments: list[str], status: str, body: bytes
) -> None:
    claim = held(store)
    done = command(
        "resolve", "a key", "--complete", *arguments, "--reason", "so", input=b"from standard input"
    )
    assert done.exit_code == 0, done.output
    assert done.stdout.count("\n") == 1
    record = store.lookup(claim.digest)
    assert record is not None
    assert (record.status, record.body) == (status, body)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "Give one of --forget, --release and --complete."),
        (["--forget", "--release"], "Give one of --forget, --release and --complete."),
        (["--forget", "--status", "201"], "belong to --complete"),
        (["--release", "--body-file", "/dev/null"], "belong to --complete"),
        (["--release", "--header", "A: b"], "belong to --complete"),
        (["--complete", "--body-file", "/dev/null"], "--complete needs the --status"),
        (["--complete", "--status", "201"], "--complete needs the --body-file"),
        (["--complete", "--header", "A"], "'A' is not like 'Name: value'"),
        (["--complete", "--status", "201", "--body-file", "/no/such"], "No such file"),
        (["--forget", "--actor", " "], "it says nothing"),
    ],
    ids=["no action", "two actions", "a status to forget", "a body to release",
         "a header to release", "no status", "no body", "a header without a value",
         "a body that isn't there", "a blank actor"],
)  # fmt: skip
def test_resolve_refuses_nonsense(
    store: SQLStore, command: Command, arguments: list[str], said: str
) -> None:
    claim = held(store)
    done = command("resolve", "a key", "--reason", "so", *arguments)
    assert done.exit_code == 2
    assert said in done.stderr
    assert store.lookup(claim.digest) is not None
    assert Resolver(store).resolutions(claim.digest) == []


@pytest.mark.parametrize("reason", [[], ["--reason", ""], ["--reason", " \n"]])
def test_resolve_wants_a_reason(store: SQLStore, command: Command, reason: list[str]) -> None:
    claim = held(store)
    done = command("resolve", "a key", "--forget", *reason)
    assert done.exit_code == 2
    assert "--reason" in done.stderr
    assert store.lookup(claim.digest) is not None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--status", "601"], "the status line was not valid HTTP"),
        (["--status", "429"], "429 speaks of a request"),
        (["--status", "200", "--header", "A B: c"], "a header field was not valid HTTP"),
        (["--status", "200", "--max-body-bytes", "4"], "has 5 bytes, more than the 4 allowed"),
    ],
    ids=["a status that is none", "a status of a moment", "a header that is none", "a large body"],
)
def test_resolve_refuses_a_response_that_can_not_be_replayed(
    store: SQLStore, command: Command, arguments: list[str], said: str
) -> None:
    claim = held(store)
    done = command(
        "resolve", "a key", "--complete", "--body-file", "-", "--reason", "so", *arguments,
        input=b"a body",
    )  # fmt: skip
    assert done.exit_code == 1
    assert said in done.stderr
    record = store.lookup(claim.digest)
    assert record is not None
    assert record.state is State.HELD


@pytest.mark.parametrize(
    ("arrange", "said"),
    [
        (lambda store: store.claim(make_claim()), "Error: The operation is in flight: attempt 1"),
        (completed, "Error: The operation is completed (200 OK): there is nothing to resolve."),
    ],
    ids=["in flight", "completed"],
)
def test_resolve_leaves_alone_what_is_not_open(
    store: SQLStore, command: Command, arrange: Callable[[SQLStore], object], said: str
) -> None:
    arrange(store)
    before = store.lookup(make_claim().digest)
    assert before is not None
    done = command("resolve", "a key", "--forget", "--reason", "so")
    assert done.exit_code == 1
    assert said in done.stderr
    assert done.stderr.endswith(" Nothing was changed.\n")
    after = store.lookup(make_claim().digest)
    assert after is not None
    assert (after.state, after.token) == (before.state, before.token)


def test_a_user_without_a_name_is_on_record_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that runs as any number."""
    from wsgi_idempotency.resolve_commands import current_user

    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 7)
    assert current_user() == f"user {2**31 - 7}"


# ---------------------------------------------------------------------- reconcile


@pytest.fixture
def verdicts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the verdicts of apps.verdicts are found, and write to."""
    monkeypatch.setenv("LEDGER", str(tmp_path / "ledger"))
    return "apps.verdicts:answer"


def test_reconcile_once_says_what_came_of_it(
    store: SQLStore, command: Command, verdicts: str
) -> None:
    for name in ("done 1", "never 1", "never 2", "unknown"):
        held(store, name, lease=OVER)
    done = command("reconcile", "--verdict", verdicts, "--once", "--actor", "the night shift")
    assert (done.exit_code, done.stdout) == (
        0, "4 looked at: 1 completed, 2 not executed, 1 still unknown\n",
    )  # fmt: skip
    made = query_resolutions(store)
    assert {row["actor"] for row in made} == {"the night shift"}
    again = command("reconcile", "--verdict", verdicts, "--once")
    assert (again.exit_code, again.stdout) == (0, "0 looked at\n")


def query_resolutions(store: SQLStore) -> list[dict[str, Any]]:
    url = store.url.render_as_string(hide_password=False)
    return query(url, "SELECT * FROM idempotency_resolutions")


def test_reconcile_once_fails_when_a_verdict_does(
    store: SQLStore, command: Command, verdicts: str
) -> None:
    held(store, "fails", lease=OVER)
    held(store, "never", lease=OVER)
    done = command("reconcile", "--verdict", verdicts, "--once")
    assert (done.exit_code, done.stdout) == (1, "2 looked at: 1 not executed, 1 failed\n")


def test_reconcile_refuses_a_response_that_is_too_large(
    store: SQLStore, command: Command, verdicts: str
) -> None:
    held(store, "done", lease=OVER)
    done = command("reconcile", "--verdict", verdicts, "--once", "--max-body-bytes", "3")
    assert (done.exit_code, done.stdout) == (1, "1 looked at: 1 failed\n")


def test_a_walk_that_a_signal_ended_early_is_said(
    store: SQLStore, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second signal would have done what it does elsewhere."""
    (tmp_path / "early.py").write_text(
        "import os, signal, time\n"
        "from wsgi_idempotency import NotExecuted\n"
        "def verdict(record):\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(1)  # another thread hears it\n"
        "    return NotExecuted\n"
    )
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        held(store, name, lease=OVER)

    def unheard(*_: object) -> None: ...

    # Not the default, by which a second signal would be the end of the test runner.
    usual = signal.signal(signal.SIGTERM, unheard)
    try:
        done = command("reconcile", "--verdict", "early:verdict", "--once")
        assert (done.exit_code, done.stdout) == (130, "1 looked at: 1 not executed\n")
        assert signal.getsignal(signal.SIGTERM) is unheard
    finally:
        signal.signal(signal.SIGTERM, usual)


def test_reconcile_goes_on_until_it_is_told_to_stop(
    store: SQLStore, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Walk after walk; what each came to is in the log."""
    (tmp_path / "twice.py").write_text(
        "import os, signal\n"
        "from wsgi_idempotency import NotExecuted, SQLStore\n"
        "from wsgi_idempotency.testing import make_claim\n"
        "def verdict(record):\n"
        "    if record.key == 'second':\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "    else:\n"
        "        store = SQLStore(os.environ['WSGI_IDEMPOTENCY_DATABASE'])\n"
        "        claim = make_claim('second', lease=0)\n"
        "        store.claim(claim)\n"
        "        store.close()\n"
        "    return NotExecuted\n"
    )
    monkeypatch.chdir(tmp_path)
    held(store, "first", lease=OVER)
    started = time.monotonic()
    done = command("reconcile", "--verdict", "twice:verdict", "--interval", "0.2")
    assert (done.exit_code, done.stdout) == (0, "2 looked at: 2 not executed\n")
    assert time.monotonic() - started > 0.2, "it rests between walks"


@pytest.mark.parametrize(
    ("verdict", "said"),
    [
        ("apps.verdicts", "it is 'apps.verdicts'; use module:name"),
        (":answer", "use module:name"),
        ("no_such_module:answer", "no_such_module can't be imported: No module named"),
        ("apps.verdicts:no_such", "apps.verdicts has no no_such"),
        ("apps.verdicts:looks", "apps.verdicts:looks can't be called"),
    ],
    ids=["no function", "no module", "a module that isn't there", "a function that isn't there",
         "no function at all"],
)  # fmt: skip
def test_reconcile_says_which_verdict_it_needs(command: Command, verdict: str, said: str) -> None:
    done = command("reconcile", "--verdict", verdict)
    assert done.exit_code == 2
    assert said in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [["--interval", "-1"], ["--interval", "nan"], ["--patience", "0.5"], ["--actor", " "]],
    ids=" ".join,
)
def test_reconcile_refuses_nonsense(command: Command, arguments: list[str]) -> None:
    done = command("reconcile", "--verdict", "apps.verdicts:answer", *arguments)
    assert done.exit_code == 2
    assert f"Invalid value for '{arguments[0]}'" in done.stderr


def test_a_verdict_is_found_where_one_stands(
    store: SQLStore, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "standing_here.py").write_text(
        "from wsgi_idempotency import NotExecuted\n\ndef verdict(record):\n    return NotExecuted\n"
    )
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert command("reconcile", "--verdict", "standing_here:verdict", "--once").exit_code == 0
    monkeypatch.chdir(TESTS)
