"""The PasteDeploy filter, from the ini file of the example and from others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from paste.deploy import loadapp
from werkzeug.test import Client

from wsgi_idempotency import IdempotencyMiddleware, Policy
from wsgi_idempotency.errors import ConfigurationError

SHOP = """
def make(global_conf, **local_conf):
    charged = []
    def app(environ, start_response):
        charged.append(environ["wsgi.input"].read())
        start_response("201 Created", [("Content-Type", "text/plain")])
        return [b"charge %d" % len(charged)]
    return app
"""

PIPELINE = """
[DEFAULT]
tenant_field = X-Tenant

[pipeline:main]
pipeline = idempotency shop

[app:shop]
paste.app_factory = pasted_shop:make

[filter:idempotency]
use = egg:wsgi-idempotency
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "pasted_shop.py").write_text(SHOP)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def load(folder: Path, *lines: str) -> Any:
    (folder / "shop.ini").write_text(PIPELINE + "\n".join(lines) + "\n")
    return loadapp(f"config:{folder / 'shop.ini'}")


def test_a_percent_sign_is_written_twice(folder: Path) -> None:
    """As ini files have it: a password in a URL may need one."""
    app = load(folder, "store = postgresql://shop:p%%40ss@localhost/shop", "scope = everyone")
    assert app.store.url.password == "p@ss"


def test_a_pipeline_has_the_middleware_with_the_options_of_its_section(folder: Path) -> None:
    """Interpolated as in every ini file."""
    app = load(
        folder,
        "store = sqlite:///%(here)s/keys.db",
        "scope = header:%(tenant_field)s",
        "retention = 7 days",
        "required = true",
    )
    assert isinstance(app, IdempotencyMiddleware)
    assert app.policy == Policy(retention=7 * 86400, required=True)
    client = Client(app)
    alice, bob = ({"X-Tenant": name, "Idempotency-Key": "k"} for name in ("alice", "bob"))
    assert [client.post("/", headers=who).text for who in (alice, alice, bob)] == [
        "charge 1", "charge 1", "charge 2",
    ]  # fmt: skip
    assert (folder / "keys.db").exists()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["scope = everyone"], "the filter has no store"),
        (["store = memory:"], "the filter has no scope"),
        (["store = memory:", "scope = everyone", "leese = 5 s"], "did you mean lease?"),
        (["store = memory:", "scope = everyone", "lease = soon"], "lease is 'soon'"),
    ],
    ids=["no store", "no scope", "a slip", "nonsense"],
)
def test_a_section_is_refused_that_has(folder: Path, lines: list[str], message: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        load(folder, *lines)
    assert message in str(refused.value)
