"""Speaking to servers: pushes, pulls, and moving state; no more pushes on the way than agreed.

Whatever is sent twice is done once: a push has the ids of what it holds, and everything else only reads, or sets what it sets.
All that one server is told at a time is one message. One thread uses a client.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import torch

from shoal.comm.codecs import tensor_of
from shoal.errors import RequestError
from shoal.ps import messages
from shoal.ps.applied import NOTHING, PushId
from shoal.ps.dense import Numbers
from shoal.ps.endpoint import RunKeys
from shoal.ps.lbfgs import SIZE
from shoal.ps.messages import (
    Commit,
    Done,
    Hold,
    Multiplied,
    Multiply,
    Norm,
    Normed,
    Ping,
    Pull,
    Pulled,
    PulledRows,
    PullRows,
    Put,
    Take,
    Taken,
)
from shoal.ps.requests import PATIENCE, Check, NotStaged, Patience, Requests, Ticket
from shoal.ps.shard import Push, Snapshot
from shoal.ps.wire import Malformed

__all__ = ["Client", "NotStaged", "Patience"]


class Client(Requests):
    """Speaks to the servers of a run, each known by its number; see ``Requests``."""

    def __init__(
        self, addresses: Mapping[int, str], keys: RunKeys, patience: Patience = PATIENCE,
        while_waiting: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self._pushes: list[list[Ticket]] = []
        self._version_of: dict[int, int] = {}
        super().__init__(addresses, keys, messages.decode_answer, lambda n: f"server {n}", patience, while_waiting)

    def disconnect(self, place: int) -> None:
        super().disconnect(place)
        self._version_of.pop(place, None)

    # -- pushing -------------------------------------------------------------------------------------------------

    def push(
        self, parts: Mapping[int, Push], staged: bool = False, codec_of: Callable[[int], str] = lambda piece: "none",
        pulled: Mapping[int, int] | None = None,
    ) -> list[Ticket]:  # fmt: skip
        """Send a push to all servers, each its part; wait first where as many as may be are on the way.

        Args:
            pulled: of each server, the version that the gradients are of.
        """
        self._pushes = [tickets for tickets in self._pushes if any(t.answer is None for t in tickets)]
        while len(self._pushes) >= self.patience.pushes:
            self.wait(self._pushes.pop(0), "a push to be taken")
        tickets = []
        for server, part in parts.items():
            head, frames = messages.pack_push(part, 0, codec_of, staged)
            if pulled is not None:
                head = msgspec.structs.replace(head, pulled=pulled[server])
            tickets.append(self.send(server, lambda n, head=head: msgspec.structs.replace(head, number=n), frames, _is(Done)))  # type: ignore[misc]
        self._pushes.append(tickets)
        return tickets

    def acknowledged(self, tickets: Sequence[Ticket], what: str = "a push to be applied") -> dict[int, int]:
        """Wait until all servers hold a push; of each, how many updates it had then made."""
        self.wait(tickets, what)
        return {t.place: t.answer.version for t in tickets if isinstance(t.answer, Done)}

    def norm_squared(self, ids: Sequence[PushId]) -> float:
        """The squared norm of the sum of staged pushes, over all servers."""
        tickets = [self.send(s, lambda n: Norm(number=n, ids=tuple(ids)), check=_is(Normed)) for s in self.places]
        self.wait(tickets, "the norm of a step's gradients")
        return sum(t.answer.squared for t in tickets if isinstance(t.answer, Normed))

    def multiply(self, ids: Sequence[PushId], scale: float) -> np.ndarray:
        """The scalar products of L-BFGS's vectors with the sum of staged pushes, a row a server; see ``shoal.ps.lbfgs``."""
        asked = lambda n: Multiply(number=n, ids=tuple(ids), scale=scale)  # noqa: E731
        tickets = [self.send(server, asked, check=_multiplied) for server in self.places]
        self.wait(tickets, "the products of a step's gradients")
        return np.array([t.answer.products for t in tickets if isinstance(t.answer, Multiplied)])

    def commit(
        self, ids: Sequence[PushId], settled: PushId, scale: float = 1.0, groups: Sequence[Numbers] | None = None
    ) -> dict[int, int]:
        """Let all servers apply the sum of staged pushes; of each, how many updates it has then made."""
        numbers = None if groups is None else tuple(groups)
        tickets = [
            self.send(
                s, lambda n: Commit(number=n, ids=tuple(ids), settled=settled, scale=scale, groups=numbers), check=_is(Done)
            )
            for s in self.places
        ]
        return self.acknowledged(tickets, "a step to be applied")

    # -- pulling -------------------------------------------------------------------------------------------------

    def pull(
        self, write: Callable[[int, memoryview], None], anew: bool = False,
        sizes: Mapping[int, Mapping[int, int]] | None = None,
    ) -> dict[int, int]:  # fmt: skip
        """Get what has changed since the last pull; of each server, how many updates it had made.

        Args:
            write: called with the number of each piece, and its bytes, to be copied. Never half a push of one server.
            anew: get everything.
            sizes: of each server, its pieces and their bytes: what answers are compared with.
        """
        if anew:
            self._version_of.clear()
        tickets = []
        for server in self.places:
            have = self._version_of.get(server, -1)
            check = _pulled(have, None if sizes is None else sizes[server])
            tickets.append(self.send(server, lambda n, have=have: Pull(n, have), check=check))  # type: ignore[misc]
        self.wait(tickets, "the weights")
        for ticket in tickets:
            assert isinstance(ticket.answer, Pulled)
            for block, frame in zip(ticket.answer.dense, ticket.further, strict=True):
                write(block.piece, frame)
            self._version_of[ticket.place] = ticket.answer.version
        return dict(self._version_of)

    def pull_rows(
        self, table: int, keys: Mapping[int, np.ndarray], step: int, width: int, dtype: torch.dtype
    ) -> dict[int, torch.Tensor]:
        """The rows of different keys, (n, width), of each server."""
        tickets = [
            self.send(
                s, lambda n, own=own: PullRows(n, table, len(own), step), [messages.raw_bytes(own)],  # type: ignore[misc]
                _is(PulledRows, [len(own) * width * dtype.itemsize]),
            )
            for s, own in keys.items()
        ]  # fmt: skip
        self.wait(tickets, "rows")
        found = {}
        for ticket in tickets:
            assert isinstance(ticket.answer, PulledRows)
            rows = tensor_of(ticket.further[0], len(keys[ticket.place]) * width, dtype)
            found[ticket.place] = rows.view(-1, width)
        return found

    # -- state ---------------------------------------------------------------------------------------------------

    def take(
        self, server: int, pieces: Sequence[int] | None = None, row_shards: Mapping[int, Sequence[int]] | None = None,
        check: Callable[[Snapshot], None] = lambda snapshot: None,
    ) -> Snapshot:  # fmt: skip
        """A server's state, or a part of it; ``check``: raises RequestError where it is none that is waited for."""
        wanted = None if row_shards is None else {str(n): tuple(shards) for n, shards in row_shards.items()}
        take = lambda n: Take(n, None if pieces is None else tuple(pieces), wanted)  # noqa: E731
        ticket = self.send(server, take, check=_taken(check))
        self.wait([ticket], "a server's state")
        assert isinstance(ticket.answer, Taken)
        return messages.unpack_snapshot(ticket.answer, ticket.further)

    def put(self, server: int, snapshot: Snapshot, whole: bool) -> None:
        """Give a server a state, or a part of one."""
        kept, heads, frames = messages.pack_snapshot(snapshot)
        ticket = self.send(server, lambda n: Put(number=n, kept=kept, tensors=heads, whole=whole), frames, _is(Done))
        self.wait([ticket], "a server to take up its state")

    def hold(
        self, server: int, pieces: Sequence[int], row_shards: Mapping[int, Sequence[int]], version: int = 0,
        settled: PushId = NOTHING,
    ) -> None:  # fmt: skip
        """Let a server hold these pieces and shards of tables from now on; see ``Shard.hold``."""
        shards = {str(table): tuple(own) for table, own in row_shards.items()}
        hold = lambda n: Hold(  # noqa: E731
            number=n, pieces=tuple(pieces), row_shards=shards, version=version, settled=settled
        )
        self.wait([self.send(server, hold, check=_is(Done))], "a server to hold what it is to hold")

    def ping(self, server: int) -> int:
        """A server's version."""
        ticket = self.send(server, Ping, check=_is(Done))
        self.wait([ticket], "an answer")
        assert isinstance(ticket.answer, Done)
        return ticket.answer.version


