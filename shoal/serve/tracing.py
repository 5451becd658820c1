"""Traces by OpenTelemetry, configured by its own environment variables; off, and free, where none of them is set.

A request's span has a child for each wait: admission, queue, compute, answer. A batch is a span of its own, linked with the
requests in it, and they with it. Spans are made when a batch is done, from times that were noted: nothing waits for them.
"""

from __future__ import annotations

import contextlib
import contextvars
import importlib.util
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from shoal.errors import RequestError

_KNOWN = ("otlp", "console", "none")
_PROTOCOL = "http/protobuf"
_FLUSH_MS = 2000
_HEADERS = ("traceparent", "tracestate")
# What the client's request belongs to; set by whoever reads its headers, read by the desk in the same task.
_parent: contextvars.ContextVar[Any] = contextvars.ContextVar("shoal-trace", default=None)


def exporters(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Where traces go, by the names that OTEL_TRACES_EXPORTER has; none where tracing is off.

    Raises:
        RequestError: they are to go somewhere, and the packages for it are missing, or nobody knows where that is.
    """
    if environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return ()
    endpoint = environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")
    text = environ.get("OTEL_TRACES_EXPORTER") or ("otlp" if endpoint else "none")
    names = tuple(name.strip() for name in text.split(",") if name.strip() not in ("", "none"))
    for name in names:
        if name not in _KNOWN:
            raise RequestError(f"OTEL_TRACES_EXPORTER is {name}; shoal knows {', '.join(_KNOWN)}.")
    protocol = environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or environ.get("OTEL_EXPORTER_OTLP_PROTOCOL") or _PROTOCOL
    if "otlp" in names and protocol != _PROTOCOL:
        raise RequestError(f"OTEL_EXPORTER_OTLP_PROTOCOL is {protocol}; shoal sends {_PROTOCOL}.")
    if names and not _installed("otlp" in names):
        raise RequestError('Traces need OpenTelemetry; install it with "pip install shoal[otel]", or unset OTEL_*.')
    return names


def _installed(otlp: bool) -> bool:
    modules = ["opentelemetry.sdk.trace", *(["opentelemetry.exporter.otlp.proto.http"] if otlp else [])]
    try:
        return all(importlib.util.find_spec(module) is not None for module in modules)
    except ModuleNotFoundError:
        return False


@dataclass(slots=True)
class Traced:
    """An accepted request: its span, and when what happened, on the monotonic clock."""

    span: Any
    accepted_s: float
    handed_s: float = 0.0
    computed: tuple[float, float] | None = None
    batch: Any = None


class Tracing:
    """Makes spans and sends them, in a thread of OpenTelemetry's own."""

    @classmethod
    def from_environment(cls, environ: Mapping[str, str], name: str = "shoal") -> Tracing | None:
        """None where tracing is off. ``name``: the service's, where OTEL_SERVICE_NAME says nothing."""
        found = exporters(environ)
        return cls(found, environ.get("OTEL_SERVICE_NAME") or name) if found else None

    def __init__(self, names: Iterable[str], service_name: str) -> None:
        from opentelemetry import trace
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SpanExporter
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._trace = trace
        self._propagator = TraceContextTextMapPropagator()
        # The sampler is OTEL_TRACES_SAMPLER's, the attributes are OTEL_RESOURCE_ATTRIBUTES' too: the SDK reads them.
        self._provider = TracerProvider(resource=Resource.create({"service.name": service_name}))
        for name in names:
            exporter: SpanExporter = ConsoleSpanExporter()
            if name == "otlp":
                from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

                exporter = OTLPSpanExporter()
            self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._none = trace.set_span_in_context(trace.INVALID_SPAN)
        self._tracer = self._provider.get_tracer("shoal")
        self._epoch_ns = time.time_ns() - time.monotonic_ns()

    def close(self) -> None:
        """Send what is there, within a moment."""
        self._provider.force_flush(_FLUSH_MS)
        self._provider.shutdown()

    # -- what clients belong to ----------------------------------------------------------------------------------

    def enter(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Note whose trace the request belongs to that this task answers."""
        _parent.set(self._context(headers))

    def _context(self, headers: Iterable[tuple[bytes, bytes]]) -> Any:
        carrier = {name.decode("latin-1"): value.decode("latin-1") for name, value in headers}
        return self._propagator.extract({name: carrier[name] for name in _HEADERS if name in carrier})

    @contextlib.contextmanager
    def forwarded(self, headers: Iterable[tuple[bytes, bytes]], name: str) -> Iterator[list[tuple[bytes, bytes]]]:
        """A span around a request that somebody else answers; yields the headers that tell them of it."""
        kind = self._trace.SpanKind.SERVER
        with self._tracer.start_as_current_span(name, context=self._context(headers), kind=kind):
            carrier: dict[str, str] = {}
            self._propagator.inject(carrier)
            yield [(key.encode(), value.encode()) for key, value in carrier.items()]

    # -- what a desk does ----------------------------------------------------------------------------------------

    def accepted(self, model: str, version: str, rows: int, arrived_s: float) -> Traced:
        """A request was taken in."""
        return Traced(self._request(model, version, rows, arrived_s), time.monotonic())

    def turned_down(self, model: str, version: str, rows: int, arrived_s: float) -> None:
        """A request was refused."""
        span = self._request(model, version, rows, arrived_s)
        self._child(span, "admission", arrived_s, time.monotonic())
        self._close(span, "refused", time.monotonic())

    def handed(self, rows: Iterable[Traced | None], now_s: float) -> None:
        """A batch of these rows' requests goes to a replica."""
        for traced in rows:
            if traced is not None:
                traced.handed_s = max(now_s, traced.accepted_s)

    def batch(self, rows: Iterable[Traced | None], replica: int, took_s: float, now_s: float) -> None:
        """A batch of these rows' requests is done."""
        found = list(rows)
        # A request of several rows is in it once.
        members = list({id(traced): traced for traced in found if traced is not None}.values())
        if not members:
            return
        began_s = min(member.handed_s for member in members)
        links = [self._trace.Link(member.span.get_span_context()) for member in members]
        span = self._tracer.start_span(
            "batch", context=self._none, links=links,
            attributes={"shoal.rows": len(found), "shoal.requests": len(members), "shoal.replica": replica},
            start_time=self._ns(began_s),
        )  # fmt: skip
        span.end(self._ns(now_s))
        for member in members:
            member.computed, member.batch = (max(member.handed_s, now_s - took_s), now_s), span.get_span_context()

    def ended(self, traced: Traced, arrived_s: float, outcome: str) -> None:
        """An accepted request has its outcome, and whoever waits for it its answer."""
        span, now = traced.span, time.monotonic()
        if span.is_recording():
            self._child(span, "admission", arrived_s, traced.accepted_s)
            self._child(span, "queue", traced.accepted_s, traced.handed_s or now)
            if traced.computed is not None:
                began_s, done_s = traced.computed
                self._child(span, "compute", began_s, done_s, traced.batch)
                self._child(span, "answer", done_s, now)
        self._close(span, outcome, now)

    def _request(self, model: str, version: str, rows: int, arrived_s: float) -> Any:
        return self._tracer.start_span(
            f"infer {model}", context=_parent.get(), kind=self._trace.SpanKind.SERVER, start_time=self._ns(arrived_s),
            attributes={"shoal.model": model, "shoal.version": version, "shoal.rows": rows},
        )  # fmt: skip

    def _child(self, parent: Any, name: str, from_s: float, to_s: float, other: Any = None) -> None:
        links = [] if other is None else [self._trace.Link(other)]
        context = self._trace.set_span_in_context(parent)
        self._tracer.start_span(name, context=context, links=links, start_time=self._ns(from_s)).end(self._ns(to_s))

    def _close(self, span: Any, outcome: str, now_s: float) -> None:
        span.set_attribute("shoal.outcome", outcome)
        if outcome != "answered":
            span.set_status(self._trace.StatusCode.ERROR, outcome)
        span.end(self._ns(now_s))

    def _ns(self, at_s: float) -> int:
        return self._epoch_ns + int(at_s * 1e9)
