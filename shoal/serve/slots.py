"""The shared memory between the gateway and the replicas of one model: slots for rows, and a ring for each replica.

An accepted request holds a slot for each of its rows until it has an outcome, so the queue is never longer than there are slots.
A slot is one row of every input and one row of every output. A *ring* is how the gateway hands batches to a replica: an entry is
a list of slots. The gateway alone writes ``posted``, the replica alone ``done``; both count batches from the service's beginning.

Each side wakes the other through an eventfd *after* it has written. The system call orders the memory, on any processor, so
nobody may look at a ring's new entry before having read from the eventfd. A replica's is a semaphore: one read, one batch.

The memory belongs to the supervisor: gateway and replicas may be killed and the counts of outcomes stay.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from shoal.serve.signature import ModelSignature, TensorSignature

_ALIGN = 64
_LIVE_AT, _USING_AT = 1024, 2048
RING_ENTRIES = 4
TEXT_BYTES = 240


class Outcome(IntEnum):
    """What became of requests; each is counted once. Those up to ``LOST`` are the outcomes of accepted ones."""

    ACCEPTED = 0
    ANSWERED = 1
    EXPIRED = 2
    FAILED = 3
    CANCELLED = 4
    LOST = 5  # open when the gateway died; written by the supervisor
    REFUSED = 6
    INVALID = 7
    PROBED = 8  # asked by the service itself, to see whether it answers; counted here whatever became of it, and nowhere else


class LIVE(IntEnum):
    """What is said of weights that follow a run by its updates, float64 each; written by the process that follows it."""

    BANK = 0  # which of the two to use
    UPDATES = 1  # how often it changed
    PUBLISHED_AT = 2  # when the run had these weights, in seconds of the Unix clock; 0: they follow nothing
    LAG_S = 3  # how old they were when they could be used
    ENDED = 4  # nothing newer will come
    UPDATE_0 = 5  # how many updates of the run, on every server, are in the first bank; 0: nobody knows
    UPDATE_1 = 6  # in the second one
    LOST = 7  # how often the run could not be heard any more; written by the supervisor
    TRIES = 8  # how often it was looked for since then


ENDED = (Outcome.ANSWERED, Outcome.EXPIRED, Outcome.FAILED, Outcome.CANCELLED, Outcome.LOST)


@dataclass(frozen=True, kw_only=True)
class SlotLayout:
    """How big everything is. A value that can be sent to another process."""

    slots: int
    rings: int
    max_batch: int
    inputs: tuple[TensorSignature, ...]
    outputs: tuple[TensorSignature, ...]

    @classmethod
    def of(cls, signature: ModelSignature, slots: int, rings: int, max_batch: int) -> SlotLayout:
        return cls(slots=slots, rings=rings, max_batch=max_batch, inputs=signature.inputs, outputs=signature.outputs)

    @property
    def entry(self) -> np.dtype:
        """One entry of a ring. ``status`` 0 is done; 1 is failed, and ``text`` says why; ``update``: of the weights."""
        return np.dtype([("count", "i4"), ("status", "i4"), ("took_s", "f8"), ("update", "i8"), ("text", "u1", (TEXT_BYTES,)),
                         ("slots", "i4", (self.max_batch,))], align=True)  # fmt: skip

    @property
    def ring(self) -> np.dtype:
        """One replica's ring; the two counters on cache lines of their own."""
        return np.dtype({"names": ["posted", "done", "entries"], "formats": ["u8", "u8", (self.entry, (RING_ENTRIES,))],
                         "offsets": [0, _ALIGN, 2 * _ALIGN],
                         "itemsize": _up(2 * _ALIGN + RING_ENTRIES * self.entry.itemsize)})  # fmt: skip

    @property
    def size(self) -> int:
        return self._rings_at + self.rings * self.ring.itemsize + _up(4 * self.slots) + self.slots * self._slot_bytes

    _rings_at = 4096

    @property
    def _slot_bytes(self) -> int:
        return sum(_up(row_bytes(t)) for t in (*self.inputs, *self.outputs))


def row_bytes(tensor: TensorSignature) -> int:
    """Bytes of one row; what has no fixed size has no slot."""
    size = tensor.row_bytes
    assert size is not None, f"{tensor.name} has no fixed size"
    return size


