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
        assert not pace.behind(now + 0.099)
        assert pace.behind(now + 0.101)
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


def test_what_was_read_fills_a_turn() -> None:
    async def turns() -> None:
        pace = Pace(slo_s=1.0)
        for _ in range(20):
            pace.handed_on()
            pace.arrive(time.monotonic() - 0.02)
            await asyncio.sleep(0)
        assert not pace.full(), "nobody waits"
        for _ in range(8):
            pace.handed_on()
        assert not pace.full(), "so few never do"
        for _ in range(3):
            pace.handed_on()
        assert pace.full(), "eleven of 20 ms are more than a tenth of a second"
        for _ in range(11):
            pace.arrive(time.monotonic())
        assert not pace.full()

    asyncio.run(turns())


def test_one_bad_moment_does_not_fill_the_next_turns() -> None:
    async def turns() -> None:
        pace = Pace(slo_s=1.0)
        for took_s in (0.0005, 5.0):
            pace.handed_on()
            pace.arrive(time.monotonic() - took_s)
            await asyncio.sleep(0)
        for _ in range(20):
            pace.handed_on()
        assert not pace.full()

    asyncio.run(turns())
