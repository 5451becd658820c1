"""Chain replication (van Renesse and Schneider 2004): a server's shard is held by others, too, which apply the same pushes.

A chain is a row of servers with the same pieces. Clients speak to its *head*: it applies a push, hands it on, and acknowledges it
when the *tail* has it; everyone in between does the same, so whatever was acknowledged is held by all. As a shard is a state
machine, they hold the same bits. Pushes are numbered by the shard's version and applied in that order; who has missed one says
so, and gets it and all behind it once more.

When the head dies, the next one along the chain is the head: it has all that was acknowledged, clients send the rest again, and
ids see to it that nothing counts twice. What is read is held by all, too, so that a version means the same bits at whoever is the
head. When another dies, the one before it is told whom to follow it with. A replacement joins
as the tail: it gets a snapshot, taken between two pushes, and then what was pushed since, while clients go on.

Which servers make up a chain: ``successors`` along the ring, so that each server's shard lies with its neighbours.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import zmq

from shoal.ps import messages
from shoal.ps.client import Client
from shoal.ps.endpoint import Endpoint, RunKeys
from shoal.ps.messages import Done, Pull, PullRows, PushHead, Put, Refused, Request
from shoal.ps.shard import Push, Shard
from shoal.ps.shard_server import ShardServer
from shoal.ps.wire import Malformed, encode

_RESEND_S = 1.0
_ADOPTION_S = 60.0


class Forward(msgspec.Struct, tag="forward", frozen=True, kw_only=True):
    """The push that makes a shard's version ``number``; ``push``: its head, and its frames follow."""

    number: int
    push: PushHead


class Follow(msgspec.Struct, tag="follow", frozen=True):
    """Hand pushes on to the server at ``address``, or to nobody where that is empty; ``anew``: it has nothing yet."""

    number: int
    address: str
    anew: bool = False


_decoder = msgspec.msgpack.Decoder(Forward | Follow)


def successors(servers: Sequence[int], server: int, replicas: int) -> tuple[int, ...]:
    """The chain of a server, itself first: those behind it along the ring of all. ValueError where there are too few."""
    ring = sorted(servers)
    if replicas >= len(ring):
        raise ValueError(f"{replicas} replicas need more than {len(ring)} servers")
    at = ring.index(server)
    return tuple((ring * 2)[at : at + 1 + replicas])


@dataclass
class _Sent:
    """A push that the successor has not acknowledged."""

    version: int
    head: bytes
    frames: Sequence[Any]


class Chain:
    """A server's place in a chain, for its ``ShardServer``: whom it hands pushes on to, and what waits for them."""

    def __init__(self, shard: Shard, endpoint: Endpoint, keys: RunKeys) -> None:
        self._shard, self._endpoint, self._keys = shard, endpoint, keys
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket: zmq.Socket[bytes] | None = None
        self._sent: deque[_Sent] = deque()
        self._waiting: deque[tuple[int, Callable[[], None]]] = deque()
        self._heard_at = 0.0
        # The version of the snapshot that a new successor has yet to take up.
        self._adopted: int | None = None
        shard.on_apply = self._hand_on

    def when_kept(self, version: int, then: Callable[[], None]) -> None:
        if self._socket is None or version <= self.kept:
            then()
        else:
            self._waiting.append((version, then))

    @property
    def kept(self) -> int:
        """Up to which version the successor has everything."""
        return self._sent[0].version - 1 if self._sent else self._shard.version

    def _hand_on(self, push: Push) -> None:
        """A push is about to be applied here."""
        if self._socket is None:
            return
        head, frames = messages.pack_push(push, 0)
        version = self._shard.version + 1
        # The frames may be views of what the optimizer is about to use, but nobody changes a gradient.
        sent = _Sent(version, encode(Forward(number=version, push=head)), frames)
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
        if self._socket is not None:
            self._endpoint.forget(self._socket)
            self._socket.close(linger=0)
            self._socket = None
        if not address:
            # Here is the tail: what is applied is kept as well as can be.
            self._sent.clear()
            self._release()
            return
        socket = self._keys.dealer(self._context, 0)
        socket.connect(address)
        self._socket = socket
        self._endpoint.attend(socket, self._hear)
        self._heard_at = time.monotonic()
        if anew:
            snapshot = self._shard.snapshot()
            kept, heads, frames = messages.pack_snapshot(snapshot)
            put = encode(Put(number=kept.version, kept=kept, tensors=heads, whole=True))
            self._sent = deque([_Sent(kept.version, put, frames)])
            self._adopted = kept.version
            self._transmit(self._sent[0])
        else:
            for sent in self._sent:
                self._transmit(sent)

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
            self._heard_at = time.monotonic()
            if isinstance(answer, Done):
                if self._adopted is not None and answer.number >= self._adopted:
                    self._adopted = None
                while self._sent and self._sent[0].version <= answer.number:
                    self._sent.popleft()
            elif isinstance(answer, Refused) and answer.missing:
                for sent in self._sent:
                    self._transmit(sent)
        self._release()

    def _release(self) -> None:
        kept = self.kept
        while self._waiting and self._waiting[0][0] <= kept:
            self._waiting.popleft()[1]()

    def attend(self) -> None:
        """Several times a second: what the successor has not acknowledged for a while is sent again."""
        patience = _RESEND_S if self._adopted is None else _ADOPTION_S
        if self._socket is not None and self._sent and time.monotonic() - self._heard_at > patience:
            self._heard_at = time.monotonic()
            for sent in self._sent:
                self._transmit(sent)

    def close(self) -> None:
        if self._socket is not None:
            self._endpoint.forget(self._socket)
            self._socket.close(linger=0)
            self._socket = None
        self._context.term()


