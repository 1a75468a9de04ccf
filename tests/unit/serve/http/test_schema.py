"""The API does what its description says: requests made from /openapi.json, and the examples in it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance, unsupported_method

from cat_cluster.registry import Registry
from cat_cluster.store import LocalStore
from cat_cluster.telemetry import HTTP_REQUESTS, HTTP_SECONDS, Metrics, PrometheusBackend
from serve.http.access import Access
from serve.http.ingress import build_app
from serve.http.schema import ErrorResponse, ImageRequest
from serve.settings import ServeSettings
from tests.support.ingress_server import Live, ScriptedEngine, furnish, serving

KEY = "a-key-for-tests"


@pytest.fixture(scope="module")
def live(tiny_base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    shop = furnish(tiny_base_folder, tmp_path_factory.mktemp("storage"), max_steps=3)
    with serving(shop, Access(shop.settings, api_keys=["another"], admin_keys=[KEY])) as live:
        yield live


def description() -> dict[str, Any]:
    """What /openapi.json says; no engine is needed to say it."""
    settings, metrics = ServeSettings(), Metrics(PrometheusBackend(), [HTTP_REQUESTS, HTTP_SECONDS])
    app = build_app(ScriptedEngine(), Registry(LocalStore("nowhere")), settings, Access(settings), metrics, bytes)
    return app.openapi()


schema = schemathesis.openapi.from_dict(description())


@schema.auth()
class KeyOfTheTest:
    """Sends the key with every request but those that are made to lack one."""

    def get(self, case: schemathesis.Case, context: schemathesis.AuthContext) -> str:
        return KEY

    def set(self, case: schemathesis.Case, data: str, context: schemathesis.AuthContext) -> None:
        case.headers["Authorization"] = f"Bearer {data}"


@pytest.mark.slow
@schema.parametrize()
@settings(max_examples=100, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck), database=None)
def test_answers_are_those_described(case: schemathesis.Case, live: Live) -> None:
    # Sizes, steps and probes that are sound by the description may still not be offered by a service's settings.
    unfit: list[Any] = [positive_data_acceptance]
    if case.operation.path.endswith("/drift"):
        unfit.append(unsupported_method)  # POST there is an action that is none: 400
    case.call_and_validate(base_url=live.url, excluded_checks=unfit)


def test_examples_are_valid() -> None:
    document = description()
    request = document["components"]["schemas"]["ImageRequest"]
    assert request["examples"]
    for example in request["examples"]:
        ImageRequest.model_validate(example)
    for operations in document["paths"].values():
        for operation in operations.values():
            for status, answer in operation["responses"].items():
                example = answer.get("content", {}).get("application/json", {}).get("example")
                assert (example is not None) == (int(status) >= 400), (operation["operationId"], status)
                if example is not None:
                    ErrorResponse.model_validate(example)
            assert operation["operationId"].startswith(("health", "ready", "metrics")) or operation["security"]
    assert "HTTPValidationError" not in str(document)
