"""Where events go: the log, Prometheus, OpenTelemetry."""

from __future__ import annotations

import json
import logging
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from urllib.request import urlopen

import pytest
from opentelemetry import trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families
from servers.http import Connection, Gunicorn
from werkzeug.test import Client

from wsgi_idempotency import Event, IdempotencyMiddleware, MemoryStore, Policy, Route, everyone
from wsgi_idempotency.events import NAMES
from wsgi_idempotency.observers import logging as to_log
from wsgi_idempotency.observers import opentelemetry as to_opentelemetry
from wsgi_idempotency.observers import prometheus as to_prometheus
from wsgi_idempotency.protocol import Action

MONITORING = Path(__file__).parent.parent / "docs" / "monitoring"

RUN = Event(
    name="executed",
    method="POST",
    path="/sales/7",
    route="/sales/<int:number>",
    key_digest="ab" * 32,
    attempt=2,
    action="hold",
    seconds=1.5,
    store_seconds=0.25,
    exception=LookupError("4242 4242 4242 4242"),
)
EVENTS = [
    RUN,
    Event(name="replayed", path="/pay", key_digest="cd" * 32, store_seconds=0.125),
    Event(name="waited", path="/pay", seconds=3.0),
    Event(name="conflict", path="/pay", code="CONFLICT", store_seconds=0.5, waited_seconds=3.0),
    Event(name="executed", path="/pay", attempt=1, seconds=0.5, store_seconds=0.125),
    Event(name="refused", path="/pay", code="INVALID_KEY"),
    Event(name="purged", count=7, seconds=0.1),
]

#: What EVENTS come to, each way.
PREVENTED, PURGED = 2, 7


# ---------------------------------------------------------------------- the log


def test_an_event_is_a_line_and_has_its_fields_as_extra(caplog) -> None:
    caplog.set_level(logging.DEBUG)
    to_log.observe(RUN)
    (record,) = caplog.records
    assert record.name == "wsgi_idempotency.events"
    assert record.getMessage() == (
        f"executed POST /sales/7 digest={'ab' * 32} attempt=2 action=hold"
        " exception=LookupError took=1.500s store=0.250s"
    )
    fields = {
        name.removeprefix("idempotency_"): value
        for name, value in vars(record).items()
        if name.startswith("idempotency_")
    }
    assert fields == {
        "event": "executed",
        "method": "POST",
        "path": "/sales/7",
        "route": "/sales/<int:number>",
        "key_digest": "ab" * 32,
        "attempt": 2,
        "code": None,
        "action": "hold",
        "seconds": 1.5,
        "store_seconds": 0.25,
        "waited_seconds": None,
        "count": None,
        "exception": "LookupError",
    }


def test_a_path_of_control_characters_can_not_write_lines_of_its_own(caplog) -> None:
    caplog.set_level(logging.DEBUG)
    to_log.observe(Event(name="refused", method="PO\x1b[2JST", path="/a\nERROR forged\x00"))
    (record,) = caplog.records
    for text in (record.getMessage(), record.idempotency_path, record.idempotency_method):
        assert text.isprintable()


@pytest.mark.parametrize("name", NAMES)
def test_every_event_has_a_level(name: str) -> None:
    assert name in to_log.LEVELS


@pytest.mark.parametrize(
    ("event", "level"),
    [
        (Event(name="executed", action="store"), logging.INFO),
        (RUN, logging.WARNING),
        (Event(name="fenced"), logging.ERROR),
        (Event(name="one of a later release"), logging.INFO),
    ],
    ids=["a run", "a run that is held", "a run that does not count", "what is not known"],
)
def test_what_somebody_has_to_look_at_is_louder(caplog, event: Event, level: int) -> None:
    caplog.set_level(logging.DEBUG)
    to_log.observe(event)
    assert [record.levelno for record in caplog.records] == [level]


def test_levels_and_logger_may_be_others() -> None:
    logger = logging.Logger("ours", logging.INFO)
    logged: list[logging.LogRecord] = []
    logger.handle = logged.append  # type: ignore[method-assign]
    observe = to_log.LogObserver(logger, {"executed hold": logging.DEBUG, "waited": logging.ERROR})
    observe(RUN)
    assert logged == []
    observe(Event(name="waited", waited_seconds=2.0))
    assert [record.getMessage() for record in logged] == ["waited waited=2.000s"]


# ---------------------------------------------------------------------- Prometheus


