"""The versions of one model in the gateway: which of them gets a request, and which is only tried beside it."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import replace
from typing import Any

import numpy as np

from shoal.serve.desk import Desk
from shoal.serve.protocols.v2 import InferRequest
from shoal.serve.refusals import Refusal
from shoal.serve.signature import ModelSignature, TensorSignature

_TIMES_KEPT = 2048
# Copies of requests that may be on their way at once: more would only make the version that answers slower.
_MOST_COPIES = 8
_COPY_S = 2.0
# Behind everything that a client can ask for.
_LAST = -(1 << 30)


class Shelf:
    """One model's versions. ``active`` answers; ``trial`` gets a share of the requests (a canary), or copies (a shadow)."""

    def __init__(self) -> None:
        self.versions: dict[str, Desk] = {}
        self.active: Desk | None = None
        self.trial: Canary | Shadow | None = None
        self.leaving: set[str] = set()
        self._uncounted: set[str] = set()

    def pick(self) -> Desk | None:
        """Who answers the next request that names no version."""
        if isinstance(self.trial, Canary) and self.trial.next():
            return self.trial.desk
        return self.active

    def mirror(self, desk: Desk, request: InferRequest, outputs: list[np.ndarray], took_s: float) -> None:
        """Ask the shadow the same, where there is one and the version that answers has answered."""
        if isinstance(self.trial, Shadow) and desk is self.active:
            self.trial.mirror(request, outputs, took_s)

    def take(self, version: str, share: float, shadow: bool) -> None:
        """Give a version requests: all, a share of them, or copies."""
        desk = self.versions[version]
        if shadow:
            self.trial = Shadow(desk)
        elif share < 1.0:
            self.trial = Canary(desk, share)
        else:
            if isinstance(self.trial, Shadow):
                # No client had asked for these.
                desk.forget_counts()
            self.active, self.trial = desk, None

    def retire(self, version: str) -> None:
        """Give a version nothing new."""
        self.leaving.add(version)
        desk = self.versions[version]
        if self.trial is not None and self.trial.desk is desk:
            if isinstance(self.trial, Shadow):
                self._uncounted.add(version)
            self.trial = None
        if self.active is desk:
            self.active = None

    def remove(self, version: str) -> None:
        """Forget a version that has finished; what it counted is added to what the model's other version counts."""
        desk = self.versions.pop(version)
        self.leaving.discard(version)
        if self.active is not None and version not in self._uncounted:
            self.active.slots.counts[:] += desk.slots.counts
            desk.slots.counts[:] = 0
        self._uncounted.discard(version)
        desk.leave()

    def numbers(self) -> dict[str, Any]:
        """What the display and the statistics say of the model as a whole."""
        desk = self.active
        if desk is None:
            return {}
        trial = None if self.trial is None else self.trial.numbers()
        return {**desk.numbers(), "version": desk.signature.version, "trial": trial}


class Canary:
    """A version that gets a share of the requests; an even one, not a drawn one."""

    kind = "canary"

    def __init__(self, desk: Desk, share: float) -> None:
        self.desk = desk
        self.share = share
        self._owed = 0.0

    def next(self) -> bool:
        """Whether the next request is its."""
        self._owed += self.share
        if self._owed < 1.0:
            return False
        self._owed -= 1.0
        return True

    def numbers(self) -> dict[str, Any]:
        found = self.desk.numbers()
        return {
            "kind": self.kind, "version": self.desk.signature.version, "share": self.share,
            **{key: found[key] for key in ("answered", "failed", "p50_ms", "p95_ms", "p99_ms")},
        }  # fmt: skip


class Shadow:
    """A version that is asked what clients ask of another; nobody waits for it, and its answers are only compared."""

    kind = "shadow"

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self._tasks: set[asyncio.Task[None]] = set()
        self._answered = self._failed = self._skipped = self._same = 0
        self._worst = self._sum = 0.0
        self._times_s: deque[tuple[float, float]] = deque(maxlen=_TIMES_KEPT)

    def mirror(self, request: InferRequest, outputs: list[np.ndarray], took_s: float) -> None:
        """Ask the same in the background; left out where too many copies are on their way."""
        if len(self._tasks) >= _MOST_COPIES:
            self._skipped += 1
            return
        task = asyncio.get_running_loop().create_task(self._ask(request, outputs, took_s))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _ask(self, request: InferRequest, outputs: list[np.ndarray], took_s: float) -> None:
        start = time.monotonic()
        try:
            found = await self.desk.infer(replace(request, timeout_s=_COPY_S, priority=_LAST, uncached=True), _COPY_S)
        except Refusal as refusal:
            if refusal.status == 500:
                self._failed += 1
            else:
                self._skipped += 1
            return
        self._times_s.append((took_s, time.monotonic() - start))
        difference, same = compare(self.desk.signature, outputs, found)
        self._answered += 1
        self._same += same
        self._worst = max(self._worst, difference)
        self._sum += difference

    def numbers(self) -> dict[str, Any]:
        theirs, ours = np.percentile(np.array(self._times_s or [(0.0, 0.0)]), 95, axis=0)
        return {
            "kind": self.kind, "version": self.desk.signature.version, "answered": self._answered, "failed": self._failed,
            "skipped": self._skipped, "same_answer": self._same / max(1, self._answered), "worst_difference": self._worst,
            "mean_difference": self._sum / max(1, self._answered), "p95_ms": float(ours) * 1e3,
            "p95_ms_active": float(theirs) * 1e3,
        }  # fmt: skip


def numbers_of(spec: TensorSignature, array: np.ndarray) -> np.ndarray:
    """An array that can be calculated with: BF16 lies in memory as the uint16 of its bits."""
    return (array.astype("<u4") << 16).view("<f4") if spec.datatype == "BF16" else array


def compare(signature: ModelSignature, left: list[np.ndarray], right: list[np.ndarray]) -> tuple[float, bool]:
    """(largest difference between two answers, whether they say the same).

    Two rows of numbers say the same where their largest number is at the same place, as for classes; whole numbers where they
    are equal. A number that is finite on one side only counts as an infinite difference.
    """
    worst, same = 0.0, True
    for spec, one, other in zip(signature.outputs, left, right, strict=True):
        one, other = numbers_of(spec, one), numbers_of(spec, other)
        if one.size == 0:
            continue
        if one.dtype.kind == "f" and one.ndim > 1 and one.shape[-1] > 1:
            same &= bool((one.argmax(-1) == other.argmax(-1)).all())
        elif one.dtype.kind != "f":
            same &= bool((one == other).all())
        with np.errstate(invalid="ignore"):
            apart = np.abs(one.astype("f8") - other.astype("f8"))
        equal = (one == other) | ((one != one) & (other != other))
        apart[equal] = 0.0
        worst = max(worst, float(np.where(np.isnan(apart), np.inf, apart).max()))
    return worst, same
