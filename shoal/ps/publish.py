"""Publishing the weights of a run while it trains: a snapshot for whoever comes, then what has changed.

A reader asks for whatever is newer than what it has, and gets one answer: so a slow reader holds nobody up and is never
sent more than it can take; what it misses in between is in its next answer. What the servers hold is copied server by
server, each at a moment between two of its updates, so half a push of one server is never seen; across servers a
publication is a vector of versions.

What changed is found by comparing with the last publication, block by block, so servers need to know nothing of readers,
and nothing at all is done while there is none. It holds 2 · P bytes for P of weights, once there is a reader.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import zmq

from shoal.ps import wire
from shoal.ps.keys import Doorkeeper, Pair, ReadKey

logger = logging.getLogger(__name__)

PERIOD_S = 0.02
"""How often the servers' versions are looked at while somebody waits."""
HEARTBEAT_S = 1.0
"""After so long without anything new, a reader that waits is told so: it knows then that the run is alive."""
_COPYING_SHARE = 4
# A reader that has asked nothing for so long has gone; those who have not are told of the end, if they ask until then.
_GONE_S = 10.0
_FAREWELL_S = 2.0


class Source(Protocol):
    """What is published."""

    @property
    def tensors(self) -> Sequence[wire.Tensor]: ...

    @property
    def size(self) -> int:
        """Bytes of all tensors."""

    def versions(self) -> tuple[int, ...]:
        """How many updates each server has made."""

    def copy(self, server: int, out: np.ndarray) -> int | None:
        """Copy what a server holds to its places in ``out`` (uint8, of ``size``), all of one version; return that version.

        None, and nothing copied, where there was no moment between two updates for long enough.
        """


class Publisher:
    """Serves readers in a thread of its own until it is closed."""

    def __init__(self, source: Source, run: str, address: str = "tcp://127.0.0.1:*") -> None:
        """Bind; ``read_key`` is then what a reader needs. zmq.ZMQError where the address cannot be had."""
        self._source = source
        self._run = run
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        own, reader = Pair.new(), Pair.new()
        self._door = Doorkeeper(self._context, {reader.public})
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.linger = 200
        self._socket.curve_server = True
        self._socket.curve_secretkey = own.secret.encode()
        self._socket.curve_publickey = own.public.encode()
        self._socket.maxmsgsize = 1 << 20
        self._socket.bind(address)
        bound = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self.read_key = ReadKey(bound, own.public, reader.public, reader.secret)
        self._edition = _Edition(source)
        # Who waits: its identity, what it has, and since when.
        self._waiting: dict[bytes, tuple[int, float]] = {}
        # Who has asked for something, and when.
        self._heard: dict[bytes, float] = {}
        self._closing: str | None = None
        self._thread = threading.Thread(target=self._serve, name="shoal-publisher", daemon=True)
        self._thread.start()

    def close(self, reason: str = "The run has ended.") -> None:
        """Give waiting readers what is newest, tell them that it was the last, and leave."""
        self._closing = reason
        self._thread.join()
        self._door.close()
        self._socket.close()
        self._context.term()

    # -- the thread ----------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._door.socket, zmq.POLLIN)
        pause_s = PERIOD_S
        while self._closing is None:
            for socket, _ in poller.poll(int(pause_s * 1000)):
                if socket is self._door.socket:
                    self._door.attend()
                else:
                    self._take()
            took_s = self._answer() if self._waiting else 0.0
            # Copying may take one part in so many of the time.
            pause_s = max(PERIOD_S, _COPYING_SHARE * took_s)
        self._say_farewell()

    def _take(self) -> None:
        with contextlib.suppress(zmq.Again):
            while True:
                identity, *frames = self._socket.recv_multipart(zmq.NOBLOCK)
                try:
                    request = wire.decode_request(frames)
                except wire.Malformed as error:
                    logger.warning("A message from a reader was dropped: %s.", error)
                    continue
                if isinstance(request, wire.Bye):
                    self._heard.pop(identity, None)
                    self._waiting.pop(identity, None)
                    continue
                if isinstance(request, wire.Hello):
                    source = self._source
                    welcome = wire.Welcome(self._run, source.size, len(source.versions()), tuple(source.tensors))
                    self._send(identity, welcome)
                else:
                    self._waiting[identity] = (request.have, time.monotonic())
                self._heard[identity] = time.monotonic()

    def _answer(self) -> float:
        """Bring the edition up to date and answer those for whom it has something new; how long the copying took, in s."""
        began = time.monotonic()
        self._edition.renew()
        took_s = time.monotonic() - began
        now = time.monotonic()
        for identity, (have, since) in list(self._waiting.items()):
            if have != self._edition.number or now - since > HEARTBEAT_S:
                del self._waiting[identity]
                self._send_update(identity, have)
        return took_s

    def _send_update(self, identity: bytes, have: int) -> None:
        update, payload = self._edition.since(have)
        self._send(identity, update, payload)

    def _send(self, identity: bytes, message: wire.FromPublisher, payload: bytes = b"") -> None:
        frames = [identity, wire.encode(message)] + ([payload] if payload else [])
        # A reader that has gone, or takes nothing, is not waited for.
        with contextlib.suppress(zmq.ZMQError):
            self._socket.send_multipart(frames, zmq.NOBLOCK, copy=False)

    def _say_farewell(self) -> None:
        """Everybody who is there and asks within a moment gets the last edition, then the reason."""
        now = time.monotonic()
        untold = {identity for identity, at in self._heard.items() if now - at < _GONE_S}
        if untold:
            self._edition.renew()
        while untold and time.monotonic() < now + _FAREWELL_S:
            for identity, (have, _) in list(self._waiting.items()):
                del self._waiting[identity]
                if have != self._edition.number:
                    self._send_update(identity, have)
                else:
                    self._send(identity, wire.Closed(self._closing or ""))
                    untold.discard(identity)
            if untold and self._socket.poll(100):
                self._take()


