"""What Prometheus reads at ``/metrics``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from shoal.serve.desk import Desk
from shoal.serve.slots import Outcome

_BUCKETS_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


class Metrics:
    """Counts come from the shared memory, so a gateway that is replaced goes on counting; only the histogram begins again."""

    content_type = b"text/plain; version=0.0.4; charset=utf-8"

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._latency = Histogram("shoal_request_seconds", "From arrival to answer, answered requests.", ["model"],
                                  buckets=_BUCKETS_S, registry=self._registry)  # fmt: skip
        self._turned = Counter("shoal_turned_away", "Requests and connections that were for no model, by why they were "
                               "turned away.", ["reason"], registry=self._registry)  # fmt: skip
        self._counts = _Counts()
        self._registry.register(self._counts)

    def observer(self, model: str) -> Callable[[float], None]:
        """What a desk calls with the seconds that each answered request took."""
        observe: Callable[[float], None] = self._latency.labels(model).observe
        return observe

    def turned_away(self, reason: str) -> None:
        """Count a request that never came to a model; ``reason`` is one of a few words."""
        self._turned.labels(reason).inc()

    def render(self, desks: Mapping[str, Desk]) -> bytes:
        """The page."""
        self._counts.desks = desks
        return generate_latest(self._registry)


class _Counts(Collector):
    def __init__(self) -> None:
        self.desks: Mapping[str, Desk] = {}

    def collect(self) -> Iterator[Metric]:
        outcomes = CounterMetricFamily("shoal_requests", "Requests by what became of them; accepted is the sum of those with an "
                                       "outcome and the open ones.", labels=["model", "outcome"])  # fmt: skip
        gauges = {name: GaugeMetricFamily(f"shoal_{name}", text, labels=["model"]) for name, text in _GAUGES.items()}
        batches = CounterMetricFamily("shoal_batches", "Batches computed.", labels=["model"])
        rows = CounterMetricFamily("shoal_rows", "Rows computed.", labels=["model"])
        probes = CounterMetricFamily("shoal_probes", "Questions of the service's own whether it answers; not among the requests.",
                                     labels=["model"])  # fmt: skip
        updates = CounterMetricFamily("shoal_weights_updates", "Updates of the run that were taken into the weights, for models "
                                      "that follow one.", labels=["model"])  # fmt: skip
        lost = CounterMetricFamily("shoal_weights_lost", "How often the run that the weights follow could not be heard any more.",
                                   labels=["model"])  # fmt: skip
        for name, desk in self.desks.items():
            probes.add_metric([name], int(desk.slots.counts[Outcome.PROBED]))
            for outcome in (one for one in Outcome if one is not Outcome.PROBED):
                outcomes.add_metric([name, outcome.name.lower()], int(desk.slots.counts[outcome]))
            gauges["queued_rows"].add_metric([name], desk.dispatcher.queued)
            gauges["open_requests"].add_metric([name], desk.open_requests)
            gauges["replicas"].add_metric([name], desk.replicas_up)
            weights = desk.slots.weights()
            if weights is not None:
                lost.add_metric([name], weights["lost"])
                gauges["weights_age_seconds"].add_metric([name], weights["age_s"])
                updates.add_metric([name], weights["updates"])
            batches.add_metric([name], desk.times.batches)
            rows.add_metric([name], desk.times.rows)
        yield from (outcomes, probes, *gauges.values(), batches, rows, updates, lost)


_GAUGES = {
    "queued_rows": "Rows that wait for a replica.",
    "open_requests": "Requests that were accepted and have no outcome yet.",
    "replicas": "Replicas that take batches.",
    "weights_age_seconds": "Seconds since the run that the weights follow had them.",
}
