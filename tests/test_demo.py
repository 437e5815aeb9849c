"""The demo, as a person runs it: the shop, the page, the lines to paste, the double tap."""

from __future__ import annotations

import contextlib
import html.parser
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise, takewhile
from pathlib import Path

import pytest
from click.testing import CliRunner
from servers import ended, http
from sqlalchemy import create_engine
from werkzeug.exceptions import InternalServerError, NotFound
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from werkzeug.test import Client

from wsgi_idempotency.demo import demo, server
from wsgi_idempotency.demo.command import origin, tap_twice
from wsgi_idempotency.demo.double_tap import (
    TIMEOUT,
    Observation,
    Purchase,
    buy,
    complaints,
    pay,
)
from wsgi_idempotency.demo.shop import create_app, create_charges, create_pages, metadata
from wsgi_idempotency.stores.tables import SCHEMA_REVISION

COMMAND = Path(sys.executable).with_name("wsgi-idempotency")


@dataclass
class Demo:
    """A demo that runs in a process of its own.

    :param output: what it has printed before its last line, which is about Ctrl-C.
    :param folder: where it makes its temporary files.
    """

    process: subprocess.Popen[str]
    output: str
    folder: Path

    @property
    def address(self) -> tuple[str, int]:
        [(host, port)] = re.findall(r"open at http://([^:/]+):(\d+)/$", self.output, re.MULTILINE)
        return host, int(port)

    @property
    def lines(self) -> list[str]:
        """The lines to paste."""
        return re.findall(r"^ +(curl .*)$", self.output, re.MULTILINE)

    def stop(self, number: signal.Signals) -> int:
        self.process.send_signal(number)
        return self.process.wait(30)


