"""Traces of real calls, as a collector receives them: one tree from the client's span to the image's parts."""

from __future__ import annotations

import math
import os
import pickle
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from cat_cluster.errors import MissingExtraError, SpecError
from cat_cluster.models.base_model import BaseModel
from cat_cluster.models.image_start import ImageStart, start_from_noise
from cat_cluster.models.samplers import SamplerTable
from cat_cluster.telemetry import SERVING_METRICS, Metrics, PrometheusBackend
from serve import running_call
from serve.calls import ImageCall
from serve.http.access import Access
from serve.service import Service
from serve.settings import SafetySettings
from serve.tracing import ENDPOINTS, NO_SPAN, NO_TRACER, open_tracer
from tests.support.classifiers import write_classifier
from tests.support.collector import Collector, Received, collecting
from tests.support.ingress_server import PATH, Live, Shop, furnish, listening, picture

ENDPOINT = ENDPOINTS[1]
CLIENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"  # a trace and a span, of W3C's own example
ROOT = Path(__file__).parents[3]
EDITS = "/v1/images/edits"
PROMPT = "a very particular sks cup"


@pytest.fixture(autouse=True)
def _no_other_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    with collecting() as collector:
        monkeypatch.setenv(ENDPOINT, collector.url)
        yield collector


@contextmanager
def traced(shop: Shop) -> Iterator[Live]:
    """Ingress and engine, each with a tracer of its own as on Ray, closed at the end."""
    ingress, engine = open_tracer("ingress"), open_tracer("engine")

    @asynccontextmanager
    async def opened() -> Any:
        async with Service.open(shop.settings, Metrics(PrometheusBackend(), SERVING_METRICS), engine) as service:
            yield service

    try:
        with listening(opened(), shop.registry, shop.settings, Access(shop.settings), tracer=ingress) as live:
            yield live
    finally:
        ingress.close()
        engine.close()


def named(spans: list[Received], name: str) -> list[Received]:
    return [span for span in spans if span.name == name]


@pytest.mark.slow
def test_a_call_is_one_tree_from_the_clients_span_to_the_parts_of_each_image(
    collector: Collector, tiny_base_folder: Path, tmp_path: Path
) -> None:
    model = write_classifier(tmp_path / "model", certain="calm")
    shop = furnish(tiny_base_folder, tmp_path / "storage", safety=SafetySettings(model=model, labels=("odd",)))
    request = {"model": "cup", "prompt": PROMPT, "n": 2, "num_inference_steps": 3, "seed": 5}
    before = time.time_ns()
    with traced(shop) as live, live.http() as http:
        sent = {"traceparent": f"00-{CLIENT[0]}-{CLIENT[1]}-01"}
        response = http.post(PATH, json=request, headers=sent)
        assert response.status_code == 200, response.text
        assert http.post(PATH, json=request).status_code == 200
        assert http.post(PATH, json={"prompt": PROMPT, "num_inference_steps": 2}).status_code == 200
        assert http.get("/health").status_code == 200
        live.await_idle()
    after = time.time_ns()

    assert collector.paths == {"/v1/traces"}
    spans = [span for span in collector.spans if span.trace == CLIENT[0]]
    by_id = {span.id: span for span in spans}
    assert Counter(span.name for span in spans) == {
        f"POST {PATH}": 1,
        "generate_content cup@latest": 1,
        "plan": 1,
        "image": 2,
        "encode_text": 4,  # the prompt and the negative one
        "load_adapter": 2,
        "queue": 2,
        "denoise": 2,
        "decode": 2,
        "check": 2,
        "write_file": 2,
    }
    (root,), (call,) = named(spans, f"POST {PATH}"), named(spans, "generate_content cup@latest")
    assert (root.parent, call.parent) == (CLIENT[1], root.id)
    assert (root.resource["cat.process"], call.resource["cat.process"]) == ("ingress", "engine")
    assert root.resource["service.name"] == "cat-cluster"
    images = named(spans, "image")
    assert {span.parent for span in images} == {call.id}
    for span in spans:
        if span.name not in (f"POST {PATH}", "generate_content cup@latest", "plan", "image"):
            assert by_id[span.parent].name == "image"
        if span.parent in by_id:
            parent = by_id[span.parent]
            assert parent.began <= span.began <= span.ended <= parent.ended, span
        assert before <= span.began <= span.ended <= after
        assert not span.failed

    for image in images:
        parts = {span.name: span for span in spans if span.parent == image.id}
        order = ["load_adapter", "queue", "denoise", "decode", "check", "write_file"]
        for first, second in pairwise(order):
            # Loop and engine read the clock in turn: to a millisecond.
            assert parts[first].ended <= parts[second].began + 1_000_000, (first, second)
        denoised = parts["denoise"].attributes
        assert (denoised["cat.steps"], denoised["cat.sampler"]) == (3, "ddim")
        assert denoised["cat.model"] == response.json()["model"]
        assert denoised["cat.rows.most"] >= 2
        facts = response.json()["data"][image.attributes["cat.index"]]["facts"]
        assert (parts["denoise"].ended - parts["denoise"].began) / 1e9 == pytest.approx(facts["denoise_s"], abs=1e-3)
        assert parts["write_file"].attributes == {"cat.format": "png", "cat.signed": False}
    assert {image.attributes["cat.seed"] for image in images} == {"5", "6"}
    assert root.attributes["http.response.status_code"] == 200
    assert root.attributes["http.route"] == PATH
    assert root.attributes["cat.request_id"] == call.attributes["cat.request_id"] == response.headers["x-request-id"]
    assert call.attributes["gen_ai.request.model"] == "cup@latest"
    assert call.attributes["gen_ai.response.model"] == response.json()["model"]

    # The first call fetched the adapter; later ones found it in its slot. The base takes none.
    others = [span for span in collector.spans if span.trace != CLIENT[0]]
    tiers = [span.attributes["cat.tiers"] for span in named(spans, "load_adapter")]
    assert tiers == [["store"], ["store"]]
    assert [span.attributes["cat.tiers"] for span in named(others, "load_adapter")] == [["slot"], ["slot"]]
    roots = [span for span in others if not span.parent]
    assert [span.name for span in roots] == [f"POST {PATH}"] * 2
    assert len({span.trace for span in others}) == 2
    assert not [body for body in collector.bodies if b"particular" in body]


