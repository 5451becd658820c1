"""Batches through a crew of replicas without a gateway: handed to their rings from here, answers taken back in order.

A row's slot is its place in the queue, from when it is read until its answer is delivered, so there are never more rows on their
way than there are slots. A replica that dies gives its batches back, and others compute them: inference is pure.
"""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from shoal.errors import DataError, JobFailed, ShoalError
from shoal.process.channel import ChannelClosed
from shoal.serve.crew import Crew
from shoal.serve.slots import RING_ENTRIES, drain
from shoal.serve.tables.rows import Rows

_WAIT_S = 0.02
_LOOK_EVERY_S = 0.02
# Batches that take longer than this are not laid up many ahead: a death, or the end, would wait for them.
_SHORT_BATCH_S = 0.05
_MOST_DEATHS = 3


@dataclass(eq=False)
class Window:
    """Rows that follow each other: read together, delivered together.

    Attributes:
        first: the number of the first row, from 0.
        slots: of each row.
        mark: the data's behind the last row; None where not all rows that were read together are here.
        files: the file that each row is, where they are files.
        lengths: of each row, where they have one of their own.
        left: rows that are not computed yet.
        failures: place of a row -> why it cannot be answered, and the first and the last place of which that is said.
    """

    first: int
    slots: list[int]
    mark: str | None
    files: list[str] | None
    lengths: np.ndarray | None
    left: int
    failures: dict[int, tuple[str, int, int]] = field(default_factory=dict)

    def before(self, place: int) -> Window:
        """The rows before one of them."""
        return Window(
            self.first, self.slots[:place], None, self.files and self.files[:place],
            None if self.lengths is None else self.lengths[:place], 0,
        )  # fmt: skip