@pytest.fixture
def running_demo(tmp_path: Path) -> Iterator[Demo]:
    """``wsgi-idempotency demo`` on a free port, once it has said everything."""
    process = subprocess.Popen(
        [COMMAND, "demo", "--port", "0"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert process.stdout is not None
    with ended(process, by="TERM"):
        lines = takewhile(lambda line: not line.startswith("Ctrl-C"), process.stdout)
        yield Demo(process, "".join(lines), tmp_path)


# ---------------------------------------------------------------- the double tap


def test_once_charges_the_protected_order_once_on_sqlite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a file that is gone afterwards."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    result = CliRunner().invoke(demo, ["--once"])

    assert result.exit_code == 0, result.output
    assert_charged_once_under_protection(result.output)
    assert not list(tmp_path.iterdir())


def test_once_charges_the_protected_order_once_on_postgresql(pg_url: str) -> None:
    """In a database with nothing in it; then again, with the tables and charges there."""
    for before in ("upgraded from nothing", "as before"):
        result = CliRunner().invoke(demo, ["--once", "--database", pg_url])

        assert result.exit_code == 0, result.output
        assert f"the schema is at {SCHEMA_REVISION}, {before}." in result.output
        assert_charged_once_under_protection(result.output)


def assert_charged_once_under_protection(output: str) -> None:
    table = output[output.index("replayed?") :]
    rows = re.findall(r"(tap|retry) +(\d+|none) +(yes|no) +(ch_\d+|-) *(\d*)$", table, re.MULTILINE)
    without, with_ = rows[:3], rows[3:]
    assert [status for _, status, *_ in without] == ["201", "201", "201"]
    assert len({charge for *_, charge, _ in without}) == 3
    assert without[-1][-1] == "3"
    taps, (_, *retry) = with_[:2], with_[2]
    # On a busy machine the second tap may come when the first is done, and be a replay.
    assert sorted(status for _, status, *_ in taps) in (["201", "409"], ["201", "201"])
    [charge] = {charge for *_, charge, _ in taps} - {"-"}
    assert retry == ["201", "yes", charge, "1"]
    assert "With protection the order was charged once." in output
    assert "Without protection the order was charged 3 times." in output


def test_once_fails_when_a_protected_order_is_charged_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A shop whose protected door has no middleware before it."""
    engine = create_engine(f"sqlite:///{tmp_path / 'shop.db'}")
    metadata.create_all(engine)
    charges = create_charges(engine, 0)
    shop = DispatcherMiddleware(
        create_pages(engine), {"/protected": charges, "/unprotected": charges}
    )
    with http.werkzeug(shop) as address, pytest.raises(SystemExit) as exit:
        tap_twice(address)
    engine.dispose()

    assert exit.value.code == 1
    assert "The protected order was charged 3 times instead of once." in capsys.readouterr().err


KEPT = Purchase(
    protected=True,
    observations=(
        Observation("first tap", 201, False, "ch_1"),
        Observation("second tap", 409),
        Observation("later retry", 201, True, "ch_1"),
    ),
    rows=1,
)
FIRST, SECOND, RETRY = KEPT.observations


@pytest.mark.parametrize(
    "observations",
    [
        pytest.param(KEPT.observations, id="the second tap is told to wait"),
        pytest.param((SECOND, FIRST, RETRY), id="the first tap is told to wait"),
        pytest.param((FIRST, RETRY, RETRY), id="the second tap is a replay"),
    ],
)
def test_nothing_is_wrong_when(observations: tuple[Observation, ...]) -> None:
    assert complaints(replace(KEPT, observations=observations)) == []


@pytest.mark.parametrize(
    ("purchase", "complaint"),
    [
        pytest.param(
            replace(KEPT, rows=2),
            "The protected order was charged twice instead of once.",
            id="the ledger has two rows",
        ),
        pytest.param(
            replace(KEPT, rows=0),
            "The protected order was charged 0 times instead of once.",
            id="the ledger has no row",
        ),
        pytest.param(
            replace(KEPT, observations=(FIRST, replace(SECOND, status=503), RETRY)),
            "The protected second tap got 503.",
            id="a tap got an error",
        ),
        pytest.param(
            replace(KEPT, observations=(FIRST, replace(SECOND, status=None), RETRY)),
            "The protected second tap got no answer.",
            id="a tap got no answer",
        ),
        pytest.param(
            replace(KEPT, observations=(FIRST, SECOND, replace(RETRY, charge="ch_2"))),
            "The protected requests were told of different charges.",
            id="the retry names another charge",
        ),
        pytest.param(
            replace(KEPT, observations=(FIRST, SECOND, replace(RETRY, replayed=False))),
            "The protected later retry was not answered with a replay.",
            id="the retry was not a replay",
        ),
    ],
)
def test_something_is_wrong_when(purchase: Purchase, complaint: str) -> None:
    assert complaints(purchase) == [complaint]


def test_a_double_charge_without_protection_is_what_the_demo_shows() -> None:
    assert complaints(replace(KEPT, protected=False, rows=3)) == []


def test_a_tap_on_a_closed_shop_gets_no_answer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
    assert pay(address, "tap", order="a", key="k", protected=True) == Observation("tap", None)


def test_once_is_no_success_when_it_is_interrupted(tmp_path: Path) -> None:
    with subprocess.Popen(
        [COMMAND, "demo", "--once"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith(b"Two taps at once")
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
    assert process.returncode == 130
    assert not list(tmp_path.iterdir())


def test_an_interrupt_before_the_second_tap_has_begun_lets_go_of_the_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Which waits for the second, as the command then does for the first."""
    begin = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        if thread.name.endswith("_1"):
            raise KeyboardInterrupt
        begin(thread)

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        buy(("127.0.0.1", 1), protected=True)
    assert time.monotonic() - started < TIMEOUT / 2


# ---------------------------------------------------------------- the open shop


def test_every_printed_line_can_be_split_and_sent_twice(running_demo: Demo) -> None:
    """As curl would send it; for machines without curl."""

    def send(line: str) -> http.Response:
        _, *words = shlex.split(line)
        [url] = [word for word in words if word.startswith("http")]
        options = list(pairwise(words))
        fields = [value.partition(": ") for name, value in options if name == "-H"]
        headers = [(name, value) for name, _, value in fields]
        body = "&".join(value for name, value in options if name == "-d").encode()
        prefix = "http://{}:{}".format(*running_demo.address)
        assert url.startswith(prefix)
        with http.Connection(running_demo.address) as connection:
            if not body:
                return connection.request("GET", url.removeprefix(prefix))
            headers += [("Content-Type", "application/x-www-form-urlencoded")]
            return connection.request("POST", url.removeprefix(prefix), headers, body)

    protected, unprotected, ledger = running_demo.lines
    first, second = send(protected), send(protected)
    assert (first.status, second.status) == (201, 201)
    assert first.body == second.body
    assert first.header("Idempotency-Replayed") is None
    assert second.header("Idempotency-Replayed") == "true"
    assert send(unprotected).body != send(unprotected).body
    assert json.loads(send(ledger).body)["rows"] == 3


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_lines_work_when_pasted_twice(running_demo: Demo) -> None:
    def paste(line: str) -> tuple[str, dict[str, str], str]:
        done = subprocess.run(line, shell=True, check=True, stdout=subprocess.PIPE, text=True)
        head, _, body = done.stdout.partition("\n\n")
        status, *fields = head.splitlines()
        return status, dict(field.split(": ", 1) for field in fields), body

    protected, unprotected, ledger = running_demo.lines
    status, headers, body = paste(protected)
    status_again, headers_again, body_again = paste(protected)
    assert (status, body) == (status_again, body_again)
    assert status == "HTTP/1.1 201 CREATED"
    of_the_moment = {"Date", "Connection", "Server"}
    assert headers_again.pop("Idempotency-Replayed") == "true"
    assert {name: value for name, value in headers.items() if name not in of_the_moment} == {
        name: value for name, value in headers_again.items() if name not in of_the_moment
    }
    assert paste(unprotected)[2] != paste(unprotected)[2]
    listed = subprocess.run(ledger, shell=True, check=True, stdout=subprocess.PIPE).stdout
    assert [charge["protected"] for charge in json.loads(listed)["charges"]] == [False, False, True]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_shop_closes_cleanly_on(running_demo: Demo, number: signal.Signals) -> None:
    """The exit status is 0, and neither gunicorn nor the SQLite file is left behind."""
    assert list(running_demo.folder.iterdir())

    assert running_demo.stop(number) == 0
    assert not list(running_demo.folder.iterdir())
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(running_demo.address)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_end_interrupts_the_demo(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), server.stopped_by_signals():
        signal.raise_signal(number)
    assert signal.getsignal(number) is before


def test_a_demo_under_nohup_outlives_its_terminal() -> None:
    """nohup has the hang-up ignored, and it stays so."""
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with server.stopped_by_signals():
            signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, previous)


# ---------------------------------------------------------------- what can go wrong


def test_a_port_that_is_taken_is_told_with_what_to_do() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = CliRunner().invoke(demo, ["--port", str(port)])
    assert result.exit_code == 1
    assert f"Port {port} of 127.0.0.1 is taken" in result.output
    assert "--port 0" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["--host", "192.0.2.1"], "Can't listen on 192.0.2.1", id="a foreign host"),
        pytest.param(["--database", "memory:"], "not a URL", id="not a database URL"),
        pytest.param(["--database", "sqlite://"], "in-memory", id="a database of one process"),
        pytest.param(
            ["--database", "sqlite:////nowhere/at/all.db"],
            "The database can't be prepared: unable to open database file",
            id="a database that can't be opened",
        ),
    ],
)
def test_what_can_not_work_is_told_in_one_line(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(demo, ["--once", *arguments])
    assert result.exit_code == 1
    assert message in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize("module", ["flask", "gunicorn"])
def test_a_missing_extra_is_told_with_the_line_to_run(
    module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    result = CliRunner().invoke(demo, ["--once"])
    assert result.exit_code == 1
    assert f"The demo needs {module}: pip install 'wsgi-idempotency[demo]'" in result.output


def test_a_shop_whose_workers_can_not_start_is_told() -> None:
    """Here they aren't told which database to use."""
    listener = server.listen("127.0.0.1", 0)
    with contextlib.ExitStack() as shop, pytest.raises(server.ShopFailed, match="did not start"):
        shop.enter_context(server.serve(listener, workers=1, environ={}))


def test_a_gunicorn_that_can_not_start_is_told_by_the_command(tmp_path: Path) -> None:
    tmp_path.joinpath("gunicorn.py").write_text("raise SystemExit('broken')")
    result = CliRunner(env={"PYTHONPATH": str(tmp_path)}).invoke(demo, ["--once"])
    assert result.exit_code == 1
    assert "Error: gunicorn did not start; its own message is above\n" in result.output


def test_a_shop_whose_page_fails_is_told() -> None:
    with (
        http.werkzeug(InternalServerError()) as address,
        pytest.raises(server.ShopFailed, match="page answered 500"),
    ):
        server.wait_for_answer(address)


def test_a_ledger_that_can_not_be_read_is_told() -> None:
    with (
        http.werkzeug(NotFound()) as address,
        pytest.raises(server.ShopFailed, match="ledger answered 404"),
    ):
        tap_twice(address)


def test_a_gunicorn_that_does_not_finish_is_killed() -> None:
    stubborn = "import signal; signal.signal(15, signal.SIG_IGN); print('up', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", stubborn], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        server.stop(process, patience=0.05)
        assert process.returncode == -signal.SIGKILL


def test_a_gunicorn_that_ends_by_itself_is_told() -> None:
    with (
        subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"]) as process,
        pytest.raises(server.ShopFailed, match="exit status 3"),
    ):
        server.wait_for_end(process)


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:80"),
        ("0.0.0.0", "http://127.0.0.1:80"),
        ("::", "http://[::1]:80"),
        ("shop.test", "http://shop.test:80"),
    ],
)
def test_the_printed_address_is_one_that_this_machine_can_reach(host: str, url: str) -> None:
    assert origin(host, 80) == url


