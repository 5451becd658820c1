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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from shoal.errors import DataError, JobFailed
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
class Batch:
    """Rows that are computed together. ``first``: the number of the first row; ``mark``: the data's behind the last."""

    first: int
    slots: list[int]
    mark: str | None
    files: list[str] | None
    done: bool = False
    failure: str | None = None
    deaths: int = 0


Deliver = Callable[[Batch, Sequence[np.ndarray]], None]


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
        batch: rows in a batch, at most the crew's ``layout.max_batch``.
        until: the number of the row to stop before, or None for the end of the data.
        deliver: gets each batch with its outputs, in the order of the rows.
    """

    def __init__(self, crew: Crew, rows: Rows, batch: int, until: int | None, deliver: Deliver) -> None:
        self._crew = crew
        self._slots = crew.slots
        self._rows = rows
        self._batch = batch
        self._until = until
        self._deliver = deliver
        self._free = list(range(crew.layout.slots))[::-1]
        self._order: deque[Batch] = deque()
        self._again: deque[Batch] = deque()
        self._replicas = {rank: _Replica(rank, wake) for rank, wake in crew.ready()}
        self._fallen: list[int] = []
        self._ended = False
        self._bad_row: DataError | None = None
        self._looked_s = 0.0
        self._ahead = RING_ENTRIES
        crew.on_up, crew.on_down = self._up, self._fallen.append

    def run(self, watch: Callable[[], None]) -> None:
        """Answer everything; ``watch`` is called again and again meanwhile.

        Raises:
            DataError: a row makes no sense, those before it have been delivered; or there is none.
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
            batch = self._again.popleft() if self._again else self._read()
            if batch is None:
                break
            replica.batches.append((self._slots.rings[replica.rank].post(batch.slots), batch))
            os.eventfd_write(replica.wake, 1)
            posted = True
        return posted

    def _read(self) -> Batch | None:
        """The next rows, laid into slots; None where there are none, or no room for them."""
        most = self._batch if self._until is None else min(self._batch, self._until - self._rows.at)
        if self._ended or len(self._free) < most:
            return None
        first = self._rows.at
        try:
            inputs = self._rows.read(most) if most else None
        except DataError as error:
            # What is on its way is finished first: nothing of it is lost.
            self._bad_row = error
            inputs = None
        if inputs is None:
            self._ended = True
            return None
        taken = [self._free.pop() for _ in range(len(inputs[0]))]
        for place, values in zip(self._slots.inputs, inputs, strict=True):
            place[taken] = values
        batch = Batch(first, taken, self._rows.mark, self._rows.files())
        self._order.append(batch)
        return batch

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
        while self._order and self._order[0].done:
            batch = self._order[0]
            if batch.failure is not None:
                raise JobFailed(self._sentence(batch, batch.failure))
            self._deliver(batch, [array[batch.slots] for array in self._slots.outputs])
            self._free.extend(batch.slots)
            self._order.popleft()

    def _collect_from(self, replica: _Replica) -> None:
        ring = self._slots.rings[replica.rank]
        while replica.batches and replica.batches[0][0] < ring.done:
            number, batch = replica.batches.popleft()
            took_s, failure = ring.result(number)
            self._ahead = RING_ENTRIES if took_s < _SHORT_BATCH_S else 2
            if failure is not None and len(batch.slots) > 1:
                self._take_apart(batch)
            else:
                batch.done, batch.failure = True, failure

    def _take_apart(self, batch: Batch) -> None:
        """The model raised over a batch: run its rows one by one, to name the one over which it raises."""
        singles = [
            Batch(batch.first + k, [slot], None, None if batch.files is None else [batch.files[k]])
            for k, slot in enumerate(batch.slots)
        ]
        singles[-1].mark = batch.mark
        at = self._order.index(batch)
        del self._order[at]
        for k, single in enumerate(singles):
            self._order.insert(at + k, single)
        self._again.extend(singles)

    def _sentence(self, batch: Batch, failure: str) -> str:
        where = self._rows.where(batch.first, len(batch.slots))
        if batch.files is not None and len(batch.files) == 1:
            where += f" ({batch.files[0]})"
        what = "that row" if len(batch.slots) == 1 else "the row that does it"
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
                suspect.done = True
                suspect.failure = f"the model's process died each of {suspect.deaths} times."
                unfinished = unfinished[1:]
        self._again.extendleft(reversed(unfinished))
        self._slots.rings[replica.rank].reset()
        drain(replica.wake)
        self._deliver_next()
