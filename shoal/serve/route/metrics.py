"""What Prometheus reads at the route's ``/metrics``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

_BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)


class RouteMetrics:
    """Counters of what happened, gauges of what is."""

    content_type = b"text/plain; version=0.0.4; charset=utf-8"

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._ended = Counter("shoal_route_requests", "Requests by what became of them.", ["outcome"],
                              registry=self._registry)  # fmt: skip
        self._seconds = Histogram("shoal_route_request_seconds", "From arrival to the end of the answer, answered requests.",
                                  buckets=_BUCKETS_S, registry=self._registry)  # fmt: skip
        self._asked = Counter("shoal_route_asked", "How often a service was asked, by how that ended; more than requests where "
                              "some were asked again.", ["service", "result"], registry=self._registry)  # fmt: skip
        self._turned = Counter("shoal_route_turned_away", "Requests and connections that never were one, by why.",
                               ["reason"], registry=self._registry)  # fmt: skip
        self._now = _Now()
        self._registry.register(self._now)

    def begin_with(self, outcomes: Iterable[str]) -> None:
        """What may become of requests: counted from 0, so that a rate knows of the first one."""
        for outcome in outcomes:
            self._ended.labels(outcome)

    def ended(self, outcome: str, took_s: float) -> None:
        """A request has its outcome."""
        self._ended.labels(outcome).inc()
        if outcome == "answered":
            self._seconds.observe(took_s)

    def asked(self, service: str, result: str) -> None:
        """A service was asked."""
        self._asked.labels(service, result).inc()

    def turned_away(self, reason: str) -> None:
        """Something came that was no request; ``reason`` is one of a few words."""
        self._turned.labels(reason).inc()

    def render(self, numbers: Mapping[str, Any]) -> bytes:
        """The page; ``numbers`` as the route's statistics have them."""
        self._now.numbers = numbers
        return generate_latest(self._registry)


class _Now(Collector):
    def __init__(self) -> None:
        self.numbers: Mapping[str, Any] = {"open": 0, "services": []}

    def collect(self) -> Iterator[Metric]:
        waiting = GaugeMetricFamily("shoal_route_open_requests", "Requests that have no outcome yet.")
        waiting.add_metric([], self.numbers["open"])
        gauges = {name: GaugeMetricFamily(f"shoal_route_{name}", text, labels=["service"]) for name, text in _GAUGES.items()}
        for service in self.numbers["services"]:
            found = {
                "ready": service["ready"], "breaker_open": service["breaker"] != "closed",
                "outstanding": service["outstanding"], "refusal_share": service["refusal_share"],
                "predicted_seconds": (service["predicted_ms"] or 0.0) / 1e3,
            }  # fmt: skip
            for name, value in found.items():
                gauges[name].add_metric([service["url"]], float(value))
        yield from (waiting, *gauges.values())


_GAUGES = {
    "ready": "Whether a service is ready to answer.",
    "breaker_open": "Whether it is left alone after faults.",
    "outstanding": "Requests on their way to it.",
    "refusal_share": "How likely it refuses.",
    "predicted_seconds": "After how long it would answer a request now.",
}
