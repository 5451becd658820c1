"""Where the time before a run goes: what finding a plan takes, part by part."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

MEASURING_S = 15.0
"""What ``auto`` may take for everything that it measures."""
MEASURED = ("rewrites", "trials", "compile")
"""The parts that are measuring; the others (starting, building the job, forecasting memory) are what any run has to do."""


class Spent:
    """Seconds by part, in the order in which these were first begun. A part within another counts for itself alone."""

    def __init__(self) -> None:
        self.parts_s: dict[str, float] = {}
        self._within: list[float] = []

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what runs within to a part."""
        began = time.monotonic()
        self._within.append(0.0)
        self.parts_s.setdefault(name, 0.0)
        try:
            yield
        finally:
            took = time.monotonic() - began
            self.parts_s[name] += took - self._within.pop()
            if self._within:
                self._within[-1] += took

    @property
    def measuring_s(self) -> float:
        """What measuring has taken so far."""
        return sum(self.parts_s.get(name, 0.0) for name in MEASURED)

    @property
    def left_s(self) -> float:
        """What of the time for measuring is left."""
        return max(0.0, MEASURING_S - self.measuring_s)

    def as_dict(self) -> dict[str, float]:
        """The parts, and what of them was measuring, rounded to milliseconds."""
        return {"measuring": round(self.measuring_s, 3), **{name: round(took, 3) for name, took in self.parts_s.items()}}

    def sentence(self) -> str:
        """The same for a person."""
        told = [(name in MEASURED, f"{name} {took:.1f} s") for name, took in self.parts_s.items() if took >= 0.05]
        measured, others = (", ".join(text for counts, text in told if counts is which) for which in (True, False))
        beside = f"; beside it: {others}" if others else ""
        return f"Measuring took {self.measuring_s:.1f} s ({measured or 'all was remembered'}){beside}."
