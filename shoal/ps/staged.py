"""Pushes that wait at a server to be applied with others, as one: those of all shards of a step, under ``sync``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from shoal.errors import RequestError
from shoal.ps.applied import NOTHING, PushId
from shoal.ps.checks import fits
from shoal.ps.dense import Numbers
from shoal.ps.lbfgs import multiply
from shoal.ps.shard import Push, Shard, add_up


class MissingError(Exception):
    """Pushes that are to be applied are not here; the text says how many."""


class Staged:
    """What waits at one shard."""

    def __init__(self, shard: Shard) -> None:
        self._shard = shard
        self._pushes: dict[PushId, Push] = {}
        self._sum: Push | None = None

    def stage(self, push: Push) -> bool:
        """Keep a push; False where it is here or was applied before. RequestError, JobFailed where it belongs nowhere here."""
        if self._shard.ledger.has(push.ids):
            return False
        self._shard.check(push)
        if len(push.ids) != 1:
            raise RequestError("A push that waits for others has one id.")
        new = push.ids[0] not in self._pushes
        # The same again may come from another worker; what is there has been acknowledged.
        self._pushes.setdefault(push.ids[0], push)
        return new

    @property
    def pushes(self) -> tuple[Push, ...]:
        """All that wait, in the order in which they came."""
        return tuple(self._pushes.values())

    def holds(self, ids: Sequence[PushId]) -> bool:
        """Whether all of these wait here."""
        return all(id in self._pushes for id in ids)

    def put(self, pushes: Sequence[Push]) -> None:
        """Let just these wait."""
        self._pushes, self._sum = {push.ids[0]: push for push in pushes}, None

    def take_back(self, push: Push) -> None:
        """It could not be kept after all."""
        self._pushes.pop(push.ids[0], None)

    def norm_squared(self, ids: Sequence[PushId]) -> float:
        """The squared norm of the sum of these; 0 where they are applied already. MissingError where some are not here."""
        if self._shard.ledger.has(ids):
            return 0.0
        return self._together(ids).norm_squared()

    def multiply(self, ids: Sequence[PushId], scale: float) -> np.ndarray:
        """What ``shoal.ps.lbfgs.multiply`` gives with the sum of these as the gradient. MissingError where some are not here."""
        if not fits(scale):
            raise RequestError(f"{scale} is no scale of a push.")
        return multiply(self._shard.dense.vectors(self._together(ids).dense, scale))

    def commit(
        self, ids: Sequence[PushId], settled: PushId = NOTHING, scale: float = 1.0, groups: Sequence[Numbers] | None = None
    ) -> bool:
        """Apply the sum of these as one; False where that was done before. MissingError where some are not here."""
        if self._shard.ledger.has(ids):
            return False
        whole, self._sum = self._together(ids), None
        new = self._shard.apply(replace(whole, settled=max(whole.settled, settled), scale=scale, groups=groups))
        self._pushes = {id: push for id, push in self._pushes.items() if id not in self._shard.ledger}
        return new

    def _together(self, ids: Sequence[PushId]) -> Push:
        missing = [id for id in ids if id not in self._pushes]
        if missing or not ids:
            raise MissingError(f"{len(missing)} of {len(ids)} pushes are not here")
        if self._sum is None or self._sum.ids != tuple(ids):
            self._sum = add_up([self._pushes[id] for id in ids], self._shard.tables, 1.0, None)
        return self._sum
