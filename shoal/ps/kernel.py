"""What is done with the rows of a table in bulk: the C files beside this one through ctypes.

``load()`` returns them, or where there is no compiler ``fallback.py``, which gives the same answers slowly. All processes of a
table use the same kind: their locks are different ones.
"""

from __future__ import annotations

import ctypes
import functools
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from shoal.errors import DeadlineError, JobFailed
from shoal.kernels.build import build
from shoal.ps.memory import TableMemory
from shoal.ps.spec import TableSpec

LOCK_TIMEOUT_S = 120.0
FOUND, ABSENT, MAYBE_COLD = 0, 1, 3
_FILES = [Path(__file__).with_name(name) for name in ("rows.c", "row_math.c", "row_batch.c", "rows.h")]
# Square roots are only done for eight numbers at once where they need not set errno.
_FLAGS = ["-ffp-contract=off", "-fno-math-errno", "-pthread"]
BUSY, NO_MEMORY, FULL, _STUCK = -1, -2, -3, -4


@dataclass(frozen=True)
class Batch:
    """The different keys of a batch.

    Attributes:
        keys: int64, in the order of first appearance.
        inverse: int32, for each key of the batch which of these it is; -1 for one that is left out.
        counts: uint32, how often each stands in the batch.
    """

    keys: np.ndarray
    inverse: np.ndarray
    counts: np.ndarray


@dataclass(frozen=True)
class Part:
    """Gradients by key, sorted by shard: shard ``s`` has those from ``starts[s]`` to ``starts[s + 1]``."""

    keys: np.ndarray
    counts: np.ndarray
    rows: torch.Tensor
    starts: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Push:
    """What is applied to shards.

    Attributes:
        keys, counts, rows: different keys, how often each was seen, and its gradient (n, width); or with ``raw`` its weights and
            state (n, width + state), which are put there as they are.
        last: with ``raw``, the step of each row's last use.
        order: positions of a shard's keys, or None for all of them in their order.
        id: of a push that must be applied once; -1: it has none.
        overwrite: with ``raw``, whether a row that is there gives way.
    """

    keys: np.ndarray
    counts: np.ndarray
    rows: torch.Tensor
    last: np.ndarray | None = None
    order: np.ndarray | None = None
    id: int = -1
    step: int = 0
    scale: float = 1.0
    raw: bool = False
    overwrite: bool = False


