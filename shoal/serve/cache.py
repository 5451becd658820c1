"""Answers that were given before: an exact cache, bounded in bytes and in age."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Key = tuple[tuple[tuple[int, ...], bytes], ...]


@dataclass(slots=True)
class _Entry:
    outputs: list[np.ndarray]
    size: int
    until_s: float


def key_of(inputs: Sequence[np.ndarray]) -> Key:
    """All of a request that its answer depends on. Keys are compared whole, so two requests never share an answer by accident."""
    return tuple((array.shape, array.tobytes()) for array in inputs)


class ResponseCache:
    """Outputs by inputs; the least recently used go first where there is no more room. Of one version of one model."""

    def __init__(self, size: int, ttl_s: float) -> None:
        """``size``: bytes of keys and outputs together; ``ttl_s``: seconds after which an answer is not given again."""
        self._most = size
        self._ttl_s = ttl_s
        self._entries: OrderedDict[Key, _Entry] = OrderedDict()
        self._bytes = 0

    @property
    def entries(self) -> int:
        return len(self._entries)

    @property
    def bytes(self) -> int:
        return self._bytes

    def get(self, key: Key, now_s: float) -> list[np.ndarray] | None:
        """The answer, or None where there is none that is young enough."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        if now_s >= entry.until_s:
            self._drop(key)
            return None
        self._entries.move_to_end(key)
        return entry.outputs

    def put(self, key: Key, outputs: list[np.ndarray], now_s: float) -> None:
        """Keep an answer; what alone is larger than the cache is not kept. The arrays must not be written to any more."""
        size = sum(sys.getsizeof(raw) for _, raw in key) + sum(array.nbytes + sys.getsizeof(array) for array in outputs)
        if key in self._entries:
            self._drop(key)
        if size > self._most:
            return
        while self._bytes + size > self._most:
            self._drop(next(iter(self._entries)))
        self._entries[key] = _Entry(outputs, size, now_s + self._ttl_s)
        self._bytes += size

    def _drop(self, key: Key) -> None:
        self._bytes -= self._entries.pop(key).size
