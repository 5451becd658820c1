"""Requests that need no computing of their own: answered before, or being computed for somebody who asked the same."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np

from shoal.serve.cache import Key, ResponseCache, key_of
from shoal.serve.refusals import too_late
from shoal.serve.slots import Outcome
from shoal.serve.times import Times

Compute = Callable[[bool], Awaitable[list[np.ndarray]]]
"""Computes a request; told whether it was taken in and counted already, in the hope of somebody else's answer."""


class Remembered:
    """The answers of one version of one model that may be given again. ``count``: told each outcome that it gives."""

    def __init__(self, cache: ResponseCache, count: Callable[[Outcome], None], times: Times) -> None:
        self._cache = cache
        self._count = count
        self._times = times
        self._shared: dict[Key, asyncio.Future[list[np.ndarray]]] = {}
        self.waiting = 0

    async def answer(
        self, inputs: Sequence[np.ndarray], now: float, deadline: float, compute: Compute
    ) -> list[np.ndarray]:
        """Give the answer that was given before, wait for the one that is being computed, or compute it for all who ask."""
        key = key_of(inputs)
        found = self._cache.get(key, now)
        if found is not None:
            self._count(Outcome.ACCEPTED)
            self._count(Outcome.ANSWERED)
            self._times.hit(time.monotonic() - now)
            return found
        shared = self._shared.get(key)
        if shared is not None:
            found = await self._follow(shared, deadline)
            return found if found is not None else await compute(True)
        self._times.misses += 1
        shared = self._shared[key] = asyncio.get_running_loop().create_future()
        try:
            found = await compute(False)
            self._cache.put(key, found, time.monotonic())
            shared.set_result(found)
            return found
        finally:
            del self._shared[key]
            # Whoever waited asks for itself: another deadline, another client.
            shared.cancel()

    async def _follow(self, shared: asyncio.Future[list[np.ndarray]], deadline: float) -> list[np.ndarray] | None:
        """The answer to an equal request that was here first; None where that one has got none."""
        began = time.monotonic()
        self._count(Outcome.ACCEPTED)
        self.waiting += 1
        try:
            await asyncio.wait([shared], timeout=max(0.0, deadline - began))
        except asyncio.CancelledError:
            self._count(Outcome.CANCELLED)
            raise
        finally:
            self.waiting -= 1
        if not shared.done():
            self._count(Outcome.EXPIRED)
            raise too_late()
        if shared.cancelled():
            return None
        self._count(Outcome.ANSWERED)
        self._times.coalesced += 1
        self._times.hit(time.monotonic() - began)
        return shared.result()

    def numbers(self) -> dict[str, Any]:
        """For the statistics."""
        return {
            "hits": self._times.hits, "misses": self._times.misses, "coalesced": self._times.coalesced,
            "entries": self._cache.entries, "bytes": self._cache.bytes,
        }  # fmt: skip
