"""schemathesis makes requests, good and bad, from the server's own OpenAPI document, and judges the answers by it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from puna.serving.app import make_app
from puna.serving.state import ServerSettings, ServerState
from serving.conftest import Running, Serve

schemathesis = pytest.importorskip("schemathesis")
from schemathesis import checks  # noqa: E402

KEY = "sesame"
# Not that every request of the schema's shape is answered: fields must also fit together, which errors then tell.
# Nor that every other one is refused: null counts as left out, also for fields that this server does not have.
UNUSED = [checks.positive_data_acceptance, checks.negative_data_rejection]


@pytest.fixture(scope="module")
def guarded_server(serve: Serve) -> Iterator[Running]:
    """One with a key, so that requests without one are tried, too. Idle after all of it."""
    with serve(api_keys=(KEY,)) as running:
        yield running
        running.wait_until_idle()
        assert running.http.get("/ready").status_code == 200


# From the application alone: tests are collected before a server runs.
schema = schemathesis.openapi.from_dict(
    make_app(ServerState(ServerSettings(model_name="small", api_keys=(KEY,)))).openapi()
)


@schema.auth()
class Key:
    """What schemathesis sends, and at times leaves out."""

    def get(self, case: Any, context: Any) -> str:
        return KEY

    def set(self, case: Any, data: str, context: Any) -> None:
        case.headers["authorization"] = f"Bearer {data}"


@schema.parametrize()
@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[
        HealthCheck.function_scoped_fixture,
        HealthCheck.too_slow,
        HealthCheck.filter_too_much,
        HealthCheck.data_too_large,
    ],
)
def test_the_document_holds(case: Any, guarded_server: Running, caplog: pytest.LogCaptureFixture) -> None:
    caplog.clear()
    if isinstance(case.body, dict):
        case.body = {"deadline": 0.3} | case.body if "max_tokens" in case.body else case.body
    case.call_and_validate(base_url=guarded_server.url, excluded_checks=UNUSED, timeout=30)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
