"""Pictures of the demo after a double-click, with protection off and on.

``cd tests && python -m screenshots ../docs/images`` makes those of the documentation.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.support import expected_conditions as see
from selenium.webdriver.support.wait import WebDriverWait
from servers import http
from servers.browser import TIMEOUT, chromium, click, visit
from sqlalchemy import create_engine

from wsgi_idempotency.demo import shop


def until(browser: Chrome, condition: Callable[[Any], Any]) -> Any:
    return WebDriverWait(browser, TIMEOUT).until(condition)


def element(browser: Chrome, by: str, what: str) -> Any:
    return until(browser, see.element_to_be_clickable((by, what)))


def picture(browser: Chrome, path: Path) -> None:
    """The part of the page that says what was charged."""
    part = browser.find_element(By.XPATH, "//section[.//*[@id='verdict']]")
    path.write_bytes(part.screenshot_as_png)
    print(f"{path}: {path.stat().st_size / 1024:.0f} KiB")


def by_button(browser: Chrome, url: str, folder: Path, *, protection: str, says: str) -> None:
    visit(browser, url)
    pay = element(browser, By.ID, "pay")
    if protection == "off":
        browser.find_element(By.ID, "protection").click()
    click(browser, pay, times=2)
    until(browser, see.text_to_be_present_in_element((By.ID, "verdict"), f"charged {says}"))
    answer = "201, replayed" if protection == "on" else "ch_2"
    until(browser, see.text_to_be_present_in_element((By.ID, "log"), answer))
    picture(browser, folder / f"button-{protection}.png")


def by_form(browser: Chrome, url: str, folder: Path, *, protection: str, says: str) -> None:
    door = {"off": "unprotected", "on": "protected"}[protection]
    visit(browser, url)
    pay = element(browser, By.XPATH, f"//form[@action='{door}/orders']//button")
    again = click(browser, pay)
    again()
    until(browser, see.text_to_be_present_in_element((By.ID, "verdict"), f"charged {says}"))
    picture(browser, folder / f"form-{protection}.png")


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        database = f"sqlite:///{work}/shop.db"
        engine = create_engine(database)
        shop.metadata.create_all(engine)
        engine.dispose()
        with (
            http.werkzeug(shop.create_app(database)) as (host, port),
            chromium(Path(work)) as browser,
        ):
            url = f"http://{host}:{port}/"
            for take in (by_button, by_form):
                take(browser, url, folder, protection="off", says="twice")
                take(browser, url, folder, protection="on", says="once")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
