"""Which server holds what: consistent hashing on a ring (Karger et al. 1997), with bounded loads (Mirrokni et al. 2018).

Every server stands at many points of the ring of 64-bit numbers; a thing belongs to the server at the first point behind
its own. A server that comes or goes moves only what lies between its points and those before them: about 1/S of everything.
So that no server holds much more than its part, the next one along the ring takes what a full one has no room for.
"""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

POINTS = 128
"""Points of each server: the more, the more even the parts."""
ROOM = 1.1
"""So much of its even part may a server hold, as long as things are small beside it."""

Thing = TypeVar("Thing", bound=Hashable)


def point(name: str) -> int:
    """Where a name stands on the ring: the same in every process, on every machine."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")


class Ring:
    """The ring of some servers, known by numbers that they keep for life."""

    def __init__(self, servers: Sequence[int]) -> None:
        """ValueError where there are none, or one twice."""
        if not servers or len(set(servers)) != len(servers):
            raise ValueError(f"{list(servers)} are no different servers")
        self.servers = tuple(sorted(servers))
        points = sorted((point(f"server {server} point {k}"), server) for server in servers for k in range(POINTS))
        self._points = [at for at, _ in points]
        self._owners = [server for _, server in points]

    def owner(self, name: str) -> int:
        """The server that a name belongs to, however much it holds."""
        return self._owners[bisect.bisect_right(self._points, point(name)) % len(self._owners)]

    def place(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """The server of each thing; ``sizes``: their bytes. The largest are placed first, since they fit least easily."""
        room = ROOM * sum(sizes.values()) / len(self.servers)
        held = dict.fromkeys(self.servers, 0)
        found: dict[str, int] = {}
        for name in sorted(sizes, key=lambda n: (-sizes[n], n)):
            at = bisect.bisect_right(self._points, point(name))
            tried: dict[int, None] = {}
            for k in range(len(self._owners)):
                server = self._owners[(at + k) % len(self._owners)]
                if server not in tried and held[server] + sizes[name] <= room:
                    break
                tried[server] = None
                if len(tried) == len(self.servers):
                    # It fits nowhere: who has least takes it.
                    server = min(tried, key=lambda s: held[s])
                    break
            held[server] += sizes[name]
            found[name] = server
        return found