@pytest.mark.slow
def test_an_edit_says_when_its_image_was_encoded_and_which_steps_were_made(
    collector: Collector, tiny_base_folder: Path, tmp_path: Path
) -> None:
    shop = furnish(tiny_base_folder, tmp_path / "storage")
    form = {"prompt": PROMPT, "n": "2", "num_inference_steps": "10", "strength": "0.3"}
    with traced(shop) as live, live.http() as http:
        response = http.post(EDITS, data=form, files={"image": ("photo.png", picture())})
        assert response.status_code == 200, response.text
        live.await_idle()
    (call,) = (span for span in collector.spans if span.name.startswith("generate_content"))
    (encoded,) = named(collector.spans, "encode_image")
    assert (encoded.parent, encoded.failed) == (call.id, False)
    denoised = named(collector.spans, "denoise")
    assert [span.attributes["cat.steps"] for span in denoised] == [3, 3]
    for span in denoised:
        assert call.began <= encoded.began <= encoded.ended <= span.began + 1_000_000


@pytest.mark.slow
def test_the_image_that_fails_is_marked_and_its_neighbours_are_not(
    collector: Collector, tiny_base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it cannot join the engine's rows, and where it cannot be decoded."""

    def start(base: BaseModel, seed: int, table: SamplerTable, size: tuple[int, int]) -> ImageStart:
        begun = start_from_noise(base, seed, table, (9, 9) if seed == 16 else size)
        return replace(begun, latents=begun.latents * math.nan) if seed == 6 else begun

    shop = furnish(tiny_base_folder, tmp_path / "storage")
    with traced(shop) as live, live.http() as http:
        monkeypatch.setattr(running_call, "start_from_noise", start)
        for seed, status in ((5, 422), (15, 500)):
            request = {"model": "cup", "prompt": PROMPT, "n": 2, "num_inference_steps": 3, "seed": seed}
            assert http.post(PATH, json=request).status_code == status
        live.await_idle()
    for seed, kind in ((6, "NotFiniteError"), (16, "ServingError")):
        (span,) = (span for span in named(collector.spans, "image") if span.attributes["cat.seed"] == str(seed))
        assert (span.failed, span.attributes["error.type"]) == (True, kind)
        (span,) = (span for span in named(collector.spans, "image") if span.attributes["cat.seed"] == str(seed - 1))
        assert not span.failed
    assert all(span.failed for span in collector.spans if span.name.startswith("generate_content"))


@pytest.mark.slow
def test_a_failure_is_named_without_its_message_and_prompts_only_where_they_may_be_logged(
    collector: Collector, tiny_base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop = furnish(tiny_base_folder, tmp_path / "storage")
    monkeypatch.setenv("CAT_LOG_PROMPTS", "1")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "pictures")
    with traced(shop) as live, live.http() as http:
        assert http.post(PATH, json={"model": "nothing", "prompt": PROMPT}).status_code == 404
    (root,), (call,) = named(collector.spans, f"POST {PATH}"), named(collector.spans, "generate_content nothing@latest")
    assert (root.attributes["error.type"], call.attributes["error.type"]) == ("model_not_found", "AdapterNotFoundError")
    assert call.failed
    assert not root.failed, "a 404 is no failure of the server"
    assert root.attributes["cat.prompt"] == PROMPT
    assert PROMPT not in str([span for span in collector.spans if span is not root])
    assert root.resource["service.name"] == "pictures"


def test_a_call_carries_its_trace_over_a_handle_and_is_the_same_call(collector: Collector) -> None:
    tracer = open_tracer("ingress")
    with tracer.request("POST", {"traceparent": f"00-{CLIENT[0]}-{CLIENT[1]}-01", "tracestate": "vendor=1"}) as span:
        call = ImageCall("r", "a cup", trace=span.carrier)
    tracer.close()
    carried = pickle.loads(pickle.dumps(call)).trace
    (sent,) = collector.spans
    assert carried == {"traceparent": f"00-{CLIENT[0]}-{sent.id}-01", "tracestate": "vendor=1"}
    assert call == ImageCall("r", "a cup")


@pytest.mark.parametrize("given", ["", "nonsense", "00-0-0-01", f"00-{'0' * 32}-{CLIENT[1]}-01"])
def test_a_header_that_names_no_trace_begins_a_new_one(given: str, collector: Collector) -> None:
    tracer = open_tracer("ingress")
    tracer.request("POST", {"traceparent": given}).end()
    tracer.close()
    (span,) = collector.spans
    assert span.parent == ""


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {ENDPOINT: ""},
        {ENDPOINT: "http://127.0.0.1:1", "OTEL_SDK_DISABLED": "True"},
        {ENDPOINT: "http://127.0.0.1:1", "OTEL_TRACES_EXPORTER": "none"},
    ],
)
def test_traces_are_off_without_an_endpoint_or_where_the_environment_says_so(
    variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert open_tracer("engine") is NO_TRACER
    assert NO_TRACER.request("GET", {}) is NO_TRACER.call("x", None, {}) is NO_SPAN.child("y") is NO_SPAN
    assert NO_SPAN.carrier is None


def test_off_imports_nothing_of_opentelemetry() -> None:
    """FastAPI imports its API where that is there; its SDK and exporters nobody else imports."""
    code = (
        "import sys; from serve.tracing import open_tracer; import serve.calls; open_tracer('ingress'); "
        "print([name for name in sys.modules if name.startswith('opentelemetry')]); import serve.http.ingress; "
        "print([name for name in sys.modules if name.startswith(('opentelemetry.sdk', 'opentelemetry.exporter'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[]", "[]"]


def test_a_protocol_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENDPOINT, "http://127.0.0.1:4317")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    with pytest.raises(SpecError, match=r"^OTEL_EXPORTER_OTLP_PROTOCOL: grpc .* set http/protobuf, .* \(4318\)$"):
        open_tracer("engine")


