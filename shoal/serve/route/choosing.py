"""Waiting for a service that can be asked, and what ends a wait for one that was."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection

from shoal.serve.refusals import Refusal
from shoal.serve.route.balance import Ask, Balancer

MOST_TRIES = 5
CONNECT_S = 1.0
PAUSE_S = 0.05
# Where nobody can be asked: services that are restarted are back in less.
_WAIT_FOR_ANYBODY_S = 2.0


class Late(Exception):
    """Its deadline has passed."""


class Left(Exception):
    """Its client has gone."""


class Down(Exception):
    """The service that was asked is not there any more, or hangs."""


async def choose(
    balancer: Balancer, ask: Ask, tried: set[int], deadline_s: float, content: bool = False,
    left: Callable[[], bool] = lambda: False, without: Callable[[], Collection[int]] = tuple,
) -> int | None:  # fmt: skip
    """Who is asked next; waits a little where nobody can be.

    Args:
        tried: who has been asked already; forgotten where there is nobody else.
        content: there is an answer that will do: None comes back where nobody else is left.
        left: whether the client has gone.
        without: who cannot be asked such a thing.

    Raises:
        Late, Left: the wait has ended. Refusal: nobody has come.
    """
    give_up_s = min(deadline_s, time.monotonic() + _WAIT_FOR_ANYBODY_S)
    while True:
        now = time.monotonic()
        index = balancer.choose(ask, now, tried, without())
        if index is not None or content:
            return index
        if now >= deadline_s:
            raise Late
        if now >= give_up_s:
            raise Refusal(503, "No service is ready; try again.", 1.0)
        if left():
            raise Left
        await asyncio.sleep(PAUSE_S)
        # Who failed a moment ago may be asked again where there is nobody else.
        tried.clear()
