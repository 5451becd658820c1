"""Who is let in, and what is computed next. Pure: no sockets, no processes, and the time is handed in.

A request is *admitted* where it is predicted to be done by its deadline. The prediction: all rows that are in flight or queued
with the same or a higher priority go first (where their deadlines are later that is pessimistic), at the rate at which rows have
lately left a busy queue; then comes a batch of its own, and a margin within which 95 % of the predictions so far have been right.

Rows are computed by priority, then by deadline. Nobody waits for a batch to fill.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from shoal.serve.latency import GAIN, LatencyModel

_QUANTILE = 0.95
_MARGIN_STEP = 0.02
_LEARN_ROWS = 0.02
_SLOWEST = 20.0
_LOOK_EVERY = 64
# How many rows of other keys are looked past for one more of the same.
_LOOK_PAST = 256
_LEAST_RETRY_S = 0.005


@dataclass(slots=True)
class Row:
    """One row of a request. Deadlines are seconds of a monotonic clock.

    ``key``: only rows with equal keys may share a batch, and they are equally much work: ``units``.
    """

    slot: int
    request: int
    deadline_s: float
    priority: int
    key: Hashable
    units: int = 1


def apart(rows: Sequence[Row]) -> list[Row]:
    """The same rows, those of each request to be computed without anybody else's."""
    return [replace(row, key=(row.request, row.key)) for row in rows]


@dataclass(slots=True, order=True)
class _Entry:
    rank: tuple[int, float, int]
    row: Row = field(compare=False)
    queued: bool = field(default=True, compare=False)


