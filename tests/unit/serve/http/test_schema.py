"""The API does what its description says: requests made from /openapi.json, and the examples in it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.specs.openapi.checks import positive_data_acceptance, unsupported_method

from cat_cluster.registry import Registry
from cat_cluster.store import LocalStore
from cat_cluster.telemetry import HTTP_REQUESTS, HTTP_SECONDS, Metrics, PrometheusBackend
from serve.http.access import Access
from serve.http.answers import ErrorResponse
from serve.http.ingress import build_app
from serve.http.schema import ImageRequest
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


NAMES = ("cup", "cup@stable", "mug", "mug@latest", "mug@nowhere", "nobody", "No Name")
MEMBERS = st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from((0, 0.5, 2.0))), max_size=5)


@pytest.mark.slow
@given(named=MEMBERS, tagged=MEMBERS, in_model=st.booleans())
@settings(max_examples=60, derandomize=True, deadline=None, database=None)
def test_stacks_are_served_or_refused_as_described(
    live: Live, named: list[tuple[str, float]], tagged: list[tuple[str, float]], in_model: bool
) -> None:
    fields = {
        "model": "+".join(name for name, _ in named) or None if in_model else None,
        "adapters": None if in_model else [{"model": name, "strength": strength} for name, strength in named],
    }
    prompt = "a cup" + "".join(f" <lora:{name}:{strength}>" for name, strength in tagged)
    body = {**fields, "prompt": prompt, "num_inference_steps": 1}
    case = schema["/v1/images/generations"]["POST"].Case(body=body, media_type="application/json")
    response = case.call_and_validate(
        base_url=live.url, headers={"Authorization": f"Bearer {KEY}"}, excluded_checks=[positive_data_acceptance]
    )
    names = [name for name, _ in (*named, *tagged)]
    ids = [name.partition("@")[0] for name in names]
    expected = set[int]()
    if len(set(ids)) < len(ids):
        expected.add(400)
    if not set(names) <= {"cup", "cup@stable", "mug", "mug@latest"}:
        expected.add(404)
    assert response.status_code in (expected or {200}), (body, response.text[:300])
    if response.status_code == 200 and ids:
        assert [part.partition("@")[0] for part in response.json()["model"].split("+")] == ids


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
