"""What one model's statistics say beside the counts of outcomes: how many, how long, in batches of which size."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

_KEPT = 4096


@dataclass
class Times:
    """Nanoseconds as the protocol wants them. ``observe``: told the seconds of each answer."""

    observe: Callable[[float], None] = lambda _: None
    requests: int = 0
    rows: int = 0
    batches: int = 0
    busy_s: float = 0.0
    queue_ns: int = 0
    compute_ns: int = 0
    by_batch: dict[int, tuple[int, int]] = field(default_factory=dict)
    latest_s: deque[float] = field(default_factory=lambda: deque(maxlen=_KEPT))
    refused_s: deque[float] = field(default_factory=lambda: deque(maxlen=_KEPT))
    hits: int = 0
    hit_ns: int = 0
    misses: int = 0
    coalesced: int = 0

    def batch(self, rows: int, took_s: float) -> None:
        """A batch was computed. ``rows``: those that were asked for from outside."""
        self.busy_s += took_s
        if not rows:
            return
        self.batches += 1
        self.rows += rows
        count, spent = self.by_batch.get(rows, (0, 0))
        self.by_batch[rows] = (count + 1, spent + int(took_s * 1e9))

    def answered(self, took_s: float, compute_s: float) -> None:
        """A request was answered after ``took_s``, of which it was computed for ``compute_s``."""
        self.requests += 1
        self.compute_ns += int(compute_s * 1e9)
        self.queue_ns += int(max(0.0, took_s - compute_s) * 1e9)
        self.latest_s.append(took_s)
        self.observe(took_s)

    def hit(self, took_s: float) -> None:
        """A request got an answer that was computed for another one."""
        self.hits += 1
        self.hit_ns += int(took_s * 1e9)
        self.latest_s.append(took_s)
        self.observe(took_s)

    def refused(self, waited_s: float) -> None:
        """A request was refused so long after it may have come at the earliest."""
        self.refused_s.append(waited_s)

    def latest_ms(self) -> dict[str, float | None]:
        """Percentiles of the latest answers, and of the latest refusals; None where there was none."""
        latest = np.array(self.latest_s) if self.latest_s else np.zeros(1)
        p50, p95, p99 = (float(v) * 1e3 for v in np.percentile(latest, (50, 95, 99)))
        refused = float(np.percentile(self.refused_s, 99)) * 1e3 if self.refused_s else None
        return {"p50_ms": p50, "p95_ms": p95, "p99_ms": p99, "refused_p99_ms": refused}
