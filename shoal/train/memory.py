"""Memory of a run's processes, as the operating system counts it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from shoal.process.messages import PARTNER, WORKER

_MB = 1024.0


def memory_of(pids: Sequence[int], before: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Peak resident memory of each process (MB), and the proportional share of all together (MB, the largest seen).

    Shared pages count once in ``pss_mb``. A process that is gone keeps its last peak.
    """
    peaks: dict[int, float] = dict((before or {}).get("peaks", {}))
    pss = 0.0
    for pid in pids:
        peak = _field(Path(f"/proc/{pid}/status"), "VmHWM:")
        if peak is not None:
            peaks[pid] = peak / _MB
        pss += (_field(Path(f"/proc/{pid}/smaps_rollup"), "Pss:") or 0.0) / _MB
    largest = max(pss, (before or {}).get("pss_mb") or 0.0)
    return {"peaks": peaks, "peak_rss_mb": [round(v, 1) for v in peaks.values()], "pss_mb": round(largest, 1) or None}


class MemoryWatch:
    """What a run's processes have taken at most; looked at ever more seldom, since counting shared pages takes a while."""

    def __init__(self) -> None:
        self._peak: dict[str, Any] = {}
        self._workers: set[int] = set()
        self._due = 0.0
        self._every_s = 0.5

    def look(self, processes: Callable[[], Sequence[Mapping[str, Any]]]) -> None:
        """Measure, where it is time to; ``processes``: those of this machine, as processes.json has them."""
        now = time.monotonic()
        if now < self._due:
            return
        rows = processes()
        self._peak = memory_of([row["pid"] for row in rows], self._peak)
        self._workers.update(row["pid"] for row in rows if row["role"] in (WORKER, PARTNER))
        self._every_s = min(30.0, 2 * self._every_s)
        self._due = now + self._every_s

    @property
    def peak_rss_mb(self) -> list[float]:
        """Of each process, in MB."""
        return self._peak.get("peak_rss_mb", [])

    @property
    def pss_mb(self) -> float | None:
        """Of all together, in MB."""
        return self._peak.get("pss_mb")

    @property
    def largest_worker_mb(self) -> float | None:
        """The largest worker's peak in 10⁶ bytes, as predictions and limits count; None where nobody was looked at."""
        peaks = [peak for pid, peak in self._peak.get("peaks", {}).items() if pid in self._workers]
        return round(max(peaks) * 1.048576, 1) if peaks else None


def _field(path: Path, name: str) -> float | None:
    """A number in kB from a file of /proc."""
    try:
        for line in path.read_text().splitlines():
            if line.startswith(name):
                return float(line.split()[1])
    except (OSError, ValueError):
        return None
    return None
