"""What a load test found: outcomes counted, latencies kept, percentiles at the end."""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

PERCENTILES = (50.0, 90.0, 95.0, 99.0, 99.9)
OUTCOMES = ("answered", "refused", "expired", "failed")
_BINS_A_DECADE = 20
_SHORTEST_S, _DECADES = 1e-5, 8


def outcome_of(status: int) -> str:
    """Return which of ``OUTCOMES`` an HTTP status is; 0 stands for no answer."""
    if 200 <= status < 300:
        return "answered"
    return {429: "refused", 503: "refused", 504: "expired"}.get(status, "failed")


def percentiles(values_s: Sequence[float] | np.ndarray, at: Sequence[float] = PERCENTILES) -> list[float | None]:
    """Return for each p the smallest value that p percent of the values do not exceed; None where there is no value."""
    values = np.sort(np.asarray(values_s, np.float64))
    if not len(values):
        return [None] * len(at)
    # Rounded: in floating point 99.9 % of 1,000 are a little more than 999.
    return [float(values[max(0, math.ceil(round(len(values) * p / 100, 6)) - 1)]) for p in at]


def histogram(values_s: Sequence[float] | np.ndarray) -> list[tuple[float, float, int]]:
    """Return (from_s, to_s, count) for bins of equal ratio, 20 to a decade, from the first that holds a value to the last."""
    values = np.asarray(values_s, np.float64)
    if not len(values):
        return []
    last = _DECADES * _BINS_A_DECADE - 1
    place = np.floor(np.log10(np.maximum(values, _SHORTEST_S) / _SHORTEST_S) * _BINS_A_DECADE).astype(int).clip(0, last)
    counts = np.bincount(place)
    edges = _SHORTEST_S * 10 ** (np.arange(last + 2) / _BINS_A_DECADE)
    return [(float(edges[i]), float(edges[i + 1]), int(counts[i])) for i in range(place.min(), place.max() + 1)]


@dataclass(frozen=True, kw_only=True)
class Report:
    """A load test's result.

    Latencies are those of answered requests, in milliseconds, from the time at which a request was *meant* to be sent: where
    a service stalls, the requests that had to wait behind the stall say so too (no coordinated omission). In a closed loop a
    client means to send as soon as it has its last answer.

    Attributes:
        requests: all that were sent, or could not be sent for want of a connection.
        errors: those not answered; refused (429, 503) + expired (504) + failed (anything else, or no answer).
        statuses: how often each HTTP status came; "none" where no answer did.
        reasons: for each status that is no answer, the first sentence that came with it.
        throughput: answers per second. goodput: answers within the SLO per second; None without an SLO.
        within_slo: the share of all requests that were answered within the SLO.
        late_p99_ms: how late the generator itself sent; where that is no small part of p99_ms, the client was the limit.
        client_us: CPU time of the generator per request, in microseconds.
        histogram: (from_ms, to_ms, count) over the answered requests' latencies.
    """

    mode: str
    requests: int
    answered: int
    refused: int
    expired: int
    failed: int
    elapsed_s: float
    throughput: float
    p50_ms: float | None
    p90_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    p999_ms: float | None
    mean_ms: float | None
    max_ms: float | None
    refused_p99_ms: float | None
    late_p99_ms: float | None
    client_us: float | None
    slo_ms: float | None = None
    goodput: float | None = None
    within_slo: float | None = None
    statuses: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    histogram: list[tuple[float, float, int]] = field(default_factory=list)

    @property
    def errors(self) -> int:
        """Requests that were not answered."""
        return self.requests - self.answered

    @property
    def holds(self) -> bool:
        """Whether the 99th percentile of *all* requests is within the SLO: what is not answered counts as never answered."""
        return self.within_slo is not None and self.within_slo >= 0.99

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON can hold it."""
        return {"requests": self.requests, "errors": self.errors, **asdict(self)}


class Ledger:
    """Takes down each request as it ends; ``report`` sums up."""

    def __init__(self, slo_s: float | None = None) -> None:
        self.slo_s = slo_s
        self.statuses: Counter[int] = Counter()
        self.reasons: dict[int, str] = {}
        self.answered_s = array("d")
        self.refused_s = array("d")
        self.late_s = array("d")
        self.last_s = -math.inf

    def record(self, status: int, intended_s: float, sent_s: float, done_s: float) -> None:
        """A request meant for ``intended_s`` was sent and has ended, all on one clock; status 0: with no answer."""
        self.statuses[status] += 1
        self.late_s.append(sent_s - intended_s)
        self.last_s = done_s
        if 200 <= status < 300:
            self.answered_s.append(done_s - intended_s)
        elif status == 429 or status == 503:
            self.refused_s.append(done_s - sent_s)

    def count(self, outcome: str) -> int:
        """How many requests had this outcome so far."""
        return sum(count for status, count in self.statuses.items() if outcome_of(status) == outcome)

    def report(self, mode: str, elapsed_s: float, cpu_s: float | None = None) -> Report:
        """Sum up; ``elapsed_s`` is what rates are over, ``cpu_s`` what the generator took."""
        answered = np.array(self.answered_s)
        seconds = max(elapsed_s, 1e-9)
        total = sum(self.statuses.values())
        within = None if self.slo_s is None else int((answered <= self.slo_s).sum())
        p50, p90, p95, p99, p999 = (_ms(value) for value in percentiles(answered))
        return Report(
            mode=mode, requests=total, **{outcome: self.count(outcome) for outcome in OUTCOMES},
            elapsed_s=elapsed_s, throughput=len(answered) / seconds,
            p50_ms=p50, p90_ms=p90, p95_ms=p95, p99_ms=p99, p999_ms=p999,
            mean_ms=_ms(float(answered.mean())) if len(answered) else None,
            max_ms=_ms(float(answered.max())) if len(answered) else None,
            refused_p99_ms=_ms(percentiles(self.refused_s, (99,))[0]),
            late_p99_ms=_ms(percentiles(self.late_s, (99,))[0]),
            client_us=None if cpu_s is None or not total else cpu_s / total * 1e6,
            slo_ms=_ms(self.slo_s),
            goodput=None if within is None else within / seconds,
            within_slo=None if within is None or not total else within / total,
            statuses={_status(status): count for status, count in sorted(self.statuses.items())},
            reasons={_status(status): reason for status, reason in sorted(self.reasons.items())},
            histogram=[(low * 1e3, high * 1e3, count) for low, high, count in histogram(answered)],
        )  # fmt: skip


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e3


def _status(status: int) -> str:
    return str(status) if status else "none"
