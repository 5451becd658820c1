"""Publishing the weights of a run while it trains: a snapshot for whoever comes, then what has changed.

A reader asks for whatever is newer than what it has, and gets one answer: so a slow reader holds nobody up and is never
sent more than it can take; what it misses in between is in its next answer. What the servers hold is copied server by
server, each at a moment between two of its updates, so half a push of one server is never seen; across servers a
publication is a vector of versions.

Readers on the same machine look into the memory that publications lie in (``banks``). For others, what changed is found by
comparing with the last publication, block by block, so servers need to know nothing of readers, and nothing at all is done while
there is none. It holds 3 · P bytes for P of weights, once there is a reader.

Which rows of tables have changed is noted by whoever changes them (``rows.c``), once there is a reader; their values are read
in the same moment as the weights. Nothing holds a second table: a new reader gets the rows piece by piece while they change,
and then all changes since the first piece, read in one moment, which make a whole of it.

What goes wrong in the publisher's thread must not leave readers waiting without a word: it is told to the run, and everything is
published anew; where that goes wrong again and again, readers are told why there will be nothing more.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Protocol

import numpy as np
import zmq

from shoal.ps import wire
from shoal.ps.banks import Banks
from shoal.ps.complaints import Complaints
from shoal.ps.keys import Doorkeeper, Pair, ReadKey
from shoal.ps.row_log import Changes, RowLog, last_of

logger = logging.getLogger(__name__)

PERIOD_S = 0.02
"""How often the servers' versions are looked at while somebody waits."""
HEARTBEAT_S = 1.0
"""After so long without anything new, a reader that waits is told so: it knows then that the run is alive."""
_COPYING_SHARE = 1
# A reader that has asked nothing for so long has gone; those who have not are told of the end, if they ask until then.
_GONE_S = 10.0
_FAREWELL_S = 5.0
# What is kept of changed rows for readers that are slow; more only while somebody is being given all rows.
_KEPT_BYTES = 256 << 20
# How long readers are given to take what is newest before this process is busy, and how often that is looked at.
_SETTLE_S, _HURRY_S = 0.05, 0.001
# After something went wrong: how long nothing is tried, and how often it may within how long before nothing is tried any more.
_PAUSE_S = 0.2
_MOST_FAILURES, _FAILURES_S = 3, 60.0


@dataclass(frozen=True)
class Copied:
    """What was found in one moment between two updates.

    Attributes:
        versions: of the servers that were looked at, how many updates each had made.
        rows: what has changed in tables since the last time, by the table's number; None in the place of changes: more than
            was noted.
        busy_s: for how long servers were busy with it, beyond the processor time of the thread that asked.
    """

    versions: tuple[int, ...]
    rows: tuple[tuple[int, Changes | None], ...] = ()
    busy_s: float = 0.0


class Source(Protocol):
    """What is published."""

    @property
    def tensors(self) -> Sequence[wire.Tensor]: ...

    @property
    def size(self) -> int:
        """Bytes of all tensors."""

    @property
    def tables(self) -> Sequence[wire.Table]:
        """Tables of rows."""

    @property
    def groups(self) -> Sequence[Sequence[int]]:
        """Which servers are copied together, in one moment."""

    def versions(self) -> tuple[int, ...]:
        """How many updates each server has made."""

    def listen(self) -> None:
        """Note from now on which rows change. OSError where there is no memory for that."""

    def copy(self, servers: Sequence[int], out: np.ndarray) -> Copied | None:
        """Copy what a group holds to its places in ``out`` (uint8, of ``size``), all of one version each.

        None where there was no moment between two updates for long enough; at its places is anything then.
        """

    def places(self, servers: Sequence[int]) -> Sequence[tuple[int, int]]:
        """Where in the bytes lies what a group holds: (begin, end)."""

    def piece(self, table: int, shard: int, cold: bool, at: int) -> tuple[np.ndarray, np.ndarray, int | None]:
        """Some rows, at whatever moment: see ``Table.piece``."""


@dataclass(frozen=True)
class Succession:
    """What a publisher takes over from the one before it: key pairs (its own, readers'), where it is, the last publication."""

    pairs: tuple[Pair, Pair]
    address: str
    number: int


