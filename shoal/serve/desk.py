"""The desk of one model in the gateway: takes requests in, hands batches to replicas, gives every request exactly one outcome.

It runs in the gateway's event loop and nowhere else, so nothing here is locked. A request that is admitted holds its slots until
it is answered, expired, failed or cancelled; ``_end`` is the only place where that happens.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter
from typing import Any

from shoal.serve.cache import ResponseCache
from shoal.serve.dispatch import Dispatcher, Row, apart
from shoal.serve.latency import LatencyModel
from shoal.serve.messages import AddModel
from shoal.serve.protocols.embeddings import TextEncoder
from shoal.serve.protocols.v2 import USUAL_PRIORITY, InferRequest, longest_body
from shoal.serve.refusals import Refusal, too_late
from shoal.serve.remembered import Remembered
from shoal.serve.signature import UNIT
from shoal.serve.slots import Outcome, Slots, drain
from shoal.serve.ticket import Done, Outputs, Reply, Ticket
from shoal.serve.times import Times
from shoal.serve.tracing import Tracing

# A second batch waits in a replica's ring while the first is computed where batches are shorter than this: the replica need not
# wait for the event loop. Longer ones stay in the queue, where a more urgent request can still overtake them.
_AHEAD_BELOW_S = 0.005
_SWEEP_S = 0.005
_TRY_AGAIN_S = 1.0
_NOT_IN_TIME = "This request could not be answered in time; try again later."
_UNREAD = Refusal(429, _NOT_IN_TIME, _TRY_AGAIN_S)
_LOOK_AFTER_S = 0.02
# Where every replica has just died, the next is there within this; a request that can wait so long is taken in.
_REPLACED_WITHIN_S = 0.5
_LEFT = "The client left, or closed its side of the connection while others were before it; keep it open to wait."
# A request in whose batch so many replicas have died is not given to another one.
_MOST_DEATHS = 3


@dataclass(slots=True)
class _Replica:
    rank: int
    wake: int
    up: bool = True
    # Told, once it has finished what it has, that it is not needed any more; None: it stays.
    leaving: Callable[[], None] | None = None
    # (batch number, rows), oldest first; rows is empty for a batch of a gateway that is gone.
    batches: deque[tuple[int, list[Row], list[int]]] = field(default_factory=deque)

    @property
    def takes(self) -> bool:
        """Whether it may be given batches."""
        return self.up and self.leaving is None


_takes = attrgetter("takes")


class Desk:
    """One model's requests."""

    def __init__(
        self, model: AddModel, slots_fd: int, done_fd: int, observe: Callable[[float], None] = lambda _: None
    ) -> None:
        self.signature = model.signature
        self.sample = model.sample
        self._fixed = model.signature.longest is None
        self.takes_encoded = model.signature.encoded is not None
        self._free_inputs = [spec.free for spec in model.signature.inputs]
        self.expected = model.expected
        self.why = model.why
        self.precision = model.precision
        self.text = TextEncoder(model.tokenizer, model.signature) if model.tokenizer is not None else None
        self.slots = Slots(slots_fd, model.layout)
        self.latency = LatencyModel.from_measured(model.measured_s)
        unit = "row" if self.signature.longest is None else f"piece of {UNIT} places"
        self.dispatcher = Dispatcher(
            self.latency, capacity=model.layout.slots, most_rows=model.layout.max_batch, unit=unit
        )  # fmt: skip
        self.times = Times(observe)
        self.last_answer_s = 0.0
        self.body_bytes = longest_body(model.signature, model.layout.max_batch) or 0
        self.max_rows = min(model.layout.max_batch, model.layout.slots)
        self._done_fd = done_fd
        self._free = list(range(model.layout.slots))
        self._replicas: dict[int, _Replica] = {}
        self._tickets: dict[int, Ticket] = {}
        self._remembered: Remembered | None = None
        if model.cache_bytes:
            cache = ResponseCache(model.cache_bytes, model.cache_ttl_s)
            self._remembered = Remembered(cache, self.slots.count, self.times)
        self._next = 0
        # Requests of the service's own that hold slots.
        self._own = 0
        self._closed = False
        self._tick: asyncio.TimerHandle | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        # Set by the gateway where traces are kept.
        self.tracing: Tracing | None = None
        self._leave_alone()

    # -- requests ------------------------------------------------------------------------------------------------

    async def infer(
        self, request: InferRequest, slo_s: float, abandoned: Callable[[], bool] = lambda: False,
        arrived_s: float | None = None,
    ) -> Outputs:
        """Outputs of a request, not to be written to.

        ``arrived_s``: when it came, on the monotonic clock; now where that is not known.

        Raises:
            Refusal: it is not taken in (429, 503), expires (504) or fails (500).
        """
        now = time.monotonic()
        deadline = (now if arrived_s is None else arrived_s) + (request.timeout_s or slo_s)
        self._must_be_open()
        if self._remembered is None or request.uncached:
            return await self._compute(request, now, deadline, abandoned)
        compute = partial(self._compute, request, now, deadline, abandoned)
        return Outputs(await self._remembered.answer(request.inputs, now, deadline, compute))

    async def _compute(
        self, request: InferRequest, now: float, deadline: float, abandoned: Callable[[], bool], accepted: bool = False
    ) -> Outputs:
        """``accepted``: it was taken in and counted already, in the hope of somebody else's answer."""
        later = self._later(request, now, deadline)
        if later is not None and accepted:
            self.slots.count(Outcome.EXPIRED)
            raise too_late()
        if later is not None:
            self.slots.count(Outcome.PROBED if request.own else Outcome.REFUSED)
            if self.tracing is not None and not request.uncached:
                self.tracing.turned_down(self.signature.name, self.signature.version, request.rows, now)
            raise self._refusal(later)
        if not accepted and not request.own:
            self.slots.count(Outcome.ACCEPTED)
        future: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        ticket = self._accept(request, now, deadline, abandoned, future)
        if self.tracing is not None and not request.uncached:
            ticket.traced = self.tracing.accepted(self.signature.name, self.signature.version, request.rows, now)
        self.pump(now)
        try:
            await future
            return self._outputs(ticket, request.length)
        except asyncio.CancelledError:
            self._give_up(ticket)
            raise
        finally:
            self._free_slots(ticket)
            if self.tracing is not None and ticket.traced is not None and ticket.outcome is not None:
                self.tracing.ended(ticket.traced, now, ticket.outcome.name.lower())

    def submit(
        self, request: InferRequest, slo_s: float, abandoned: Callable[[], bool], arrived_s: float, done: Done
    ) -> None:
        """As ``infer``, where nothing is remembered, for who is called: ``done`` once, perhaps before this returns.

        Refusal where it is not taken in; then ``done`` is not called.
        """
        now = time.monotonic()
        deadline = arrived_s + (request.timeout_s or slo_s)
        self._must_be_open()
        later = self._later(request, now, deadline)
        if later is not None:
            self.slots.count(Outcome.REFUSED)
            self.times.refused(now - arrived_s)
            raise self._refusal(later)
        self.slots.count(Outcome.ACCEPTED)
        reply = Reply(partial(self._outputs, length=request.length), self._free_slots, done)
        reply.ticket = self._accept(request, now, deadline, abandoned, reply)
        self.pump(now)

    def _must_be_open(self) -> None:
        if self._closed:
            self.slots.count(Outcome.REFUSED)
            raise Refusal(503, "The service is shutting down; ask another one.", 1.0)

    @property
    def remembers(self) -> bool:
        """Whether answers are kept, and equal requests share one."""
        return self._remembered is not None

    def _outputs(self, ticket: Ticket, length: int) -> Outputs:
        """Copies of what replicas wrote into a ticket's slots; one row is sliced, for that takes a tenth of the time."""
        slots = ticket.slots
        index: Any = slice(slots[0], slots[0] + 1) if len(slots) == 1 else slots
        if self._fixed:
            found = Outputs(array[index].copy() for array in self.slots.outputs)
        else:
            outputs = zip(self.signature.outputs, self.slots.outputs, strict=True)
            found = Outputs(array[index][:, :length].copy() if spec.free else array[index].copy() for spec, array in outputs)
        found.update = ticket.update
        return found

    def hopeless(self, deadline_s: float, now: float, ahead: int = 0, wait_s: float = 0.0) -> bool:
        """Whether any request of usual urgency would be refused: even one small row, and nothing is remembered.

        ``ahead``: rows that will be here before it, ``wait_s`` seconds from now.
        """
        if self._remembered is not None or not self._replicas:
            return False
        return self.dispatcher.admit(1 + ahead, deadline_s, USUAL_PRIORITY, now, after_s=wait_s) is not None

    def refused(self, arrived_s: float) -> Refusal:
        """Count a request as refused that was not read, and say so."""
        self.slots.count(Outcome.REFUSED)
        self.times.refused(time.monotonic() - arrived_s)
        return self._refusal(_TRY_AGAIN_S)

    def turned_away(self, arrived_s: float, now: float) -> Refusal:
        """As ``refused``, in a third of the time: what it returns may be another's too, and is not to be raised."""
        self.slots.count(Outcome.REFUSED)
        self.times.refused(now - arrived_s)
        return _UNREAD if any(map(_takes, self._replicas.values())) else self._refusal(_TRY_AGAIN_S)

    def _later(self, request: InferRequest, now: float, deadline: float) -> float | None:
        """None where the request is taken in, else after how many seconds it may be tried again."""
        if not self.replicas_up and (not self._replicas or deadline - now < _REPLACED_WITHIN_S):
            return _REPLACED_WITHIN_S
        units = self.signature.units(request.length)
        later = self.dispatcher.admit(request.rows, deadline, request.priority, now, units)
        if later is None and len(self._free) < request.rows:
            return self.latency.predict(1) * len(self.slots.inputs[0])
        return later

    def _refusal(self, later_s: float) -> Refusal:
        if not self.replicas_up:
            return Refusal(503, f"No replica of {self.signature.name} is ready; try again.", max(later_s, 0.1))
        return Refusal(429, _NOT_IN_TIME, later_s)

    def _accept(
        self, request: InferRequest, now: float, deadline: float, abandoned: Callable[[], bool],
        future: asyncio.Future[float] | Reply,
    ) -> Ticket:  # fmt: skip
        taken = [self._free.pop() for _ in range(request.rows)]
        length = request.length
        index: Any = slice(taken[0], taken[0] + 1) if len(taken) == 1 else taken
        for place, values, free in zip(self.slots.inputs, request.inputs, self._free_inputs, strict=True):
            (place[:, :length] if free else place)[index] = values
        if not self._fixed:
            self.slots.lengths[index] = length
        self._next += 1
        ticket = Ticket(self._next, taken, len(taken), now, deadline, future, abandoned, own=request.own)
        self._own += request.own
        self._tickets[ticket.number] = ticket
        key, units = self.signature.key(length), self.signature.units(length)
        rows = [Row(slot, ticket.number, deadline, request.priority, key, units) for slot in taken]
        self.dispatcher.put(rows, now)
        return ticket

    def _end(self, ticket: Ticket, outcome: Outcome, refusal: Refusal | None = None) -> None:
        """Give a request its outcome, once. Its slots come back when nobody computes on them and nobody reads them any more."""
        if ticket.ended:
            return
        ticket.ended = True
        ticket.outcome = outcome
        self.slots.count(Outcome.PROBED if ticket.own else outcome)
        if not ticket.future.done():
            if refusal is None:
                ticket.future.set_result(time.monotonic())
            else:
                ticket.future.set_exception(refusal)

    def _give_up(self, ticket: Ticket) -> None:
        if not ticket.ended:
            self.dispatcher.cancel(ticket.number)
            # Whose client waits no longer than until its deadline leaves at that moment.
            late = time.monotonic() >= ticket.deadline_s
            self._end(ticket, Outcome.EXPIRED if late else Outcome.CANCELLED)

    def _free_slots(self, ticket: Ticket) -> None:
        if ticket.in_flight == 0 and self._tickets.pop(ticket.number, None) is not None:
            self._own -= ticket.own
            self._free.extend(ticket.slots)

    # -- batches -------------------------------------------------------------------------------------------------

    def pump(self, now: float) -> None:
        """Hand out batches as long as a replica can take one."""
        if not self.dispatcher.queued:
            return
        ahead = self._ahead()
        for replica in self._replicas.values():
            while replica.takes and len(replica.batches) < ahead and self._hand_out(replica, now):
                pass

    def _ahead(self) -> int:
        return 2 if self.latency.predict(self.dispatcher.batch_limit) < _AHEAD_BELOW_S else 1

    def _hand_out(self, replica: _Replica, now: float) -> bool:
        while self.dispatcher.queued:
            self.sweep(now)
            rows = self.dispatcher.take(now)
            if not rows:
                return False
            wanted = [row for row in rows if self._still_wanted(row, now)]
            if len(wanted) < len(rows):
                for row in rows:
                    if row not in wanted:
                        self.dispatcher.give_back([row])
                        self.dispatcher.cancel(row.request)
            if wanted:
                rows = wanted
                break
        else:
            return False
        for row in rows:
            self._tickets[row.request].in_flight += 1
        if self.tracing is not None:
            self.tracing.handed((self._tickets[row.request].traced for row in rows), now)
        taken = [row.slot for row in rows]
        replica.batches.append((self.slots.rings[replica.rank].post(taken), rows, taken))
        os.eventfd_write(replica.wake, 1)
        return True

    def _still_wanted(self, row: Row, now: float) -> bool:
        ticket = self._tickets.get(row.request)
        if ticket is None or ticket.ended:
            return False
        if now - ticket.arrived_s > _LOOK_AFTER_S and ticket.abandoned():
            self._end(ticket, Outcome.CANCELLED, Refusal(499, _LEFT))
            return False
        return True

    def sweep(self, now: float) -> None:
        """End what can no longer be answered in time."""
        for row in self.dispatcher.expired(now):
            ticket = self._tickets.get(row.request)
            if ticket is not None:
                self._end(ticket, Outcome.EXPIRED, too_late())

    def collect(self) -> None:
        """Take in what replicas have finished; called when they say so."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._done_fd)
        now = time.monotonic()
        for replica in list(self._replicas.values()):
            self._collect_from(replica, now)
            self._let_go(replica)
        self.pump(now)

    def _collect_from(self, replica: _Replica, now: float) -> None:
        ring = self.slots.rings[replica.rank]
        while replica.batches and replica.batches[0][0] < ring.done:
            number, rows, taken = replica.batches.popleft()
            took_s, failure = ring.result(number)
            if not rows:
                self._free.extend(taken)
                continue
            if failure is not None and len({row.request for row in rows}) > 1:
                # One of them may be at fault: the others shall not suffer from what they were batched with.
                self._take_back(apart(rows))
                continue
            self.dispatcher.finished(rows, took_s, now)
            self.times.batch(len(rows) - self._own_rows(rows), took_s)
            update = ring.update_of(number)
            if update:
                self._note_update(rows, update)
            if self.tracing is not None:
                self.tracing.batch((self._tickets[row.request].traced for row in rows), replica.rank, took_s, now)
            for row in rows:
                self._row_done(row, took_s, failure, now)

    def _row_done(self, row: Row, took_s: float, failure: str | None, now: float) -> None:
        ticket = self._tickets[row.request]
        ticket.in_flight -= 1
        ticket.rows_left -= 1
        ticket.compute_s = max(ticket.compute_s, took_s)
        if ticket.ended:
            # Whoever waited has left already, and does not look at the outputs.
            self._free_slots(ticket)
            return
        if failure is not None:
            self.dispatcher.cancel(row.request)
            self._end(ticket, Outcome.FAILED, Refusal(500, failure))
        elif ticket.rows_left == 0:
            self.last_answer_s = now
            self._end(ticket, Outcome.ANSWERED)
            if not ticket.own:
                self.times.answered(now - ticket.arrived_s, ticket.compute_s)

    def _own_rows(self, rows: list[Row]) -> int:
        """How many rows of a batch the service has asked for itself."""
        return sum(self._tickets[row.request].own for row in rows) if self._own else 0

    def _note_update(self, rows: list[Row], update: int) -> None:
        """So many updates were in the weights that some rows were computed with; of a request the least counts."""
        for row in rows:
            ticket = self._tickets[row.request]
            ticket.update = min(ticket.update or update, update)

    # -- replicas ------------------------------------------------------------------------------------------------

    def replica_up(self, rank: int, wake: int) -> None:
        """A replica serves this ring from now on."""
        old = self._replicas.get(rank)
        if old is None:
            self._replicas[rank] = _Replica(rank, wake)
        else:
            os.close(old.wake)
            old.wake, old.up, old.leaving = wake, True, None
            if old.batches:
                # The gateway that is gone may have died before it had woken the replica for the last of them: each batch that
                # follows would wait for the next one. A waking too many does no harm.
                os.eventfd_write(wake, 1)
        self.dispatcher.replicas = self.replicas_up
        self.pump(time.monotonic())

    def replica_leave(self, rank: int, left: Callable[[], None]) -> None:
        """Give a replica nothing more; ``left`` is called when it has finished what it had. Not for the last one."""
        replica = self._replicas.get(rank)
        if replica is None or not replica.up:
            return
        replica.leaving = left
        self.dispatcher.replicas = max(1, self.replicas_up)
        self._let_go(replica)

    def _let_go(self, replica: _Replica) -> None:
        if replica.leaving is None or replica.batches or not replica.up:
            return
        del self._replicas[replica.rank]
        os.close(replica.wake)
        replica.leaving()

    def replica_down(self, rank: int) -> None:
        """A replica is dead: what it had not finished goes back to the front of the queue, for inference is pure."""
        replica = self._replicas.get(rank)
        if replica is None:
            return
        replica.up = False
        now = time.monotonic()
        self._collect_from(replica, now)
        for place, (_, rows, taken) in enumerate(replica.batches):
            if not rows:
                self._free.extend(taken)
            if place == 0 and self._suspect(rows):
                rows = apart(rows)
            self._take_back(rows)
        replica.batches.clear()
        self.slots.rings[rank].reset()
        drain(replica.wake)
        # The last one's replacement is on its way: what can wait for it is still taken in.
        self.dispatcher.replicas = max(1, self.replicas_up)
        self.pump(now)

    def _suspect(self, rows: list[Row]) -> bool:
        """A replica died over these rows; a request over which several did is the likely cause, and fails.

        Returns whether each should be computed alone from now on.
        """
        for ticket in {row.request: self._tickets[row.request] for row in rows}.values():
            ticket.deaths += 1
            if ticket.deaths >= _MOST_DEATHS:
                self.dispatcher.cancel(ticket.number)
                self._end(
                    ticket, Outcome.FAILED, Refusal(500, "The model's process died each time it computed this request.")
                )
        return any(self._tickets[row.request].deaths == _MOST_DEATHS - 1 for row in rows)

    def _take_back(self, rows: list[Row]) -> None:
        """Rows that were handed out are queued again, but for those that nobody waits for any more."""
        for row in rows:
            self._tickets[row.request].in_flight -= 1
        self.dispatcher.give_back(rows)
        for ticket in {row.request: self._tickets[row.request] for row in rows}.values():
            if ticket.ended:
                self.dispatcher.cancel(ticket.number)
                self._free_slots(ticket)

    def _leave_alone(self) -> None:
        """Slots that a replica still computes on for a gateway that is gone stay taken until it is done with them."""
        busy: set[int] = set()
        for rank, ring in enumerate(self.slots.rings):
            for number in range(ring.done, ring.posted):
                taken = ring.slots_of(number)
                busy.update(taken)
                self._replicas.setdefault(rank, _Replica(rank, os.eventfd(0), up=False)).batches.append(
                    (number, [], taken)
                )
        self._free = [slot for slot in self._free if slot not in busy]

    # -- the service ---------------------------------------------------------------------------------------------

    def watch(self, loop: asyncio.AbstractEventLoop) -> None:
        """Listen to replicas, and look for expired requests now and then."""
        self._loop = loop
        loop.add_reader(self._done_fd, self.collect)

        def tick() -> None:
            now = time.monotonic()
            self.sweep(now)
            self.pump(now)
            self._tick = loop.call_later(_SWEEP_S, tick)

        tick()

    def leave(self) -> None:
        """Stop watching and give back what was handed over; when no request is open any more."""
        if self._loop is not None and self._tick is not None:
            self._loop.remove_reader(self._done_fd)
            self._tick.cancel()
        for replica in self._replicas.values():
            os.close(replica.wake)
        self._replicas.clear()
        os.close(self._done_fd)
        self.slots.close()

    def forget_counts(self) -> None:
        """Count from now on: what was asked until now, no client had asked for. Requests that are still open stay accepted."""
        still = sum(not ticket.ended for ticket in self._tickets.values())
        self.slots.counts[:] = 0
        self.slots.count(Outcome.ACCEPTED, still)

    def close(self) -> None:
        """Take nothing more in."""
        self._closed = True

    @property
    def open_requests(self) -> int:
        return len(self._tickets) + (self._remembered.waiting if self._remembered is not None else 0)

    @property
    def replicas_up(self) -> int:
        return sum(replica.takes for replica in self._replicas.values())

    def numbers(self) -> dict[str, Any]:
        """Counts of outcomes, what waits, the latest latencies: for the display and the statistics."""
        return {
            **{outcome.name.lower(): int(self.slots.counts[outcome]) for outcome in Outcome},
            "queued": self.dispatcher.queued, "open": self.open_requests, "replicas": self.replicas_up,
            "batches": self.times.batches, "rows": self.times.rows, "busy_s": self.times.busy_s,
            "cache": self._remembered and self._remembered.numbers(),
            **self.times.latest_ms(), **self.dispatcher.statistics(), "chosen": self.why,
            "precision": self.precision, "weights": self.slots.weights(),
        }  # fmt: skip
