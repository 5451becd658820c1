"""Memory of a run's processes, as the operating system counts it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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


def _field(path: Path, name: str) -> float | None:
    """A number in kB from a file of /proc."""
    try:
        for line in path.read_text().splitlines():
            if line.startswith(name):
                return float(line.split()[1])
    except (OSError, ValueError):
        return None
    return None