class Publisher:
    """Serves readers in a thread of its own until it is closed."""

    def __init__(
        self, source: Source, run: str, address: str = "tcp://127.0.0.1:*", after: Succession | None = None, host: str = "",
    ) -> None:  # fmt: skip
        """Bind; ``read_key`` is then what a reader needs. zmq.ZMQError where the address cannot be had.

        ``host``: what readers elsewhere know this machine by, where ``address`` is all of its addresses.

        ``after``: what a publisher of the same run has left that was closed for this one: its readers find this one where that
        one was, with the keys that they have, and publications count on.
        """
        self._source = source
        self._run = run
        self._complaints = Complaints(logger)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        own, reader = (Pair.new(), Pair.new()) if after is None else after.pairs
        self._pairs = own, reader
        self._door = Doorkeeper(self._context, {reader.public})
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.linger = 2000
        own.listen_by(self._socket)
        self._socket.maxmsgsize = 1 << 20
        try:
            self._socket.bind(address if after is None else after.address)
        except zmq.ZMQError:
            # Somebody else has it by now: readers need the new one.
            self._socket.bind(address)
        bound = self._socket.getsockopt_string(zmq.LAST_ENDPOINT).replace("//0.0.0.0:", f"//{host or '0.0.0.0'}:")
        self.read_key = ReadKey(bound, own.public, reader.public, reader.secret)
        self._edition = _Edition(source, 0 if after is None else after.number)
        # Who waits: its identity, what it has, and since when.
        self._waiting: dict[bytes, tuple[int, float]] = {}
        # Which publication each reader has, who have one.
        self._have: dict[bytes, int] = {}
        # Who looks into the shared memory.
        self._sharing: set[bytes] = set()
        # Who has asked for something, and when.
        self._heard: dict[bytes, float] = {}
        # Who is being given the rows: of which publication, and when the last piece was read.
        self._filling: dict[bytes, tuple[int, float]] = {}
        # Which publication each was sent last.
        self._sent: dict[bytes, int] = {}
        self._due = 0.0
        # By which the thread is woken, to see to it that everybody has what is newest.
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._settling, self._settled = False, threading.Event()
        self._failed_at: list[float] = []
        self.troubles: SimpleQueue[str] = SimpleQueue()
        """What went wrong, in sentences for whoever looks after the run."""
        self._closing: str | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name="shoal-publisher", daemon=True)
        self._thread.start()

    @property
    def succession(self) -> Succession:
        """What a publisher that goes on for this one takes over."""
        return Succession(self._pairs, self.read_key.address, self._edition.number)

    def close(self, reason: str | None = "The run has ended.") -> None:
        """Give waiting readers what is newest, tell them that it was the last, and leave.

        ``reason``: what they are told; None: nothing, for another publisher will go on for them.
        """
        self._closing, self._closed = reason, True
        os.eventfd_write(self._bell, 1)
        self._thread.join()
        os.close(self._bell)
        self._door.close()
        self._socket.close()
        self._context.term()
        self._edition.close()

    def settle(self, within_s: float = _SETTLE_S) -> bool:
        """Send every reader what there is now, and wait for that; returns whether it was done ``within_s`` seconds.

        For whoever rests the servers and is about to keep this process busy: no reader is to be behind for so long.
        """
        if not self._heard:
            return True
        self._settled.clear()
        self._settling = True
        os.eventfd_write(self._bell, 1)
        try:
            return self._settled.wait(within_s)
        finally:
            self._settling = False

    # -- the thread ----------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        while not self._closed:
            try:
                self._attend()
            except Exception as error:
                if not self._begin_again(error):
                    return
        if self._closing is not None:
            try:
                self._say_farewell()
            except Exception as error:
                self._tell(error, "Its readers may not have its last weights")

    def _attend(self) -> None:
        poller = zmq.Poller()
        for socket in (self._socket, self._door.socket, self._bell):
            poller.register(socket, zmq.POLLIN)
        while not self._closed:
            pause_s = max(0.0, self._due - time.monotonic()) if self._waiting else PERIOD_S
            for socket, _ in poller.poll(math.ceil(1000 * (_HURRY_S if self._settling else pause_s))):
                if socket is self._door.socket:
                    self._door.attend()
                elif socket is self._socket:
                    self._take()
                else:
                    os.eventfd_read(self._bell)
            now = time.monotonic()
            if (now >= self._due or self._settling) and (self._waiting or self._filling):
                took_s = self._answer()
                # Between two copies there is so many times as long as they take.
                self._due = now + max(PERIOD_S, (_COPYING_SHARE + 1) * took_s)
                self._forget_the_gone(now)
            if self._settling and self._have_all():
                self._settled.set()

    def _have_all(self) -> bool:
        """Whether everybody was sent what the servers have now; who is being given the rows takes longer."""
        number, versions = self._edition.number, self._edition.versions
        readers = self._heard.keys() - self._filling.keys()
        return versions == self._source.versions() and all(self._sent.get(reader) == number for reader in readers)

    def _begin_again(self, error: Exception) -> bool:
        """Something went wrong that nobody has thought of: publish everything anew. False where that happens too often."""
        now = time.monotonic()
        self._failed_at = [at for at in self._failed_at if now - at < _FAILURES_S] + [now]
        if len(self._failed_at) > _MOST_FAILURES:
            self._tell(error, "Its readers are told that nothing more is published")
            self._refuse(f"What it publishes went wrong again and again ({_named(error)}); it goes on and keeps checkpoints.")
            return False
        self._tell(error, "Its readers are given everything anew")
        self._edition = self._edition.anew()
        self._due = now + _PAUSE_S
        return True

    def _refuse(self, reason: str) -> None:
        """Nothing is published any more: whoever waits, or asks, is told so at once."""
        for identity in self._waiting:
            self._send(identity, wire.Closed(reason))
        while not self._closed:
            if self._door.socket.poll(0):
                self._door.attend()
            if self._socket.poll(math.ceil(PERIOD_S * 1000)):
                identity, *_ = self._socket.recv_multipart()
                self._send(identity, wire.Closed(reason))

    def _tell(self, error: Exception, what: str) -> None:
        sentence = f"Publishing the weights of {self._run} went wrong ({_named(error)}). {what}."
        logger.error("%s", sentence, exc_info=error)
        self.troubles.put(sentence)

    def _forget_the_gone(self, now: float) -> None:
        """A reader that is there asks again as soon as it has an answer, and has one within a heartbeat."""
        for identity in [identity for identity, at in self._heard.items() if now - at > _GONE_S]:
            self._drop(identity)

    def _drop(self, identity: bytes) -> None:
        self._heard.pop(identity, None)
        self._waiting.pop(identity, None)
        self._filling.pop(identity, None)
        self._sharing.discard(identity)
        self._have.pop(identity, None)
        self._sent.pop(identity, None)

    def _take(self) -> None:
        with contextlib.suppress(zmq.Again):
            while True:
                identity, *frames = self._socket.recv_multipart(zmq.NOBLOCK)
                try:
                    request = wire.decode_request(frames)
                    self._look_at(request)
                except wire.Malformed as error:
                    self._complaints.add(str(error))
                    continue
                if isinstance(request, wire.Bye):
                    self._drop(identity)
                    continue
                self._heard[identity] = time.monotonic()
                if isinstance(request, wire.Hello):
                    source = self._source
                    servers, tensors, tables = len(source.versions()), tuple(source.tensors), tuple(source.tables)
                    shared = self._edition.share()
                    self._send(identity, wire.Welcome(self._run, source.size, servers, tensors, tables, shared))
                elif isinstance(request, wire.Rows):
                    self._send_piece(identity, request)
                else:
                    (self._sharing.add if request.shares else self._sharing.discard)(identity)
                    have = self._known(request.have)
                    self._waiting[identity] = (have, time.monotonic())
                    if have:
                        self._have[identity] = have

    def _known(self, have: int) -> int:
        """A publication that somebody says to have; 0, nothing, where there never was one of that number."""
        return have if 0 <= have <= self._edition.number else 0

    def _look_at(self, request: wire.FromReader) -> None:
        """Raises Malformed where somebody asks for what cannot be there."""
        tables = self._source.tables
        if isinstance(request, wire.Rows) and not (
            0 <= request.table < len(tables) and 0 <= request.shard < tables[request.table].shards and 0 <= request.at < 1 << 64
        ):
            raise wire.Malformed(f"it asks for rows of table {request.table}")

    def _send_piece(self, identity: bytes, asked: wire.Rows) -> None:
        keys, rows, after = self._source.piece(asked.table, asked.shard, asked.cold, asked.at)
        self._filling[identity] = (self._known(asked.have), time.monotonic())
        piece = wire.Piece(asked.table, asked.shard, asked.cold, len(keys), after)
        self._send(identity, piece, keys.tobytes() + rows.tobytes())

    def _answer(self) -> float:
        """Bring the edition up to date and answer those for whom it has something new; for how long that kept others busy, in s.

        Waiting for the moment between two updates keeps nobody busy.
        """
        began_s = time.thread_time()
        wholes = any(identity in self._filling and have for identity, (have, _) in self._waiting.items())
        needed = min((have for have, _ in self._filling.values()), default=None)
        try:
            self._edition.renew(everybody=wholes, needed=needed, compare=not self._heard.keys() <= self._sharing)
        except OSError as error:
            logger.warning("Rows are not published: there is no memory to note which of them change (%s).", error.strerror)
        self._edition.trim(min([*self._have.values(), *(have for have, _ in self._filling.values())], default=0))
        took_s = time.thread_time() - began_s + self._edition.busy_s
        now = time.monotonic()
        for identity, (have, since) in list(self._waiting.items()):
            late = now - since > HEARTBEAT_S
            if have and identity in self._filling:
                if self._edition.settled_at > self._filling[identity][1]:
                    del self._waiting[identity], self._filling[identity]
                    self._send_update(identity, have)
                elif late:
                    del self._waiting[identity]
                    self._send(identity, self._edition.nothing(have))
            elif have != self._edition.number or late:
                del self._waiting[identity]
                self._send_update(identity, have)
        return took_s

    def _send_update(self, identity: bytes, have: int) -> None:
        update, payload = self._edition.since(have, identity in self._sharing)
        if not update.whole:
            self._filling[identity] = (update.number, math.inf)
        self._sent[identity] = update.number
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
        while untold and time.monotonic() < now + _FAREWELL_S:
            self._answer()
            for identity, (have, _) in list(self._waiting.items()):
                if have == self._edition.number and identity not in self._filling:
                    del self._waiting[identity]
                    self._send(identity, wire.Closed(self._closing or ""))
                    untold.discard(identity)
            if untold and self._socket.poll(100):
                self._take()


