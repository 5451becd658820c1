"""Looking after the services behind a route: is each still there, and does it answer?"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from shoal.serve import wire
from shoal.serve.asgi import GRPC_HEADER
from shoal.serve.route.balance import Balancer
from shoal.serve.route.link import Broken, Links

_EVERY_S = 0.5
_WITHIN_S = 1.0
# Who is not ready is looked at more often, and forgiven less time.
_EVERY_DOWN_S = 0.2
_MOST_DIGITS = 5


class Health:
    """Asks one service again and again whether it is ready; ready means that an inference has just succeeded."""

    def __init__(
        self, balancer: Balancer, index: int, links: Links, down: Callable[[int], None], say: Callable[[str], None]
    ) -> None:
        """``down`` is told when a service does not answer any more, ``say`` one sentence when it comes or goes."""
        self._balancer, self._index, self._links = balancer, index, links
        self._down, self._say = down, say

    async def watch(self) -> None:
        """Until it is cancelled."""
        while True:
            began_s = time.monotonic()
            ready = await self.look()
            every_s = _EVERY_S if ready else _EVERY_DOWN_S
            await asyncio.sleep(max(0.0, began_s + every_s - time.monotonic()))

    async def look(self) -> bool:
        """Ask once; whether it is ready."""
        trouble, silent = None, False
        try:
            head, body = await self._links.get("/v2/health/ready", _WITHIN_S)
            if head.status != 200:
                trouble = wire.sentence_of(body, head.status).rstrip(".")
            else:
                port = head.header(GRPC_HEADER) or b""
                self._links.grpc_port = int(port) if port.isdigit() and len(port) <= _MOST_DIGITS else None
        except (asyncio.TimeoutError, TimeoutError):
            trouble, silent = f"it does not answer within {_WITHIN_S:g} s", True
        except Broken as error:
            trouble, silent = str(error), True
        url = self._links.address.url
        if self._balancer.health(self._index, trouble):
            self._say(f"{url} is ready." if trouble is None else f"{url} gets no requests: {trouble}.")
        if silent:
            self._links.close()
            self._down(self._index)
        return trouble is None
