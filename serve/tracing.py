"""Traces: the spans of a request through ingress and engine, sent to a collector of OpenTelemetry where one is named.

The variables are OpenTelemetry's own: https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/.
Without an endpoint nothing of OpenTelemetry is imported here, and a span is an object that does nothing. Names and
attributes are those of its conventions where these have one, else they begin with `cat.`. A request's span has what the
log has of it, so a prompt only where that may have it (CAT_LOG_PROMPTS); no other span has one.
"""

from __future__ import annotations

import logging
import os
import time
from asyncio import CancelledError, Future
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, TypeVar
from urllib.parse import urlsplit

from cat_cluster.errors import SpecError, needs_extra

logger = logging.getLogger("cat_cluster.serve")

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_PROTOCOL = "http/protobuf"
SERVICE = "cat-cluster"
_SHOWN = 80  # characters of a value in a message

Attribute = str | int | float | bool | Sequence[str]
Attributes = Mapping[str, Attribute]
Carrier = Mapping[str, str]  # W3C trace context: traceparent and, where there is one, tracestate
F = TypeVar("F", bound=Future[Any])


class Span:
    """A span that nobody records. In a `with` block it ends with the block, and an error there is its own."""

    @property
    def carrier(self) -> Carrier | None:
        """What carries the span to another process, as the parent of what that does; None: nothing is recorded."""
        return None

    def child(self, name: str, attributes: Attributes | None = None) -> Span:
        """Begin a part of this span."""
        return self

    def until(self, name: str, future: F, attributes: Attributes | None = None) -> F:
        """Record a part of this span that began now and ends with a future; returns the future."""
        return future

    def past(self, name: str, began: float, ended: float, attributes: Attributes | None = None) -> None:
        """Record a part of this span between two times of `time.monotonic`."""

    def set(self, attributes: Attributes) -> None:
        """Add attributes."""

    def rename(self, name: str) -> None:
        """Give it another name."""

    def fail(self, kind: str) -> None:
        """Say that it failed; kind: a class or a code, never a message, which may quote a prompt."""

    def end(self) -> None:
        """End it; again does nothing."""

    def __enter__(self) -> Span:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is not None and not isinstance(error, GeneratorExit | CancelledError):
            self.fail(type(error).__name__)
        self.end()


NO_SPAN = Span()


class Tracer:
    """Begins spans that nobody records."""

    def request(self, name: str, headers: Carrier) -> Span:
        """Begin a request's span, a part of the client's trace where its headers name one."""
        return NO_SPAN

    def call(self, name: str, carrier: Carrier | None, attributes: Attributes) -> Span:
        """Begin the span of a call from another process."""
        return NO_SPAN

    def close(self) -> None:
        """Send what is left."""


NO_TRACER = Tracer()


def open_tracer(process: str) -> Tracer:
    """Return the tracer of this process, an `ingress` or `engine`; one that records nothing without an endpoint.

    Raises MissingExtraError where an endpoint is set without the extra `otel`, SpecError for a protocol or a value that
    the exporter does not have, and for an endpoint that is no address.
    """
    variable = next((name for name in ENDPOINTS if os.environ.get(name)), None)
    is_off = os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    if variable is None or is_off or os.environ.get("OTEL_TRACES_EXPORTER", "").strip().lower() == "none":
        return NO_TRACER
    protocol = next((name for name in _PROTOCOLS if os.environ.get(name)), None)
    if protocol is not None and os.environ[protocol].strip() != _PROTOCOL:
        raise SpecError(
            f"{protocol}: {os.environ[protocol]} is not there: set {_PROTOCOL}, and in {variable} the collector's port "
            "for it (4318)"
        )
    shown = _checked_address(variable)
    with needs_extra("otel", f"sending traces ({variable})", ", or set OTEL_TRACES_EXPORTER=none"):
        from serve.recorded_spans import RecordingTracer
    try:
        tracer = RecordingTracer(process)
    except ValueError as error:  # from the SDK, over a variable of the environment
        raise SpecError(f"OTEL_*: OpenTelemetry does not start with the environment's variables: {error}") from error
    logger.info("traces are sent to %s", shown)
    return tracer


def _checked_address(variable: str) -> str:
    """Return the address of the collector without a password or token in it; SpecError for what is none.

    The exporter takes any text, and fails with every batch of spans, in the log of a worker.
    """
    given = os.environ[variable].strip()
    try:
        parts = urlsplit(given)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # the port, or the brackets of an IPv6 address
        is_address = False
    if not is_address:
        raise SpecError(
            f"{variable}: {given[:_SHOWN]!r} is no address of a collector: write http:// or https:// before its host, "
            "as in http://localhost:4318"
        )
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def monotonic_ns(at: float) -> int:
    """Return a time of `time.monotonic` as Unix time in nanoseconds."""
    return time.time_ns() - round((time.monotonic() - at) * 1e9)
