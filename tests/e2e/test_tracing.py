"""Traces, as a collector gets them: a small one that speaks OTLP over HTTP, a route, and a service behind it."""

from __future__ import annotations

import http.client
import http.server
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bundles
import numpy as np
import pytest

import shoal
from shoal.errors import RequestError
from shoal.serve.tracing import exporters

pytest.importorskip("opentelemetry.sdk")
triton = pytest.importorskip("tritonclient.grpc")
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest  # noqa: E402

_TRACE, _CLIENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
_WAIT_S = 60.0


class _Collector(http.server.ThreadingHTTPServer):
    def __init__(self) -> None:
        self.spans: list[tuple[str, Any]] = []
        super().__init__(("127.0.0.1", 0), _Receiver)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def until(self, names: set[str]) -> dict[str, Any]:
        """The spans, by service and name, when all of these are there."""
        give_up = time.monotonic() + _WAIT_S
        while not names <= (found := {f"{service} {span.name}": span for service, span in self.spans}).keys():
            assert time.monotonic() < give_up, found.keys()
            time.sleep(0.05)
        return found


class _Receiver(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        assert isinstance(self.server, _Collector) and self.path == "/v1/traces"
        request = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["content-length"])))
        for resource in request.resource_spans:
            service = next(a.value.string_value for a in resource.resource.attributes if a.key == "service.name")
            self.server.spans += [(service, span) for scope in resource.scope_spans for span in scope.spans]
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Collector]:
    found = _Collector()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{found.server_address[1]}")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
    yield found
    found.shutdown()
    found.server_close()


def _infer(url: str, value: int = 1, **headers: str) -> int:
    tensor = {"name": "input", "datatype": "UINT8", "shape": [2, 3, 4], "data": [value] * 24}
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=_WAIT_S)
    connection.request("POST", "/v2/models/odd/infer", json.dumps({"inputs": [tensor]}), headers)
    status = connection.getresponse().status
    connection.close()
    return status


def test_a_trace_goes_from_the_client_through_the_route_to_the_batch(collector: _Collector, tmp_path: Path) -> None:
    with shoal.serve(bundles.odd(tmp_path / "bundle"), slo_ms=20_000, replicas=1, grpc_port=0) as service:
        command = [sys.executable, "-m", "shoal", "route", service.url]
        route = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        try:
            assert route.stdout is not None
            url = json.loads(route.stdout.readline())["url"]
            assert _infer(url, traceparent=f"00-{_TRACE}-{_CLIENT}-01") == 200
            children = {f"shoal {name}" for name in ("admission", "queue", "compute", "answer")}
            found = collector.until({"shoal-route route odd", "shoal infer odd", "shoal batch", *children})
            collector.spans.clear()
            with triton.InferenceServerClient(service.grpc_url) as client:
                rows = triton.InferInput("input", [1, 3, 4], "UINT8")
                rows.set_data_from_numpy(np.zeros((1, 3, 4), np.uint8))
                client.infer("odd", [rows], headers={"traceparent": f"00-{_TRACE}-{_CLIENT}-01"})
            called = collector.until({"shoal infer odd"})["shoal infer odd"]
            collector.spans.clear()
            assert _infer(service.url, 255) == 500
            failed = collector.until({"shoal infer odd"})["shoal infer odd"]
        finally:
            route.send_signal(signal.SIGTERM)
            assert route.wait(60) == 0
            route.stdout.close()
    routed, request, batch = found["shoal-route route odd"], found["shoal infer odd"], found["shoal batch"]
    assert routed.trace_id.hex() == request.trace_id.hex() == _TRACE
    assert routed.parent_span_id.hex() == _CLIENT and request.parent_span_id == routed.span_id
    spans = [found[name] for name in sorted(children)]
    assert all(span.parent_span_id == request.span_id and span.trace_id == request.trace_id for span in spans)
    assert all(request.start_time_unix_nano <= s.start_time_unix_nano <= s.end_time_unix_nano for s in spans)
    assert [link.span_id for link in batch.links] == [request.span_id] and batch.trace_id != request.trace_id
    assert [link.span_id for link in found["shoal compute"].links] == [batch.span_id]
    assert called.trace_id.hex() == _TRACE and called.parent_span_id.hex() == _CLIENT
    attributes = {a.key: a.value for a in request.attributes}
    assert attributes["shoal.outcome"].string_value == "answered" and attributes["shoal.rows"].int_value == 2
    assert {a.key: a.value.string_value for a in failed.attributes}["shoal.outcome"] == "failed" and failed.status.code == 2


def test_the_usual_variables_say_where_traces_go() -> None:
    here = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318"}
    assert exporters({}) == exporters({**here, "OTEL_SDK_DISABLED": "true"}) == ()
    assert exporters({**here, "OTEL_TRACES_EXPORTER": "none"}) == ()
    assert exporters(here) == ("otlp",) and exporters({"OTEL_TRACES_EXPORTER": "console"}) == ("console",)
    wrongs = ({"OTEL_TRACES_EXPORTER": "zipkin"}, "zipkin"), ({**here, "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "grpc")
    for wrong, word in wrongs:
        with pytest.raises(RequestError, match=word):
            exporters(wrong)


def test_without_the_package_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk", None)
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(RequestError, match=r"pip install shoal\[otel\]"):
        exporters({"OTEL_TRACES_EXPORTER": "otlp"})
