"""How long a batch takes, by its size: measured at the start, kept true while it runs.

A batch's size is its number of rows, or where rows differ in length the units of work in all of them (``ModelSignature.units``).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping

# A batch that takes this much longer than expected is put down to something else on the machine.
_OUTLIER = 4.0
_LEARN = 0.05
# A row in a batch has to be cheaper by this much than alone, or the batch is not worth its wait.
GAIN = 0.05


class LatencyModel:
    """Seconds for a batch: straight lines between the measured sizes, each of which is kept true by what is seen."""

    def __init__(self, sizes: tuple[int, ...], seconds: tuple[float, ...]) -> None:
        self._sizes = sizes
        self._seconds = list(seconds)

    @classmethod
    def from_measured(cls, measured_s: Mapping[int, float]) -> LatencyModel:
        """From measured seconds by batch size, at least one of them."""
        sizes = tuple(sorted(measured_s))
        return cls(sizes, tuple(max(measured_s[size], 1e-9) for size in sizes))

    def predict(self, batch: int) -> float:
        """Seconds for a batch; beyond what was measured, in proportion to the rows."""
        sizes, seconds = self._sizes, self._seconds
        if batch <= sizes[0]:
            # By far the most usual question.
            return seconds[0]
        at = bisect_left(sizes, batch)
        if at < len(sizes) and sizes[at] == batch:
            return seconds[at]
        if at == len(sizes):
            return seconds[-1] * batch / sizes[-1]
        part = (batch - sizes[at - 1]) / (sizes[at] - sizes[at - 1])
        return seconds[at - 1] + part * (seconds[at] - seconds[at - 1])

    def update(self, batch: int, took_s: float) -> None:
        """Learn from a batch that was computed: the nearest measured sizes move a little towards it."""
        expected = self.predict(batch)
        ratio = min(max(took_s / expected, 1 / _OUTLIER), _OUTLIER)
        at = min(bisect_left(self._sizes, batch), len(self._sizes) - 1)
        near = {at} if self._sizes[at] == batch or at == 0 else {at - 1, at}
        for place in near:
            self._seconds[place] *= 1 + _LEARN * (ratio - 1)

    def rows_per_s(self, batch: int) -> float:
        """Rows computed in a second by one replica in batches of this size."""
        return batch / self.predict(batch)

    def best_batch(self, limit: int) -> int:
        """The smallest measured size, up to ``limit``, within 5 % of the best rate; 1 where batches gain less than 5 %."""
        sizes = [size for size in self._sizes if size <= limit] or [1]
        best = max(self.rows_per_s(size) for size in sizes)
        if best < (1 + GAIN) * self.rows_per_s(1):
            return 1
        return min(size for size in sizes if self.rows_per_s(size) >= (1 - GAIN) * best)

    def cheapest_batch(self, limit: int) -> int:
        """The largest measured size, up to ``limit``, within 5 % of the best rate: for where nobody waits."""
        sizes = [size for size in self._sizes if size <= limit] or [1]
        best = max(self.rows_per_s(size) for size in sizes)
        return max(size for size in sizes if self.rows_per_s(size) >= (1 - GAIN) * best)
