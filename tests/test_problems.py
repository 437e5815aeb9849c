"""Refusals as RFC 9457 and as Stripe's SDKs have them."""

from __future__ import annotations

import json

import pytest
from werkzeug.test import Client

from wsgi_idempotency.problems import CODES, RFC9457, problem, rfc9457, stripe

STATUSES = {
    "MISSING_KEY": 400,
    "INVALID_KEY": 400,
    "KEY_TOO_LONG": 400,
    "MISSING_SCOPE": 400,
    "EXTRACTOR_FAILED": 500,
    "LENGTH_REQUIRED": 411,
    "BODY_TOO_LARGE": 413,
    "INCOMPLETE_BODY": 400,
    "FINGERPRINT_MISMATCH": 422,
    "CONFLICT": 409,
    "OUTCOME_UNKNOWN": 409,
    "RESPONSE_NOT_REPLAYABLE": 409,
    "STORE_UNAVAILABLE": 503,
    "TRANSACTION_CONFLICT": 503,
    "TRANSACTION_FAILED": 500,
    "REBUILD_FAILED": 500,
    "COMMIT_UNKNOWN": 503,
}
RETRYABLE = {
    "INCOMPLETE_BODY",
    "CONFLICT",
    "STORE_UNAVAILABLE",
    "TRANSACTION_CONFLICT",
    "COMMIT_UNKNOWN",
    "REBUILD_FAILED",
}


def test_every_code_of_the_contract_is_there():
    assert set(CODES) == set(STATUSES)


@pytest.mark.parametrize("code", sorted(STATUSES))
def test_a_problem_document_has_every_member(code):
    answer = Client(rfc9457(problem(code, extensions={"original_status": 201}), {})).get("/")
    document = json.loads(answer.get_data())
    assert answer.status_code == STATUSES[code] == document["status"]
    assert answer.content_type == "application/problem+json"
    assert answer.headers["Content-Language"] == "en"
    assert int(answer.headers["Content-Length"]) == len(answer.get_data())
    assert document["code"] == code
    assert document["retryable"] is (code in RETRYABLE)
    assert document["type"] == "urn:wsgi-idempotency:problem:" + code.lower().replace("_", "-")
    assert document["title"]
    assert document["detail"].endswith(".")
    assert document["original_status"] == 201


def test_the_base_of_the_types_and_the_documentation_are_the_service_s_to_choose():
    render = RFC9457(type_base="https://shop.example/problems/", docs_url="https://shop.example/d")
    answer = Client(render(problem("CONFLICT"), {})).get("/")
    assert json.loads(answer.get_data())["type"] == "https://shop.example/problems/conflict"
    assert answer.headers["Link"] == '<https://shop.example/d>; rel="describedby"'


def test_stripe_has_a_mismatch_as_400_and_an_error_object():
    answer = Client(stripe(problem("FINGERPRINT_MISMATCH"), {})).get("/")
    assert answer.status_code == 400
    error = json.loads(answer.get_data())["error"]
    assert error["type"] == "idempotency_error"
    assert error["code"] == "FINGERPRINT_MISMATCH"
    assert Client(stripe(problem("CONFLICT", detail="Wait."), {})).get("/").status_code == 409
