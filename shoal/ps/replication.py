"""Chain replication (van Renesse and Schneider 2004): a server's shard is held by others, too, which apply the same pushes.

A chain is a row of servers with the same pieces. Clients speak to its *head*: it applies a push, hands it on, and acknowledges it
when the *tail* has it; everyone in between does the same, so whatever was acknowledged is held by all. As a shard is a state
machine, they hold the same bits. What is handed on are *entries*, numbered and taken in that order: pushes that are applied,
pushes that wait to be applied with others (``sync``), and the word that these are, which says no gradient again. Who has missed
an entry says so, and gets it and all behind it once more.

When the head dies, the next one along the chain is the head: it has all that was acknowledged, clients send the rest again, and
ids see to it that nothing counts twice. Who is the head is told so, and takes no entries any more, so that one that only seemed
to be dead acknowledges nothing; whoever is not takes no pushes of clients. What is read is held by all, too, so that a version
means the same bits at whoever is the head. When another dies, the one before it is told whom to follow it with. A replacement
joins as the tail: it gets a snapshot, taken between two entries, with the pushes that wait, and then what came since, while
clients go on.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import msgspec
import zmq

from shoal.errors import RequestError, ShoalError
from shoal.ps import messages
from shoal.ps.applied import PartlyApplied, PushId
from shoal.ps.checks import check_count
from shoal.ps.client import Client
from shoal.ps.dense import Groups, Piece
from shoal.ps.endpoint import Endpoint, RunKeys
from shoal.ps.messages import Commit, Done, Pull, PullRows, PushHead, Refused, Request, Tensor
from shoal.ps.requests import Patience
from shoal.ps.shard import Kept, Push, Shard, Snapshot
from shoal.ps.shard_server import ShardServer
from shoal.ps.staged import MissingError, Staged
from shoal.ps.wire import Malformed, decode_head, encode

_RESEND, _ADOPTION = Patience(retry_s=1.0), Patience(retry_s=60.0)
"""After how long without a word of the successor everything is sent again, and after how long while it takes a snapshot up."""


class Forward(msgspec.Struct, tag="forward", frozen=True, kw_only=True):
    """Entry ``number``: a push to be applied, or to wait for others; ``push``: its head, and its frames follow."""

    number: int
    push: PushHead


class Together(msgspec.Struct, tag="together", frozen=True, kw_only=True):
    """Entry ``number``: the sum of pushes that wait is to be applied."""

    number: int
    ids: tuple[PushId, ...]
    settled: PushId
    scale: float
    groups: Groups | None


class Adopt(msgspec.Struct, tag="adopt", frozen=True, kw_only=True):
    """Everything up to entry ``number``: a snapshot, and the heads of the pushes that wait, in order; frames: of both."""

    number: int
    kept: Kept
    tensors: tuple[Tensor, ...]
    waiting: tuple[PushHead, ...]


class Follow(msgspec.Struct, tag="follow", frozen=True):
    """Hand pushes on to the server at ``address``, or to nobody where that is empty.

    ``anew``: it has nothing yet; ``whole``: this is answered when it has everything, and all behind it have.
    """

    number: int
    address: str
    anew: bool = False
    whole: bool = False


class Lead(msgspec.Struct, tag="lead", frozen=True):
    """This server is the head of its chain from now on."""

    number: int


_decoder = msgspec.msgpack.Decoder(Forward | Together | Adopt | Follow | Lead)


@dataclass
class _Sent:
    """An entry that the successor has not acknowledged."""

    number: int
    head: bytes
    frames: Sequence[Any]

    @cached_property
    def nbytes(self) -> int:
        return sum(memoryview(frame).nbytes for frame in self.frames)


class Chain:
    """A server's place in a chain, for its ``ShardServer``: whom it hands entries on to, and what waits for them.

    Attributes:
        number: the last entry that was taken here.
        applied: the last one that has changed the shard.
        staged: the pushes that wait here.
    """

    def __init__(self, shard: Shard, endpoint: Endpoint, keys: RunKeys) -> None:
        self._shard, self._endpoint, self._keys = shard, endpoint, keys
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket: zmq.Socket[bytes] | None = None
        self._sent: deque[_Sent] = deque()
        self._waiting: deque[tuple[int, Callable[[], None]]] = deque()
        self._heard_at = 0.0
        # When everything was last sent again, and how often since the successor has acknowledged anything.
        self._again_at, self._times = -math.inf, 0
        # The number of the snapshot that a new successor has yet to take up.
        self._adopted: int | None = None
        self.number = self.applied = 0
        self.staged = Staged(shard)
        shard.on_apply = self._hand_on_applied

    def when_kept(self, version: int, then: Callable[[], None]) -> None:
        """See ``Keeper``: whatever was taken so far, and so any version."""
        self.when_taken(self.number, then)

    def when_taken(self, number: int, then: Callable[[], None]) -> None:
        """Call ``then`` once all entries up to one are held by all behind this."""
        if self._socket is None or number <= self.kept:
            then()
        else:
            self._waiting.append((number, then))

    @property
    def kept(self) -> int:
        """Up to which entry the successor has everything."""
        return self._sent[0].number - 1 if self._sent else self.number

    def _hand_on_applied(self, push: Push) -> None:
        """A push is about to be applied here."""
        if self.staged.holds(push.ids):
            groups = None if push.groups is None else tuple(push.groups)
            self._hand_on(
                lambda n: Together(number=n, ids=push.ids, settled=push.settled, scale=push.scale, groups=groups), ()
            )
        else:
            head, frames = messages.pack_push(push, 0)
            self._hand_on(lambda n: Forward(number=n, push=head), frames)
        self.applied = self.number

    def hand_on_staged(self, push: Push) -> None:
        """A push waits here from now on."""
        head, frames = messages.pack_push(push, 0, staged=True)
        self._hand_on(lambda n: Forward(number=n, push=head), frames)

    def _hand_on(self, make: Callable[[int], msgspec.Struct], frames: Sequence[Any]) -> None:
        self.number += 1
        if self._socket is None:
            return
        # The frames may be views of what the optimizer is about to use, but nobody changes a gradient.
        sent = _Sent(self.number, encode(make(self.number)), frames)
        if not self._sent:
            self._heard_at = time.monotonic()
        self._sent.append(sent)
        self._transmit(sent)

    def _transmit(self, sent: _Sent) -> None:
        assert self._socket is not None
        try:
            self._socket.send_multipart([sent.head, *sent.frames], zmq.NOBLOCK, copy=False)
        except zmq.Again:
            # It is sent again when the successor says that it lacks it, or says nothing.
            return

    def follow_with(self, address: str, anew: bool) -> None:
        """Hand pushes on to another server from now on, or to nobody; ``anew``: give it everything first."""
        socket = None if not address else self._connected(address)
        if self._socket is not None:
            self._endpoint.forget(self._socket)
            self._socket.close(linger=0)
            self._socket = None
        if socket is None:
            # Here is the tail: what is taken is kept as well as can be.
            self._sent.clear()
            self._release()
            return
        self._socket = socket
        self._endpoint.attend(socket, self._hear)
        self._heard_at, self._again_at, self._times = time.monotonic(), -math.inf, 0
        if anew:
            head, frames = self._everything()
            self._sent = deque([_Sent(self.number, head, frames)])
            self._adopted = self.number
            self._transmit(self._sent[0])
        else:
            self._transmit_all()

    def _transmit_all(self) -> None:
        for sent in self._sent:
            self._transmit(sent)

    def _connected(self, address: str) -> zmq.Socket[bytes]:
        socket = self._keys.dealer(self._context, 0)
        try:
            socket.connect(address)
        except (zmq.ZMQError, ValueError) as error:
            socket.close(linger=0)
            raise RequestError(f"{address!r} is no address ({error}).") from None
        return socket

    def _everything(self) -> tuple[bytes, list[Any]]:
        """What a new successor gets first: head and frames."""
        kept, heads, frames = messages.pack_snapshot(self._shard.snapshot())
        waiting = [messages.pack_push(push, 0, staged=True) for push in self.staged.pushes]
        adopt = Adopt(number=self.number, kept=kept, tensors=heads, waiting=tuple(head for head, _ in waiting))
        return encode(adopt), [*frames, *(frame for _, own in waiting for frame in own)]

    def _hear(self) -> None:
        """The successor has answered."""
        while self._socket is not None:
            try:
                frames = [frame.buffer for frame in self._socket.recv_multipart(zmq.NOBLOCK, copy=False)]
            except zmq.Again:
                break
            try:
                answer = messages.decode_answer(frames)
            except Malformed as error:
                self._endpoint.complain(str(error))
                continue
            if answer.number > self.number:
                self._endpoint.complain(f"the successor has answered entry {answer.number}, and {self.number} is the last one")
                continue
            self._heard_at = time.monotonic()
            if isinstance(answer, Done):
                self._times = 0
                if self._adopted is not None and answer.number >= self._adopted:
                    self._adopted = None
                while self._sent and self._sent[0].number <= answer.number:
                    self._sent.popleft()
            elif isinstance(answer, Refused) and answer.missing and self._heard_at - self._again_at > self._again_s:
                # It says so of each entry that it cannot take, and all come again at the first word.
                self._transmit_again()
        self._release()

    def _release(self) -> None:
        kept = self.kept
        while self._waiting and self._waiting[0][0] <= kept:
            self._waiting.popleft()[1]()

    def attend(self) -> None:
        """Several times a second: what the successor has not acknowledged for a while is sent again."""
        if self._socket is not None and self._sent and time.monotonic() - self._heard_at > self._again_s:
            self._transmit_again()
            self._heard_at = self._again_at

    @property
    def _again_s(self) -> float:
        """How long the successor has for what is on its way: what is sent again takes its memory, too."""
        patience = _RESEND if self._adopted is None else _ADOPTION
        return patience.again_s(self._times + 1, sum(sent.nbytes for sent in self._sent))

    def _transmit_again(self) -> None:
        self._again_at = time.monotonic()
        self._times += 1
        self._transmit_all()

    def close(self) -> None:
        if self._socket is not None:
            self._endpoint.forget(self._socket)
            self._socket.close(linger=0)
            self._socket = None
        self._context.term()


class ChainServer(ShardServer):
    """A server that is part of a chain: it also takes what the one before it hands on, and is told whom to follow it with."""

    def __init__(
        self, shard: Shard, endpoint: Endpoint, keys: RunKeys, pieces: Mapping[int, Piece] | None = None
    ) -> None:
        self.chain = Chain(shard, endpoint, keys)
        super().__init__(shard, endpoint, self.chain, pieces)
        self.staged = self.chain.staged
        # Whether it was given everything by the one before it.
        self._adopted = False
        # Whether it was told that it is the head: nobody else takes a client's pushes.
        self._leads = False
        # Whom it was told to be followed by.
        self._followed: Follow | None = None

    def serve(self, over: Callable[[], bool], between: Callable[[], None] = lambda: None) -> None:
        def attend() -> None:
            self.chain.attend()
            between()

        try:
            super().serve(over, attend)
        finally:
            self.chain.close()

    def _take(self, identity: bytes, frames: Sequence[Any]) -> None:
        try:
            message = decode_head(_decoder, frames)
        except Malformed:
            super()._take(identity, frames)
            return

        def answer(said: msgspec.Struct) -> None:
            self.endpoint.send(identity, encode(said))

        try:
            if isinstance(message, (Forward, Together, Adopt)):
                self._take_entry(message, frames[1:], answer)
                return
            if isinstance(message, Follow):
                # What takes long is asked for once more, and not begun once more.
                if not (message.whole and message == self._followed):
                    self.chain.follow_with(message.address, message.anew)
                self._followed = message
            else:
                self._leads = True
            done = Done(message.number, self.shard.version)
            if isinstance(message, Follow) and message.whole:
                self.chain.when_taken(self.chain.number, lambda: answer(done))
            else:
                answer(done)
        except (Malformed, PartlyApplied, MissingError, ShoalError) as error:
            # What is handed on was found right by the one before; who hands on what is not is none of this chain.
            self.endpoint.complain(str(error))

    def _answer(self, message: Request, frames: Sequence[Any], answer: Callable[..., None]) -> None:
        applied = self.chain.applied
        if isinstance(message, (PushHead, Commit)) and not self._leads:
            # Who does not know who the head is, or is about to be told that this one is, asks again.
            self.endpoint.complain("a push of a client came to a server that is not the head of its chain")
            return
        if isinstance(message, (Pull, PullRows)) and self.chain.kept < applied:
            # Nobody is told a version that may not survive: another push might become the one of that number.
            def when_kept(answered: msgspec.Struct, further: Sequence[Any] = ()) -> None:
                copies = [bytes(frame) for frame in further]
                self.chain.when_taken(applied, lambda: answer(answered, copies))

            super()._answer(message, frames, when_kept)
            return
        super()._answer(message, frames, answer)

    def _stage(self, push: Push) -> bool:
        new = super()._stage(push)
        if new:
            self.chain.hand_on_staged(push)
        return new

    def _take_entry(
        self, message: Forward | Together | Adopt, frames: Sequence[Any], answer: Callable[[msgspec.Struct], None]
    ) -> None:
        chain, number = self.chain, message.number
        check_count("entry", number)
        if self._leads:
            # A head that was given up for dead and lives must not acknowledge what nobody has who counts.
            answer(Refused(number, "another one is the head of this chain"))
            return
        if isinstance(message, Adopt):
            # Where it was sent twice, what came behind it may be here; nobody goes back to what was before.
            if number > chain.number or (number == chain.number and not self._adopted):
                self._adopt(message, frames)
        elif number > chain.number + 1:
            answer(Refused(number, f"entry {chain.number + 1} is missing", missing=True))
            return
        elif number == chain.number + 1:
            if isinstance(message, Together):
                self.staged.commit(message.ids, message.settled, message.scale, message.groups)
            else:
                push = messages.unpack_push(message.push, frames, self._forms())
                (self._stage if message.push.staged else self.shard.apply)(push)
        chain.when_taken(number, lambda: answer(Done(number, self.shard.version)))

    def _adopt(self, message: Adopt, frames: Sequence[Any]) -> None:
        """Take up everything that the one before this has."""
        at = len(message.tensors)
        tensors = messages.unpack_tensors(message.tensors, frames[:at])
        waiting = []
        for head in message.waiting:
            count = len(head.dense) + 3 * len(head.rows)
            waiting.append(messages.unpack_push(head, frames[at : at + count], self._forms()))
            at += count
        if at != len(frames):
            raise Malformed(f"{len(frames)} frames where {at} belong")
        self.shard.restore(Snapshot(message.kept, tensors))
        self.staged.put(waiting)
        self.chain.number = self.chain.applied = message.number
        self._adopted = True


def follow(client: Client, server: int, address: str, anew: bool = False, whole: bool = False) -> int:
    """Tell a server to hand pushes on to the one at ``address`` (nobody where that is empty); its version.

    ``anew``: the other has nothing yet and joins as the tail; ``whole``: wait until it has everything.
    """
    ticket = client.send(server, lambda number: Follow(number, address, anew, whole))
    client.wait([ticket], "a server to be followed by another")
    assert isinstance(ticket.answer, Done)
    return ticket.answer.version


def lead(client: Client, server: int) -> None:
    """Tell a server that it is the head of its chain."""
    client.wait([client.send(server, Lead)], "a server to be the head of its chain")