@dataclass(eq=False)
class Batch:
    """Rows of a window, by their places in it, that are computed together."""

    window: Window
    places: list[int]
    deaths: int = 0

    @property
    def slots(self) -> list[int]:
        return [self.window.slots[place] for place in self.places]


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How rows are put together.

    Attributes:
        window: rows that are read together.
        batch: rows that are computed together, at the most.
        units: how much work a batch may be, see ``ModelSignature.units``; one row may be more.
    """

    window: int
    batch: int
    units: int


Deliver = Callable[[Window, Sequence[np.ndarray]], None]


@dataclass
class _Replica:
    rank: int
    wake: int
    up: bool = True
    batches: deque[tuple[int, Batch]] = field(default_factory=deque)


class Conveyor:
    """Takes rows to the replicas and their answers back.

    Args:
        crew: started, its way of sharing the cores chosen. Its events come here from now on.
        rows: what to answer, from where it stands.
        pace: how they are put together; at most the crew's ``layout.max_batch`` in a batch, its ``layout.slots`` in a window.
        until: the number of the row to stop before, or None for the end of the data.
        deliver: gets each window with its outputs, in the order of the rows; an output whose rows have lengths is padded.
    """

    def __init__(self, crew: Crew, rows: Rows, pace: Pace, until: int | None, deliver: Deliver) -> None:
        self._crew = crew
        self._slots = crew.slots
        self._rows = rows
        self._pace = pace
        self._until = until
        self._deliver = deliver
        self._free = list(range(crew.layout.slots))[::-1]
        self._order: deque[Window] = deque()
        self._ready: deque[Batch] = deque()
        self._replicas = {rank: _Replica(rank, wake) for rank, wake in crew.ready()}
        self._fallen: list[int] = []
        self._ended = False
        self._bad_row: ShoalError | None = None
        self._looked_s = 0.0
        self._ahead = RING_ENTRIES
        crew.on_up, crew.on_down = self._up, self._fallen.append

    def run(self, watch: Callable[[], None]) -> None:
        """Answer everything; ``watch`` is called again and again meanwhile.

        Raises:
            DataError: a row makes no sense, those before it have been delivered; or there is none.
            UserCodeError: the caller's own data set raised; rows before have been delivered.
            JobFailed: the model raised, or its process died over the same rows several times; rows before have been delivered.
        """
        while True:
            moved = self._fill()
            moved |= self._collect()
            if self._ended and not self._order:
                break
            if not moved:
                self._wait()
            self._look()
            watch()
        if self._bad_row is not None:
            raise self._bad_row
        if self._rows.at == 0:
            raise DataError(f"{self._rows.what} has no rows; add some.")

    # -- handing out ---------------------------------------------------------------------------------------------

    def _fill(self) -> bool:
        """Give each replica one more batch, where it has room; whether any got one."""
        posted = False
        for replica in self._replicas.values():
            if not replica.up or len(replica.batches) >= self._ahead:
                continue
            if not self._ready and not self._read():
                break
            batch = self._ready.popleft()
            replica.batches.append((self._slots.rings[replica.rank].post(batch.slots), batch))
            os.eventfd_write(replica.wake, 1)
            posted = True
        return posted

    def _read(self) -> bool:
        """Lay the next rows into slots; False where there are none, or no room for them."""
        most = self._pace.window if self._until is None else min(self._pace.window, self._until - self._rows.at)
        if self._ended or len(self._free) < most:
            return False
        first = self._rows.at
        try:
            inputs = self._rows.read(most) if most else None
        except ShoalError as error:
            # What is on its way is finished first: nothing of it is lost.
            self._bad_row = error
            inputs = None
        if inputs is None:
            self._ended = True
            return False
        count, lengths = len(inputs[0]), self._rows.lengths()
        window = Window(
            first, [self._free.pop() for _ in range(count)], self._rows.mark, self._rows.files(), lengths, count
        )
        for spec, place, values in zip(self._crew.signature.inputs, self._slots.inputs, inputs, strict=True):
            where = place[:, : values.shape[1]] if spec.free else place
            where[window.slots] = values
        self._slots.lengths[window.slots] = 0 if lengths is None else lengths
        self._order.append(window)
        self._ready.extend(self._batches(window))
        return True

    def _batches(self, window: Window) -> Iterator[Batch]:
        """The rows of a window, those of equal length (or nearly so, where padding is masked) together, the longest first."""
        if window.lengths is None:
            yield Batch(window, list(range(len(window.slots))))
            return
        signature = self._crew.signature
        groups: dict[int, list[int]] = {}
        for place, length in enumerate(window.lengths.tolist()):
            groups.setdefault(signature.key(length), []).append(place)
        for _, places in sorted(groups.items(), reverse=True):
            units = signature.units(int(window.lengths[places[0]]))
            size = min(self._pace.batch, max(1, self._pace.units // units))
            for at in range(0, len(places), size):
                yield Batch(window, places[at : at + size])

    # -- taking back ---------------------------------------------------------------------------------------------

    def _collect(self) -> bool:
        """Take in what replicas have finished, and deliver what is next; whether there was anything."""
        try:
            os.eventfd_read(self._crew.done_fd)
        except BlockingIOError:
            return False
        for replica in self._replicas.values():
            self._collect_from(replica)
        self._deliver_next()
        return True

    def _deliver_next(self) -> None:
        while self._order and not self._order[0].left:
            window = self._order[0]
            bad = min(window.failures, default=None)
            whole = window if bad is None else window.before(bad)
            if whole.slots:
                self._deliver(whole, [array[whole.slots] for array in self._slots.outputs])
            if bad is not None:
                raise JobFailed(self._sentence(window, *window.failures[bad]))
            self._free.extend(window.slots)
            self._order.popleft()

    def _collect_from(self, replica: _Replica) -> None:
        ring = self._slots.rings[replica.rank]
        while replica.batches and replica.batches[0][0] < ring.done:
            number, batch = replica.batches.popleft()
            took_s, failure = ring.result(number)
            self._ahead = RING_ENTRIES if took_s < _SHORT_BATCH_S else 2
            if failure is not None and len(batch.places) > 1:
                # Run one by one, to name the row over which the model raises.
                self._ready.extendleft(Batch(batch.window, [place]) for place in reversed(batch.places))
            else:
                self._done(batch, failure)

    @staticmethod
    def _done(batch: Batch, failure: str | None) -> None:
        batch.window.left -= len(batch.places)
        if failure is not None:
            first, last = min(batch.places), max(batch.places)
            batch.window.failures[first] = (failure, first, last)

    def _sentence(self, window: Window, failure: str, first: int, last: int) -> str:
        where = self._rows.where(window.first + first, last - first + 1)
        if window.files is not None and first == last:
            where += f" ({window.files[first]})"
        what = "that row" if first == last else "the row that does it"
        failure = failure[:1].lower() + failure[1:].rstrip(".")
        return f"{where[:1].upper()}{where[1:]}: {failure}; leave {what} out, or mend the model."

    # -- waiting, and deaths -------------------------------------------------------------------------------------

    def _wait(self) -> None:
        select.select([self._crew.done_fd], [], [], _WAIT_S)

    def _look(self) -> None:
        """Look at the replicas now and then; put back those that have died."""
        now = time.monotonic()
        if now - self._looked_s < _LOOK_EVERY_S:
            return
        self._looked_s = now
        self._crew.poll(0.0)
        # Not from within the crew's own round: it may be about to begin again with another template.
        for rank in list(self._fallen):
            self._take_back(self._replicas[rank])
            with contextlib.suppress(ChannelClosed):
                self._crew.release(rank)
                self._fallen.remove(rank)

    def _up(self, rank: int, wake: int) -> None:
        replica = self._replicas.setdefault(rank, _Replica(rank, wake))
        replica.wake, replica.up = wake, True

    def _take_back(self, replica: _Replica) -> None:
        """A replica is dead: what it had not finished is computed again, before anything else."""
        replica.up = False
        self._collect_from(replica)
        unfinished = [batch for _, batch in replica.batches]
        replica.batches.clear()
        if unfinished:
            # It died over the first; the others only waited behind it.
            suspect = unfinished[0]
            suspect.deaths += 1
            if suspect.deaths >= _MOST_DEATHS:
                self._done(suspect, f"the model's process died each of {suspect.deaths} times")
                del unfinished[0]
        self._ready.extendleft(reversed(unfinished))
        self._slots.rings[replica.rank].reset()
        drain(replica.wake)
        self._deliver_next()
