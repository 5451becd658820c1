"""A server: a shard behind an endpoint. One thread answers one request after the other, so nobody sees half a push."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import msgspec

from shoal.errors import RequestError, ShoalError
from shoal.ps import messages
from shoal.ps.applied import PartlyApplied, PushId
from shoal.ps.checks import check_count, parse_number
from shoal.ps.dense import Piece
from shoal.ps.endpoint import Endpoint
from shoal.ps.messages import (
    Block,
    Commit,
    Done,
    Forms,
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
    PushHead,
    Put,
    Refused,
    Request,
    Take,
    Taken,
)
from shoal.ps.shard import Push, Shard
from shoal.ps.staged import MissingError, Staged
from shoal.ps.watch import Watching
from shoal.ps.wire import Malformed, encode

_SLICE_S = 0.1


class Keeper(Protocol):
    """What makes updates survive the process that made them: a log, or a peer that has the same shard."""

    def when_kept(self, version: int, then: Callable[[], None]) -> None:
        """Call ``then`` once all updates up to ``version`` will survive: at once, or later out of ``Endpoint.receive``."""


class InMemory:
    """Updates go with their process."""

    def when_kept(self, version: int, then: Callable[[], None]) -> None:
        then()


class ShardServer:
    """Answers clients.

    Args:
        keeper: an update is acknowledged once it says so.
        pieces: all that there are, whoever holds them, by number. A server that knows of none holds for good what it holds.
    """

    def __init__(
        self, shard: Shard, endpoint: Endpoint, keeper: Keeper | None = None, pieces: Mapping[int, Piece] | None = None
    ) -> None:
        self.shard = shard
        self._pieces = pieces
        self.endpoint = endpoint
        self._keeper: Keeper = keeper if keeper is not None else InMemory()
        # Answers those who follow what is held here.
        self._watching = Watching(shard, endpoint, self._keeper.when_kept)
        self.staged = Staged(shard)

    def serve(self, over: Callable[[], bool], between: Callable[[], None] = lambda: None) -> None:
        """Answer until ``over``; ``between`` is called several times a second."""
        while not over():
            for identity, frames in self.endpoint.receive(_SLICE_S):
                self._take(identity, frames)
            between()

    def _take(self, identity: bytes, frames: Sequence[Any]) -> None:
        try:
            message = messages.decode_request(frames)
        except Malformed as error:
            self._take_other(identity, frames, error)
            return

        def answer(answered: msgspec.Struct, further: Sequence[Any] = ()) -> None:
            self.endpoint.send(identity, encode(answered), further)

        try:
            self._answer(message, frames[1:], answer)
        except Malformed as error:
            self.endpoint.complain(str(error))
        except MissingError as error:
            answer(Refused(message.number, str(error), missing=True))
        except (PartlyApplied, ShoalError) as error:
            answer(Refused(message.number, str(error)))

    def _take_other(self, identity: bytes, frames: Sequence[Any], error: Malformed) -> None:
        """It is no client's; ``error``: why."""
        try:
            if not self._watching.take(identity, frames):
                raise error
        except Malformed as found:
            self.endpoint.complain(str(found))

    def _answer(self, message: Request, frames: Sequence[Any], answer: Callable[..., None]) -> None:
        shard, number = self.shard, message.number

        def done(new: bool, ids: Sequence[PushId] = ()) -> None:
            # One that comes again is told what has become of it, whatever was applied since.
            version, staleness = (shard.ledger.made(ids) if ids else None) or (shard.version, None)
            self._keeper.when_kept(shard.version, lambda: answer(Done(number, version, new, staleness)))

        if isinstance(message, PushHead):
            push = messages.unpack_push(message, frames, self._forms())
            push = replace(push, staleness=self._staleness(message))
            done(self._stage(push) if message.staged else shard.apply(push), push.ids)
        elif isinstance(message, Pull):
            pieces = shard.pull() if message.have != shard.version else {}
            _, views = messages.pack_tensors({str(piece): tensor for piece, tensor in pieces.items()})
            answer(Pulled(number, shard.version, tuple(map(Block, pieces))), views)
        elif isinstance(message, PullRows):
            rows = shard.pull_rows(message.table, messages.unpack_keys(message, frames), message.step)
            heads, views = messages.pack_tensors({"": rows})
            answer(PulledRows(number, shard.version, heads[0]), views)
        elif isinstance(message, Norm):
            answer(Normed(number, self.staged.norm_squared(message.ids)))
        elif isinstance(message, Multiply):
            answer(Multiplied(number, tuple(self.staged.multiply(message.ids, message.scale).tolist())))
        elif isinstance(message, Commit):
            done(self.staged.commit(message.ids, message.settled, message.scale, message.groups), message.ids)
        elif isinstance(message, Take):
            self._give(message, answer)
        elif isinstance(message, Put):
            snapshot = messages.unpack_snapshot(message, frames)
            (shard.restore if message.whole else shard.merge)(snapshot)
            done(True)
        elif isinstance(message, Hold):
            self._hold(message)
            done(True)
        else:
            assert isinstance(message, Ping)
            answer(Done(number, shard.version))

    def _stage(self, push: Push) -> bool:
        return self.staged.stage(push)

    def _staleness(self, head: PushHead) -> int | None:
        """How many updates there are by now since the pull that a push was computed from."""
        if head.pulled is None:
            return None
        check_count("version", head.pulled)
        # One that has come again may not have all yet that it had told before.
        return max(0, self.shard.version - head.pulled)

    def _forms(self) -> Forms:
        return forms_of(self.shard)

    def _hold(self, message: Hold) -> None:
        known = self._pieces
        if known is None or any(number not in known for number in message.pieces):
            raise RequestError("This server cannot hold other pieces than it does.")
        for count in message.settled:
            check_count("place in a run", count)
        row_shards = {parse_number(table): shards for table, shards in message.row_shards.items()}
        self.shard.hold([known[number] for number in message.pieces], row_shards, message.version, message.settled)

    def _give(self, message: Take, answer: Callable[..., None]) -> None:
        shard = self.shard
        wanted = None
        shards_of = {str(number): range(table.spec.shards) for number, table in shard.tables.items()}
        if message.row_shards is not None:
            asked = message.row_shards
            if not all(n in shards_of and all(s in shards_of[n] for s in shards) for n, shards in asked.items()):
                raise RequestError("Rows were asked for that are not held here.")
            wanted = {int(n): tuple(dict.fromkeys(shards)) for n, shards in asked.items()}
        if any(n not in shard.dense.pieces for n in message.pieces or ()):
            raise RequestError("A piece was asked for that is not held here.")
        kept, heads, frames = messages.pack_snapshot(shard.snapshot(message.pieces, wanted))
        answer(Taken(message.number, kept, heads), frames)


def forms_of(shard: Shard) -> Forms:
    """What pushes to a shard are like."""
    return Forms(
        {number: (piece.numel, piece.dtype) for number, piece in shard.dense.pieces.items()},
        {number: (table.spec.width, table.spec.dtype) for number, table in shard.tables.items()},
    )