@pytest.mark.parametrize(
    "given", ["localhost:4318", "collector", "grpc://collector:4317", " ", "http://", "http:/collector", "http://a:b"]
)
def test_an_endpoint_that_is_no_address_is_refused(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    """Of OTLP over gRPC an address has no scheme; the exporter would fail with every batch, where nobody looks."""
    for variable in ENDPOINTS:
        monkeypatch.setenv(variable, given)
        with pytest.raises(SpecError, match=rf"^{variable}: .* as in http://localhost:4318$"):
            open_tracer("test")
        monkeypatch.delenv(variable)


def test_the_log_has_no_password_of_the_collector(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "https://me:secret@127.0.0.1:9/otlp?token=secret")
    with caplog.at_level("INFO", "cat_cluster.serve"):
        open_tracer("test").close()
    assert [record.getMessage() for record in caplog.records] == ["traces are sent to https://127.0.0.1:9/otlp"]


def test_without_the_extra_it_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENDPOINT, "http://127.0.0.1:4318")
    monkeypatch.delitem(sys.modules, "serve.recorded_spans", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(
        MissingExtraError, match=r"opentelemetry.* pip install 'cat-cluster\[otel\]', or set OTEL_TRACES_EXPORTER=none"
    ):
        open_tracer("engine")


def test_a_collector_that_is_away_fails_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENDPOINT, "http://127.0.0.1:9")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    tracer = open_tracer("engine")
    with tracer.call("x", None, {}) as span:
        span.child("y").end()
    tracer.close()
