"""A real Chromium, without a window, driven as WebDriver (W3C) has it."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support import expected_conditions as see
from selenium.webdriver.support.wait import WebDriverWait

from servers import KILL_GROUP, Watchdog

#: What distributions call it.
NAMES = ("chromium", "chromium-browser", "google-chrome")

TIMEOUT = 60  # seconds for what takes one on an idle machine

PAINTED = """
const [button, done] = arguments;
const frame = (then) => requestAnimationFrame(() => requestAnimationFrame(then));
const middle = () => {
  button.scrollIntoView({ block: "center" });
  frame(() => {
    const box = button.getBoundingClientRect();
    done([box.left + box.width / 2, box.top + box.height / 2]);
  });
};
if (document.readyState === "complete") middle();
else addEventListener("load", middle);
"""


def visit(browser: Chrome, url: str) -> None:
    """Have a page in place of the one before, whose parts can no longer be found then."""
    browser.get(url)
    WebDriverWait(browser, TIMEOUT, poll_frequency=0.05).until(see.url_to_be(url))


class Driver(Service):
    """A chromedriver that is killed with every browser of its own when this process ends, also
    by SIGKILL or at a time-out: left alone, both go on for ever."""

    def __init__(self, path: str) -> None:
        super().__init__(path, popen_kw={"start_new_session": True})
        self._watchdog: Watchdog | None = None

    def start(self) -> None:
        super().start()
        self._watchdog = Watchdog(KILL_GROUP, str(self.process.pid))

    def kill(self) -> None:
        """Kill it and its browser, whether they have ended or not."""
        if self._watchdog is None:
            return  # it has not been started, and has stopped itself
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._watchdog.dismiss()


@contextmanager
def chromium(folder: Path) -> Iterator[Chrome]:
    """Run a browser with a profile of its own; skip the test where none is installed.

    Its commands don't wait until a page is loaded: another click may be to come before.

    :param folder: where its profile is made.
    """
    binary = next(filter(None, map(shutil.which, NAMES)), None)
    if binary is None:
        pytest.skip("there is no Chromium here: apt-get install chromium chromium-driver")
    driver = shutil.which("chromedriver")
    assert driver is not None, "Chromium is here without its driver; install chromium-driver"
    options = ChromeOptions()
    options.binary_location = binary
    options.page_load_strategy = "none"
    for argument in (
        "--headless=new",
        "--no-sandbox",  # which it refuses to run in as root
        "--disable-dev-shm-usage",  # too small in containers
        "--disable-gpu",
        "--disable-background-networking",
        "--disable-component-update",
        "--no-first-run",
        "--force-color-profile=srgb",
        "--window-size=900,1400",
        f"--user-data-dir={folder}",
    ):
        options.add_argument(argument)
    service = Driver(driver)
    try:
        browser = Chrome(options, service)
        try:
            browser.set_script_timeout(TIMEOUT)
            yield browser
        finally:
            browser.quit()
    finally:
        service.kill()


def click(browser: Chrome, button: WebElement, times: int = 1) -> Callable[[], None]:
    """Press and release the mouse over a button.

    As an event of the browser's, since WebDriver's own clicks wait until what the one before
    has begun is over.

    :param times: 2 for a double-click.
    :returns: a function that clicks there once more, as the second click of a double-click.
    """
    # Not before the page is laid out and painted: until then it moves, and takes no clicks.
    left, top = browser.execute_async_script(PAINTED, button)
    place = {"x": left, "y": top}

    def once(count: int) -> None:
        for kind in ("mousePressed", "mouseReleased"):
            event = {"type": kind, **place, "button": "left", "clickCount": count}
            browser.execute_cdp_cmd("Input.dispatchMouseEvent", event)

    for count in range(1, times + 1):
        once(count)
    return lambda: once(2)
