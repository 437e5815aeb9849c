"""What is watched, with the real parts: two workers of gunicorn, Prometheus, every panel's query
and every alert, after everything has happened that can."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest
from apps.gate import Gate
from prometheus_client.parser import text_string_to_metric_families
from servers import ended, free_port
from servers.http import GUNICORN_CONFIGURATION, Connection, Gunicorn, is_running

from wsgi_idempotency.events import NAMES

DOCS = Path(__file__).parent.parent / "docs"
MONITORING = DOCS / "monitoring"

ROUTES = {
    "default", "/sales/<int:number>/<int:status>", "/large", "/gate/wait", "/gate/die",
    "/bypassed", "/refused",
}  # fmt: skip

#: One request to each, before anything happens.
ONE_OF_EACH = (
    "/", "/sales/1/201", "/large", "/gate/wait", "/gate/die", "/away/bypassed", "/away/refused",
)  # fmt: skip

CONFIGURATION = """
global: {{scrape_interval: 200ms, scrape_timeout: 200ms, evaluation_interval: 500ms}}
rule_files: [{rules}]
scrape_configs:
  - job_name: shop
    static_configs: [{{targets: ["{shop}"]}}]
"""


def gunicorn_hook() -> str:
    """What the documentation has in gunicorn's configuration."""
    page = (DOCS / "observe.md").read_text(encoding="utf-8")
    (hook,) = re.findall(r"```python\n(# gunicorn\.conf\.py\n.*?)```", page, re.DOTALL)
    return hook


