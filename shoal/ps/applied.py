"""Which pushes a server has applied: by (epoch, batch, shard), so that a push counts once, however often it is sent."""

from __future__ import annotations

from collections.abc import Iterable

PushId = tuple[int, int, int]
"""(epoch, batch, shard), from 0: a part of one batch in the one global order of samples, whoever computes it."""

NOTHING: PushId = (0, 0, 0)


Made = tuple[int, int | None]
"""How many updates a server had made with a push, and the push's staleness, where it has one."""


class PartlyApplied(Exception):
    """Of the ids of one push some are applied and some are not: whoever sent it must not be heard."""


class Applied:
    """The ids of the pushes that were applied.

    Everything before ``settled`` counts as applied and is not kept one by one: nobody will ever send it again.
    """

    def __init__(self, settled: PushId = NOTHING, ids: Iterable[PushId] = ()) -> None:
        self.settled = settled
        self._ids: dict[PushId, Made | None] = dict.fromkeys(ids)

    def __contains__(self, id: PushId) -> bool:
        return id < self.settled or id in self._ids

    def __len__(self) -> int:
        """Ids that are kept one by one."""
        return len(self._ids)

    def has(self, ids: Iterable[PushId]) -> bool:
        """Whether a push with these ids is applied. PartlyApplied where that holds for some of them only."""
        known = [id in self for id in ids]
        if any(known) and not all(known):
            raise PartlyApplied("some of what it holds has been applied with another push")
        return bool(known) and known[0]

    def add(self, ids: Iterable[PushId], made: Made | None = None) -> None:
        self._ids.update(dict.fromkeys(ids, made))

    def made(self, ids: Iterable[PushId]) -> Made | None:
        """What became of a push when it was applied; None where that is not known (any more)."""
        return self._ids.get(next(iter(ids)))

    def settle(self, before: PushId) -> None:
        """Everything before this is applied on all servers."""
        if before > self.settled:
            self.settled = before
            self._ids = {id: made for id, made in self._ids.items() if id >= before}

    def ids(self) -> tuple[PushId, ...]:
        """Those that are kept one by one, in order."""
        return tuple(sorted(self._ids))