class _Edition:
    """The last publication: its bytes, and for each block the publication in which it last changed."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.number = 0
        self.versions: tuple[int, ...] = ()
        self._taken_at = 0.0
        self._bytes = self._next = np.empty(0, np.uint8)
        self._changed = np.empty(0, np.int64)

    def renew(self) -> None:
        """Copy what has changed since the last time."""
        found = self._source.versions()
        if self.number and found == self.versions:
            return
        first = not self.number
        if first:
            self._bytes, self._next = (np.zeros(_whole(self._source.size), np.uint8) for _ in range(2))
            self._changed = np.zeros(len(self._bytes) // wire.BLOCK_BYTES, np.int64)
        self._taken_at = time.time()
        versions = list(self.versions or [-1] * len(found))
        for server, version in enumerate(found):
            if version != versions[server]:
                copied = self._source.copy(server, self._next)
                versions[server] = versions[server] if copied is None else copied
        if -1 in versions or (self.number and tuple(versions) == self.versions):
            return
        self.number += 1
        self.versions = tuple(versions)
        words = (len(self._changed), wire.BLOCK_BYTES // 8)
        before, after = (b.view(np.int64).reshape(words) for b in (self._bytes, self._next))
        differs = np.ones(len(before), bool) if first else (before != after).any(axis=1)
        self._changed[differs] = self.number
        before[differs] = after[differs]

    def since(self, have: int) -> tuple[wire.Update, bytes]:
        """What somebody who has publication ``have`` lacks; everything for one that was never made here."""
        base = have if 0 < have <= self.number else 0
        blocks = np.flatnonzero(self._changed > base)
        runs = _runs(blocks)
        size = self._source.size
        data = b"".join(
            self._bytes[first * wire.BLOCK_BYTES : min((first + count) * wire.BLOCK_BYTES, size)].data for first, count in runs
        )
        return wire.Update(self.number, base, self.versions, self._taken_at, runs), data


def _whole(size: int) -> int:
    return -(-size // wire.BLOCK_BYTES) * wire.BLOCK_BYTES


def _runs(blocks: np.ndarray) -> tuple[tuple[int, int], ...]:
    """Ascending numbers as (first, count) of neighbours."""
    if not len(blocks):
        return ()
    cuts = np.flatnonzero(np.diff(blocks) != 1) + 1
    return tuple((int(part[0]), len(part)) for part in np.split(blocks, cuts))
