"""One server's part of everything: dense pieces, rows, and the ledger of what was applied to them.

A state machine: what it holds follows from what it began with and the pushes that it was given, in order, to the bit. So a
log of them, or a peer that is given the same ones, has the same state. It knows nothing of sockets, files or other servers,
and one thread uses it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import torch

from shoal.errors import JobFailed, RequestError
from shoal.process.failure import first_line
from shoal.ps.applied import NOTHING, Applied, PushId
from shoal.ps.checks import check_count, check_groups, check_ids, check_snapshot, fits, has_twice
from shoal.ps.dense import DensePart, Groups, Number, Numbers, Piece
from shoal.ps.table import Rows, Table, check_gradients, from_tensors, to_tensors


@dataclass(frozen=True)
class RowGradients:
    """Gradients of different rows of one table: keys int64 (n,), how often each was seen uint32 (n,), and sums (n, width)."""

    keys: np.ndarray
    counts: np.ndarray
    gradients: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Push:
    """What is applied as one: the gradient of one part of a batch, or the sum over several.

    Attributes:
        ids: of all parts that are in it.
        step: of the run, from 0: what rows age by and their optimizers count.
        settled: everything before this id is applied on all servers.
        dense: gradients by the number of a piece, elements in a row. A piece that nobody touched is not among them.
        rows: by the number of a table.
        scale: what all of them are multiplied by.
        groups: hyperparameters from this push on; None: as they were.
        staleness: how many updates there were between its pull and its application here; None where workers wait for each other.
    """

    ids: tuple[PushId, ...]
    step: int = 0
    settled: PushId = NOTHING
    dense: Mapping[int, torch.Tensor] = field(default_factory=dict)
    rows: Mapping[int, RowGradients] = field(default_factory=dict)
    scale: float = 1.0
    groups: Sequence[Numbers] | None = None
    staleness: int | None = None

    def norm_squared(self) -> float:
        """The squared norm of all that is in it, before it is scaled."""
        parts = [*self.dense.values(), *(r.gradients for r in self.rows.values())]
        return math.fsum(float(torch.linalg.vector_norm(p, dtype=torch.float64)) ** 2 for p in parts)


def add_up(pushes: Sequence[Push], tables: Mapping[int, Table], scale: float, groups: Sequence[Numbers] | None) -> Push:
    """The sum of several pushes as one, each times its own scale, added in the order that they are given in."""
    first = pushes[0]
    dense: dict[int, torch.Tensor] = {}
    for number in sorted({n for push in pushes for n in push.dense}):
        parts = [(push.dense[number], push.scale) for push in pushes if number in push.dense]
        total = parts[0][0] * parts[0][1]
        for part, factor in parts[1:]:
            total.add_(part, alpha=factor)
        dense[number] = total
    rows: dict[int, RowGradients] = {}
    for number in sorted({n for push in pushes for n in push.rows}):
        found = [
            RowGradients(own.keys, own.counts, own.gradients * push.scale)
            for push in pushes
            if (own := push.rows.get(number)) is not None
        ]
        table = tables[number]
        batch = table.unique(np.concatenate([f.keys for f in found]))
        sums = table.kernel.scatter(torch.cat([f.gradients for f in found]), batch.inverse, 1, len(batch.keys))
        counts = np.bincount(batch.inverse, np.concatenate([f.counts for f in found]), len(batch.keys))
        rows[number] = RowGradients(batch.keys, counts.astype(np.uint32), sums)
    return Push(
        ids=tuple(id for push in pushes for id in push.ids), step=first.step,
        settled=max(push.settled for push in pushes), dense=dense, rows=rows, scale=scale, groups=groups,
    )  # fmt: skip


class Kept(msgspec.Struct, frozen=True, kw_only=True):
    """What of a shard's state is no tensor.

    Attributes:
        version: how many pushes it had applied.
        numbers: of each piece that the optimizer keeps such things of, its plain numbers.
        row_shards: of each table whose rows are there, which shards of it.
    """

    version: int
    settled: PushId
    ids: tuple[PushId, ...]
    groups: Groups
    numbers: dict[str, dict[str, Number | bool | None]]
    row_shards: dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Snapshot:
    """A shard's whole state at one version, or a part of it; its tensors are copies and nobody else's.

    ``tensors``: ``weights/PIECE``, ``state.KEY/PIECE``, and of each table ``rows/TABLE/keys``, ``values``, ``counts``, ``last``
    and, with admission, ``sketch`` (see ``shoal.ps.table.to_tensors``).
    """

    kept: Kept
    tensors: dict[str, torch.Tensor]


class Shard:
    """The state machine. ``version`` counts the pushes that were applied."""

    def __init__(
        self, dense: DensePart, tables: Mapping[int, Table] | None = None, factor_of: Callable[[int], float] | None = None
    ) -> None:
        """``factor_of``: the staleness of a push -> what learning rates are multiplied by; None: nothing."""
        self.dense = dense
        self._factor_of = factor_of
        self.tables: Mapping[int, Table] = tables or {}
        self.ledger = Applied()
        self.version = 0
        # Called with each push after it was found new and whole and before it changes anything: for a log, or a peer.
        # What it raises leaves the state as it was.
        self.on_apply: Callable[[Push], None] = lambda push: None

    # -- changing it ---------------------------------------------------------------------------------------------

    def apply(self, push: Push) -> bool:
        """Apply a push as one update; False, and nothing is done, where it was applied before.

        Raises:
            PartlyApplied: a part of it was. RequestError: it is for pieces, tables or widths that are not here.
            JobFailed: a gradient in it is no number.
        """
        if self.ledger.has(push.ids):
            return False
        self.check(push)
        factor = self._factor(push.staleness)
        self.on_apply(push)
        self.dense.apply(push.dense, push.scale, push.groups, factor)
        for number, rows in push.rows.items():
            table = self.tables[number]
            if self._factor_of is not None:
                table.scale_lr(factor)
            table.push(rows.keys, rows.gradients, rows.counts, step=push.step, scale=push.scale)
            age = table.spec.max_age
            if age is not None and push.step and push.step % max(1, age // 4) == 0:
                table.sweep(push.step)
        self.version += 1
        self.ledger.add(push.ids, (self.version, push.staleness))
        self.ledger.settle(push.settled)
        return True

    def check(self, push: Push) -> None:
        """RequestError where a push does not belong here, JobFailed where it is no number: none is ever half applied."""
        if not fits(push.scale):
            raise RequestError(f"{push.scale} is no scale of a push.")
        check_ids(push.ids, push.settled)
        check_count("step", push.step)
        check_count("staleness", push.staleness or 0)
        check_groups(self.dense, push.groups)
        for number, gradient in push.dense.items():
            piece = self.dense.pieces.get(number)
            if piece is None or gradient.numel() != piece.numel or gradient.dtype != piece.dtype:
                raise RequestError(f"The push has {gradient.numel()} {gradient.dtype} for piece {number}, not held here.")
            # A sum may overflow where no gradient does; only then is every number looked at.
            if not bool(torch.isfinite(gradient.sum())) and not bool(torch.isfinite(gradient).all()):
                raise JobFailed(f"The gradient of {piece.name} is not finite, so it was not applied.")
        for number, rows in push.rows.items():
            table = self.tables.get(number)
            shape = (len(rows.keys), table.spec.width if table is not None else -1)
            if table is None or tuple(rows.gradients.shape) != shape or len(rows.counts) != len(rows.keys):
                raise RequestError(f"The push has rows of shape {tuple(rows.gradients.shape)} for table {number}, not held here.")
            if has_twice(rows.keys):
                raise RequestError(f"The push has a key twice for table {number}.")
            check_gradients(table.spec.name, rows.keys, rows.gradients, table.spec.width)

    def _factor(self, staleness: int | None) -> float:
        """What a push that comes so late has learning rates multiplied by. JobFailed where the job gives no number for it."""
        if self._factor_of is None or staleness is None:
            return 1.0
        said = f"The factor of shoal.ps.staleness_aware for a staleness of {staleness}"
        try:
            found = float(self._factor_of(staleness))
        # It is the user's, and may fail in any way.
        except Exception as error:
            raise JobFailed(f"{said} has failed with {type(error).__name__}: {first_line(error)}.") from None
        if not math.isfinite(found):
            raise JobFailed(f"{said} is {found}; give a function whose values are numbers.")
        return found

    # -- reading it ----------------------------------------------------------------------------------------------

    def pull(self) -> dict[int, torch.Tensor]:
        """All dense pieces, as they are after ``version`` pushes: views, to be copied before anything is applied."""
        return {number: self.dense.weight(number) for number in sorted(self.dense.pieces)}

    def pull_rows(self, table: int, keys: np.ndarray, step: int = 0) -> torch.Tensor:
        """The weights of different keys, (n, width). RequestError where there is no such table."""
        found = self.tables.get(table)
        if found is None:
            raise RequestError(f"There is no table {table} here.")
        check_count("step", step)
        return found.pull(np.ascontiguousarray(keys, np.int64), step)

    # -- keeping and moving it -----------------------------------------------------------------------------------

    def snapshot(
        self, pieces: Iterable[int] | None = None, row_shards: Mapping[int, Sequence[int]] | None = None
    ) -> Snapshot:
        """The state as it is now; ``pieces``, ``row_shards`` (by table): only these, all where left out."""
        tensors: dict[str, torch.Tensor] = {}
        numbers: dict[str, dict[str, Any]] = {}
        for number in sorted(self.dense.pieces if pieces is None else pieces):
            tensors[f"weights/{number}"] = self.dense.weight(number).clone()
            state = self.dense.state(number)
            tensors.update({f"state.{k}/{number}": v.clone() for k, v in state.items() if isinstance(v, torch.Tensor)})
            if state:
                numbers[str(number)] = {k: v for k, v in state.items() if not isinstance(v, torch.Tensor)}
        wanted = {n: range(t.spec.shards) for n, t in self.tables.items()} if row_shards is None else row_shards
        for number, shards in wanted.items():
            table = self.tables[number]
            # What was counted of keys without a row lies by shards, and goes along with them.
            counted = table.export_counted(tuple(shards))
            rows = to_tensors(table.export(shards), None if counted is None else counted.sketch)
            tensors.update({f"rows/{number}/{name}": tensor for name, tensor in rows.items()})
        kept = Kept(
            version=self.version, settled=self.ledger.settled, ids=self.ledger.ids(), groups=tuple(self.dense.groups),
            numbers=numbers, row_shards={str(n): tuple(shards) for n, shards in wanted.items()},
        )  # fmt: skip
        return Snapshot(kept, tensors)

    def restore(self, snapshot: Snapshot) -> None:
        """Take up a whole snapshot into a new shard that holds the same pieces: weights, state, rows, ledger and version.

        RequestError, and nothing is taken up, where it is none of this shard.
        """
        self.merge(snapshot, whole=True)
        kept = snapshot.kept
        self.version = kept.version
        self.ledger = Applied(kept.settled, kept.ids)
        self.dense.take_groups(kept.groups)

    def merge(self, snapshot: Snapshot, whole: bool = False) -> None:
        """Take up the pieces and rows of a snapshot and leave version and ledger as they are. RequestError as in ``restore``."""
        check_snapshot(self.dense, self.tables, snapshot, whole)
        kept, tensors = snapshot.kept, snapshot.tensors
        states: dict[int, dict[str, Any]] = {int(n): dict(values) for n, values in kept.numbers.items()}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition("/")
            if kind == "weights":
                self.dense.put(int(rest), tensor)
            elif kind.startswith("state."):
                states.setdefault(int(rest), {})[kind.removeprefix("state.")] = tensor
        for number in [int(name.partition("/")[2]) for name in tensors if name.startswith("weights/")]:
            self.dense.put_state(number, states.get(number, {}))
        for number, table in self.tables.items():
            prefix = f"rows/{number}/"
            own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
            if own:
                rows, sketch = from_tensors(own)
                table.put(Rows(np.ascontiguousarray(rows.keys), rows.values.contiguous(), rows.counts, rows.last))
                if sketch is not None and table.spec.admission > 1:
                    table.put_sketch(sketch, kept.row_shards.get(str(number)) or None)

    def hold(
        self, pieces: Iterable[Piece], row_shards: Mapping[int, Sequence[int]], version: int = 0, settled: PushId = NOTHING
    ) -> None:
        """Hold these pieces and shards of tables from now on; all others are forgotten, and new pieces are zero until given.

        ``version``, ``settled``: what is true of a shard that was given what others had: it counts at least so many pushes, and
        all before this id are applied. RequestError, and nothing has changed, where there are no such shards of tables.
        """
        check_count("version", version)
        wanted = {piece.number: piece for piece in pieces}
        for number, shards in row_shards.items():
            held = self.tables.get(number)
            if held is None or not all(0 <= shard < held.spec.shards for shard in shards):
                raise RequestError(f"There are no shards {tuple(shards)[:9]} of a table {number} here.")
        self.dense.take_up(wanted.values())
        self.dense.give_up([number for number in self.dense.pieces if number not in wanted])
        for number, table in self.tables.items():
            others = sorted(set(range(table.spec.shards)) - set(row_shards.get(number, ())))
            table.discard(None, others)
            table.give_back(others)
            for shard in others:
                counted = table.export_sketch((shard,))
                if counted is not None:
                    table.put_sketch(np.zeros_like(counted), (shard,))
        self.version = max(self.version, version)
        self.ledger.settle(settled)