class Dispatcher:
    """The queue of one model.

    ``replicas``: how many can compute now; ``capacity``: rows that may be queued or in flight; ``most_rows``: in one batch.
    """

    def __init__(
        self, latency: LatencyModel, capacity: int, replicas: int = 0, most_rows: int = 1 << 30, unit: str = "row"
    ) -> None:
        """``unit``: what work is counted in, for people."""
        self._latency = latency
        self._capacity = capacity
        self._unit = unit
        self._most_rows = most_rows
        self._replicas = replicas
        self._order = 0
        self._by_rank: list[_Entry] = []
        self._by_deadline: list[tuple[float, int, _Entry]] = []
        self._of_request: dict[int, list[_Entry]] = {}
        self._queued_by_priority: dict[int, int] = {}
        self._queued = 0
        self._in_flight = 0
        self._units_in_flight = 0
        # request -> (when it was admitted, predicted seconds without the margin)
        self._predicted: dict[int, tuple[float, float]] = {}
        self._promised: tuple[float, float] = (0.0, 0.0)
        self._margin_s = 0.0
        self._finishes = 0
        self._busy_since: float | None = None
        self._batch_limit = latency.best_batch(1 << 30)
        # Seconds for a unit by all replicas together, as lately seen; None before anything was.
        self._unit_s: float | None = None

    # -- letting in ----------------------------------------------------------------------------------------------

    def admit(
        self, count: int, deadline_s: float, priority: int, now: float, units: int = 1, after_s: float = 0.0
    ) -> float | None:
        """None where ``count`` rows, of so many units each, are let in; else after how many seconds to try again.

        ``put`` has to follow at once. ``after_s``: none of them is computed before that.
        """
        if self._replicas == 0:
            return max(_LEAST_RETRY_S, self._latency.predict(1))
        ahead = self._units_in_flight + self._units_before(priority)
        wait_s = max((ahead + (count - 1) * units) * self._seconds_a_unit(), after_s)
        own_s = self._latency.predict(max(units, min(count * units, self._batch_limit)))
        # With nothing ahead the margin does not count: it is learned from what is let in, so refusing all would keep it for ever.
        margin_s = self._margin_s if self._queued or self._in_flight else 0.0
        late_s = now + wait_s + own_s + margin_s - deadline_s
        over = self._queued + self._in_flight + count - self._capacity
        if late_s <= 0 and over <= 0:
            self._promised = (now, wait_s + own_s)
            return None
        return max(_LEAST_RETRY_S, min(late_s, wait_s), over * units * self._seconds_a_unit())

    def _units_before(self, priority: int) -> int:
        return sum(units for other, units in self._queued_by_priority.items() if other >= priority)

    def _seconds_a_unit(self) -> float:
        if self._unit_s is not None:
            return self._unit_s
        return 1.0 / (self._latency.rows_per_s(self._batch_limit) * max(1, self._replicas))

    def put(self, rows: Sequence[Row], now: float) -> None:
        """Queue the rows of a request that was just admitted."""
        self._predicted[rows[0].request] = self._promised
        self._push(rows)

    def _push(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self._order += 1
            entry = _Entry((-row.priority, row.deadline_s, self._order), row)
            heapq.heappush(self._by_rank, entry)
            heapq.heappush(self._by_deadline, (row.deadline_s, self._order, entry))
            self._of_request.setdefault(row.request, []).append(entry)
            self._queued_by_priority[row.priority] = self._queued_by_priority.get(row.priority, 0) + row.units
        self._queued += len(rows)

    # -- computing -----------------------------------------------------------------------------------------------

    def take(self, now: float) -> list[Row]:
        """The next batch: most urgent first, rows of one key, small enough for its earliest deadline; [] where nothing waits."""
        taken: list[_Entry] = []
        others: list[_Entry] = []
        most = 1
        while self._by_rank and len(taken) < most and len(others) < _LOOK_PAST:
            entry = heapq.heappop(self._by_rank)
            if not entry.queued:
                continue
            if not taken:
                most = min(self._most_rows, max(1, self._batch_limit // entry.row.units))
            (taken if not taken or entry.row.key == taken[0].row.key else others).append(entry)
        fits = self._fitting(taken, now)
        for entry in (*others, *taken[fits:]):
            heapq.heappush(self._by_rank, entry)
        for entry in taken[:fits]:
            self._remove(entry)
        self._in_flight += fits
        self._units_in_flight += sum(entry.row.units for entry in taken[:fits])
        return [entry.row for entry in taken[:fits]]

    def _fitting(self, entries: Sequence[_Entry], now: float) -> int:
        """How many of the first entries make a batch that is done by the earliest deadline among them, at least one."""
        size = len(entries)
        while size > 1:
            earliest = min(entry.row.deadline_s for entry in entries[:size])
            if now + self._latency.predict(size * entries[0].row.units) <= earliest:
                break
            size //= 2
        return size

    def finished(self, rows: Sequence[Row], took_s: float, now: float) -> None:
        """A batch is done, after ``took_s`` seconds of computing: learn from it."""
        units = sum(row.units for row in rows)
        self._in_flight -= len(rows)
        self._units_in_flight -= units
        self._latency.update(units, took_s)
        self._learn_rate(units, now)
        for request in {row.request for row in rows}:
            promised = self._predicted.pop(request, None)
            if promised is not None:
                self._learn_margin(now - promised[0], promised[1])
        self._finishes += 1
        if self._finishes % _LOOK_EVERY == 0:
            self._batch_limit = self._latency.best_batch(1 << 30)

    def _learn_rate(self, units: int, now: float) -> None:
        """Units that leave a queue which never ran dry in between tell how fast everything together is."""
        if self._busy_since is not None and now > self._busy_since:
            seen = (now - self._busy_since) / units
            known = self._seconds_a_unit()
            self._unit_s = known + _LEARN_ROWS * (min(seen, _SLOWEST * known) - known)
        self._busy_since = now if self._queued else None

    def _learn_margin(self, took_s: float, predicted_s: float) -> None:
        """Stochastic approximation of the 0.95 quantile of how far predictions were off (Robbins and Monro 1951)."""
        step = _MARGIN_STEP * max(took_s, predicted_s, self._margin_s)
        late = took_s - predicted_s > self._margin_s
        self._margin_s = max(0.0, self._margin_s + step * (_QUANTILE if late else _QUANTILE - 1))

    def give_back(self, rows: Sequence[Row]) -> None:
        """What was taken is not computed after all: queued again, in its old order."""
        self._in_flight -= len(rows)
        self._units_in_flight -= sum(row.units for row in rows)
        self._push(rows)

    # -- leaving -------------------------------------------------------------------------------------------------

    def expired(self, now: float) -> list[Row]:
        """Take out what cannot be done any more: all queued rows of every request of which one is too late."""
        found: list[Row] = []
        soonest = now + self._latency.predict(1)
        while self._by_deadline and (self._by_deadline[0][0] < soonest or not self._by_deadline[0][2].queued):
            entry = heapq.heappop(self._by_deadline)[2]
            if entry.queued:
                found += self.cancel(entry.row.request)
        return found

    def cancel(self, request: int) -> list[Row]:
        """Take out all queued rows of a request."""
        entries = [entry for entry in self._of_request.get(request, ()) if entry.queued]
        for entry in entries:
            self._remove(entry)
        self._predicted.pop(request, None)
        return [entry.row for entry in entries]

    def _remove(self, entry: _Entry) -> None:
        entry.queued = False
        row = entry.row
        self._queued -= 1
        self._queued_by_priority[row.priority] -= row.units
        if not self._queued_by_priority[row.priority]:
            del self._queued_by_priority[row.priority]
        entries = self._of_request[row.request]
        entries.remove(entry)
        if not entries:
            del self._of_request[row.request]

    # -- looking -------------------------------------------------------------------------------------------------

    @property
    def replicas(self) -> int:
        return self._replicas

    @replicas.setter
    def replicas(self, count: int) -> None:
        if self._unit_s is not None and self._replicas and count:
            self._unit_s *= self._replicas / count
        self._replicas = count
        self._busy_since = None

    @property
    def batch_limit(self) -> int:
        """How large batches are, in rows or units."""
        return self._batch_limit

    @property
    def queued(self) -> int:
        """Rows that wait."""
        return self._queued

    @property
    def in_flight(self) -> int:
        """Rows that were taken and are not finished."""
        return self._in_flight

    def statistics(self) -> dict[str, Any]:
        """Whether it batches and why, and what its predictions rest on."""
        limit = self._batch_limit
        one = self._latency.predict(1)
        if limit > 1:
            a_row = self._latency.predict(limit) / limit
            why = f"a {self._unit} in a batch of {limit} takes {a_row * 1e3:.3g} ms, alone {one * 1e3:.3g} ms"
        else:
            why = f"no batch makes a {self._unit} {GAIN:.0%} cheaper than alone ({one * 1e3:.3g} ms)"
        return {
            "batching": limit > 1, "why": why, "batch_limit": limit,
            "row_ms": self._seconds_a_unit() * 1e3, "margin_ms": self._margin_s * 1e3,
            "wait_ms": sum(self._queued_by_priority.values()) * self._seconds_a_unit() * 1e3,
        }  # fmt: skip
