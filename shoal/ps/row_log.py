"""What has become of rows lately: for whoever has an older copy of a table, and need not be sent all of it again.

A log takes in what every publication changed, by key. Of a key only the last change counts, so what is kept is at the most
the table once; the oldest changes are let go where they take more memory than they may, and with them the chance to go on
from there.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Changes:
    """Rows that have changed.

    Attributes:
        keys: int64 (n,), each once.
        rows: (n, width): what they are now; of a row that is no longer there it means nothing.
        there: bool (n,): whether there is such a row.
    """

    keys: np.ndarray
    rows: np.ndarray
    there: np.ndarray

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.rows.nbytes + self.there.nbytes

    @classmethod
    def none(cls, width: int, dtype: np.dtype) -> Changes:
        return cls(np.empty(0, np.int64), np.empty((0, width), dtype), np.empty(0, bool))


def last_of(changes: list[Changes]) -> Changes:
    """Several one after the other as one; of a key the last counts."""
    keys = np.concatenate([c.keys for c in changes])
    # The first in the opposite order.
    _, first = np.unique(keys[::-1], return_index=True)
    at = len(keys) - 1 - first
    rows, there = np.concatenate([c.rows for c in changes]), np.concatenate([c.there for c in changes])
    return Changes(keys[at], rows[at], there[at])


class RowLog:
    """The changes of one table since publication ``floor``."""

    def __init__(self, width: int, dtype: np.dtype, floor: int, most_bytes: int) -> None:
        self._none = Changes.none(width, dtype)
        self.floor = floor
        self._most_bytes = most_bytes
        self._kept: list[tuple[int, Changes]] = []

    @property
    def nbytes(self) -> int:
        return sum(changes.nbytes for _, changes in self._kept)

    def add(self, number: int, changes: Changes, needed: int | None = None) -> None:
        """Publication ``number`` has changed this. ``needed``: what came after that publication must stay."""
        if len(changes.keys):
            self._kept.append((number, changes))
        if self.nbytes > self._most_bytes:
            self._compact()
        while self._kept and self.nbytes > self._most_bytes:
            oldest = self._kept[0][0]
            if needed is not None and oldest > needed:
                break
            self.floor = max(self.floor, oldest)
            del self._kept[0]

    def since(self, base: int) -> Changes | None:
        """What has changed after publication ``base``; None where that is no longer known."""
        if base < self.floor:
            return None
        found = [changes for number, changes in self._kept if number > base]
        return last_of(found) if found else self._none

    def forget(self, number: int) -> None:
        """Nothing is known of what came before publication ``number``."""
        self._kept, self.floor = [], number

    def trim(self, number: int) -> None:
        """Nobody will ask for what came up to publication ``number``."""
        at = next((k for k, (own, _) in enumerate(self._kept) if own > number), len(self._kept))
        del self._kept[:at]
        self.floor = max(self.floor, number)

    def _compact(self) -> None:
        """Leave out what has changed again later."""
        ends = np.cumsum([len(changes.keys) for _, changes in self._kept])
        keys = np.concatenate([changes.keys for _, changes in self._kept])
        # The first of each in the opposite order; then by where it was.
        last = np.sort(len(keys) - 1 - np.unique(keys[::-1], return_index=True)[1])
        cuts = np.searchsorted(last, ends)
        kept: list[tuple[int, Changes]] = []
        for (number, changes), end, first, stop in zip(self._kept, ends, (0, *cuts), cuts, strict=False):
            at = last[first:stop] - (end - len(changes.keys))
            if len(at):
                kept.append((number, Changes(changes.keys[at], changes.rows[at], changes.there[at])))
        self._kept = kept
