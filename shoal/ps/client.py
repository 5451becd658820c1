"""Speaking to servers: requests with deadlines, sent again where no answer comes, and no more pushes on the way than agreed.

Whatever is sent twice is done once: a push has the ids of what it holds, and everything else only reads, or sets what it sets.
All that one server is told at a time is one message. One thread uses a client.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import torch
import zmq

from shoal.comm.codecs import tensor_of
from shoal.errors import DeadlineError, JobFailed
from shoal.ps import messages
from shoal.ps.applied import PushId
from shoal.ps.dense import Numbers
from shoal.ps.endpoint import RunKeys
from shoal.ps.messages import (
    Answer,
    Commit,
    Done,
    Norm,
    Normed,
    Ping,
    Pull,
    Pulled,
    PulledRows,
    PullRows,
    Put,
    Refused,
    Take,
    Taken,
)
from shoal.ps.shard import Push, Snapshot
from shoal.ps.wire import Malformed

DEADLINE_S = 600.0
RETRY_S = 2.0
PUSHES_ON_THE_WAY = 4
_SLICE_S = 0.1


class NotStaged(JobFailed):
    """A server does not have the pushes that it is to apply: it is a new one, and they must be sent again."""


@dataclass
class Ticket:
    """A request under way; its frames must stay as they are until it is answered."""

    server: int
    number: int
    head: bytes
    frames: Sequence[Any]
    sent_at: float = 0.0
    answer: Answer | None = None
    further: list[memoryview] = field(default_factory=list)


@dataclass(frozen=True)
class Patience:
    """How long to wait for an answer, after which time to ask again, and how many pushes may be on the way."""

    deadline_s: float = DEADLINE_S
    retry_s: float = RETRY_S
    pushes: int = PUSHES_ON_THE_WAY


class Client:
    """Speaks to the servers of a run.

    Args:
        addresses: of each server, by its number.
        while_waiting: called several times a second while an answer is awaited; it may raise.
    """

    def __init__(
        self, addresses: Mapping[int, str], keys: RunKeys, patience: Patience = Patience(),
        while_waiting: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self._keys, self.patience, self._while_waiting = keys, patience, while_waiting
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._poller = zmq.Poller()
        self._sockets: dict[int, zmq.Socket[bytes]] = {}
        self._number = 0
        self._open: dict[int, Ticket] = {}
        self._pushes: list[list[Ticket]] = []
        self._version_of: dict[int, int] = {}
        for server, address in addresses.items():
            self.connect(server, address)

    @property
    def servers(self) -> tuple[int, ...]:
        return tuple(sorted(self._sockets))

    def connect(self, server: int, address: str) -> None:
        """Speak to a server at this address, also where it had another."""
        self.disconnect(server)
        socket = self._context.socket(zmq.DEALER)
        socket.linger = 0
        socket.curve_serverkey = self._keys.server.public.encode()
        socket.curve_publickey = self._keys.member.public.encode()
        socket.curve_secretkey = self._keys.member.secret.encode()
        socket.reconnect_ivl, socket.reconnect_ivl_max = 20, 500
        socket.sndhwm = 64
        socket.connect(address)
        self._sockets[server] = socket
        self._poller.register(socket, zmq.POLLIN)
        for ticket in self._open.values():
            if ticket.server == server:
                ticket.sent_at = 0.0

    def disconnect(self, server: int) -> None:
        """Speak to a server no longer."""
        socket = self._sockets.pop(server, None)
        self._version_of.pop(server, None)
        if socket is not None:
            self._poller.unregister(socket)
            socket.close()

    def close(self) -> None:
        for server in list(self._sockets):
            self.disconnect(server)
        self._context.term()

    # -- requests ------------------------------------------------------------------------------------------------

    def send(self, server: int, make: Callable[[int], msgspec.Struct], frames: Sequence[Any] = ()) -> Ticket:
        """Send a request; ``make``: its head, of the number that it gets."""
        self._number += 1
        ticket = Ticket(server, self._number, messages.encode(make(self._number)), frames)
        self._open[ticket.number] = ticket
        self._transmit(ticket)
        return ticket

    def _transmit(self, ticket: Ticket) -> None:
        ticket.sent_at = time.monotonic()
        frames = [ticket.head, *ticket.frames]
        try:
            # Small frames are copied: to keep them where they are costs more.
            self._sockets[ticket.server].send_multipart(frames, zmq.NOBLOCK, copy=False)
        except zmq.Again:
            # Its queue is full: there is time until this one is sent again.
            return

    def wait(self, tickets: Sequence[Ticket], what: str) -> None:
        """Wait until all are answered. DeadlineError, with ``what`` and whom it was waited for, where that takes too long.

        Raises:
            NotStaged: a server lacks the pushes that it was to apply. JobFailed: a server has refused.
        """
        began = time.monotonic()
        while any(ticket.answer is None for ticket in tickets):
            self._receive(_SLICE_S)
            self._while_waiting()
            now = time.monotonic()
            for ticket in tickets:
                if ticket.answer is not None or ticket.number not in self._open:
                    continue
                if now - began > self.patience.deadline_s:
                    self._forget(tickets)
                    raise DeadlineError(
                        f"Server {ticket.server} has not answered for {now - began:.0f} s ({what}); see whether it lives, and go "
                        "on with --resume."
                    )
                if now - ticket.sent_at > self.patience.retry_s:
                    self._transmit(ticket)
        for ticket in tickets:
            if isinstance(ticket.answer, Refused):
                kind = NotStaged if ticket.answer.missing else JobFailed
                raise kind(f"Server {ticket.server} has refused ({what}): {ticket.answer.reason}")

    def _forget(self, tickets: Iterable[Ticket]) -> None:
        for ticket in tickets:
            if self._open.pop(ticket.number, None) is not None:
                ticket.answer = Refused(ticket.number, "nobody waits for it any more")

    def _receive(self, timeout_s: float) -> None:
        for socket, _ in self._poller.poll(max(0, round(timeout_s * 1000))):
            while True:
                try:
                    frames = [frame.buffer for frame in socket.recv_multipart(zmq.NOBLOCK, copy=False)]
                except zmq.Again:
                    break
                try:
                    answer = messages.decode_answer(frames)
                except Malformed:
                    continue
                # An answer to something that was sent twice, or is not waited for any more, has no ticket.
                ticket = self._open.pop(answer.number, None)
                if ticket is not None:
                    ticket.answer, ticket.further = answer, frames[1:]

    # -- pushing -------------------------------------------------------------------------------------------------

    def push(
        self, parts: Mapping[int, Push], staged: bool = False, codec_of: Callable[[int], str] = lambda piece: "none"
    ) -> list[Ticket]:
        """Send a push to all servers, each its part; wait first where as many as may be are on the way."""
        self._pushes = [tickets for tickets in self._pushes if any(t.answer is None for t in tickets)]
        while len(self._pushes) >= self.patience.pushes:
            self.wait(self._pushes.pop(0), "a push to be taken")
        tickets = []
        for server, part in parts.items():
            head, frames = messages.pack_push(part, 0, codec_of, staged)
            tickets.append(self.send(server, lambda n, head=head: msgspec.structs.replace(head, number=n), frames))  # type: ignore[misc]
        self._pushes.append(tickets)
        return tickets

    def acknowledged(self, tickets: Sequence[Ticket], what: str = "a push to be applied") -> dict[int, int]:
        """Wait until all servers hold a push; of each, how many updates it had then made."""
        self.wait(tickets, what)
        return {t.server: t.answer.version for t in tickets if isinstance(t.answer, Done)}

    def norm_squared(self, ids: Sequence[PushId]) -> float:
        """The squared norm of the sum of staged pushes, over all servers."""
        tickets = [self.send(s, lambda n: Norm(number=n, ids=tuple(ids))) for s in self.servers]
        self.wait(tickets, "the norm of a step's gradients")
        return sum(t.answer.squared for t in tickets if isinstance(t.answer, Normed))

    def commit(
        self, ids: Sequence[PushId], settled: PushId, scale: float = 1.0, groups: Sequence[Numbers] | None = None
    ) -> dict[int, int]:
        """Let all servers apply the sum of staged pushes; of each, how many updates it has then made."""
        numbers = None if groups is None else tuple(groups)
        tickets = [
            self.send(s, lambda n: Commit(number=n, ids=tuple(ids), settled=settled, scale=scale, groups=numbers))
            for s in self.servers
        ]
        return self.acknowledged(tickets, "a step to be applied")

    # -- pulling -------------------------------------------------------------------------------------------------

    def pull(self, write: Callable[[int, memoryview], None], anew: bool = False) -> dict[int, int]:
        """Get what has changed since the last pull; of each server, how many updates it had made.

        Args:
            write: called with the number of each piece, and its bytes, to be copied. Never half a push of one server.
            anew: get everything.
        """
        if anew:
            self._version_of.clear()
        tickets = [self.send(s, lambda n, s=s: Pull(n, self._version_of.get(s, -1))) for s in self.servers]  # type: ignore[misc]
        self.wait(tickets, "the weights")
        for ticket in tickets:
            assert isinstance(ticket.answer, Pulled)
            for block, frame in zip(ticket.answer.dense, ticket.further, strict=True):
                write(block.piece, frame)
            self._version_of[ticket.server] = ticket.answer.version
        return dict(self._version_of)

    def pull_rows(
        self, table: int, keys: Mapping[int, np.ndarray], step: int, width: int, dtype: torch.dtype
    ) -> dict[int, torch.Tensor]:
        """The rows of different keys, (n, width), of each server."""
        tickets = [
            self.send(s, lambda n, own=own: PullRows(n, table, len(own), step), [messages.raw_bytes(own)])  # type: ignore[misc]
            for s, own in keys.items()
        ]
        self.wait(tickets, "rows")
        found = {}
        for ticket in tickets:
            assert isinstance(ticket.answer, PulledRows)
            rows = tensor_of(ticket.further[0], len(keys[ticket.server]) * width, dtype)
            found[ticket.server] = rows.view(-1, width)
        return found

    # -- state ---------------------------------------------------------------------------------------------------

    def take(
        self, server: int, pieces: Sequence[int] | None = None, row_shards: Mapping[int, Sequence[int]] | None = None
    ) -> Snapshot:
        """A server's state, or a part of it."""
        wanted = None if row_shards is None else {str(n): tuple(shards) for n, shards in row_shards.items()}
        ticket = self.send(server, lambda n: Take(n, None if pieces is None else tuple(pieces), wanted))
        self.wait([ticket], "a server's state")
        assert isinstance(ticket.answer, Taken)
        return messages.unpack_snapshot(ticket.answer, ticket.further)

    def put(self, server: int, snapshot: Snapshot, whole: bool) -> None:
        """Give a server a state, or a part of one."""
        kept, heads, frames = messages.pack_snapshot(snapshot)
        ticket = self.send(server, lambda n: Put(number=n, kept=kept, tensors=heads, whole=whole), frames)
        self.wait([ticket], "a server to take up its state")

    def ping(self, server: int) -> int:
        """A server's version."""
        ticket = self.send(server, Ping)
        self.wait([ticket], "an answer")
        assert isinstance(ticket.answer, Done)
        return ticket.answer.version
