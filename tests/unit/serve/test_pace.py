"""Turns of an event loop: what it has no time for, and since when a request may have waited."""

from __future__ import annotations

import asyncio
import time

from shoal.serve.pace import Pace


def test_a_turn_that_has_taken_its_time_is_behind() -> None:
    async def turns() -> None:
        pace = Pace(slo_s=1.0)
        now = time.monotonic()
        assert pace.arrive(now) == now, "nothing went before"
        assert not pace.behind(now + 0.199)
        assert pace.behind(now + 0.201)
        pace.arrive(now + 0.3)
        assert pace.behind(now + 0.3), "it is still the same turn"
        await asyncio.sleep(0)
        assert not pace.behind(now + 9.0), "no turn has begun"

    asyncio.run(turns())


def test_a_request_may_have_waited_for_the_turn_before() -> None:
    async def turns() -> None:
        pace = Pace(slo_s=1.0)
        pace.arrive(time.monotonic() - 5.0)
        await asyncio.sleep(0)
        now = time.monotonic()
        assert pace.arrive(now) <= now - 5.0

    asyncio.run(turns())
