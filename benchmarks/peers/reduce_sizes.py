"""What both sides of the reduce benchmark share: how many bytes, how often, and how the times are summed up."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

Measurement = tuple[int, int]
"""(bytes a process gives, how often)"""


def arguments(description: str | None) -> argparse.Namespace:
    """Parse ``--processes N --plan BYTES:TIMES … [--fresh]``; ``plan`` becomes a list of Measurement."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument("--plan", nargs="+", required=True, help="bytes:times, one for each size")
    parser.add_argument("--fresh", action="store_true", help="write all values anew before each sum, outside the clock")
    options = parser.parse_args()
    options.plan = [tuple(int(part) for part in entry.split(":")) for entry in options.plan]
    return options


def percentiles(taken: Sequence[float]) -> dict[str, float]:
    """Return the median and the 90th percentile of durations in seconds; the first tenth of them was warm-up."""
    counted = sorted(taken[len(taken) // 10 :])
    return {"median_s": counted[len(counted) // 2], "p90_s": counted[len(counted) * 9 // 10]}