def samples(text: str) -> dict[tuple[str, tuple[str, ...]], float]:
    """The values of an exposition, by name and labels; without buckets and moments."""
    return {
        (sample.name, tuple(sample.labels[label] for label in sorted(sample.labels))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if not sample.name.endswith(("_bucket", "_created"))
    }


def exposed(registry: CollectorRegistry) -> dict[tuple[str, tuple[str, ...]], float]:
    from prometheus_client import generate_latest

    return samples(generate_latest(registry).decode())


def test_events_are_counted_and_timed_by_their_route() -> None:
    registry = CollectorRegistry()
    observe = to_prometheus.PrometheusObserver(registry)
    for event in EVENTS:
        observe(event)
    found = {key: value for key, value in exposed(registry).items() if value}
    sales = "/sales/<int:number>"
    prefix = "wsgi_idempotency_"
    assert found == {
        (prefix + name, labels): value
        for name, labels, value in [
            ("duplicates_prevented_total", ("default",), PREVENTED),
            ("events_total", ("executed", sales), 1),
            ("events_total", ("executed", "default"), 1),
            ("events_total", ("replayed", "default"), 1),
            ("events_total", ("waited", "default"), 1),
            ("events_total", ("conflict", "default"), 1),
            ("events_total", ("refused", "default"), 1),
            ("executions_total", ("hold", sales), 1),
            ("executions_total", ("unknown", "default"), 1),
            ("refusals_total", ("CONFLICT", "default"), 1),
            ("refusals_total", ("INVALID_KEY", "default"), 1),
            ("purged_rows_total", (), PURGED),
            ("handler_seconds_count", (sales,), 1),
            ("handler_seconds_sum", (sales,), 1.5),
            ("handler_seconds_count", ("default",), 1),
            ("handler_seconds_sum", ("default",), 0.5),
            ("store_seconds_count", (sales,), 1),
            ("store_seconds_sum", (sales,), 0.25),
            ("store_seconds_count", ("default",), 3),
            ("store_seconds_sum", ("default",), 0.75),
            ("wait_seconds_count", ("default",), 1),
            ("wait_seconds_sum", ("default",), 3.0),
        ]
    }


def test_a_route_begins_with_every_series_at_zero() -> None:
    """So that the first fenced worker is an increase."""
    registry = CollectorRegistry()
    to_prometheus.PrometheusObserver(registry)(Event(name="waited", seconds=1.0))
    found = exposed(registry)
    for name in set(NAMES) - {"waited"}:
        assert found["wsgi_idempotency_events_total", (name, "default")] == 0
    for action in Action:
        assert found["wsgi_idempotency_executions_total", (action.value, "default")] == 0


def test_paths_and_keys_make_no_series_of_their_own() -> None:
    """Neither do clients, methods, nor digests."""
    registry = CollectorRegistry()
    middleware = IdempotencyMiddleware(
        lambda environ, start_response: start_response("201 Made", []) and [],
        MemoryStore(),
        scope=everyone,
        routes=[Route("/sales/<int:number>", Policy())],
        on_event=to_prometheus.PrometheusObserver(registry),
    )

    def post(number: int) -> int:
        client = Client(middleware)
        client.post(f"/sales/{number}", headers={"Idempotency-Key": f"k{number}"}, buffered=True)
        return len(exposed(registry))

    assert len({post(number) for number in range(20)}) == 1


def test_one_process_answers_for_itself() -> None:
    program = """
import sys
from wsgiref.util import setup_testing_defaults
from wsgi_idempotency import Event
from wsgi_idempotency.observers import prometheus
prometheus.observe(Event(name="replayed"))
environ = {}
setup_testing_defaults(environ)
sys.stdout.buffer.write(b"".join(prometheus.metrics_app()(environ, lambda *_: None)))
"""
    done = run(program)
    assert samples(done.stdout)["wsgi_idempotency_duplicates_prevented_total", ("default",)] == 1


@pytest.mark.parametrize("name", ["prometheus", "opentelemetry"])
def test_without_the_extra_it_says_what_to_install(name: str) -> None:
    program = f"""
import sys
sys.modules["prometheus_client"] = sys.modules["opentelemetry"] = None
from wsgi_idempotency import settings
settings.read({{"on_event": "{name}"}}, prefix="")
"""
    done = run(program)
    assert done.returncode == 1
    assert f"pip install 'wsgi-idempotency[{name}]'" in done.stderr.splitlines()[-1]


def run(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("observed")


@pytest.fixture(scope="module")
def shop(folder: Path) -> Iterator[Gunicorn]:
    """Two workers that share a folder of metrics."""
    metrics = folder / "metrics"
    metrics.mkdir()
    environment = {
        "DATABASE": f"sqlite:///{folder}/keys.db",
        "PROMETHEUS_MULTIPROC_DIR": str(metrics),
    }
    with Gunicorn("apps.observed:application", folder, environment=environment) as server:
        yield server


def post(shop: Gunicorn, target: str, key: str) -> tuple[int, str]:
    """The status, and the worker that answered."""
    with Connection(shop.address) as connection:
        answer = connection.request("POST", target, [("Idempotency-Key", key)], b"")
    worker = answer.header("X-Worker")
    assert worker is not None
    return answer.status, worker


@pytest.fixture(scope="module")
def scraped(shop: Gunicorn) -> SimpleNamespace:
    """What Prometheus is told after some requests, and which those were."""
    sent: Counter[str] = Counter()
    workers: set[str] = set()
    with ThreadPoolExecutor(4) as pool:
        for round_ in range(50):
            targets = [f"/sales/{round_}/{status}" for status in (201, 500, 404)] + ["/pay/201"]
            for status, worker in pool.map(lambda t: post(shop, t, f"k{round_}"), targets):  # noqa: B023
                sent[f"executed {status}"] += 1
                workers.add(worker)
            assert post(shop, targets[0], f"k{round_}")[0] == 201
            sent["replayed"] += 1
            assert post(shop, f"{targets[0]}?other", f"k{round_}")[0] == 422
            sent["mismatch"] += 1
            if len(workers) == 2:
                break
    with urlopen(f"{shop.url}/metrics") as answer:
        text = answer.read().decode()
    return SimpleNamespace(text=text, sent=sent, workers=workers)


def test_two_workers_of_gunicorn_are_scraped_as_one(scraped: SimpleNamespace) -> None:
    assert len(scraped.workers) == 2
    found = {key: value for key, value in samples(scraped.text).items() if value}
    sales = "/sales/<int:number>/<int:status>"
    sent = scraped.sent
    rounds = sent["replayed"]
    assert sent == {
        "executed 201": 2 * rounds, "executed 500": rounds, "executed 404": rounds,
        "replayed": rounds, "mismatch": rounds,
    }  # fmt: skip
    prefix = "wsgi_idempotency_"
    assert found[prefix + "duplicates_prevented_total", (sales,)] == rounds
    assert found[prefix + "events_total", ("executed", sales)] == 3 * rounds
    assert found[prefix + "events_total", ("executed", "default")] == rounds
    for action in ("store", "release", "forget"):
        assert found[prefix + "executions_total", (action, sales)] == rounds
    assert found[prefix + "handler_seconds_count", (sales,)] == 3 * rounds
    assert found[prefix + "refusals_total", ("FINGERPRINT_MISMATCH", sales)] == rounds
    assert found[prefix + "store_seconds_count", (sales,)] == 5 * rounds
    assert found[prefix + "store_seconds_sum", (sales,)] > 0


# ---------------------------------------------------------------------- dashboard and alerts


def dashboard_queries() -> list[str]:
    """Of every panel, in order, as Prometheus gets them from Grafana."""
    dashboard = json.loads((MONITORING / "dashboard.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    for variable, value in {"$__rate_interval": "5m", "$__range": "1d", "$route": ".*"}.items():
        queries = [query.replace(variable, value) for query in queries]
    return queries


def alert_queries() -> list[str]:
    text = (MONITORING / "alerts.yml").read_text()
    queries = re.findall(r"^ +expr: (.+)$", text, re.MULTILINE)
    assert len(queries) == text.count("- alert: ")
    return queries


def metrics_of(query: str) -> set[str]:
    return set(re.findall(r"\bwsgi_idempotency_\w+", query))


def test_every_metric_of_the_dashboard_and_the_alerts_is_scraped(scraped: SimpleNamespace) -> None:
    exposed = {
        sample.name
        for family in text_string_to_metric_families(scraped.text)
        for sample in family.samples
    }
    for query in dashboard_queries() + alert_queries():
        assert metrics_of(query), query
        assert metrics_of(query) <= exposed, query


def test_every_value_of_a_label_that_is_asked_for_is_one_that_exists() -> None:
    for query in dashboard_queries() + alert_queries():
        for name, values in re.findall(r'\b(event|action)=~?"([^"]*)"', query):
            known = {"event": set(NAMES), "action": {action.value for action in Action}}[name]
            assert set(values.split("|")) <= known, query


def test_the_first_number_on_the_dashboard_is_how_many_duplicates_were_prevented() -> None:
    dashboard = json.loads((MONITORING / "dashboard.json").read_text())
    first = min(
        dashboard["panels"], key=lambda panel: (panel["gridPos"]["y"], panel["gridPos"]["x"])
    )
    assert (first["title"], first["type"]) == ("Duplicates prevented", "stat")
    assert metrics_of(first["targets"][0]["expr"]) == {
        "wsgi_idempotency_duplicates_prevented_total"
    }


def promtool(*arguments: object) -> str:
    done = subprocess.run(
        ["promtool", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed"
)


@needs_promtool
def test_prometheus_can_read_every_query(tmp_path: Path) -> None:
    promtool("check", "rules", MONITORING / "alerts.yml")
    rules = [
        {"record": f"query:{number}", "expr": query}
        for number, query in enumerate(dashboard_queries())
    ]
    # What is JSON is YAML.
    (tmp_path / "queries.yml").write_text(json.dumps({"groups": [{"name": "q", "rules": rules}]}))
    assert f"{len(rules)} rules found" in promtool("check", "rules", tmp_path / "queries.yml")


@needs_promtool
def test_every_alert_fires_when_it_should_and_not_before() -> None:
    text = (MONITORING / "alerts_test.yml").read_text()
    alerts = re.findall(r"- alert: (\w+)", (MONITORING / "alerts.yml").read_text())
    for alert in alerts:
        assert f"alertname: {alert}\n" in text, f"{alert} is not tested"
    assert "SUCCESS" in promtool("test", "rules", MONITORING / "alerts_test.yml")


# ---------------------------------------------------------------------- OpenTelemetry


def test_an_event_is_on_the_current_span_and_the_decision_is_its_attributes() -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    with provider.get_tracer("test").start_as_current_span("POST"):
        to_opentelemetry.observe(Event(name="taken_over", attempt=2, key_digest="ab" * 32))
        to_opentelemetry.observe(RUN)
        to_opentelemetry.observe(Event(name="replayed", attempt=2))
    (span,) = exporter.get_finished_spans()
    assert [event.name for event in span.events] == [
        "wsgi_idempotency.taken_over",
        "wsgi_idempotency.executed",
        "wsgi_idempotency.replayed",
    ]
    decision = {
        "key_digest": "ab" * 32,
        "route": "/sales/<int:number>",
        "attempt": 2,
        "action": "hold",
        "seconds": 1.5,
        "store_seconds": 0.25,
        "exception": "LookupError",
    }
    expected = {f"wsgi_idempotency.{name}": value for name, value in decision.items()}
    assert dict(span.events[1].attributes or {}) == expected
    assert dict(span.attributes or {}) == {"wsgi_idempotency.event": "executed", **expected}
    assert "4242" not in span.to_json()


def test_without_a_span_that_records_nothing_is_traced(caplog: pytest.LogCaptureFixture) -> None:
    """The API says so in the log when it is asked to."""
    to_opentelemetry.observe(RUN)
    span = TracerProvider().get_tracer("test").start_span("POST")
    span.end()
    with trace.use_span(span):
        to_opentelemetry.observe(RUN)
    assert caplog.records == []


def test_events_are_counted_and_timed_by_opentelemetry_too() -> None:
    reader = InMemoryMetricReader()
    observe = to_opentelemetry.OpenTelemetryObserver(MeterProvider([reader]))
    for event in EVENTS:
        observe(event)
    found = {}
    for resource in reader.get_metrics_data().resource_metrics:
        for scope in resource.scope_metrics:
            for metric in scope.metrics:
                for point in metric.data.data_points:
                    labels = {
                        name.removeprefix("wsgi_idempotency."): value
                        for name, value in sorted(point.attributes.items())
                    }
                    value = getattr(point, "value", None)
                    of_all = value if value is not None else (point.count, point.sum)
                    name = metric.name.removeprefix("wsgi_idempotency.")
                    found[(name, *labels.values())] = of_all
    sales = "/sales/<int:number>"
    assert found == {
        ("duplicates_prevented", "default"): PREVENTED,
        ("events", "hold", "executed", sales): 1,
        ("events", "executed", "default"): 1,
        ("events", "replayed", "default"): 1,
        ("events", "waited", "default"): 1,
        ("events", "CONFLICT", "conflict", "default"): 1,
        ("events", "INVALID_KEY", "refused", "default"): 1,
        ("purged_rows",): PURGED,
        ("handler.duration", sales): (1, 1.5),
        ("handler.duration", "default"): (1, 0.5),
        ("store.duration", sales): (1, 0.25),
        ("store.duration", "default"): (3, 0.75),
        ("wait.duration", "default"): (1, 3.0),
    }
