"""The wrapper for Django's wsgi.py, configured in Django's settings."""

from __future__ import annotations

from typing import Any

import django
import pytest
from django.conf import settings
from django.core.wsgi import get_wsgi_application
from django.http import HttpRequest, JsonResponse
from django.test import override_settings
from django.urls import path
from werkzeug.test import Client

from wsgi_idempotency import IdempotencyMiddleware, Policy, everyone
from wsgi_idempotency.contrib.django import protect
from wsgi_idempotency.errors import ConfigurationError

charged: list[str] = []


def charge(request: HttpRequest) -> JsonResponse:
    charged.append(request.POST["amount"])
    return JsonResponse({"id": len(charged)}, status=201)


urlpatterns = [path("charges", charge)]


@pytest.fixture(scope="module")
def application() -> Any:
    """A site, set up for this process once and for all."""
    settings.configure(
        ROOT_URLCONF=type("urls", (), {"urlpatterns": urlpatterns}),
        ALLOWED_HOSTS=["*"],
        LOGGING_CONFIG=None,
    )
    django.setup(set_prefix=False)
    return get_wsgi_application()


def test_the_settings_are_the_options(application: Any) -> None:
    charged.clear()
    with override_settings(
        IDEMPOTENCY_STORE="memory:",
        IDEMPOTENCY_SCOPE="cookie:sessionid",
        IDEMPOTENCY_WAIT=2,
        IDEMPOTENCY_RETENTION="7 days",
    ):
        app = protect(application)
    assert isinstance(app, IdempotencyMiddleware)
    assert app.policy == Policy(wait=2, retention=7 * 86400)
    answers = []
    for user in ("alice", "alice", "bob"):
        headers = {"Cookie": f"sessionid={user}", "Idempotency-Key": "k"}
        answers.append(
            Client(app, use_cookies=False).post("/charges", data={"amount": "42"}, headers=headers)
        )
    assert [answer.json["id"] for answer in answers] == [1, 1, 2]
    assert charged == ["42", "42"]


def test_a_setting_may_be_a_value_of_python(application: Any) -> None:
    with override_settings(IDEMPOTENCY_STORE="memory:", IDEMPOTENCY_SCOPE=everyone):
        assert protect(application).scope is everyone  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "IDEMPOTENCY_STORE is not in the settings"),
        ({"IDEMPOTENCY_STORE": "memory:"}, "IDEMPOTENCY_SCOPE is not in the settings"),
        ({"IDEMPOTENCY_LEESE": 5}, "did you mean IDEMPOTENCY_LEASE?"),
        ({"IDEMPOTENCY_LEASE": "soon"}, "IDEMPOTENCY_LEASE is 'soon'"),
    ],
    ids=["no store", "no scope", "a slip", "nonsense"],
)
def test_settings_are_refused_that_have(
    application: Any, options: dict[str, object], message: str
) -> None:
    with override_settings(**options), pytest.raises(ConfigurationError) as refused:
        protect(application)
    assert message in str(refused.value)
