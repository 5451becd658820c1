"""Requests over sockets: with deadlines, and sent again where no answer comes. One thread uses what is here."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import msgspec
import zmq

from shoal.errors import DeadlineError, JobFailed
from shoal.ps.complaints import Complaints
from shoal.ps.endpoint import RunKeys
from shoal.ps.messages import Refused
from shoal.ps.wire import Malformed, encode

logger = logging.getLogger(__name__)

DEADLINE_S = 600.0
RETRY_S = 2.0
PUSHES_ON_THE_WAY = 4
_SLICE_S = 0.1
# What is sent again takes memory of whoever is slow to read it, so there is more time for what is large, and for the next time.
_LEAST_BYTES_S = 20e6
_MOST_DOUBLINGS = 3
_QUEUED = 64


class Damaged(JobFailed):
    """A checkpoint that a server was to go on from is not what was written."""


class NotStaged(JobFailed):
    """A server does not have the pushes that it is to apply: it is a new one, and they must be sent again."""


Check = Callable[[Any, Sequence[memoryview]], None]
"""Looks at an answer that is no refusal, and its frames; raises Malformed where it is none to what was asked."""


def no_check(answer: Any, frames: Sequence[memoryview]) -> None:
    """Any answer will do."""


@dataclass
class Ticket:
    """A request under way; its frames must stay as they are until it is answered."""

    place: int
    number: int
    head: bytes
    frames: Sequence[Any]
    check: Check = no_check
    sent_at: float = -math.inf
    times: int = 0
    answer: Any = None
    further: list[memoryview] = field(default_factory=list)

    @cached_property
    def nbytes(self) -> int:
        """How large the request is."""
        return sum(memoryview(frame).nbytes for frame in self.frames)


@dataclass(frozen=True)
class Patience:
    """How long to wait for an answer, after which time to ask again, and how many pushes may be on the way.

    What is large, or was sent again already, has longer before it is sent again.
    """

    deadline_s: float = DEADLINE_S
    retry_s: float = RETRY_S
    pushes: int = PUSHES_ON_THE_WAY

    def again_s(self, times: int, nbytes: int) -> float:
        """How long to wait for an answer to so large a request that was sent so often."""
        return self.retry_s * 2 ** min(max(times - 1, 0), _MOST_DOUBLINGS) + nbytes / _LEAST_BYTES_S


PATIENCE = Patience()


class Requests:
    """Asks some others, each known by a number, and hears their answers.

    Args:
        addresses: of each.
        decode: reads the head of an answer out of its frames; raises Malformed.
        name: what one of them is called in a sentence.
        while_waiting: called several times a second while an answer is awaited; it may raise.
    """

    def __init__(
        self, addresses: Mapping[int, str], keys: RunKeys, decode: Callable[[Sequence[Any]], Any],
        name: Callable[[int], str], patience: Patience = PATIENCE, while_waiting: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self._keys, self.patience, self.while_waiting = keys, patience, while_waiting
        self._decode, self._name = decode, name
        self._complaints = Complaints(logger)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._poller = zmq.Poller()
        self._sockets: dict[int, zmq.Socket[bytes]] = {}
        self._number = 0
        self._open: dict[int, Ticket] = {}
        for place, address in addresses.items():
            self.connect(place, address)

    @property
    def places(self) -> tuple[int, ...]:
        return tuple(sorted(self._sockets))

    def connect(self, place: int, address: str) -> None:
        """Speak to somebody at this address, also where it had another."""
        self.disconnect(place)
        socket = self._keys.dealer(self._context, _QUEUED)
        socket.connect(address)
        self._sockets[place] = socket
        self._poller.register(socket, zmq.POLLIN)
        for ticket in self._open.values():
            if ticket.place == place:
                ticket.sent_at, ticket.times = -math.inf, 0

    def disconnect(self, place: int) -> None:
        """Speak to somebody no longer."""
        socket = self._sockets.pop(place, None)
        if socket is not None:
            self._poller.unregister(socket)
            socket.close()

    def close(self) -> None:
        for place in list(self._sockets):
            self.disconnect(place)
        self._context.term()

    def send(
        self, place: int, make: Callable[[int], msgspec.Struct], frames: Sequence[Any] = (), check: Check | None = None
    ) -> Ticket:
        """Send a request; ``make``: its head, of the number that it gets. What ``check`` finds malformed is no answer."""
        self._number += 1
        asked = make(self._number)
        ticket = Ticket(place, self._number, encode(asked), frames, check or self._check_of(asked))
        self._open[ticket.number] = ticket
        self._transmit(ticket)
        return ticket

    def _check_of(self, asked: msgspec.Struct) -> Check:
        """What looks at the answer to a request of which whoever sends it says nothing."""
        return no_check

    def _transmit(self, ticket: Ticket) -> None:
        ticket.sent_at = time.monotonic()
        try:
            self._sockets[ticket.place].send_multipart([ticket.head, *ticket.frames], zmq.NOBLOCK, copy=False)
        except zmq.Again:
            # Its queue is full: there is time until this one is sent again.
            return
        ticket.times += 1

    def wait(self, tickets: Sequence[Ticket], what: str) -> None:
        """Wait until all are answered. DeadlineError, with ``what`` and whom it was waited for, where that takes too long.

        Raises:
            NotStaged: a server lacks the pushes that it was to apply. Damaged: a checkpoint is. JobFailed: somebody has refused.
        """
        began = time.monotonic()
        while any(ticket.answer is None for ticket in tickets):
            self.receive(_SLICE_S)
            self.while_waiting()
            now = time.monotonic()
            for ticket in tickets:
                if ticket.answer is not None:
                    continue
                if now - began > self.patience.deadline_s:
                    self._forget(tickets)
                    name = self._name(ticket.place)
                    raise DeadlineError(
                        f"{name[0].upper()}{name[1:]} has not answered for {now - began:.0f} s ({what}); see whether it lives, "
                        "and go on with --resume."
                    )
                self.again(ticket)
        for ticket in tickets:
            if isinstance(ticket.answer, Refused):
                if ticket.answer.missing:
                    raise NotStaged(ticket.answer.reason)
                raise (Damaged if ticket.answer.damaged else JobFailed)(ticket.answer.reason)

    def again(self, ticket: Ticket) -> None:
        """Send a request again that has had no answer for too long."""
        if ticket.answer is None and time.monotonic() - ticket.sent_at > self.patience.again_s(ticket.times, ticket.nbytes):
            self._transmit(ticket)

    def forget_all(self) -> None:
        """Nobody waits any more for anything that was asked."""
        self._forget(list(self._open.values()))

    def _forget(self, tickets: Iterable[Ticket]) -> None:
        for ticket in tickets:
            if self._open.pop(ticket.number, None) is not None:
                ticket.answer = Refused(ticket.number, "nobody waits for it any more")

    def receive(self, timeout_s: float) -> None:
        """Take the answers that have come."""
        for socket, _ in self._poller.poll(max(0, round(timeout_s * 1000))):
            while True:
                try:
                    frames = [frame.buffer for frame in socket.recv_multipart(zmq.NOBLOCK, copy=False)]
                except zmq.Again:
                    break
                try:
                    answer = self._decode(frames)
                    # An answer to something that was sent twice, or is not waited for any more, has no ticket.
                    ticket = self._open.get(answer.number)
                    if ticket is None or self._sockets.get(ticket.place) is not socket:
                        continue
                    if not isinstance(answer, Refused):
                        ticket.check(answer, frames[1:])
                except Malformed as error:
                    # It is asked again; who always answers so is named when the deadline has passed.
                    self._complaints.add(str(error))
                    continue
                del self._open[ticket.number]
                ticket.answer, ticket.further = answer, frames[1:]