class ChainServer(ShardServer):
    """A server that is part of a chain: it also takes what the one before it hands on, and is told whom to follow it with."""

    def __init__(self, shard: Shard, endpoint: Endpoint, keys: RunKeys) -> None:
        self.chain = Chain(shard, endpoint, keys)
        super().__init__(shard, endpoint, self.chain)

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
            message = _decoder.decode(frames[0]) if frames else None
        except msgspec.MsgspecError:
            message = None
        if message is None:
            super()._take(identity, frames)
            return

        def answer(said: msgspec.Struct) -> None:
            self.endpoint.send(identity, encode(said))

        if isinstance(message, Follow):
            self.chain.follow_with(message.address, message.anew)
            answer(Done(message.number, self.shard.version))
            return
        try:
            self._forwarded(message, frames[1:], answer)
        except Malformed as error:
            self.endpoint.complain(str(error))

    def _answer(self, message: Request, frames: Sequence[Any], answer: Callable[..., None]) -> None:
        kept = message.kept.version if isinstance(message, Put) and message.whole else None
        if kept is not None and 0 < kept <= self.shard.version:
            # It was sent twice, and what came behind it is here.
            self.chain.when_kept(kept, lambda: answer(Done(message.number, self.shard.version, False)))
            return
        version = self.shard.version
        if isinstance(message, (Pull, PullRows)) and self.chain.kept < version:
            # Nobody is told a version that may not survive: another push might become the one of that number.
            def when_kept(answered: msgspec.Struct, further: Sequence[Any] = ()) -> None:
                copies = [bytes(frame) for frame in further]
                self.chain.when_kept(version, lambda: answer(answered, copies))

            super()._answer(message, frames, when_kept)
            return
        super()._answer(message, frames, answer)

    def _forwarded(self, message: Forward, frames: Sequence[Any], answer: Callable[[msgspec.Struct], None]) -> None:
        shard, number = self.shard, message.number
        if number > shard.version + 1:
            answer(Refused(number, f"push {shard.version + 1} is missing", missing=True))
            return
        if number == shard.version + 1:
            shard.apply(messages.unpack_push(message.push, frames, self._forms()))
        self.chain.when_kept(number, lambda: answer(Done(number, shard.version)))


def follow(client: Client, server: int, address: str, anew: bool = False) -> int:
    """Tell a server to hand pushes on to the one at ``address`` (nobody where that is empty); its version.

    ``anew``: the other has nothing yet and joins as the tail.
    """
    ticket = client.send(server, lambda number: Follow(number, address, anew))
    client.wait([ticket], "a server to be followed by another")
    assert isinstance(ticket.answer, Done)
    return ticket.answer.version