# ---------------------------------------------------------------- the shop itself


@pytest.fixture
def client(sqlite_url: str) -> Client:
    engine = create_engine(sqlite_url)
    metadata.create_all(engine)
    engine.dispose()
    return Client(create_app(sqlite_url, seconds=0))


@pytest.mark.parametrize("door", ["protected", "unprotected"])
@pytest.mark.parametrize(
    "form",
    [
        pytest.param({"amount": "4200"}, id="no order"),
        pytest.param({"order": "x" * 41, "amount": "4200"}, id="a long order"),
        pytest.param({"order": "a", "amount": "much"}, id="an amount that is no number"),
        pytest.param({"order": "a", "amount": "0"}, id="nothing to charge"),
    ],
)
def test_a_charge_that_makes_no_sense_is_refused(
    client: Client, door: str, form: dict[str, str]
) -> None:
    answer = client.post(f"/{door}/charges", data=form, headers={"Idempotency-Key": "k"})
    assert answer.status_code == 400
    assert client.get("/ledger").json == {"rows": 0, "charges": []}


def test_the_ledger_counts_all_and_shows_the_latest(client: Client) -> None:
    for number in range(25):
        client.post("/unprotected/charges", data={"order": f"o{number}", "amount": "1"})
    all_of_them = client.get("/ledger").json
    one = client.get("/ledger?order=o7").json
    assert all_of_them is not None
    assert all_of_them["rows"] == 25
    assert [charge["order"] for charge in all_of_them["charges"]][:2] == ["o24", "o23"]
    assert len(all_of_them["charges"]) == 20
    assert one == {
        "rows": 1,
        "charges": [{"id": "ch_8", "order": "o7", "amount": 1, "protected": False}],
    }


def test_the_page_and_all_it_refers_to_are_served_by_the_shop(client: Client) -> None:
    """Nothing comes from elsewhere: the demo works on a train."""

    class References(html.parser.HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.found: list[str] = []
            self.buttons: list[str | None] = []

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            given = dict(attrs)
            self.found += [value for name in ("src", "href") if (value := given.get(name))]
            if tag == "button":
                self.buttons.append(given.get("id"))

    page = client.get("/")
    references = References()
    references.feed(page.text)
    assert page.status_code == 200
    assert "default-src 'none'" in page.headers["Content-Security-Policy"]
    assert references.buttons == ["pay", "double", "new", None, None]
    assert references.found == ["data:,", "static/style.css", "static/pay.js"]
    for path in references.found[1:]:
        with client.get(f"/{path}") as answer:
            assert answer.status_code == 200
            assert answer.data
