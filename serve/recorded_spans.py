"""Spans that OpenTelemetry records and exports; imported only where traces are wanted."""

from __future__ import annotations

import os

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import Span as OtelSpan
from opentelemetry.trace import SpanKind, StatusCode, set_span_in_context
from opentelemetry.trace import Tracer as OtelTracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from cat_cluster.registry.manifest import package_version
from serve.tracing import SERVICE, Attributes, Carrier, F, Span, Tracer, monotonic_ns

_W3C = TraceContextTextMapPropagator()


class RecordedSpan(Span):
    """A span of OpenTelemetry's; see Span. May be used by any thread."""

    def __init__(self, tracer: OtelTracer, span: OtelSpan) -> None:
        self._tracer, self._span = tracer, span

    @property
    def carrier(self) -> Carrier | None:
        """See Span."""
        carrier: dict[str, str] = {}
        _W3C.inject(carrier, set_span_in_context(self._span))
        return carrier

    def child(self, name: str, attributes: Attributes | None = None) -> RecordedSpan:
        """See Span."""
        span = self._tracer.start_span(name, set_span_in_context(self._span), attributes=attributes)
        return RecordedSpan(self._tracer, span)

    def until(self, name: str, future: F, attributes: Attributes | None = None) -> F:
        """See Span."""
        part = self.child(name, attributes)

        def end(done: F) -> None:
            if not done.cancelled() and (error := done.exception()) is not None:
                part.fail(type(error).__name__)
            part.end()

        future.add_done_callback(end)
        return future

    def past(self, name: str, began: float, ended: float, attributes: Attributes | None = None) -> None:
        """See Span."""
        context = set_span_in_context(self._span)
        span = self._tracer.start_span(name, context, attributes=attributes, start_time=monotonic_ns(began))
        span.end(monotonic_ns(ended))

    def set(self, attributes: Attributes) -> None:
        """See Span."""
        if self._span.is_recording():
            self._span.set_attributes(attributes)

    def rename(self, name: str) -> None:
        """See Span."""
        if self._span.is_recording():
            self._span.update_name(name)

    def fail(self, kind: str) -> None:
        """See Span."""
        if self._span.is_recording():
            self._span.set_attribute("error.type", kind)
            self._span.set_status(StatusCode.ERROR)

    def end(self) -> None:
        """See Span."""
        if self._span.is_recording():
            self._span.end()


class RecordingTracer(Tracer):
    """Records spans and sends them in batches, on a thread of its own; more than it can send are dropped.

    exporter: where they go; None: the collector that the environment names. The provider is this object's own: what
    else in the process uses OpenTelemetry, as Ray may, is left as it is.
    """

    def __init__(self, process: str, exporter: SpanExporter | None = None) -> None:
        names = {"service.version": package_version(), "cat.process": process}
        if not os.environ.get("OTEL_SERVICE_NAME") and "service.name=" not in os.environ.get(
            "OTEL_RESOURCE_ATTRIBUTES", ""
        ):
            names["service.name"] = SERVICE
        self._provider = TracerProvider(resource=Resource.create(names))
        self._provider.add_span_processor(BatchSpanProcessor(exporter or OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer(SERVICE, package_version())

    def request(self, name: str, headers: Carrier) -> Span:
        """See Tracer."""
        parent = _W3C.extract({key: value for key in ("traceparent", "tracestate") if (value := headers.get(key))})
        return RecordedSpan(self._tracer, self._tracer.start_span(name, parent, kind=SpanKind.SERVER))

    def call(self, name: str, carrier: Carrier | None, attributes: Attributes) -> Span:
        """See Tracer."""
        return RecordedSpan(
            self._tracer, self._tracer.start_span(name, _W3C.extract(carrier or {}), attributes=attributes)
        )

    def close(self) -> None:
        """See Tracer."""
        self._provider.shutdown()
