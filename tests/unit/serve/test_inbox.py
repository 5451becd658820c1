"""What waits while a loop looks at its sockets; the clock is handed in."""

from __future__ import annotations

import asyncio

from shoal.serve.inbox import Inbox


class _Work:
    """Pieces of work of a given length; the clock goes on while they are done."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.done: list[int] = []
        self.inbox = Inbox(slo_s=0.1, clock=lambda: self.now_s)

    def put(self, number: int, took_s: float) -> None:
        def work() -> None:
            self.now_s += took_s
            self.done.append(number)

        self.inbox.put(work)


def test_a_turn_works_for_a_slice_and_the_rest_waits_in_order() -> None:
    async def turns() -> None:
        work = _Work()
        for number in range(10):
            work.put(number, 0.0004)
        assert work.done == [0, 1, 2], "three take more than a slice"
        seen = []
        while len(work.inbox):
            await asyncio.sleep(0)
            seen.append(len(work.done))
            if len(work.done) == 6:
                work.put(10, 0.0004)
                assert work.done[-1] == 5, "nobody overtakes who waits"
        assert seen == [6, 9, 11] and work.done == list(range(11))
        await asyncio.sleep(0)
        work.put(11, 0.0004)
        assert work.done[-1] == 11, "where nothing waits, it is done at once"

    asyncio.run(turns())


def test_it_is_full_when_the_wait_would_take_too_much_of_the_time_there_is() -> None:
    async def turns() -> None:
        work = _Work()
        for number in range(200):
            work.put(number, 0.0005)
        assert not work.inbox.full() and work.inbox.wait_s == 0.0, "nothing is known yet"
        for _ in range(20):
            # Sockets are read in between, which takes as long again.
            work.now_s += 0.001
            await asyncio.sleep(0)
        assert len(work.inbox) == 157 and work.inbox.full()
        assert abs(work.inbox.wait_s - 157 * 0.001) < 0.02
        while len(work.inbox) > 25:
            work.now_s += 0.001
            await asyncio.sleep(0)
        assert not work.inbox.full(), "25 ms of 100"

    asyncio.run(turns())