class Slots:
    """The mapped memory: ``inputs[k]`` and ``outputs[k]`` are arrays over all slots, ``[slots, *shape of the longest row]``.

    ``lengths``: of each slot the length of its row, 0 where all rows are of one shape.
    """

    def __init__(self, fd: int, layout: SlotLayout) -> None:
        self.fd = fd
        self.layout = layout
        self._map = mmap.mmap(fd, layout.size)
        raw = np.frombuffer(self._map, np.uint8)
        self.counts = raw[: 8 * len(Outcome)].view(np.uint64)
        # The same numbers: counted here in a fifth of the time.
        self._counted = self.counts.data
        self.live = raw[_LIVE_AT : _LIVE_AT + 8 * len(LIVE)].view(np.float64)
        # Of each replica the bank that it computes with, and 1; 0: none.
        self.using = raw[_USING_AT : _USING_AT + layout.rings]
        at = layout._rings_at
        size = layout.rings * layout.ring.itemsize
        self.rings = [Ring(raw[at + k * layout.ring.itemsize :], layout) for k in range(layout.rings)]
        at += size
        self.lengths = raw[at : at + 4 * layout.slots].view(np.int32)
        at += _up(4 * layout.slots)
        self.inputs: list[np.ndarray] = []
        self.outputs: list[np.ndarray] = []
        for tensors, arrays in ((layout.inputs, self.inputs), (layout.outputs, self.outputs)):
            for tensor in tensors:
                stride, used = _up(row_bytes(tensor)), row_bytes(tensor)
                block = raw[at : at + layout.slots * stride].reshape(layout.slots, stride)[:, :used]
                arrays.append(_rows(block, tensor, stride))
                at += layout.slots * stride

    @classmethod
    def create(cls, layout: SlotLayout) -> Slots:
        """Make and reserve the memory, all zero. OSError where the machine does not have it."""
        fd = os.memfd_create("shoal-slots", os.MFD_CLOEXEC)
        try:
            os.posix_fallocate(fd, 0, layout.size)
        except OSError:
            os.close(fd)
            raise
        return cls(fd, layout)

    def count(self, outcome: Outcome, by: int = 1) -> None:
        """Count requests; only the gateway does (``LOST``: only the supervisor, while there is no gateway)."""
        self._counted[outcome] += by

    def open_requests(self) -> int:
        """Accepted requests that have no outcome yet."""
        return int(self.counts[Outcome.ACCEPTED]) - sum(int(self.counts[o]) for o in ENDED)

    def weights(self) -> dict[str, float | bool] | None:
        """Of weights that follow a run by its updates: how many came, how old they are, how often the run was lost.

        None where they follow nothing.
        """
        live = self.live
        if not live[LIVE.PUBLISHED_AT]:
            return None
        return {
            "updates": int(live[LIVE.UPDATES]), "age_s": max(0.0, time.time() - float(live[LIVE.PUBLISHED_AT])),
            "lag_s": float(live[LIVE.LAG_S]), "following": not live[LIVE.ENDED],
            "lost": int(live[LIVE.LOST]), "tries": int(live[LIVE.TRIES]),
        }  # fmt: skip

    def close(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self.fd)


class Ring:
    """One replica's ring."""

    def __init__(self, raw: np.ndarray, layout: SlotLayout) -> None:
        self._ring = raw[: layout.ring.itemsize].view(layout.ring)[0]
        self._posted = raw[:8].view(np.uint64)
        self._done = raw[_ALIGN : _ALIGN + 8].view(np.uint64)
        self._entries = self._ring["entries"]

    @property
    def posted(self) -> int:
        return int(self._posted[0])

    @property
    def done(self) -> int:
        return int(self._done[0])

    def post(self, slots: Sequence[int]) -> int:
        """Write a batch and return its number; the caller wakes the replica afterwards, and never posts more than fit."""
        number = self.posted
        assert number - self.done < RING_ENTRIES
        entry = self._entries[number % RING_ENTRIES]
        entry["slots"][: len(slots)] = slots
        entry["count"] = len(slots)
        self._posted[0] = number + 1
        return number

    def slots_of(self, number: int) -> list[int]:
        """The slots of a batch that was posted."""
        entry = self._entries[number % RING_ENTRIES]
        return [int(k) for k in entry["slots"][: int(entry["count"])]]

    def finish(self, took_s: float, failure: str | None = None, update: int = 0) -> None:
        """Say that the oldest batch is done; the caller wakes the gateway afterwards.

        ``update``: of the run that the weights follow, 0 where they follow none.
        """
        entry = self._entries[self.done % RING_ENTRIES]
        entry["took_s"], entry["status"], entry["update"] = took_s, int(failure is not None), update
        if failure is not None:
            text = failure.encode()[:TEXT_BYTES]
            entry["text"] = 0
            entry["text"][: len(text)] = np.frombuffer(text, np.uint8)
        self._done[0] = self.done + 1

    def result(self, number: int) -> tuple[float, str | None]:
        """(seconds, None) of a batch that is done, or (seconds, why it failed)."""
        entry = self._entries[number % RING_ENTRIES]
        if not entry["status"]:
            return float(entry["took_s"]), None
        return float(entry["took_s"]), bytes(entry["text"]).rstrip(b"\0").decode(errors="replace")

    def update_of(self, number: int) -> int:
        """With which update of the weights a batch was computed that is done; 0 where they follow nothing."""
        return int(self._entries[number % RING_ENTRIES]["update"])

    def reset(self) -> None:
        """Forget what a dead replica had not done; only while nobody serves this ring."""
        self._done[0] = self.posted


def drain(fd: int) -> None:
    """Take back all wakings that nobody has read. Asks first: a replica's descriptor blocks, and blocking is shared with it."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    while poll.poll(0):
        os.eventfd_read(fd)


def _rows(block: np.ndarray, tensor: TensorSignature, stride: int) -> np.ndarray:
    """See ``[slots, bytes]`` as ``[slots, *row shape]`` of the tensor's own type; rows are a stride apart."""
    shape = tensor.row_shape
    assert shape is not None, f"{tensor.name} has no fixed size"
    inner = np.empty((1, *shape), tensor.dtype).strides[1:]
    flat = np.ndarray(
        (block.shape[0], *shape), tensor.dtype, buffer=block.base, offset=_offset(block), strides=(stride, *inner)
    )
    return flat


def _offset(block: np.ndarray) -> int:
    base = block.base
    assert isinstance(base, np.ndarray)
    return block.__array_interface__["data"][0] - base.__array_interface__["data"][0]


def _up(size: int) -> int:
    return -(-max(size, 1) // _ALIGN) * _ALIGN
