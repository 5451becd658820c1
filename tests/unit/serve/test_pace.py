"""Turns of an event loop: what it has no time for, and since when a request may have waited. The clock is turned by hand."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from shoal.serve import pace as pace_module
from shoal.serve.pace import Pace


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """``now``: seconds."""
    found = SimpleNamespace(now=100.0)
    monkeypatch.setattr(pace_module, "time", SimpleNamespace(monotonic=lambda: found.now))
    return found


async def turn(pace: Pace, clock: SimpleNamespace, takes_s: float) -> None:
    """A turn that sees one request and takes so long."""
    pace.arrive(clock.now)
    clock.now += takes_s
    await asyncio.sleep(0)


def test_a_turn_that_has_taken_its_time_is_behind(clock: SimpleNamespace) -> None:
    async def turns() -> None:
        pace = Pace(slo_s=1.0)
        now = clock.now
        assert pace.arrive(now) == now, "nothing went before"
        assert not pace.behind(now + 0.099)
        assert pace.behind(now + 0.101)
        pace.arrive(now + 0.3)
        assert pace.behind(now + 0.3), "it is still the same turn"
        await asyncio.sleep(0)
        assert not pace.behind(now + 9.0), "no turn has begun"

    asyncio.run(turns())


def test_a_request_may_have_waited_for_the_turn_before(clock: SimpleNamespace) -> None:
    async def turns() -> None:
        pace = Pace(slo_s=1.0)
        await turn(pace, clock, 5.0)
        assert pace.arrive(clock.now) == clock.now - 5.0

    asyncio.run(turns())


def test_what_was_read_fills_a_turn(clock: SimpleNamespace) -> None:
    async def turns() -> None:
        pace = Pace(slo_s=1.0)
        for _ in range(20):
            pace.handed_on()
            await turn(pace, clock, 0.02)
        assert not pace.full(), "nobody waits"
        for _ in range(8):
            pace.handed_on()
        assert not pace.full(), "so few never do"
        for _ in range(3):
            pace.handed_on()
        assert pace.full(), "eleven of 20 ms are more than a tenth of a second"
        for _ in range(11):
            pace.arrive(clock.now)
        assert not pace.full()

    asyncio.run(turns())


def test_one_bad_moment_does_not_fill_the_next_turns(clock: SimpleNamespace) -> None:
    async def turns() -> None:
        pace = Pace(slo_s=1.0)
        for takes_s in (0.0005, 5.0):
            pace.handed_on()
            await turn(pace, clock, takes_s)
        for _ in range(20):
            pace.handed_on()
        assert not pace.full()

    asyncio.run(turns())