def _is(kind: type, sizes: Sequence[int] = ()) -> Check:
    """The answer is of this kind, and its frames have these sizes."""

    def check(answer: Any, frames: Sequence[memoryview]) -> None:
        found = [frame.nbytes for frame in frames]
        if not isinstance(answer, kind) or found != list(sizes):
            raise Malformed(f"{type(answer).__name__} with {found} bytes where {kind.__name__} with {list(sizes)} belongs")
        if isinstance(answer, Done) and answer.staleness is not None and not 0 <= answer.staleness < answer.version:
            raise Malformed(f"{answer.staleness} is no staleness of update {answer.version}")
        if isinstance(answer, Normed) and not answer.squared >= 0.0:
            raise Malformed(f"{answer.squared} is no norm")

    return check


def _multiplied(answer: Any, frames: Sequence[memoryview]) -> None:
    _is(Multiplied)(answer, frames)
    if len(answer.products) != SIZE * SIZE + 2 or not all(map(math.isfinite, answer.products)):
        raise Malformed(f"{len(answer.products)} products are none of L-BFGS's vectors")


def _pulled(have: int, sizes: Mapping[int, int] | None) -> Check:
    """These pieces, all of them, or none where there is nothing new."""

    def check(answer: Any, frames: Sequence[memoryview]) -> None:
        if not isinstance(answer, Pulled) or len(answer.dense) != len(frames):
            raise Malformed(f"{type(answer).__name__} with {len(frames)} frames where weights belong")
        found = {block.piece: frame.nbytes for block, frame in zip(answer.dense, frames, strict=True)}
        if len(found) != len(frames) or (sizes is not None and found != (sizes if answer.version != have else {})):
            raise Malformed("the weights that came are not those that were asked for")

    return check


def _taken(look: Callable[[Snapshot], None]) -> Check:
    def check(answer: Any, frames: Sequence[memoryview]) -> None:
        if not isinstance(answer, Taken):
            raise Malformed(f"{type(answer).__name__} where a state belongs")
        try:
            look(messages.unpack_snapshot(answer, frames))
        except RequestError as error:
            raise Malformed(str(error)) from None

    return check