class _Edition:
    """The last publication: its bytes, for each block the publication in which it last changed, and the rows that did lately."""

    def __init__(self, source: Source, number: int = 0, banks: Banks | None = None) -> None:
        """``number``: of the last publication that there was before; ``banks``: where they lie, if readers look there already."""
        self._source = source
        self.number, self._before = number, number
        self.versions: tuple[int, ...] = ()
        self.settled_at = -math.inf
        """When everything was read that it holds, each server's between two of its updates."""
        self.busy_s = 0.0
        """For how long the servers were busy with the last renewal."""
        self._taken_at = 0.0
        self._banks = banks
        self._changed = np.empty(0, np.int64)
        self._logs: list[RowLog] = []

    def anew(self) -> _Edition:
        """Another one that goes on for this one, of which nobody knows what is in it."""
        return _Edition(self._source, self.number, self._banks)

    def share(self) -> wire.Shared | None:
        """What a reader on this machine needs to see publications where they lie; None where they are not shared."""
        if self._banks is None:
            self._banks = Banks(_whole(self._source.size))
        return self._banks.described

    def close(self) -> None:
        """It is not renewed any more; readers have it as long as they want."""
        if self._banks is not None:
            self._banks.close()

    def _begin(self) -> None:
        source = self._source
        source.listen()
        self.share()
        self._changed = np.zeros(_whole(source.size) // wire.BLOCK_BYTES, np.int64)
        most = _KEPT_BYTES // max(1, len(source.tables))
        self._logs = [RowLog(table.width, np.dtype(table.dtype), self._before + 1, most) for table in source.tables]

    def renew(self, everybody: bool = False, needed: int | None = None, compare: bool = True) -> None:
        """Copy what has changed since the last time.

        ``everybody``: look at all servers, also at those that say that nothing has. ``needed``: of changed rows, what came after
        that publication has to be kept. ``compare``: find out which bytes have changed; nobody wants to know where all readers
        share the memory. OSError where memory has run out.
        """
        self.busy_s = 0.0
        found = self._source.versions()
        first = self.number == self._before
        if not first and found == self.versions and not everybody:
            return
        if first and not len(self._changed):
            self._begin()
        assert self._banks is not None
        banks, following = self._banks, self._banks.next
        began, taken_at = time.monotonic(), time.time()
        versions = list(self.versions or [-1] * len(found))
        failed, rows = False, list[tuple[int, Changes | None]]()
        for group in self._source.groups:
            copied = None
            if everybody or any(found[server] != versions[server] for server in group):
                copied = self._source.copy(group, following)
                failed |= copied is None
            if copied is None:
                for start, stop in self._source.places(group):
                    following[start:stop] = banks.bytes[start:stop]
                continue
            rows += copied.rows
            self.busy_s += copied.busy_s
            for server, version in zip(group, copied.versions, strict=True):
                versions[server] = version
        if everybody and not failed:
            self.settled_at = began
        if -1 in versions or (not first and tuple(versions) == self.versions and not rows):
            return
        self._taken_at = taken_at
        self.number += 1
        self.versions = tuple(versions)
        self._log(rows, needed)
        if compare and not first:
            words = (len(self._changed), wire.BLOCK_BYTES // 8)
            before, after = (b.view(np.int64).reshape(words) for b in (banks.bytes, following))
            self._changed[(before != after).any(axis=1)] = self.number
        else:
            self._changed[:] = self.number
        banks.publish(self.number)

    def _log(self, rows: Sequence[tuple[int, Changes | None]], needed: int | None) -> None:
        for number, log in enumerate(self._logs):
            own = [changes for table, changes in rows if table == number]
            known = [changes for changes in own if changes is not None]
            if len(known) < len(own):
                log.forget(self.number)
            elif known:
                log.add(self.number, last_of(known), needed)

    def trim(self, number: int) -> None:
        """Every reader has publication ``number``, or a newer one: rows that changed until then are not kept."""
        for log in self._logs:
            log.trim(min(number, self.number))

    def nothing(self, have: int) -> wire.Update:
        """What is said to a reader who waits to be whole, and is not yet."""
        return wire.Update(have, have, self.versions, self._taken_at, (), whole=False)

    def since(self, have: int, shares: bool = False) -> tuple[wire.Update, bytes]:
        """What somebody who has publication ``have`` lacks; everything but rows for one that is not known here.

        ``shares``: somebody who sees the bytes where they lie.
        """
        base = have if self._before < have <= self.number else 0
        changes = [log.since(base) for log in self._logs] if base else []
        known = [each for each in changes if each is not None]
        if len(known) < len(changes):
            base, known = 0, []
        runs, data = ((), []) if shares else self._blocks(base)
        changed = []
        for table, each in enumerate(known):
            if len(each.keys):
                there = each.there
                changed.append(wire.Changed(table, int(there.sum()), int((~there).sum())))
                data += [each.keys[there].data, each.keys[~there].data, np.ascontiguousarray(each.rows[there]).data]
        whole, bank = bool(base) or not self._logs, None
        if shares and self._banks is not None and self.number > self._before:
            bank = self._banks.newest
        update = wire.Update(self.number, base, self.versions, self._taken_at, runs, tuple(changed), whole, bank)
        return update, b"".join(data)

    def _blocks(self, base: int) -> tuple[tuple[tuple[int, int], ...], list[memoryview]]:
        """Which blocks have changed since a publication, and their bytes."""
        if self._banks is None:
            return (), []
        runs, size, held = _runs(np.flatnonzero(self._changed > base)), self._source.size, self._banks.bytes
        ends = ((first * wire.BLOCK_BYTES, min((first + count) * wire.BLOCK_BYTES, size)) for first, count in runs)
        return runs, [held[start:stop].data for start, stop in ends]


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _whole(size: int) -> int:
    return -(-size // wire.BLOCK_BYTES) * wire.BLOCK_BYTES


def _runs(blocks: np.ndarray) -> tuple[tuple[int, int], ...]:
    """Ascending numbers as (first, count) of neighbours."""
    if not len(blocks):
        return ()
    cuts = np.flatnonzero(np.diff(blocks) != 1) + 1
    return tuple((int(part[0]), len(part)) for part in np.split(blocks, cuts))
