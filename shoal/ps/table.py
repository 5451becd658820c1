"""A table of rows by 64-bit key, shared by the processes of a machine.

Rows are pulled by the different keys of a batch and pushed as gradients summed by key. A row comes into being with its first
push; until then its key reads as what it would begin with, a function of (seed, key) alone. So reading changes nothing, and
who comes first does not matter. A push has an id and is applied once to every shard, as a whole or not at all, whoever is
killed meanwhile: see ``rows.c``. What goes beyond ``memory_bytes`` is written to a store on disk (``cold.py``) and comes back
with its next push.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from shoal.cluster.local import find_cores
from shoal.errors import JobError, JobFailed
from shoal.ps.cold import ColdStore
from shoal.ps.kernel import FOUND, MAYBE_COLD, Batch, Kernel, Part, Push, TableHandle, load
from shoal.ps.memory import ROWS_AT, SKETCH_BITS, TableMemory, Word
from shoal.ps.spec import HEAD_BYTES, TableSpec

# Of a shard that is over its limit, so much goes to disk at once.
_EVICTED = 1 / 8
# So many rows are put there by several threads.
_MANY, _THREADS = 1 << 17, 4
_NO_ROWS = np.empty(0, np.int64)
_EVERYTHING = 0
"""As a step: no row is too old for it."""


def sketch_shape(spec: TableSpec, shards: int) -> tuple[int, int] | None:
    """The shape of what so many shards of a table have counted of keys without a row; None where it counts none."""
    return (2, (shards << SKETCH_BITS) // spec.shards) if spec.admission > 1 else None


@dataclass(frozen=True)
class Counted:
    """What some shards of a table have counted of keys without a row: uint16 (2, cells), one shard behind the other."""

    shards: tuple[int, ...]
    sketch: np.ndarray

    def of(self, shards: Iterable[int]) -> Counted | None:
        """The same of those among them that are these; None where none is."""
        wanted = set(shards)
        at = [place for place, shard in enumerate(self.shards) if shard in wanted]
        if not at:
            return None
        cut = self.sketch.reshape(2, len(self.shards), -1).take(at, axis=1)
        return Counted(tuple(self.shards[place] for place in at), cut.reshape(2, -1))


@dataclass(frozen=True)
class Rows:
    """Rows as they are kept in a checkpoint, sorted by key.

    Attributes:
        keys: int64 (n,).
        values: (n, width + state): weights, then what the optimizer keeps.
        counts: uint32 (n,): how often each was seen.
        last: int64 (n,): the step of its last push.
    """

    keys: np.ndarray
    values: torch.Tensor
    counts: np.ndarray
    last: np.ndarray


class Table:
    """One process's hold of a table."""

    def __init__(self, spec: TableSpec, memory: TableMemory, cold_dir: Path | None = None, kernel: Kernel | None = None) -> None:
        """``cold_dir``: where rows beyond the memory limit go; needed where the spec has one."""
        self.spec = spec
        self.memory = memory
        self.kernel = kernel or load()
        self._handle = TableHandle(spec, memory)
        self._words = [memory.words(shard) for shard in range(spec.shards)]
        self._cold = None if spec.memory_bytes is None else ColdStore(cold_dir, spec)

    @classmethod
    def create(cls, spec: TableSpec, cold_dir: Path | None = None, kernel: Kernel | None = None) -> Table:
        """Make an empty table in new memory."""
        table = cls(spec, TableMemory.create(spec), cold_dir, kernel)
        table.kernel.create(table._handle)
        return table

    @classmethod
    def attach(cls, spec: TableSpec, fd: int, cold_dir: Path | None = None) -> Table:
        """Take up the table behind a descriptor."""
        return cls(spec, TableMemory.attach(spec, fd), cold_dir)

    def scale_lr(self, factor: float) -> None:
        """Let this process's next pushes use the optimizer's learning rate times ``factor``."""
        optimizer = self.spec.optimizer
        spec = replace(self.spec, optimizer=replace(optimizer, lr=optimizer.lr * factor))
        self._handle = TableHandle(spec, self.memory)

    # -- reading -------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Rows in memory; those that are only on disk are not counted."""
        return sum(int(words[Word.LIVE]) for words in self._words)

    @property
    def nbytes(self) -> int:
        """What the rows in memory take."""
        return len(self) * self.spec.row_bytes

    @property
    def repairs(self) -> int:
        """How often a shard was mended after its writer had been killed."""
        return sum(int(words[Word.REPAIRS]) for words in self._words)

    def unique(self, keys: np.ndarray, skipped: int | None = None) -> Batch:
        """Find the different keys of a batch (int64, 1-D); ``skipped`` is left out."""
        return self.kernel.unique(np.ascontiguousarray(keys), skipped)

    def pull(self, keys: np.ndarray, step: int = 0) -> torch.Tensor:
        """Weights of different keys, (n, width): never half of a push."""
        rows, flags = self.kernel.pull(self._handle, np.ascontiguousarray(keys), step)
        if self._cold is not None and (flags == MAYBE_COLD).any():
            asked = np.flatnonzero(flags == MAYBE_COLD)
            at, found = self._cold.read(keys[asked], self._shards_of(keys[asked]))
            fresh = self._not_aged(found.last, step)
            rows[torch.from_numpy(asked[at[fresh]])] = found.values[torch.from_numpy(fresh), : self.spec.width]
        return rows

    def read(self, keys: np.ndarray) -> tuple[torch.Tensor, np.ndarray]:
        """(weights of different keys, which of them have a row, in memory or on disk; those that have none mean nothing)."""
        rows, flags = self.kernel.pull(self._handle, np.ascontiguousarray(keys), _EVERYTHING)
        there = flags == FOUND
        if self._cold is not None and (flags == MAYBE_COLD).any():
            asked = np.flatnonzero(flags == MAYBE_COLD)
            at, found = self._cold.read(keys[asked], self._shards_of(keys[asked]))
            rows[torch.from_numpy(asked[at])] = found.values[:, : self.spec.width]
            there[asked[at]] = True
        return rows, there

    def piece(self, shard: int, cold: bool, at: int, count: int) -> tuple[np.ndarray, torch.Tensor, int | None]:
        """Some rows of a shard: (keys, weights, where the next ones begin, or None after the last of them).

        From 0 on, first those in memory, then with ``cold`` those on disk. Others may be writing: what changes meanwhile may be
        missing, be there twice or torn, and all of that is among the keys that ``changed`` names afterwards.
        """
        if cold:
            keys = np.empty(0, np.int64) if self._cold is None else self._cold.keys(shard, at, count)
            rows, there = self.read(keys)
            after = int(keys[-1:].view(np.uint64)[0]) + 1 if len(keys) == count else None
            return keys[there], rows[torch.from_numpy(there)], None if after is None or after >= 1 << 64 else after
        used = int(self._words[shard][Word.ROWS_USED])
        raw = self.memory.rows(shard, used, self.spec.row_bytes)[at : at + count].copy()
        live = raw[:, 12:16].copy().view(np.uint32).reshape(-1) != 0
        raw = raw[live]
        size = self.spec.width * self.spec.dtype.itemsize
        keys = raw[:, :8].copy().view(np.int64).reshape(-1)
        rows = self.spec.values(raw[:, HEAD_BYTES : HEAD_BYTES + size])
        return keys, rows.view(len(keys), self.spec.width), at + count if at + count < used else None

    def pieces(self, count: int = 1 << 14) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        """All rows piece by piece, (keys, weights); nobody may be writing to them meanwhile."""
        for shard in range(self.spec.shards):
            for cold in (False, True)[: 1 + (self._cold is not None)]:
                at: int | None = 0
                while at is not None:
                    keys, rows, at = self.piece(shard, cold, at, count)
                    yield keys, rows

    def listen(self, shard: int, size: int) -> int:
        """Have the keys of rows that change noted, the last ``size`` (a power of two); where the count of them is.

        OSError where memory has run out.
        """
        self.kernel.lock(self._handle, shard)
        try:
            self.memory.listen(shard, size)
            return int(self._words[shard][Word.CHANGES])
        finally:
            self.kernel.unlock(self._handle, shard)

    def changed(self, shard: int, since: int) -> tuple[np.ndarray | None, int]:
        """(keys that have changed since the count was ``since``, None where there were too many to be noted; the count now).

        Nobody may be writing meanwhile.
        """
        words = self._words[shard]
        now, size = int(words[Word.CHANGES]), int(words[Word.HEARD])
        if now == since:
            return _NO_ROWS, now
        if now - since > size:
            return None, now
        ring = self.memory.changes(shard, size)
        return ring[(since + np.arange(now - since)) % size], now

    def _not_aged(self, last: np.ndarray, step: int) -> np.ndarray:
        age = self.spec.max_age
        return np.flatnonzero(step - last <= age) if age is not None else np.arange(len(last))

    def _shards_of(self, keys: np.ndarray) -> np.ndarray:
        order, starts = self.kernel.partition(np.ascontiguousarray(keys), self.spec.shards)
        shards = np.empty(len(keys), np.int64)
        shards[order] = np.repeat(np.arange(self.spec.shards), np.diff(starts))
        return shards

    # -- writing -------------------------------------------------------------------------------------------------

    def push(
        self, keys: np.ndarray, gradients: torch.Tensor, counts: np.ndarray | None = None, *, push_id: int = -1,
        step: int = 0, scale: float = 1.0,
    ) -> int:  # fmt: skip
        """Apply gradients (n, width) of different keys; return to how many shards they were new.

        Args:
            counts: how often each key was seen, for admission; once by default.
            push_id: from 0; a shard that has applied it already leaves it out. The last 65,536 are remembered.
            step: for ageing, and for optimizers that count steps; from 0.
            scale: what gradients are multiplied by.
        """
        keys = np.ascontiguousarray(keys, dtype=np.int64)
        check_gradients(self.spec.name, keys, gradients, self.spec.width)
        seen = np.ones(len(keys), np.uint32) if counts is None else np.ascontiguousarray(counts, dtype=np.uint32)
        order, starts = self.kernel.partition(keys, self.spec.shards)
        rows = gradients.detach().contiguous()
        push = Push(keys=keys, counts=seen, rows=rows, order=order, id=push_id, step=step, scale=scale)
        return self._apply_all(0, starts, push)

    def push_part(self, part: Part, first_shard: int, *, push_id: int, step: int, scale: float = 1.0) -> int:
        """The same for gradients that are sorted by shard already, the first of them being ``first_shard``."""
        push = Push(keys=part.keys, counts=part.counts, rows=part.rows, id=push_id, step=step, scale=scale)
        return self._apply_all(first_shard, part.starts, push)

    def _apply_all(self, first: int, starts: np.ndarray, push: Push) -> int:
        starts = np.ascontiguousarray(starts)
        if self._cold is None:
            return self.kernel.apply_all(self._handle, first, starts, push)
        shards = range(first, first + len(starts) - 1)
        if any(self._words[shard][Word.SPILLED] for shard in shards):
            order = None if push.order is None else push.order[int(starts[0]) : int(starts[-1])]
            self._bring_back(push.keys[int(starts[0]) : int(starts[-1])] if order is None else push.keys[order], push.step)
        applied = self.kernel.apply_all(self._handle, first, starts, push)
        for shard in shards:
            self._tend(shard)
        return applied

    def put(self, rows: Rows, overwrite: bool = True) -> None:
        """Put whole rows there, as a checkpoint has them."""
        order, starts = self.kernel.partition(rows.keys, self.spec.shards)
        values = rows.values.to(self.spec.dtype).contiguous()

        def put(shard: int, piece: int = 1 << 16) -> None:
            for low in range(int(starts[shard]), int(starts[shard + 1]), piece):
                own = order[low : min(low + piece, int(starts[shard + 1]))]
                push = Push(
                    keys=rows.keys, counts=rows.counts, rows=values, last=rows.last, order=own, raw=True, overwrite=overwrite
                )
                self.kernel.apply(self._handle, shard, push)
                self._tend(shard)

        shards = range(self.spec.shards)
        if len(order) < _MANY or self.kernel.name != "c" or self._cold is not None:
            for shard in shards:
                put(shard)
            return
        with ThreadPoolExecutor(min(_THREADS, find_cores()), "shoal-table") as threads:
            list(threads.map(put, shards))

    def begin_at(self, push_id: int) -> None:
        """Take all pushes before this one for applied, and none from it on: they are numbered anew, as behind a checkpoint."""
        for shard in range(self.spec.shards):
            self.kernel.lock(self._handle, shard)
            try:
                self.kernel.begin_at(self._handle, shard, push_id)
            finally:
                self.kernel.unlock(self._handle, shard)

    # -- age and memory ------------------------------------------------------------------------------------------

    def sweep(self, step: int, shards: Iterable[int] | None = None) -> int:
        """Give back the rows that are too old, and return how many; they read as absent before that, too."""
        if self.spec.max_age is None:
            return 0
        gone = 0
        for shard in range(self.spec.shards) if shards is None else shards:
            self.kernel.lock(self._handle, shard)
            try:
                live, _, _, last = self._heads(shard)
                old = live & (step - last > self.spec.max_age)
                numbers = np.flatnonzero(old).astype(np.uint32)
                if len(numbers):
                    self.memory.note_changed(shard, self._heads(shard)[1][old])
                    self.kernel.remove(self._handle, shard, numbers)
                gone += len(numbers)
            finally:
                self.kernel.unlock(self._handle, shard)
        return gone

    def discard(self, keys: np.ndarray | None, shards: Iterable[int] | None = None) -> None:
        """Forget the rows of these keys, in memory and on disk; None: all. ``shards``: only in these."""
        order, starts = (None, None) if keys is None else self.kernel.partition(np.ascontiguousarray(keys), self.spec.shards)
        for shard in range(self.spec.shards) if shards is None else shards:
            own = None if keys is None or order is None or starts is None else keys[order[starts[shard] : starts[shard + 1]]]
            if own is not None and not len(own):
                continue
            self.kernel.lock(self._handle, shard)
            try:
                live, there, _, _ = self._heads(shard)
                numbers = np.flatnonzero(live if own is None else live & np.isin(there, own)).astype(np.uint32)
                if len(numbers):
                    self.kernel.remove(self._handle, shard, numbers)
                if self._cold is not None:
                    self._cold.forget(shard, own)
            finally:
                self.kernel.unlock(self._handle, shard)

    def give_back(self, shards: Iterable[int]) -> None:
        """Give the memory of those of these shards back that have no rows any more; nobody reads the table meanwhile."""
        for shard in shards:
            words = self._words[shard]
            if words[Word.LIVE] or not words[Word.ROWS_USED]:
                continue
            self.kernel.lock(self._handle, shard)
            try:
                nbytes = max(int(words[Word.ROWS_USED]) * self.spec.row_bytes, int(words[Word.ROWS_RESERVED]))
                words[Word.STRUCTURE] += np.uint64(1)
                words[[Word.ROWS_USED, Word.ROWS_RESERVED, Word.FREE_COUNT]] = 0
                words[Word.STRUCTURE] += np.uint64(1)
                with contextlib.suppress(OSError):
                    self.memory.block.give_back(self.memory.head(shard) + ROWS_AT, nbytes)
            finally:
                self.kernel.unlock(self._handle, shard)

    def clear(self) -> None:
        """Forget all rows, and what was counted of keys that have none."""
        self.discard(None)
        if self.spec.admission > 1:
            self.memory.sketch()[:] = 0

    def _heads(self, shard: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Of every row of a shard: whether there is one, its key, count and last use."""
        rows = self._raw(shard)
        head = np.dtype(
            {"names": ["key", "live", "count", "last"], "formats": ["<i8", "<u4", "<u4", "<i8"],
             "offsets": [0, 12, 16, 24], "itemsize": self.spec.row_bytes}
        )  # fmt: skip
        heads = rows.reshape(-1).view(head)
        return heads["live"] != 0, heads["key"], heads["count"], heads["last"]

    def _raw(self, shard: int) -> np.ndarray:
        return self.memory.rows(shard, int(self._words[shard][Word.ROWS_USED]), self.spec.row_bytes)

    def _tend(self, shard: int) -> None:
        """Write the rows that were used longest ago to disk where a shard takes more memory than it may."""
        limit, words = self.spec.memory_bytes, self._words[shard]
        if self._cold is None or limit is None:
            return
        most = max(1, limit // self.spec.shards // self.spec.row_bytes)
        if int(words[Word.LIVE]) <= most:
            return
        self.kernel.lock(self._handle, shard)
        try:
            live, keys, _, last = self._heads(shard)
            numbers = np.flatnonzero(live)
            count = len(numbers) - most + int(most * _EVICTED)
            if len(numbers) <= most:
                return
            cold = numbers[np.argpartition(last[numbers], count - 1)[:count]]
            cold = cold[np.argsort(keys[cold].view(np.uint64))]
            self._cold.write(shard, keys[cold], self._take(shard, cold))
            self.kernel.mark_cold(self._handle, shard, np.ascontiguousarray(keys[cold]))
            self.kernel.remove(self._handle, shard, cold.astype(np.uint32))
        finally:
            self.kernel.unlock(self._handle, shard)

    def _bring_back(self, keys: np.ndarray, step: int) -> None:
        """Put those rows into memory again that are on disk only."""
        assert self._cold is not None
        _, flags = self.kernel.pull(self._handle, np.ascontiguousarray(keys), step)
        asked = keys[flags == MAYBE_COLD]
        if not len(asked):
            return
        _, found = self._cold.read(asked, self._shards_of(asked))
        fresh = self._not_aged(found.last, step)
        if len(fresh):
            order, starts = self.kernel.partition(np.ascontiguousarray(found.keys[fresh]), self.spec.shards)
            push = Push(
                keys=found.keys[fresh], counts=found.counts[fresh], rows=found.values[torch.from_numpy(fresh)].contiguous(),
                # They are about to be used: nobody else is to send them back meanwhile.
                order=order, step=step, raw=True,
            )  # fmt: skip
            self.kernel.apply_all(self._handle, 0, starts, push)

    def _take(self, shard: int, numbers: np.ndarray) -> Rows:
        raw = self._raw(shard)[numbers]
        _, keys, counts, last = self._heads(shard)
        size = (self.spec.width + self.spec.state) * self.spec.dtype.itemsize
        values = self.spec.values(raw[:, HEAD_BYTES : HEAD_BYTES + size])
        return Rows(keys[numbers].copy(), values, counts[numbers].copy(), last[numbers].copy())

    # -- keeping -------------------------------------------------------------------------------------------------

    def export_counted(self, shards: Sequence[int]) -> Counted | None:
        """What these shards have counted of keys without a row, and whose it is; None without admission, or of no shards."""
        sketch = self.export_sketch(shards) if len(shards) else None
        return None if sketch is None else Counted(tuple(shards), sketch)

    def export(self, shards: Iterable[int] | None = None) -> Rows:
        """All rows of these shards, those on disk too, sorted by key. Nobody may be writing to them meanwhile."""
        found: list[Rows] = []
        for shard in range(self.spec.shards) if shards is None else shards:
            self.kernel.lock(self._handle, shard)
            try:
                rows = self._take(shard, np.flatnonzero(self._heads(shard)[0]))
                found.append(rows)
                if self._cold is not None and self._words[shard][Word.SPILLED]:
                    found.append(_without(self._cold.all(shard), rows.keys))
            finally:
                self.kernel.unlock(self._handle, shard)
        return _sorted(found, self.spec)

    def export_sketch(self, shards: Iterable[int] | None = None) -> np.ndarray | None:
        """What these shards have counted of keys without a row, one behind the other: kept for going on exactly.

        uint16 (2, cells), as ``sketch_shape`` says; None without admission.
        """
        if self.spec.admission <= 1:
            return None
        own = range(self.spec.shards) if shards is None else shards
        return self._sketch_of_shards().take(list(own), axis=1).reshape(2, -1)

    def put_sketch(self, counts: np.ndarray, shards: Iterable[int] | None = None) -> None:
        """Put back what these shards had counted."""
        own = list(range(self.spec.shards) if shards is None else shards)
        self._sketch_of_shards()[:, own] = counts.reshape(2, len(own), -1)

    def _sketch_of_shards(self) -> np.ndarray:
        found: np.ndarray = self.memory.sketch().reshape(2, self.spec.shards, -1)
        return found

    def close(self) -> None:
        """Give the descriptor back, and close the store of cold rows."""
        if self._cold is not None:
            self._cold.close()
        self.memory.block.close()


def check_gradients(name: str, keys: np.ndarray, gradients: torch.Tensor, width: int) -> None:
    """JobError where gradients do not belong to the keys; JobFailed, with the key, where one is no finite number."""
    if tuple(gradients.shape) != (len(keys), width):
        raise JobError(f"The table {name} got gradients of shape {tuple(gradients.shape)} for {len(keys)} keys of width {width}.")
    bad = find_bad_key(keys, gradients)
    if bad is not None:
        raise JobFailed(
            f"The gradient of key {bad} of the table {name} is not finite, so it was not applied; look at the samples with "
            "this key, or lower the learning rate."
        )


def find_bad_key(keys: np.ndarray, gradients: torch.Tensor) -> int | None:
    """The first key whose gradient (a row of ``gradients``) is no finite number."""
    # A sum may overflow where no gradient does; only then is every number looked at.
    if not len(keys) or bool(torch.isfinite(gradients.sum())):
        return None
    bad = torch.nonzero(~torch.isfinite(gradients).all(dim=1)).reshape(-1)
    return int(keys[int(bad[0])]) if len(bad) else None


def _without(rows: Rows, keys: np.ndarray) -> Rows:
    """Rows but for those with these keys."""
    kept = np.flatnonzero(~np.isin(rows.keys, keys))
    return Rows(rows.keys[kept], rows.values[torch.from_numpy(kept)], rows.counts[kept], rows.last[kept])


def _sorted(parts: list[Rows], spec: TableSpec) -> Rows:
    keys = np.concatenate([p.keys for p in parts] or [_NO_ROWS])
    order = np.argsort(keys, kind="stable")
    values = torch.cat([p.values for p in parts] or [torch.empty(0, spec.width + spec.state, dtype=spec.dtype)])
    counts = np.concatenate([p.counts for p in parts] or [np.empty(0, np.uint32)])
    last = np.concatenate([p.last for p in parts] or [_NO_ROWS])
    return Rows(keys[order], values[torch.from_numpy(order)], counts[order], last[order])


def to_tensors(rows: Rows, sketch: np.ndarray | None) -> dict[str, torch.Tensor]:
    """Rows as the tensors of a safetensors file."""
    found = {
        "keys": torch.from_numpy(rows.keys), "values": rows.values, "counts": torch.from_numpy(rows.counts.astype(np.int64)),
        "last": torch.from_numpy(rows.last),
    }  # fmt: skip
    if sketch is not None:
        found["sketch"] = torch.from_numpy(sketch.view(np.int16))
    return found


def from_tensors(tensors: Mapping[str, torch.Tensor]) -> tuple[Rows, np.ndarray | None]:
    """The other way."""
    sketch = tensors.get("sketch")
    rows = Rows(
        tensors["keys"].numpy(), tensors["values"], tensors["counts"].numpy().astype(np.uint32), tensors["last"].numpy()
    )
    return rows, None if sketch is None else sketch.numpy().view(np.uint16)
