"""Which service a key belongs to: consistent hashing with bounded loads. Pure.

Mirrokni, Thorup, Zadimoghaddam: Consistent Hashing with Bounded Loads, https://arxiv.org/abs/1608.01350. A key goes to the first
service behind it on a ring that is not over its share; so a service that comes or goes moves only the keys that were, or will
be, its own, and one popular key cannot drown one service.
"""

from __future__ import annotations

import bisect
import hashlib
import math
from collections.abc import Mapping, Sequence

_PLACES = 100
BOUND = 1.25
"""A service may have so many times its even share of the requests on their way."""


class Ring:
    """Services on a ring, each at many places."""

    def __init__(self, names: Sequence[str]) -> None:
        found = sorted((_place(f"{name}\0{k}"), index) for index, name in enumerate(names) for k in range(_PLACES))
        self._places = [place for place, _ in found]
        self._owners = [index for _, index in found]
        self._count = len(names)

    def choose(self, key: str, loads: Mapping[int, int]) -> int | None:
        """The index of the service for a key.

        Args:
            loads: requests on their way of each service that may be asked; None comes back where there is none.
        """
        if not loads:
            return None
        bound = math.ceil(BOUND * (sum(loads.values()) + 1) / len(loads))
        at, seen = bisect.bisect(self._places, _place(key)), set[int]()
        for step in range(len(self._owners)):
            index = self._owners[(at + step) % len(self._owners)]
            if index in loads and loads[index] < bound:
                return index
            seen.add(index)
            if len(seen) == self._count:
                break
        return min(loads, key=lambda index: loads[index])


def _place(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
