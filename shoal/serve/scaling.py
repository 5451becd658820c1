"""How many replicas a model has: one more where requests come too late for those there are, one less after a quiet while.

Pure: the time and the numbers are handed in, what is decided is carried out by others.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from shoal.errors import RequestError

# So busy, or with so much of the deadline spent on waiting, replicas have no more to give.
_BUSY, _LATE = 0.9, 0.5
# After one replica less, the others are at most so busy.
_IDLE = 0.5
_BUSY_FOR_S, _QUIET_FOR_S = 1.0, 30.0
# What a change has brought is seen only after a while.
_SETTLE_S = 1.5


@dataclass(frozen=True)
class ReplicaRange:
    """How many replicas there may be; ``most`` None: as many as there are cores for."""

    least: int = 1
    most: int | None = None

    @classmethod
    def of(cls, given: int | str | ReplicaRange | None) -> ReplicaRange:
        """From ``2``, ``"2"``, ``"1-4"``, ``"auto"`` or None, which is auto. RequestError for anything else."""
        if isinstance(given, ReplicaRange):
            return given
        text = "auto" if given is None else str(given)
        found = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", text)
        if text == "auto":
            return cls()
        if found is None or not 1 <= int(found[1]) <= int(found[2] or found[1]):
            raise RequestError(f"--replicas is {text[:40]}; give a number of at least 1, a range such as 1-4, or auto.")
        return cls(int(found[1]), int(found[2] or found[1]))

    @property
    def fixed(self) -> bool:
        """Whether there is nothing to decide."""
        return self.least == self.most


@dataclass(frozen=True)
class Load:
    """What a gateway says of a model. ``refused`` and ``busy_s`` (of all replicas) count from its beginning.

    ``late``: the share of a request's time that one which comes now would wait.
    """

    refused: int
    busy_s: float
    late: float


@dataclass(frozen=True)
class Change:
    """One replica more (``by`` 1) or less (-1), and why, for people."""

    by: int
    why: str


class Scaler:
    """Decides for one model. ``most``: replicas at the most; times are seconds of a monotonic clock."""

    def __init__(self, least: int, most: int) -> None:
        self._least, self._most = least, most
        self._seen: tuple[float, Load] | None = None
        self._busy_since: float | None = None
        self._quiet_since: float | None = None
        self._settled_s = float("-inf")

    def decide(self, now: float, load: Load, replicas: int) -> Change | None:
        """What to change, to be asked each time that there are new numbers; None while a change is under way is not needed."""
        before, self._seen = self._seen, (now, load)
        if before is None or now <= before[0] or load.busy_s < before[1].busy_s or not replicas:
            # The first numbers, or those of another gateway.
            return None
        refused = load.refused - before[1].refused
        busy = (load.busy_s - before[1].busy_s) / (now - before[0]) / replicas
        self._note(now, refused, busy, load.late, replicas)
        if now < self._settled_s:
            return None
        change = self._more(now, refused, busy, load.late, replicas) or self._less(now, replicas)
        if change is not None:
            self._settled_s = now + _SETTLE_S
            self._busy_since = self._quiet_since = None
        return change

    def _note(self, now: float, refused: int, busy: float, late: float, replicas: int) -> None:
        """Keep since when it has been busy, and since when it would be quiet with one replica less."""
        if refused > 0 or busy > _BUSY or late > _LATE:
            self._busy_since = now if self._busy_since is None else self._busy_since
        else:
            self._busy_since = None
        if not refused and replicas > 1 and busy * replicas / (replicas - 1) < _IDLE and late < _LATE / 2:
            self._quiet_since = now if self._quiet_since is None else self._quiet_since
        else:
            self._quiet_since = None

    def _more(self, now: float, refused: int, busy: float, late: float, replicas: int) -> Change | None:
        if replicas >= self._most or self._busy_since is None:
            return None
        if refused > 0:
            return Change(1, f"{refused} requests could not be answered in time")
        if now - self._busy_since < _BUSY_FOR_S:
            return None
        if late > _LATE:
            return Change(1, f"requests wait {late:.0%} of their time")
        return Change(1, f"replicas are busy {busy:.0%} of the time")

    def _less(self, now: float, replicas: int) -> Change | None:
        if replicas <= self._least or self._quiet_since is None or now - self._quiet_since < _QUIET_FOR_S:
            return None
        return Change(-1, f"one replica less has been enough for {_QUIET_FOR_S:g} s")