class Kernel(Protocol):
    """The operations. Tensors and arrays are contiguous; rows are float32 or float64."""

    name: str

    def unique(self, keys: np.ndarray, skipped: int | None) -> Batch: ...

    def gather(self, rows: torch.Tensor, inverse: np.ndarray, bag: int) -> torch.Tensor:
        """Sums of ``bag`` rows each, by position: (len(inverse) / bag, width)."""

    def scatter(self, gradients: torch.Tensor, inverse: np.ndarray, bag: int, count: int) -> torch.Tensor:
        """The sums of gradients by position: (count, width)."""

    def partition(self, keys: np.ndarray, shards: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions sorted by shard (uint32), and where each shard's begin (int64, one more than shards)."""

    def merge(self, parts: Sequence[Part], first: int, last: int) -> Part:
        """Add up by key, part after part, what parts have for the shards from first to last; these are the result's shards."""

    def create(self, table: TableHandle) -> None: ...

    def pull(self, table: TableHandle, keys: np.ndarray, step: int) -> tuple[torch.Tensor, np.ndarray]:
        """The weights of different keys, and for each FOUND, ABSENT (what it would begin with) or MAYBE_COLD."""

    def apply(self, table: TableHandle, shard: int, push: Push) -> bool:
        """Apply a push to a shard, as a whole or not at all; False where its id was applied before."""

    def apply_all(self, table: TableHandle, first: int, starts: np.ndarray, push: Push) -> int:
        """The same for shards from ``first`` on, each of which gets what lies between its ``starts``; to how many it was new."""

    def lock(self, table: TableHandle, shard: int) -> None:
        """Keep other writers out, and mend what one that was killed has left."""

    def unlock(self, table: TableHandle, shard: int) -> None: ...

    def remove(self, table: TableHandle, shard: int, rows: np.ndarray) -> None:
        """Forget rows by their numbers (uint32); the lock is held."""

    def mark_cold(self, table: TableHandle, shard: int, keys: np.ndarray) -> None:
        """Note that the store of cold rows has these keys; the lock is held."""

    def begin_at(self, table: TableHandle, shard: int, push_id: int) -> None:
        """Take pushes before this id for applied; the lock is held."""


class _Layout(ctypes.Structure):
    _fields_ = [
        ("base", ctypes.c_void_p), ("fd", ctypes.c_int64), ("bits", ctypes.c_int64), ("width", ctypes.c_int64),
        ("state", ctypes.c_int64), ("itemsize", ctypes.c_int64), ("row_bytes", ctypes.c_int64),
        ("optimizer", ctypes.c_int64), ("initialiser", ctypes.c_int64), ("admit", ctypes.c_int64),
        ("max_age", ctypes.c_int64), ("capacity", ctypes.c_int64), ("seed", ctypes.c_uint64),
        ("init", ctypes.c_double * 2), ("p", ctypes.c_double * 8),
    ]  # fmt: skip


class _Push(ctypes.Structure):
    _fields_ = [
        ("keys", ctypes.c_void_p), ("counts", ctypes.c_void_p), ("rows", ctypes.c_void_p), ("last", ctypes.c_void_p),
        ("order", ctypes.c_void_p), ("n", ctypes.c_int64), ("id", ctypes.c_int64), ("step", ctypes.c_int64),
        ("scale", ctypes.c_double), ("raw", ctypes.c_int64), ("overwrite", ctypes.c_int64),
    ]  # fmt: skip


class _Part(ctypes.Structure):
    _fields_ = [("keys", ctypes.c_void_p), ("counts", ctypes.c_void_p), ("rows", ctypes.c_void_p),
                ("starts", ctypes.c_void_p)]  # fmt: skip


@dataclass(frozen=True)
class TableHandle:
    """A table's spec and its memory in this process."""

    spec: TableSpec
    memory: TableMemory

    @functools.cached_property
    def layout(self) -> _Layout:
        spec = self.spec
        numbers = (*spec.optimizer.numbers(), *([0.0] * 8))[:8]
        return _Layout(
            base=self.memory.address, fd=self.memory.fd, bits=spec.shards.bit_length() - 1, width=spec.width,
            state=spec.state, itemsize=spec.dtype.itemsize, row_bytes=spec.row_bytes, optimizer=spec.optimizer.code,
            initialiser=spec.init.code, admit=spec.admission, max_age=spec.max_age or 0, capacity=spec.capacity,
            seed=spec.seed & 0xFFFFFFFFFFFFFFFF, init=(ctypes.c_double * 2)(*spec.init.numbers()),
            p=(ctypes.c_double * 8)(*numbers),
        )  # fmt: skip


class _Compiled:
    name = "c"

    def __init__(self, lib: ctypes.CDLL) -> None:
        self._lib = lib
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        signatures = {
            "unique": ([pointer, number, pointer, pointer, pointer, number, number], number),
            "partition": ([pointer, number, number, pointer, pointer], None),
            "create": ([pointer], ctypes.c_int),
            "pull": ([pointer, pointer, number, number, pointer, pointer], number),
            "apply": ([pointer, number, pointer, ctypes.c_double], ctypes.c_int),
            "apply_all": ([pointer, number, number, pointer, pointer, ctypes.c_double, pointer], number),
            "lock": ([pointer, number, ctypes.c_double], ctypes.c_int),
            "unlock": ([pointer, number], None),
            "remove": ([pointer, number, pointer, number], ctypes.c_int),
            "mark": ([pointer, number, pointer, number], ctypes.c_int),
            "begin_at": ([pointer, number, number], None),
        }
        for suffix in ("f32", "f64"):
            for name in ("gather", "scatter"):
                signatures[f"{name}_{suffix}"] = ([pointer, pointer, pointer, number, number, number], None)
            signatures[f"merge_{suffix}"] = ([pointer, *[number] * 4, *[pointer] * 4], number)
        for name, (arguments, result) in signatures.items():
            function = getattr(lib, f"shoal_rows_{name}")
            function.argtypes, function.restype = arguments, result
            setattr(self, f"_{name}", function)

    def _of(self, name: str, dtype: torch.dtype) -> ctypes._NamedFuncPointer:
        found: ctypes._NamedFuncPointer = getattr(self, f"_{name}_{'f32' if dtype == torch.float32 else 'f64'}")
        return found

    def unique(self, keys: np.ndarray, skipped: int | None) -> Batch:
        n = len(keys)
        unique, counts, inverse = np.empty(n, np.int64), np.empty(n, np.uint32), np.empty(n, np.int32)
        count = self._unique(  # type: ignore[attr-defined]
            keys.ctypes.data, n, unique.ctypes.data, inverse.ctypes.data, counts.ctypes.data, skipped is not None, skipped or 0
        )
        if count < 0:
            raise MemoryError("no memory for the keys of a batch")
        return Batch(unique[:count], inverse, counts[:count])

    def gather(self, rows: torch.Tensor, inverse: np.ndarray, bag: int) -> torch.Tensor:
        out = torch.empty(len(inverse) // bag, rows.shape[1], dtype=rows.dtype)
        self._of("gather", rows.dtype)(
            out.data_ptr(), rows.data_ptr(), inverse.ctypes.data, len(out), bag, rows.shape[1]
        )
        return out

    def scatter(self, gradients: torch.Tensor, inverse: np.ndarray, bag: int, count: int) -> torch.Tensor:
        sums = torch.zeros(count, gradients.shape[1], dtype=gradients.dtype)
        self._of("scatter", sums.dtype)(
            sums.data_ptr(), gradients.data_ptr(), inverse.ctypes.data, len(gradients), bag, sums.shape[1]
        )
        return sums

    def partition(self, keys: np.ndarray, shards: int) -> tuple[np.ndarray, np.ndarray]:
        order, starts = np.empty(len(keys), np.uint32), np.empty(shards + 1, np.int64)
        self._partition(  # type: ignore[attr-defined]
            keys.ctypes.data, len(keys), shards.bit_length() - 1, order.ctypes.data, starts.ctypes.data
        )
        return order, starts

    def merge(self, parts: Sequence[Part], first: int, last: int) -> Part:
        most = sum(int(part.starts[last] - part.starts[first]) for part in parts)
        width, dtype = parts[0].rows.shape[1], parts[0].rows.dtype
        keys, counts = np.empty(most, np.int64), np.empty(most, np.uint32)
        rows, starts = torch.empty(most, width, dtype=dtype), np.empty(last - first + 1, np.int64)
        given = (_Part * len(parts))(
            *(_Part(p.keys.ctypes.data, p.counts.ctypes.data, p.rows.data_ptr(), p.starts.ctypes.data) for p in parts)
        )
        total = self._of("merge", dtype)(
            given, len(parts), first, last, width, keys.ctypes.data, counts.ctypes.data, rows.data_ptr(), starts.ctypes.data
        )
        if total < 0:
            raise MemoryError("no memory for the keys of a step")
        return Part(keys[:total], counts[:total], rows[:total], starts)

    def create(self, table: TableHandle) -> None:
        settle(self._create(ctypes.byref(table.layout)), table, 0)  # type: ignore[attr-defined]

    def pull(self, table: TableHandle, keys: np.ndarray, step: int) -> tuple[torch.Tensor, np.ndarray]:
        rows, flags = torch.empty(len(keys), table.spec.width, dtype=table.spec.dtype), np.empty(len(keys), np.uint8)
        while True:
            found = self._pull(  # type: ignore[attr-defined]
                ctypes.byref(table.layout), keys.ctypes.data, len(keys), step, rows.data_ptr(), flags.ctypes.data
            )
            if found >= 0:
                return rows, flags
            # Whoever was writing there may have been killed: the next to hold the lock mends it.
            self.lock(table, _STUCK - found)
            self.unlock(table, _STUCK - found)

    def apply(self, table: TableHandle, shard: int, push: Push) -> bool:
        given = _pushed(push)
        done = self._apply(ctypes.byref(table.layout), shard, ctypes.byref(given), LOCK_TIMEOUT_S)  # type: ignore[attr-defined]
        settle(done, table, shard)
        return bool(done == 0)

    def apply_all(self, table: TableHandle, first: int, starts: np.ndarray, push: Push) -> int:
        given, failed = _pushed(push), ctypes.c_int64(first)
        done = self._apply_all(  # type: ignore[attr-defined]
            ctypes.byref(table.layout), first, len(starts) - 1, ctypes.byref(given), starts.ctypes.data, LOCK_TIMEOUT_S,
            ctypes.byref(failed),
        )  # fmt: skip
        settle(done, table, failed.value)
        return int(done)

    def lock(self, table: TableHandle, shard: int) -> None:
        settle(self._lock(ctypes.byref(table.layout), shard, LOCK_TIMEOUT_S), table, shard)  # type: ignore[attr-defined]

    def unlock(self, table: TableHandle, shard: int) -> None:
        self._unlock(ctypes.byref(table.layout), shard)  # type: ignore[attr-defined]

    def remove(self, table: TableHandle, shard: int, rows: np.ndarray) -> None:
        done = self._remove(ctypes.byref(table.layout), shard, rows.ctypes.data, len(rows))  # type: ignore[attr-defined]
        settle(done, table, shard)

    def mark_cold(self, table: TableHandle, shard: int, keys: np.ndarray) -> None:
        done = self._mark(ctypes.byref(table.layout), shard, keys.ctypes.data, len(keys))  # type: ignore[attr-defined]
        settle(done, table, shard)

    def begin_at(self, table: TableHandle, shard: int, push_id: int) -> None:
        self._begin_at(ctypes.byref(table.layout), shard, push_id)  # type: ignore[attr-defined]


def _pushed(push: Push) -> _Push:
    order = push.order
    return _Push(
        keys=push.keys.ctypes.data, counts=push.counts.ctypes.data, rows=push.rows.data_ptr(),
        last=None if push.last is None else push.last.ctypes.data,
        order=None if order is None else order.ctypes.data,
        n=len(push.keys) if order is None else len(order), id=push.id, step=push.step, scale=push.scale,
        raw=push.raw, overwrite=push.overwrite,
    )  # fmt: skip


def settle(done: int, table: TableHandle, shard: int) -> None:
    """Raise what a negative answer means."""
    name = table.spec.name
    if done == BUSY:
        raise DeadlineError(
            f"Shard {shard} of the table {name} was locked for {LOCK_TIMEOUT_S:.0f} s; see what its writer is doing."
        )
    if done == NO_MEMORY:
        raise JobFailed(
            f"The table {name} could not grow: memory has run out, and nothing of this push was applied to shard {shard}; "
            "give the table a limit (memory=…), so that cold rows go to disk."
        )
    if done == FULL:
        raise JobFailed(f"Shard {shard} of the table {name} holds as many rows as it can; let keys be admitted later, or age.")


@functools.lru_cache(maxsize=1)
def load() -> Kernel:
    """The compiled kernel, or the fallback; ``SHOAL_NATIVE=0`` asks for the latter."""
    try:
        return _Compiled(build("rows", _FILES, _FLAGS))
    except (OSError, subprocess.SubprocessError):
        from shoal.ps.fallback import Fallback

        return Fallback()
