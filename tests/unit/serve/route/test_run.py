from __future__ import annotations

import asyncio
import contextlib

from shoal.serve.route.run import end


async def _goes_on_once() -> None:
    """As a loop does in which ``asyncio.wait_for`` has swallowed a cancellation."""
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.sleep(600)
    await asyncio.sleep(600)


def test_a_task_that_a_cancellation_did_not_reach_is_ended_all_the_same() -> None:
    async def main() -> tuple[bool, bool]:
        tasks = [asyncio.create_task(_goes_on_once()), asyncio.create_task(asyncio.sleep(600))]
        await asyncio.sleep(0)
        await asyncio.wait_for(end(tasks), 60)
        return tasks[0].cancelled(), tasks[1].cancelled()

    assert asyncio.run(main()) == (True, True)
