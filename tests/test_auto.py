"""An application wrapped by environment variables alone."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module, reload
from pathlib import Path

import pytest
from servers.http import Connection, Gunicorn
from werkzeug.test import Client

from wsgi_idempotency import Policy
from wsgi_idempotency.auto import from_environment
from wsgi_idempotency.errors import ConfigurationError

SHOP = '''
charged = []

def app(environ, start_response):
    """Knows nothing of keys."""
    charged.append(environ["wsgi.input"].read())
    start_response("201 Created", [("Content-Type", "text/plain")])
    return [b"charge %d" % len(charged)]
'''

PREFIX = "WSGI_IDEMPOTENCY_"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a module ``unwrapped_shop`` is that can be imported."""
    (tmp_path / "unwrapped_shop.py").write_text(SHOP)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def variables(url: str, **more: str) -> dict[str, str]:
    return {
        f"{PREFIX}APP": "unwrapped_shop:app",
        f"{PREFIX}DATABASE": url,
        f"{PREFIX}SCOPE": "by_authorization",
        **{PREFIX + name: text for name, text in more.items()},
    }


def test_a_server_serves_the_application_protected(folder: Path, sqlite_url: str) -> None:
    """It imports ours by name; the shop's code is untouched."""
    with Gunicorn(
        "wsgi_idempotency.auto:application",
        folder,
        workers=1,
        environment=variables(sqlite_url),
        folders=[folder],
    ) as server:
        answers = []
        for user in ("alice", "alice", "bob"):
            with Connection(server.address) as connection:
                answers.append(
                    connection.request(
                        "POST",
                        "/",
                        [("Idempotency-Key", "k"), ("Authorization", f"Bearer {user}")],
                        b"pay",
                    )
                )
    assert [answer.body for answer in answers] == [b"charge 1", b"charge 1", b"charge 2"]
    assert [answer.header("Idempotency-Replayed") for answer in answers] == [None, "true", None]


def test_the_variables_are_those_of_every_option(folder: Path, sqlite_url: str) -> None:
    app = from_environment(
        variables(
            sqlite_url, RETENTION="7 days", REQUIRED="true", MAX_WAITING="2", DEMO_DATABASE="x"
        )
        | {"HOME": "/", f"{PREFIX}TEST_POSTGRES": "system"}
    )
    assert app.policy == Policy(retention=7 * 86400, required=True)
    answer = Client(app).post("/", headers={"Authorization": "Bearer alice"})
    assert answer.json["code"] == "MISSING_KEY"


def test_the_application_is_there_as_soon_as_the_module_is(
    folder: Path, sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the module's namespace, where a server may look that doesn't ask the module."""
    auto = import_module("wsgi_idempotency.auto")
    for name, text in variables(sqlite_url).items():
        monkeypatch.setenv(name, text)
    try:
        assert "application" in vars(reload(auto))
    finally:
        vars(auto).pop("application", None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"APP": ""}, "WSGI_IDEMPOTENCY_APP is ''; use module:name, such as shop:app"),
        ({"APP": "unwrapped_shop"}, "WSGI_IDEMPOTENCY_APP is 'unwrapped_shop'; use module:name"),
        ({"APP": "unwrapped_shop:application"}, "unwrapped_shop has no application"),
        ({"APP": "no_such_shop:app"}, "no_such_shop can't be imported"),
        ({"APP": None}, "WSGI_IDEMPOTENCY_APP is not set"),
        ({"DATABASE": None}, "WSGI_IDEMPOTENCY_DATABASE is not set"),
        ({"DATABASE": "shop"}, "the database is not a URL"),
        ({"DATABASE": "postgresql://db:port/shop"}, "the database is not a URL"),
        ({"SCOPE": None}, "WSGI_IDEMPOTENCY_SCOPE is not set; say whose key it is"),
        ({"SCOPE": "me"}, "WSGI_IDEMPOTENCY_SCOPE is 'me'; use by_authorization"),
        ({"STORE": "x"}, "did you mean WSGI_IDEMPOTENCY_DATABASE?"),
        ({"RETENTON": "1 h"}, "did you mean WSGI_IDEMPOTENCY_RETENTION?"),
        ({"LEASE": "soon"}, "WSGI_IDEMPOTENCY_LEASE is 'soon'; use one like 30 s"),
    ],
)
def test_what_is_missing_or_makes_no_sense_is_told(
    folder: Path, sqlite_url: str, change: dict[str, str | None], message: str
) -> None:
    environ = variables(sqlite_url) | {PREFIX + name: text for name, text in change.items()}
    with pytest.raises(ConfigurationError) as refused:
        from_environment({name: text for name, text in environ.items() if text is not None})
    assert message in str(refused.value)


def test_a_server_does_not_start_without_the_scope(folder: Path, sqlite_url: str) -> None:
    """Rather than answer every request with an error."""
    environment = variables(sqlite_url)
    del environment[f"{PREFIX}SCOPE"]
    done = subprocess.run(
        [sys.executable, "-c", "from wsgi_idempotency.auto import application"],
        env={**os.environ, **environment, "PYTHONPATH": str(folder)},
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "ConfigurationError: WSGI_IDEMPOTENCY_SCOPE is not set" in done.stderr


def test_a_tool_may_import_the_module_and_is_told_what_is_missing() -> None:
    auto = import_module("wsgi_idempotency.auto")
    with pytest.raises(ConfigurationError, match="WSGI_IDEMPOTENCY_APP is not set"):
        _ = auto.application
    with pytest.raises(AttributeError, match="no attribute 'app'"):
        _ = auto.app