@dataclass
class Watched:
    """A shop under gunicorn, and what has happened to it.

    :ivar sent: statuses, by path and status.
    """

    shop: Gunicorn
    gate: Gate
    metrics: Path
    sent: Counter[tuple[str, int]] = field(default_factory=Counter)

    def post(self, target: str, key: str, body: bytes = b"", method: str = "POST") -> int:
        with Connection(self.shop.address) as connection:
            answer = connection.request(method, target, [("Idempotency-Key", key)], body)
        self.sent[target, answer.status] += 1
        return answer.status

    def scrape(self) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
        with urlopen(f"{self.shop.url}/metrics") as answer:
            text = answer.read().decode()
        return {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def total(self, name: str, **labels: str) -> float:
        """The sum of a metric's series that have these labels."""
        return sum(
            value
            for (found, having), value in self.scrape().items()
            if found == f"wsgi_idempotency_{name}" and labels.items() <= dict(having).items()
        )


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """Two workers that share a folder of metrics, with the hook of the documentation."""
    folder = tmp_path_factory.mktemp("watched")
    metrics = folder / "metrics"
    metrics.mkdir()
    configuration = folder / "documented.conf.py"
    configuration.write_text(f"{gunicorn_hook()}\n{GUNICORN_CONFIGURATION}")
    with Gate() as gate:
        environment = {
            "DATABASE": f"sqlite:///{folder}/keys.db",
            "GATE": gate.address,
            "PROMETHEUS_MULTIPROC_DIR": str(metrics),
        }
        shop = Gunicorn(
            "apps.monitored:application",
            folder,
            worker_class="gthread",
            threads=4,
            environment=environment,
            arguments=["--config", str(configuration)],
        )
        with shop:
            yield Watched(shop, gate, metrics)


def until(condition: Callable[[], object], what: str, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


# ---------------------------------------------------------------------- many keys, dead workers


MANY_KEYS = """
import os, sys
from werkzeug.test import Client
from wsgi_idempotency import IdempotencyMiddleware, MemoryStore, Policy, Route, by_header
from wsgi_idempotency.observers import prometheus

app = IdempotencyMiddleware(
    lambda environ, start_response: start_response("201 Made", []) and [],
    MemoryStore(),
    scope=by_header("X-Client"),
    routes=[Route("/sales/<number>", Policy())],
    on_event=prometheus.observe,
)
client = Client(app)

def traffic(number):
    name = f"from-the-client-{number}"
    def send(method, path, key, **more):
        headers = {"X-Client": name, "User-Agent": name}
        if key:
            headers["Idempotency-Key"] = key
        client.open(path, method=method, headers=headers, **more)
    send("POST", f"/sales/{name}", name)
    if number % 10 == 0:
        send("pOsT", f"/sales/{name}", name, data=name)
        send(f"X{number}", f"/sales/{name}", name)
        send("PATCH", f"/{name}?{name}", name, content_type=f"text/{name}")
        send("POST", f"/{name}", f'"{name}')
        send("POST", f"/{name}", name * 20)
        send("POST", f"/{name}", "")
        client.post(f"/{name}", headers={"Idempotency-Key": name})

def scrape():
    from wsgiref.util import setup_testing_defaults
    environ = {}
    setup_testing_defaults(environ)
    return b"".join(prometheus.metrics_app()(environ, lambda *_: None)).decode()

traffic(0)
print(scrape(), flush=True)
print("# then", flush=True)
for half in range(2):
    if os.fork() == 0:
        for number in range(1 + half * 5000, 5001 + half * 5000):
            traffic(number)
        os._exit(0)
for half in range(2):
    assert os.wait()[1] == 0
print(scrape())
"""


def test_what_clients_choose_makes_no_series(tmp_path: Path) -> None:
    """Ten thousand keys, of as many clients, to as many paths, by a thousand methods, in three
    processes of which two are gone."""
    done = subprocess.run(
        [sys.executable, "-c", MANY_KEYS],
        env={**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    before, after = (
        {
            (sample.name, *sorted(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }
        for text in done.stdout.split("# then\n")
    )
    assert before.keys() == after.keys()
    assert "from-the-client" not in done.stdout
    executed = "wsgi_idempotency_events_total", ("event", "executed"), ("route", "/sales/<number>")
    assert (before[executed], after[executed]) == (1, 10_001)


def test_what_dead_workers_counted_goes_on_counting(watched: Watched) -> None:
    """With gunicorn's hook as the documentation has it, for a worker that was killed and for one
    that was told to end; and no count of theirs is counted by the next one again."""
    for number in range(4):
        watched.post("/", f"dead {number}".replace(" ", "-"))
    executed = watched.total("events_total", event="executed")
    assert executed >= 4
    for number in (signal.SIGKILL, signal.SIGTERM):
        ready = watched.shop.worker_pids
        dead = next(pid for pid in reversed(ready) if is_running(pid))
        os.kill(dead, number)
        until(lambda: len(watched.shop.worker_pids) > len(ready), "no worker came after it")  # noqa: B023
        until(lambda: not is_running(dead), "it has not ended")  # noqa: B023
        assert watched.total("events_total", event="executed") == executed
    assert watched.post("/", "alive") == 201
    assert watched.total("events_total", event="executed") == executed + 1
    assert "Error" not in watched.shop.log_text()


# ---------------------------------------------------------------------- everything that happens


def everything(watched: Watched) -> None:
    """Each decision at least once."""
    post, gate = watched.post, watched.gate
    for _ in range(3):
        assert post("/sales/1/201", "sold") == 201
    assert post("/sales/1/201", "sold", b"another") == 422
    assert post("/sales/1/404", "gone") == 404
    assert [post("/sales/1/500", "failed") for _ in range(2)] == [500, 409]
    assert [post("/500", "fails") for _ in range(2)] == [201, 201]
    assert [post("/large", "large") for _ in range(2)] == [201, 409]
    assert post("/", '"') == 400
    assert post("/away/refused", "away") == 503
    assert post("/away/bypassed", "away") == 201
    with ThreadPoolExecutor() as pool:
        first = pool.submit(post, "/gate/wait", "waits")
        waiting = gate.arrival()
        assert post("/gate/wait", "waits", b"another") == 422
        second = pool.submit(post, "/gate/wait", "waits")
        time.sleep(0.3)  # so that it waits, and for how long can be seen
        waiting.let_pass()
        assert (first.result(), second.result()) == (201, 201)

        def lost(key: str) -> None:
            with suppress(ConnectionError):
                post("/gate/die", key)

        def again(key: str) -> None:
            """Retry until the lease has run out."""
            while post("/gate/die", key) == 409:
                time.sleep(0.1)

        killed = pool.submit(lost, "killed")
        os.kill(gate.arrival().pid, signal.SIGKILL)
        killed.result()
        successor = pool.submit(again, "killed")
        gate.arrival().let_pass()
        successor.result()

        paused = pool.submit(lost, "paused")
        waiting = gate.arrival()
        os.kill(waiting.pid, signal.SIGSTOP)
        try:
            successor = pool.submit(again, "paused")
            gate.arrival().let_pass()
            successor.result()
        finally:
            os.kill(waiting.pid, signal.SIGCONT)
        waiting.let_pass()
        paused.result()


class Prometheus:
    """A server that scrapes a shop, and knows the alert rules."""

    def __init__(self, url: str) -> None:
        self.url = url

    def get(self, path: str, **parameters: str) -> Any:
        try:
            with urlopen(f"{self.url}/api/v1/{path}?{urlencode(parameters)}") as answer:
                said = json.load(answer)
        except HTTPError as exc:
            pytest.fail(f"{parameters}: {exc.read().decode()}")
        assert said["status"] == "success"
        return said["data"]

    def values(self, query: str) -> list[float]:
        return [float(series["value"][1]) for series in self.get("query", query=query)["result"]]


@contextmanager
def prometheus(folder: Path, shop: str) -> Iterator[Prometheus]:
    configuration = folder / "prometheus.yml"
    configuration.write_text(CONFIGURATION.format(rules=MONITORING / "alerts.yml", shop=shop))
    address = f"127.0.0.1:{free_port()}"
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(
            ["prometheus", f"--config.file={configuration}", f"--web.listen-address={address}",
             f"--storage.tsdb.path={folder / 'data'}"],
            stdout=log,
            stderr=log,
        )  # fmt: skip

    def ready() -> bool:
        assert process.poll() is None, (folder / "prometheus.log").read_text()
        with suppress(OSError), urlopen(f"http://{address}/-/ready") as answer:
            return bool(answer.status == 200)
        return False

    with ended(process, by="TERM"):
        until(ready, "Prometheus does not start")
        yield Prometheus(f"http://{address}")


@pytest.fixture(scope="module")
def scraping(watched: Watched, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """A Prometheus that has seen everything happen."""
    if shutil.which("prometheus") is None:
        pytest.skip("prometheus is not installed")
    shop = "{}:{}".format(*watched.shop.address)
    with prometheus(tmp_path_factory.mktemp("prometheus"), shop) as server:
        for target in ONE_OF_EACH:
            watched.post(target, '"refused, and nothing else')
        begun = 'count(wsgi_idempotency_events_total{event="fenced"})'
        until(lambda: server.values(begun) == [len(ROUTES)], "not every route is scraped")
        everything(watched)
        for name in ("events_total", "refusals_total", "executions_total", "store_seconds_count"):
            metric = f"sum(wsgi_idempotency_{name})"
            until(lambda: server.values(metric) == [watched.total(name)], f"{name} differs")  # noqa: B023
        yield server


def test_prometheus_has_of_two_workers_what_was_sent(
    watched: Watched, scraping: Prometheus
) -> None:
    assert len(watched.shop.worker_pids) > 2, "one was killed in its handler, and replaced"
    for name in set(NAMES) - {"purged"}:
        (count,) = scraping.values(f'sum(wsgi_idempotency_events_total{{event="{name}"}})')
        assert count > 0, name
    replayed = 'wsgi_idempotency_events_total{event="replayed",route=~"/sales.*"}'
    assert scraping.values(replayed) == [2]
    assert scraping.values('wsgi_idempotency_events_total{event="fenced",route="/gate/die"}') == [1]
    assert scraping.values("sum(wsgi_idempotency_events_total)") == [watched.total("events_total")]


def panels() -> list[dict[str, Any]]:
    dashboard = json.loads((MONITORING / "dashboard.json").read_text())
    return [panel for panel in dashboard["panels"] if panel.get("targets")]


@pytest.mark.parametrize(
    "route",
    [".*", r"(/sales/<int:number>/<int:status>|/large|/gate/wait|default)"],
    ids=["of all routes", "of some"],
)
@pytest.mark.parametrize("panel", panels(), ids=lambda panel: panel["title"])
def test_a_panel_shows_something(scraping: Prometheus, panel: dict[str, Any], route: str) -> None:
    """What Grafana sends, after it has put its variables in."""
    happened = route == ".*" or panel["title"] != "Ran unprotected"
    for target in panel["targets"]:
        query = target["expr"]
        for variable, value in {
            "$__rate_interval": "1m", "$__range": "5m", "$route": route,
        }.items():  # fmt: skip
            query = query.replace(variable, value)
        assert "$" not in query
        values = scraping.values(query)
        assert values, query
        assert all(value == value for value in values), f"{query} is not a number"
        assert (max(values) > 0) == happened, query


def test_the_routes_to_choose_from_are_those_that_there_are(scraping: Prometheus) -> None:
    dashboard = json.loads((MONITORING / "dashboard.json").read_text())
    (variable,) = [one for one in dashboard["templating"]["list"] if one["name"] == "route"]
    asked = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]["query"])
    assert asked is not None
    found = scraping.get(f"label/{asked[2]}/values", **{"match[]": asked[1]})
    assert set(found) == ROUTES


#: Alerts that wait for a while before they are sent, or for more traffic.
LATER = {
    "IdempotencyStoreFailing", "IdempotencyMismatches", "IdempotencyConflicts",
    "IdempotencyStoreSlow",
}  # fmt: skip


def test_an_alert_is_sent_for_what_has_happened(scraping: Prometheus) -> None:
    def rules() -> list[dict[str, Any]]:
        (group,) = scraping.get("rules")["groups"]
        return list(group["rules"])

    until(lambda: all(rule["health"] == "ok" for rule in rules()), "a rule can't be evaluated")
    firing = {rule["name"] for rule in rules()} - LATER
    until(
        lambda: {rule["name"] for rule in rules() if rule["state"] == "firing"} == firing,
        "not every alert is sent",
    )
    pending = {rule["name"] for rule in rules() if rule["state"] == "pending"}
    assert "IdempotencyStoreFailing" in pending
    routes = {
        alert["labels"]["alertname"]: alert["labels"]["route"]
        for alert in scraping.get("alerts")["alerts"]
        if alert["state"] == "firing"
    }
    assert routes == {
        "IdempotencyUnprotected": "/bypassed",
        "IdempotencyOutcomeUnknown": "/sales/<int:number>/<int:status>",
        "IdempotencyFenced": "/gate/die",
        "IdempotencyWorkersDie": "/gate/die",
    }
