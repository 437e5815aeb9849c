"""Classic HTML forms in a real Chromium: examples/form_shop.py, and the demo's page."""

from __future__ import annotations

import importlib
import json
import os
import queue
import re
import sqlite3
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import urlopen

import pytest
from apps.gate import Gate, wait_at
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.support import expected_conditions as see
from selenium.webdriver.support.wait import WebDriverWait
from servers import http
from servers.browser import TIMEOUT, chromium, click, visit
from sqlalchemy import create_engine
from werkzeug.test import Client

from wsgi_idempotency.demo import shop as demo

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def chrome(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    with chromium(tmp_path_factory.mktemp("chromium")) as chrome:
        yield chrome


@pytest.fixture
def browser(chrome: Chrome) -> Chrome:
    chrome.execute_cdp_cmd("Network.clearBrowserCookies", {})
    return chrome


def until(browser: Chrome, condition: Callable[[Any], Any]) -> Any:
    return WebDriverWait(browser, TIMEOUT, poll_frequency=0.05).until(condition)


def button(browser: Chrome, name: str = "Order") -> Any:
    return until(browser, see.element_to_be_clickable((By.XPATH, f"//button[.='{name}']")))


@dataclass
class Shop:
    """The example, with a gate before its handler.

    :param address: where it is served.
    :param file: the SQLite file of its orders.
    :param gate: where the handler waits.
    :param sent: has an entry for each form that has reached the server.
    """

    address: http.Address
    file: Path
    gate: Gate
    sent: queue.Queue[str]

    @property
    def url(self) -> str:
        return "http://{}:{}/".format(*self.address)

    def orders(self) -> list[int]:
        """The pieces of each order."""
        with closing(sqlite3.connect(self.file)) as shop:
            return [
                pieces for (pieces,) in shop.execute("SELECT pieces FROM orders ORDER BY number")
            ]

    def expire(self) -> None:
        """Let every retention be over."""
        with closing(sqlite3.connect(self.file)) as shop, shop:
            rows = shop.execute("UPDATE idempotency_keys SET expires_at = 0").rowcount
        assert rows


@pytest.fixture
def sent() -> queue.Queue[str]:
    """Has an entry for each form that has reached the server."""
    return queue.Queue()


def counting(app: Any, sent: queue.Queue[str]) -> Any:
    def counted(environ, start_response):
        if environ["REQUEST_METHOD"] == "POST":
            sent.put(environ["PATH_INFO"])
        return app(environ, start_response)

    return counted


@pytest.fixture(params=[True], ids=["protected"])
def shop(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    gate: Gate,
    sent: queue.Queue[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Shop]:
    """examples/form_shop.py; with the parameter False, without its middleware."""
    file = tmp_path / "shop.db"
    monkeypatch.setenv("SHOP_DATABASE", f"sqlite:///{file}")
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.delitem(sys.modules, "form_shop", raising=False)
    module = importlib.import_module("form_shop")
    middleware = module.app.wsgi_app
    handler = middleware.app

    def gated(environ, start_response):
        if environ["REQUEST_METHOD"] == "POST":
            operation = environ.get("wsgi_idempotency.operation")
            wait_at(gate.address, {"pid": os.getpid(), "attempt": operation and operation.attempt})
        return handler(environ, start_response)

    middleware.app = gated
    with http.werkzeug(counting(middleware if request.param else gated, sent)) as address:
        yield Shop(address, file, gate, sent)
    middleware.store.close()
    module.engine.dispose()
    del sys.modules["form_shop"]


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_the_example_takes_a_form_once_on_either_database(
    database: str, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And its cookie, which says whose keys they are, leaves TLS no more than it came."""
    monkeypatch.setenv("SHOP_DATABASE", database)
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.delitem(sys.modules, "form_shop", raising=False)
    module = importlib.import_module("form_shop")
    person = Client(module.app)
    page = person.get("/", base_url=f"{scheme}://localhost/")
    assert ("; Secure;" in page.headers["Set-Cookie"]) is (scheme == "https")
    assert page.headers["Cache-Control"] == "private"
    (key,) = re.findall('name="idempotency_key" value="([^"]+)"', page.text)
    form = {"idempotency_key": key, "pieces": "2"}
    sent = [person.post("/orders", data=form, base_url=f"{scheme}://localhost/") for _ in range(2)]
    assert [(answer.status_code, answer.location) for answer in sent] == [(303, "/orders/1")] * 2
    placed = person.get("/orders/1", base_url=f"{scheme}://localhost/")
    assert "Order 1: 2 pieces." in placed.text
    module.app.wsgi_app.store.close()
    module.engine.dispose()
    del sys.modules["form_shop"]


def see_order(browser: Chrome, number: int, pieces: int = 1) -> None:
    """The page that a form has led to."""
    until(browser, see.title_is("Thank you"))
    assert urlsplit(browser.current_url).path == f"/orders/{number}"
    placed = until(browser, see.presence_of_element_located((By.ID, "placed")))
    assert placed.text == f"Order {number}: {pieces} pieces."


def order_once(browser: Chrome, shop: Shop) -> str:
    """Send the form and see the page of the order.

    :returns: the key that was in the form.
    """
    visit(browser, shop.url)
    order = button(browser)
    key = browser.find_element(By.NAME, "idempotency_key").get_attribute("value")
    click(browser, order)
    shop.gate.arrival().let_pass()
    see_order(browser, 1)
    assert shop.sent.get(timeout=TIMEOUT)
    return str(key)


def go_back(browser: Chrome) -> str:
    """To the form, which is the one that was sent.

    :returns: its key.
    """
    browser.back()
    button(browser)
    return str(browser.find_element(By.NAME, "idempotency_key").get_attribute("value"))


@pytest.mark.parametrize("shop", [False], indirect=True, ids=["unprotected"])
def test_without_protection_a_second_click_orders_twice(browser: Chrome, shop: Shop) -> None:
    visit(browser, shop.url)
    click_again = click(browser, button(browser))
    first = shop.gate.arrival()
    click_again()
    second = shop.gate.arrival()
    first.let_pass()
    until(browser, lambda _: len(shop.orders()) == 1)
    second.let_pass()
    see_order(browser, 2)
    assert shop.orders() == [1, 1]


def test_a_second_click_waits_for_the_first_and_leads_to_its_order(
    browser: Chrome, shop: Shop
) -> None:
    """The first answer is lost: the browser follows the second click alone."""
    visit(browser, shop.url)
    click_again = click(browser, button(browser))
    first = shop.gate.arrival()
    click_again()
    for _ in range(2):
        assert shop.sent.get(timeout=TIMEOUT) == "/orders"
    first.let_pass()
    see_order(browser, 1)
    assert shop.orders() == [1]


def test_a_double_click_orders_once(browser: Chrome, shop: Shop) -> None:
    """As fast as the browser can: how many requests come of it is its own affair."""
    visit(browser, shop.url)
    click(browser, button(browser), times=2)
    shop.gate.arrival().let_pass()
    see_order(browser, 1)
    assert shop.orders() == [1]


def test_going_back_and_sending_the_form_again_leads_to_the_same_order(
    browser: Chrome, shop: Shop
) -> None:
    key = order_once(browser, shop)
    assert go_back(browser) == key
    click(browser, button(browser))
    assert shop.sent.get(timeout=TIMEOUT) == "/orders"
    see_order(browser, 1)
    assert shop.orders() == [1]


def test_going_back_to_order_something_else_is_refused_on_a_page_for_people(
    browser: Chrome, shop: Shop
) -> None:
    key = order_once(browser, shop)
    assert go_back(browser) == key
    pieces = browser.find_element(By.NAME, "pieces")
    pieces.clear()
    pieces.send_keys("7")
    click(browser, button(browser))
    until(browser, see.title_is("Idempotency key used for another request"))
    assert "the first order stands" in browser.find_element(By.TAG_NAME, "p").text
    browser.find_element(By.LINK_TEXT, "A new order").click()
    pieces = until(browser, see.presence_of_element_located((By.NAME, "pieces")))
    pieces.clear()
    pieces.send_keys("7")
    click(browser, button(browser))
    shop.gate.arrival().let_pass()
    see_order(browser, 2, 7)
    assert shop.orders() == [1, 7]


def test_reloading_the_page_of_the_order_orders_nothing(browser: Chrome, shop: Shop) -> None:
    """It is the page of a GET, to which the form has led with a 303."""
    order_once(browser, shop)
    browser.refresh()
    see_order(browser, 1)
    assert shop.sent.empty()
    assert shop.orders() == [1]


def test_a_form_sent_again_after_its_key_has_expired_is_a_new_order(
    browser: Chrome, shop: Shop
) -> None:
    key = order_once(browser, shop)
    shop.expire()
    assert go_back(browser) == key
    click(browser, button(browser))
    shop.gate.arrival().let_pass()
    see_order(browser, 2)
    assert shop.orders() == [1, 1]


def test_a_form_that_was_filled_in_wrongly_keeps_its_key(browser: Chrome, shop: Shop) -> None:
    visit(browser, shop.url)
    button(browser)
    key = browser.find_element(By.NAME, "idempotency_key").get_attribute("value")
    pieces = browser.find_element(By.NAME, "pieces")
    pieces.clear()
    pieces.send_keys("none")
    click(browser, button(browser))
    shop.gate.arrival().let_pass()
    until(browser, see.presence_of_element_located((By.XPATH, "//*[@role='alert']")))
    assert browser.find_element(By.NAME, "idempotency_key").get_attribute("value") == key
    click(browser, button(browser))
    shop.gate.arrival().let_pass()
    see_order(browser, 1)
    assert shop.orders() == [1]


# ---------------------------------------------------------------- the demo


@pytest.fixture
def demo_url(
    sqlite_url: str, gate: Gate, sent: queue.Queue[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """The demo, whose payment provider takes the time that the gate gives it."""
    waits = types.SimpleNamespace(
        sleep=lambda seconds: wait_at(gate.address, {"pid": os.getpid(), "attempt": None})
    )
    monkeypatch.setattr(demo, "time", waits)
    engine = create_engine(sqlite_url)
    demo.metadata.create_all(engine)
    engine.dispose()
    with http.werkzeug(counting(demo.create_app(sqlite_url), sent)) as address:
        yield "http://{}:{}/".format(*address)


def rows_of(demo_url: str) -> int:
    """How many charges are in the ledger."""
    with urlopen(f"{demo_url}ledger") as answer:
        return int(json.load(answer)["rows"])


@pytest.mark.parametrize(
    ("door", "charges", "words"),
    [("unprotected", 2, "charged twice"), ("protected", 1, "charged once")],
    ids=["off", "on"],
)
def test_the_demo_s_form_shows_what_two_clicks_charge(
    browser: Chrome,
    demo_url: str,
    gate: Gate,
    sent: queue.Queue[str],
    door: str,
    charges: int,
    words: str,
) -> None:
    visit(browser, demo_url)
    path = f"//form[@action='{door}/orders']//button"
    pay = until(browser, see.element_to_be_clickable((By.XPATH, path)))
    click_again = click(browser, pay)
    waiting = [gate.arrival()]
    click_again()
    for _ in range(2):
        assert sent.get(timeout=TIMEOUT) == f"/{door}/orders"
    if door == "unprotected":
        waiting.append(gate.arrival())
    for number, handler in enumerate(waiting, 1):
        handler.let_pass()
        until(browser, lambda _, number=number: rows_of(demo_url) == number)
    verdict = until(browser, see.presence_of_element_located((By.ID, "verdict")))
    assert urlsplit(browser.current_url).path.startswith("/orders/")
    assert words in verdict.text
    assert len(browser.find_elements(By.CSS_SELECTOR, "#charges tr")) == charges


@pytest.mark.parametrize(
    ("protection", "charges", "words"),
    [("off", 2, "charged twice"), ("on", 1, "charged once")],
)
def test_the_demo_s_button_shows_what_a_double_click_charges(
    browser: Chrome, demo_url: str, gate: Gate, protection: str, charges: int, words: str
) -> None:
    visit(browser, demo_url)
    pay = until(browser, see.element_to_be_clickable((By.ID, "pay")))
    if protection == "off":
        browser.find_element(By.ID, "protection").click()
    click(browser, pay, times=2)
    for handler in [gate.arrival() for _ in range(charges)]:
        handler.let_pass()
    until(browser, see.text_to_be_present_in_element((By.ID, "verdict"), words))
    if protection == "on":
        until(browser, see.text_to_be_present_in_element((By.ID, "log"), "201, replayed"))
    rows = browser.find_elements(By.CSS_SELECTOR, "#ledger tr")
    assert len(rows) == charges


def test_the_demo_s_page_of_an_order_is_found_if_there_is_one(sqlite_url: str) -> None:
    engine = create_engine(sqlite_url)
    demo.metadata.create_all(engine)
    engine.dispose()
    client = Client(demo.create_app(sqlite_url, seconds=0))
    assert client.get("/orders/none").status_code == 404
    answer = client.post("/unprotected/orders", data={"order": "a/b c", "amount": "1"})
    assert (answer.status_code, answer.location) == (303, "../orders/a%2Fb%20c")
