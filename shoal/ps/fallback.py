"""What rows.c, row_math.c and row_batch.c do, with numpy: the same answers without a compiler, at a fraction of the speed.

The memory is laid out alike, but for the index: each process finds rows by a dictionary of its own, which it makes anew
whenever the shard's STRUCTURE says that rows were moved. The lock is a record lock of the system, which lets go when its
holder dies.
"""

from __future__ import annotations

import dataclasses
import fcntl
import os
import threading
import time
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from shoal.ps import kernel as kernels
from shoal.ps.kernel import ABSENT, FOUND, MAYBE_COLD, Batch, Part, Push, TableHandle
from shoal.ps.memory import FILTER_AT, FILTER_BITS, LEDGER_AT, LEDGER_IDS, ROWS_AT, SKETCH_BITS, UNDO_AT, Word
from shoal.ps.spec import HEAD_BYTES

_IDLE, _APPLYING, _COMMITTED, _REBUILDING = range(4)
_NONE = 0xFFFFFFFFFFFFFFFF
_PROCESS_LOCK = threading.RLock()


def mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64, over uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hashes(keys: np.ndarray) -> np.ndarray:
    return mix(keys.astype(np.int64).view(np.uint64) + np.uint64(0x9E3779B97F4A7C15))


def first_rows(table: TableHandle, keys: np.ndarray) -> np.ndarray:
    """What rows begin with: (n, width + state)."""
    spec = table.spec
    low, high = spec.init.numbers()
    dtype = np.float32 if spec.dtype == torch.float32 else np.float64
    values = np.full((len(keys), spec.width + spec.state), getattr(spec.optimizer, "initial_accumulator_value", 0.0), dtype)
    golden = np.uint64(0x9E3779B97F4A7C15)
    stream = mix(np.uint64(spec.seed & _NONE) ^ hashes(keys))[:, None]
    at = np.arange(spec.width, dtype=np.uint64)[None]
    if spec.init.code == 2:
        draws = (mix(stream + at * golden) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        values[:, : spec.width] = low + (high - low) * draws
    elif spec.init.code == 3:
        total = np.zeros((len(keys), spec.width), np.int64)
        for k in range(3):
            draw = mix(stream + (np.uint64(3) * at + np.uint64(k)) * golden)
            for shift in (0, 16, 32, 48):
                total += ((draw >> np.uint64(shift)) & np.uint64(0xFFFF)).astype(np.int64)
        values[:, : spec.width] = low + high * ((total - 6 * 65535).astype(np.float64) * 2.0**-16)
    else:
        values[:, : spec.width] = low
    return values


def update(table: TableHandle, rows: np.ndarray, g: np.ndarray, step: int) -> None:
    """Let the optimizer take a step over rows (n, width + state), in place."""
    spec = table.spec
    n, kind, number = spec.width, spec.optimizer.code, rows.dtype.type
    p = [number(x) for x in spec.optimizer.numbers()]
    w, s, v = rows[:, :n], rows[:, n : 2 * n], rows[:, 2 * n :]
    if kind == 0:
        if spec.state:
            s[:] = p[1] * s + g
        w -= p[0] * (s if spec.state else g)
    elif kind == 1:
        s += g * g
        w -= p[0] * g / (np.sqrt(s) + p[1])
    elif kind == 2:
        s += (np.square(g.astype(np.float64)).sum(1, keepdims=True) / n).astype(number)
        w -= p[0] / (np.sqrt(s) + p[1]) * g
    elif kind == 3:
        lr, b1, b2, _ = spec.optimizer.numbers()
        by = number(lr * np.sqrt(1 - b2 ** (step + 1)) / (1 - b1 ** (step + 1)))
        s += (g - s) * (1 - p[1])
        v += (g * g - v) * (1 - p[2])
        w -= by * s / (np.sqrt(v) + p[3])
    else:
        root = np.sqrt(v + g * g)
        s += g - (root - np.sqrt(v)) / p[0] * w
        v += g * g
        w[:] = np.where(np.abs(s) <= p[2], 0, (np.where(s < 0, -p[2], p[2]) - s) / ((p[1] + root) / p[0] + p[3]))


class _Shard:
    """A shard's memory in this process, and where its rows are."""

    def __init__(self, table: TableHandle, shard: int) -> None:
        spec, memory = table.spec, table.memory
        self._table, self._shard = table, shard
        self.words = memory.words(shard)
        head = memory.head(shard)
        self.undo = memory.bytes[head + UNDO_AT : head + ROWS_AT]
        self.ledger = memory.bytes[head + LEDGER_AT : head + LEDGER_AT + LEDGER_IDS // 8]
        self.filter = memory.bytes[head + FILTER_AT : head + FILTER_AT + (1 << (FILTER_BITS - 3))]
        self.head = np.dtype(
            {"names": ["key", "version", "live", "count", "last"], "formats": ["<i8", "<u4", "<u4", "<u4", "<i8"],
             "offsets": [0, 8, 12, 16, 24], "itemsize": spec.row_bytes}
        )  # fmt: skip
        self._places: dict[int, int] = {}
        self._known, self._structure = 0, -1

    def raw(self, count: int | None = None) -> np.ndarray:
        used = int(self.words[Word.ROWS_USED]) if count is None else count
        return self._table.memory.rows(self._shard, used, self._table.spec.row_bytes)

    def heads(self, count: int | None = None) -> np.ndarray:
        return self.raw(count).reshape(-1).view(self.head)

    def places(self) -> dict[int, int]:
        """Key -> number of its row."""
        structure, used = int(self.words[Word.STRUCTURE]), int(self.words[Word.ROWS_USED])
        if structure != self._structure:
            self._places, self._known, self._structure = {}, 0, structure
        if used > self._known:
            heads = self.heads(used)[self._known :]
            live = np.flatnonzero(heads["live"])
            self._places.update(zip(heads["key"][live].tolist(), (live + self._known).tolist(), strict=True))
            self._known = used
        return self._places

    def values(self, numbers: np.ndarray) -> np.ndarray:
        """Copies of rows' weights and state."""
        spec = self._table.spec
        size = (spec.width + spec.state) * spec.dtype.itemsize
        return spec.values(self.raw()[numbers, HEAD_BYTES : HEAD_BYTES + size]).numpy()

    def values_of(self, numbers: np.ndarray, fresh: np.ndarray, first: np.ndarray) -> np.ndarray:
        """Copies of weights and state; of rows that are new, what they begin with."""
        values = first
        values[~fresh] = self.values(numbers[~fresh])
        return values

    def knows(self, push_id: int) -> bool:
        words = self.words
        if push_id < int(words[Word.LEDGER_BASE]):
            return True
        bit = push_id % LEDGER_IDS
        return push_id < int(words[Word.LEDGER_NEXT]) and bool(self.ledger[bit // 8] >> bit % 8 & 1)

    def slide(self, until: int) -> None:
        words = self.words
        begin = int(words[Word.LEDGER_NEXT])
        if until <= begin:
            return
        words[Word.PENDING_NEXT] = until
        for push_id in range(max(begin, until - LEDGER_IDS), until):
            bit = push_id % LEDGER_IDS
            self.ledger[bit // 8] &= 0xFF ^ (1 << bit % 8)
        words[Word.LEDGER_BASE] = max(int(words[Word.LEDGER_BASE]), until - LEDGER_IDS, 0)
        words[Word.LEDGER_NEXT] = until
        words[Word.PENDING_NEXT] = 0

    def finish(self) -> None:
        words = self.words
        if int(words[Word.PENDING]) != _NONE:
            bit = int(words[Word.PENDING]) % LEDGER_IDS
            self.ledger[bit // 8] |= 1 << bit % 8
        words[Word.UNDO] = 0
        words[Word.PHASE] = _IDLE

    def mend(self) -> None:
        """Undo, or finish, what a writer that was killed had begun."""
        words = self.words
        if int(words[Word.PENDING_NEXT]):
            self.slide(int(words[Word.PENDING_NEXT]))
        if int(words[Word.PHASE]) == _IDLE and not int(words[Word.STRUCTURE]) & 1:
            return
        words[Word.REPAIRS] += np.uint64(1)
        if int(words[Word.PHASE]) == _COMMITTED:
            self.finish()
            return
        if int(words[Word.PHASE]) == _APPLYING:
            self._roll_back()
            words[Word.PHASE] = _REBUILDING
        self.rebuild()
        words[Word.PHASE] = _IDLE

    def rebuild(self) -> None:
        words = self.words
        words[Word.LIVE] = np.count_nonzero(self.heads()["live"])
        words[Word.STRUCTURE] = (int(words[Word.STRUCTURE]) | 1) + 1

    def note_changed(self, keys: np.ndarray) -> None:
        self._table.memory.note_changed(self._shard, keys)

    def note(self, record: bytes) -> None:
        """Write to the undo log: the record, and behind it its length."""
        at = int(self.words[Word.UNDO])
        data = record + len(record).to_bytes(8, "little")
        self.undo[at : at + len(data)] = np.frombuffer(data, np.uint8)
        self.words[Word.UNDO] = at + len(data)

    def _roll_back(self) -> None:
        end = int(self.words[Word.UNDO])
        while end:
            length = int.from_bytes(self.undo[end - 8 : end].tobytes(), "little")
            record = self.undo[end - 8 - length : end - 8].tobytes()
            end -= 8 + length
            kind, at = record[:1], int.from_bytes(record[1:9], "little")
            if kind == b"s":
                self._table.memory.sketch().reshape(-1)[at] = int.from_bytes(record[9:], "little")
            elif kind == b"m":
                self.heads(at + 1)["live"][at] = 0
            else:
                self.raw(at + 1)[at] = np.frombuffer(record[9:], np.uint8)


class Fallback:
    """See ``kernel.Kernel``."""

    name = "numpy"

    def __init__(self) -> None:
        self._shards: weakref.WeakKeyDictionary[Any, dict[int, _Shard]] = weakref.WeakKeyDictionary()

    def _shard(self, table: TableHandle, shard: int) -> _Shard:
        own = self._shards.setdefault(table.memory, {})
        if shard not in own:
            own[shard] = _Shard(table, shard)
        return own[shard]

    # -- batches -------------------------------------------------------------------------------------------------

    def unique(self, keys: np.ndarray, skipped: int | None) -> Batch:
        kept = np.ones(len(keys), bool) if skipped is None else keys != skipped
        found, first, back, counts = np.unique(keys[kept], return_index=True, return_inverse=True, return_counts=True)
        order = np.argsort(first)
        place = np.empty(len(order), np.int32)
        place[order] = np.arange(len(order), dtype=np.int32)
        inverse = np.full(len(keys), -1, np.int32)
        inverse[kept] = place[back.reshape(-1)]
        return Batch(found[order], inverse, counts[order].astype(np.uint32))

    def gather(self, rows: torch.Tensor, inverse: np.ndarray, bag: int) -> torch.Tensor:
        padded = torch.cat([rows, torch.zeros(1, rows.shape[1], dtype=rows.dtype)])
        at = torch.from_numpy(np.where(inverse < 0, len(rows), inverse).astype(np.int64)).view(-1, bag)
        out = padded[at[:, 0]]
        for k in range(1, bag):
            out += padded[at[:, k]]
        return out

    def scatter(self, gradients: torch.Tensor, inverse: np.ndarray, bag: int, count: int) -> torch.Tensor:
        sums = torch.zeros(count + 1, gradients.shape[1], dtype=gradients.dtype)
        at = torch.from_numpy(np.where(inverse < 0, count, inverse).astype(np.int64))
        sums.index_add_(0, at, gradients.repeat_interleave(bag, 0) if bag > 1 else gradients)
        return sums[:count]

    def partition(self, keys: np.ndarray, shards: int) -> tuple[np.ndarray, np.ndarray]:
        home = (hashes(keys) >> np.uint64(65 - shards.bit_length())).astype(np.int64) if shards > 1 else np.zeros(len(keys), int)
        order = np.argsort(home, kind="stable").astype(np.uint32)
        return order, np.concatenate([[0], np.cumsum(np.bincount(home, minlength=shards))]).astype(np.int64)

    def merge(self, parts: Sequence[Part], first: int, last: int) -> Part:
        found: list[tuple[np.ndarray, np.ndarray, torch.Tensor]] = []
        for shard in range(first, last):
            cuts = [slice(int(p.starts[shard]), int(p.starts[shard + 1])) for p in parts]
            batch = self.unique(np.concatenate([p.keys[c] for p, c in zip(parts, cuts, strict=True)]), None)
            counts = np.concatenate([p.counts[c] for p, c in zip(parts, cuts, strict=True)])
            rows = torch.cat([p.rows[c] for p, c in zip(parts, cuts, strict=True)])
            summed = np.bincount(batch.inverse, counts, len(batch.keys)).astype(np.uint32)
            found.append((batch.keys, summed, self.scatter(rows, batch.inverse, 1, len(batch.keys))))
        keys, counts_, rows_ = zip(*found, strict=True)
        starts = np.concatenate([[0], np.cumsum([len(k) for k in keys])]).astype(np.int64)
        return Part(np.concatenate(keys), np.concatenate(counts_), torch.cat(rows_), starts)

    # -- tables --------------------------------------------------------------------------------------------------

    def create(self, table: TableHandle) -> None:
        """Memory is zero, and that is an empty table."""

    def lock(self, table: TableHandle, shard: int) -> None:
        _PROCESS_LOCK.acquire()
        deadline = time.monotonic() + kernels.LOCK_TIMEOUT_S
        while True:
            try:
                fcntl.lockf(table.memory.fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, table.memory.head(shard))
                break
            except OSError:
                if time.monotonic() > deadline:
                    _PROCESS_LOCK.release()
                    kernels.settle(kernels.BUSY, table, shard)
                time.sleep(0.0002)
        self._shard(table, shard).mend()

    def unlock(self, table: TableHandle, shard: int) -> None:
        fcntl.lockf(table.memory.fd, fcntl.LOCK_UN, 1, table.memory.head(shard))
        _PROCESS_LOCK.release()

    def pull(self, table: TableHandle, keys: np.ndarray, step: int) -> tuple[torch.Tensor, np.ndarray]:
        spec = table.spec
        values = first_rows(table, keys)
        flags = np.full(len(keys), ABSENT, np.uint8)
        order, starts = self.partition(keys, spec.shards)
        for shard in range(spec.shards):
            own = order[starts[shard] : starts[shard + 1]].astype(np.int64)
            if not len(own):
                continue
            # Copied under the lock: numpy cannot look at versions while it copies.
            self.lock(table, shard)
            try:
                part = self._shard(table, shard)
                places = part.places()
                numbers = np.array([places.get(key, -1) for key in keys[own].tolist()], np.int64)
                there = numbers >= 0
                if spec.max_age is not None:
                    there &= ~(step - part.heads()["last"][numbers] > spec.max_age) if there.any() else there
                values[own[there]] = part.values(numbers[there])
                flags[own[there]] = FOUND
                if int(part.words[Word.SPILLED]):
                    missing = own[~there]
                    bits = ((hashes(keys[missing]) >> np.uint64(16)) & np.uint64((1 << FILTER_BITS) - 1)).astype(np.int64)
                    flags[missing[(part.filter[bits // 8] >> (bits % 8).astype(np.uint8) & 1) == 1]] = MAYBE_COLD
            finally:
                self.unlock(table, shard)
        return torch.from_numpy(values[:, : spec.width].copy()), flags

    def apply(self, table: TableHandle, shard: int, push: Push) -> bool:
        at = np.arange(len(push.keys)) if push.order is None else push.order.astype(np.int64)
        self.lock(table, shard)
        try:
            part = self._shard(table, shard)
            words = part.words
            if push.id >= 0:
                if part.knows(push.id):
                    return False
                part.slide(push.id + 1)
            numbers = np.array([part.places().get(key, -1) for key in push.keys[at].tolist()], np.int64)
            self._make_room(table, shard, part, int((numbers < 0).sum()), len(at))
            words[Word.PENDING] = np.uint64(push.id if push.id >= 0 else _NONE)
            words[Word.UNDO] = 0
            words[Word.PHASE] = _APPLYING
            self._change(table, part, push, at, numbers)
            words[Word.PUSHES] += np.uint64(1)
            words[Word.PHASE] = _COMMITTED
            part.finish()
            return True
        finally:
            self.unlock(table, shard)

    def apply_all(self, table: TableHandle, first: int, starts: np.ndarray, push: Push) -> int:
        applied = 0
        for k in range(len(starts) - 1):
            own = slice(int(starts[k]), int(starts[k + 1]))
            if own.start < own.stop or push.id >= 0:
                order = np.arange(own.start, own.stop, dtype=np.uint32) if push.order is None else push.order[own]
                applied += self.apply(table, first + k, dataclasses.replace(push, order=order))
        return applied

    def _make_room(self, table: TableHandle, shard: int, part: _Shard, rows: int, notes: int) -> None:
        used, size = int(part.words[Word.ROWS_USED]), table.spec.row_bytes
        if used + rows > table.spec.capacity:
            kernels.settle(kernels.FULL, table, shard)
        head = table.memory.head(shard)
        try:
            os.posix_fallocate(table.memory.fd, head + ROWS_AT + used * size, max(1, rows * size))
            os.posix_fallocate(table.memory.fd, head + UNDO_AT, max(1, notes * (size + 64)))
        except OSError:
            kernels.settle(kernels.NO_MEMORY, table, shard)

    def _change(self, table: TableHandle, part: _Shard, push: Push, at: np.ndarray, numbers: np.ndarray) -> None:
        counts = push.counts[at]
        if push.raw:
            chosen = np.ones(len(at), bool) if push.overwrite else numbers < 0
        else:
            chosen = np.array([n >= 0 or self._admitted(table, part, push.keys[k], int(c))
                               for n, k, c in zip(numbers, at, counts, strict=True)], bool)  # fmt: skip
        at, numbers, counts = at[chosen], numbers[chosen], counts[chosen]
        keys = push.keys[at]
        part.note_changed(keys)
        given = push.rows.numpy()[at]
        fresh = numbers < 0
        begin = int(part.words[Word.ROWS_USED])
        dead = np.flatnonzero(part.heads()["live"] == 0)[: int(fresh.sum())]
        numbers[fresh] = np.concatenate([dead, begin + np.arange(int(fresh.sum()) - len(dead))])
        for number, new in zip(numbers.tolist(), fresh.tolist(), strict=True):
            record = (b"m" if new else b"c") + number.to_bytes(8, "little")
            part.note(record if new else record + part.raw(number + 1)[number].tobytes())
        values = part.values_of(numbers, fresh, first_rows(table, keys))
        heads = part.heads(max(begin, int(numbers.max(initial=-1)) + 1))
        if push.raw:
            values[:] = given
            heads["last"][numbers] = push.step if push.last is None else push.last[at]
            heads["count"][numbers] = counts
        else:
            age = table.spec.max_age
            seen = np.where(fresh, 0, heads["count"][numbers]).astype(np.int64)
            if age is not None:
                old = ~fresh & (push.step - heads["last"][numbers] > age)
                values[old], seen[old] = first_rows(table, keys[old]), 0
            scale = values.dtype.type(push.scale)
            update(table, values, given * scale, push.step)
            heads["last"][numbers] = push.step
            heads["count"][numbers] = np.minimum(seen + counts, 0xFFFFFFFF)
        size = values[:1].nbytes
        part.raw(len(heads))[numbers, HEAD_BYTES : HEAD_BYTES + size] = values.view(np.uint8).reshape(len(at), size)
        heads["key"][numbers] = keys
        part.words[Word.ROWS_USED] = len(heads)
        heads["live"][numbers] = 1
        part.words[Word.LIVE] += np.uint64(fresh.sum())
        part.places().update(zip(keys.tolist(), numbers.tolist(), strict=True))

    def _admitted(self, table: TableHandle, part: _Shard, key: int, count: int) -> bool:
        if table.spec.admission <= 1:
            return True
        number = int(hashes(np.array([key], np.int64))[0])
        first, low = number >> (64 - SKETCH_BITS), (1 << (SKETCH_BITS - 6)) - 1
        cells = (first, (1 << SKETCH_BITS) + ((first & ~low) | (number >> 8 & low)))
        sketch = table.memory.sketch().reshape(-1)
        seen = min(65535, min(int(sketch[c]) for c in cells) + count)
        for cell in cells:
            if int(sketch[cell]) < seen:
                part.note(b"s" + cell.to_bytes(8, "little") + int(sketch[cell]).to_bytes(2, "little"))
                sketch[cell] = seen
        return seen >= table.spec.admission

    def remove(self, table: TableHandle, shard: int, rows: np.ndarray) -> None:
        part = self._shard(table, shard)
        part.words[Word.PHASE] = _REBUILDING
        part.heads()["live"][rows] = 0
        part.rebuild()
        part.words[Word.PHASE] = _IDLE

    def mark_cold(self, table: TableHandle, shard: int, keys: np.ndarray) -> None:
        part = self._shard(table, shard)
        bits = ((hashes(keys) >> np.uint64(16)) & np.uint64((1 << FILTER_BITS) - 1)).astype(np.int64)
        np.bitwise_or.at(part.filter, bits // 8, (1 << bits % 8).astype(np.uint8))
        part.words[Word.SPILLED] += np.uint64(len(keys))

    def begin_at(self, table: TableHandle, shard: int, push_id: int) -> None:
        part = self._shard(table, shard)
        # What the window holds beyond is cleared when it gets there.
        part.words[Word.LEDGER_NEXT] = part.words[Word.LEDGER_BASE] = push_id

