"""Where the parts of a table lie in its memory; rows.h has the same numbers.

A memfd as large as any table could become, mapped as a whole: it takes pages only where something was written, so every shard
has a span of its own to grow in and nothing is ever copied. Pages are reserved before they are written to, so that running out of
memory is an error and not a signal. Behind the shards lie the sketch that counts keys without a row, and each worker's *outbox*:
what it has to say of a step.
"""

from __future__ import annotations

import os

import numpy as np

from shoal.comm.memory import SharedMemory
from shoal.errors import JobFailed, RequestError
from shoal.ps.spec import TableSpec

SPAN = 1 << 34
HEAD = 1 << 24
LEDGER_AT, LEDGER_IDS = 4096, 1 << 16
FILTER_AT, FILTER_BITS = 1 << 21, 24
CHANGES_AT, MOST_CHANGES = 1 << 23, 1 << 20
UNDO_AT, ROWS_AT = 1 << 30, 1 << 31
SKETCH_BITS = 22
_MAGIC = 0x5F53574F525F5450
_OUTBOX_FROM, _OUTBOX, _MOST_OUTBOXES = 1 << 30, 1 << 32, 64


class TableMemory:
    """The mapped memory of a table; ``word`` numbers of a shard are those of ``struct shard``, after its lock."""

    def __init__(self, block: SharedMemory, shards: int) -> None:
        self.block = block
        self.bytes: np.ndarray = block.bytes.numpy()
        self._sketch_at = shards * SPAN + HEAD

    @classmethod
    def create(cls, spec: TableSpec) -> TableMemory:
        """Make the memory of an empty table."""
        fd = os.memfd_create("shoal-rows", os.MFD_CLOEXEC)
        os.ftruncate(fd, _size(spec.shards))
        made = cls.attach(spec, fd, check=False)
        made.bytes[:16].view(np.int64)[:] = _MAGIC, spec.row_bytes
        return made

    @classmethod
    def attach(cls, spec: TableSpec, fd: int, check: bool = True) -> TableMemory:
        """Map what another process made; RequestError where it is the memory of another table."""
        try:
            found = cls(SharedMemory.attach(fd, _size(spec.shards)), spec.shards)
        except OSError as error:
            raise RequestError(
                f"The table {spec.name} needs {_size(spec.shards) >> 40} TiB of address space ({error.strerror}); "
                "raise the limit of virtual memory (ulimit -v unlimited)."
            ) from None
        if check and tuple(found.bytes[:16].view(np.int64)) != (_MAGIC, spec.row_bytes):
            raise JobFailed(f"The memory that came for the table {spec.name} is of another table.")
        return found

    @property
    def address(self) -> int:
        return self.block.address

    @property
    def fd(self) -> int:
        return self.block.fd

    def head(self, shard: int) -> int:
        """Where a shard begins."""
        return shard * SPAN + HEAD

    def words(self, shard: int) -> np.ndarray:
        """A shard's numbers, uint64; see ``Word``."""
        at = self.head(shard) + 64
        found: np.ndarray = self.bytes[at : at + 256].view(np.uint64)
        return found

    def rows(self, shard: int, count: int, row_bytes: int) -> np.ndarray:
        """The first rows of a shard as bytes (count, row_bytes): a view."""
        at = self.head(shard) + ROWS_AT
        found: np.ndarray = self.bytes[at : at + count * row_bytes].reshape(count, row_bytes)
        return found

    def changes(self, shard: int, size: int) -> np.ndarray:
        """A shard's ring of the keys that changed last, int64 (size): a view."""
        at = self.head(shard) + CHANGES_AT
        found: np.ndarray = self.bytes[at : at + 8 * size].view(np.int64)
        return found

    def note_changed(self, shard: int, keys: np.ndarray) -> None:
        """Tell whoever listens that these rows change; the shard's lock is held."""
        words = self.words(shard)
        size, begin = int(words[Word.HEARD]), int(words[Word.CHANGES])
        if size:
            kept = keys[-size:]
            self.changes(shard, size)[(begin + len(keys) - len(kept) + np.arange(len(kept))) % size] = kept
            words[Word.CHANGES] = begin + len(keys)

    def listen(self, shard: int, size: int) -> None:
        """Have keys noted from now on, in a ring of ``size``, a power of two; the lock is held. OSError: no memory is left."""
        os.posix_fallocate(self.fd, self.head(shard) + CHANGES_AT, 8 * size)
        self.words(shard)[Word.HEARD] = size

    def sketch(self) -> np.ndarray:
        """Both rows of the sketch, uint16 (2, 2^22): a view."""
        size = 4 << SKETCH_BITS
        found: np.ndarray = self.bytes[self._sketch_at : self._sketch_at + size].view(np.uint16).reshape(2, -1)
        return found

    def outbox(self, rank: int, size: int) -> np.ndarray:
        """The first bytes of a worker's outbox, reserved: a view."""
        if rank >= _MOST_OUTBOXES:
            raise RequestError(f"A table of rows is shared by at most {_MOST_OUTBOXES} workers of a machine; use fewer.")
        at = self._sketch_at - HEAD + _OUTBOX_FROM + rank * _OUTBOX
        try:
            if size > _OUTBOX:
                raise OSError
            os.posix_fallocate(self.fd, at, max(size, 1))
        except OSError:
            raise JobFailed(
                f"The gradients of a step take {size >> 20} MiB and memory has run out; use smaller batches."
            ) from None
        found: np.ndarray = self.bytes[at : at + size]
        return found


class Word:
    """Which of a shard's numbers is what."""

    PHASE, PENDING, UNDO, STRUCTURE, LEVEL, ROWS_USED, ROWS_RESERVED, UNDO_RESERVED, INDEX_RESERVED = range(9)
    FREE_COUNT, LIVE, LEDGER_BASE, LEDGER_NEXT, PENDING_NEXT, SPILLED, PUSHES, REPAIRS = range(9, 17)
    HEARD, CHANGES = 17, 18


def _size(shards: int) -> int:
    return shards * SPAN + _OUTBOX_FROM + _MOST_OUTBOXES * _OUTBOX
