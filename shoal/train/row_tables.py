"""The tables of a run: who makes them, who updates which part of them, and what checkpoints and bundles hold of them.

The supervisor makes a table's memory and hands it down beside the arena. In a step every worker writes its gradients, summed
by key, into its outbox before it says that they are complete; then each of those who update (the workers themselves, or
servers) adds up all outboxes by key, in rank order, for its own range of shards, and applies the sum under the step's number.
So the rows are those of one worker, and an update that is made again after a death is applied once.

``rows-TABLE-RANK.safetensors`` in a checkpoint: keys, values (weights and what the optimizer keeps), counts, last use, of the
shards of one of them, and what these have counted of keys that have no row yet (``admission``; the metadata ``shards`` says whose
that is); any number of shards and workers can take them up.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from shoal.errors import PlanError, RequestError
from shoal.plan import Plan
from shoal.ps import outbox
from shoal.ps.embedding import embeddings, prefix_of, state_of, table_name
from shoal.ps.kernel import Part
from shoal.ps.memory import SKETCH_BITS
from shoal.ps.spec import MOST_SHARDS, TableSpec
from shoal.ps.table import Counted, Rows, Table, check_gradients, find_bad_key, from_tensors, sketch_shape, to_tensors
from shoal.train.saved import Applied, Lines, Saved
from shoal.train.update import Updater


def cold_path(directory: str | Path, number: int) -> Path:
    """Where a table's cold rows are while a run lasts."""
    return Path(directory) / f"table-{number}"


def name_tables(model: nn.Module) -> tuple[TableSpec, ...]:
    """Give every table of a model its module's path as a name, and say what they are."""
    for name, module in embeddings(model):
        module.spec = dataclasses.replace(module.spec, name=table_name(name))
    return tuple(run_spec(module.spec) for _, module in embeddings(model))


def check_tables(plan: Plan, tables: Sequence[TableSpec]) -> None:
    """PlanError where a plan cannot share rows among its workers."""
    if not tables:
        return
    for key, wrong in (("tp", (plan.tp or 1) > 1), ("pp", (plan.pp or 1) > 1), ("zero", plan.zero == 3 and plan.data_ways > 1),
                       ("local_steps", bool(plan.local_steps))):  # fmt: skip
        if wrong:
            raise PlanError(
                f"The rows of {tables[0].name} are shared by workers that each have the whole model, and {key}="
                f"{getattr(plan, key)} is another thing; use dp or ps and leave {key} out."
            )


class RunTables:
    """All tables of a run, as the supervisor holds them."""

    def __init__(self, specs: Sequence[TableSpec], cold_dir: str | Path) -> None:
        """Make empty tables; what an earlier run has left in ``cold_dir`` is deleted."""
        self._cold_dir = Path(cold_dir)
        if specs:
            shutil.rmtree(cold_dir, ignore_errors=True)
        self.tables = [Table.create(spec, cold_path(cold_dir, number)) for number, spec in enumerate(specs)]

    @property
    def fds(self) -> tuple[int, ...]:
        """What has to be handed to whoever is to use them."""
        return tuple(table.memory.fd for table in self.tables)

    def restore(self, checkpoint: Path, step: int) -> None:
        """Fill the tables from a checkpoint. RequestError where it lacks one, or has one of other rows."""
        for number, table in enumerate(self.tables):
            found = sorted(checkpoint.glob(f"rows-{number}-*.safetensors"))
            if not found:
                raise _another(checkpoint, table.spec.name)
            for path in found:
                _restore(table, path)
        self.begin_at(step)

    def begin_at(self, step: int) -> None:
        """Let updates count on from a step, whoever makes them. Rows stay where they are: shards are dealt out, not moved."""
        for table in self.tables:
            table.begin_at(step)

    def write(self, directory: Path) -> None:
        """Write all rows to a checkpoint that is being made; nobody is at work."""
        for number, table in enumerate(self.tables):
            SavedRows(f"rows-{number}-0.safetensors", table, 0, table.spec.shards).write(directory)

    def state(self) -> dict[str, torch.Tensor]:
        """What the tables are in the model's state_dict."""
        found: dict[str, torch.Tensor] = {}
        for table in self.tables:
            found.update(state_of(prefix_of(table.spec), table.export(), table.spec))
        return found

    def close(self) -> None:
        for table in self.tables:
            table.close()
        if self.tables:
            shutil.rmtree(self._cold_dir, ignore_errors=True)


class RowGradients:
    """The gradients of one worker's rows, on their way into its outboxes."""

    def __init__(self, model: nn.Module, rank: int, steps_done: Callable[[], int], served: bool = False) -> None:
        """``steps_done``: the number of the step that is computed; ageing counts by it.

        ``served``: what is published goes to servers, and whoever publishes looks at ``bad`` before it is pushed.
        """
        self._modules = [module for _, module in embeddings(model)]
        # The squared norm of what was published last; the first row of it whose gradient is no number.
        self.squared = 0.0
        self.bad: str | None = None
        self._rank, self._served = rank, served
        for module in self._modules:
            module.clock = steps_done

    def begin(self) -> None:
        """Forget what was gathered: a step begins, or begins again."""
        for module in self._modules:
            module.forget_gathered()

    def publish(self) -> None:
        """Leave the step's gradients where all can read them. JobFailed where one is no number, and no servers are there."""
        self.squared, self.bad = 0.0, None
        for module in self._modules:
            table, found = module.table, module.take_gathered()
            if found is not None:
                self.squared += float(torch.linalg.vector_norm(found.rows, dtype=torch.float64)) ** 2
                if self._served:
                    key = find_bad_key(found.keys, found.rows)
                    self.bad = self.bad or (None if key is None else f"{table.spec.name} (key {key})")
                else:
                    check_gradients(table.spec.name, found.keys, found.rows, table.spec.width)
            outbox.write(table.memory, table.kernel, table.spec, self._rank, found)

    def withdraw(self) -> None:
        """Take back what was published last, before anybody is told of it."""
        self.squared = 0.0
        for table in (module.table for module in self._modules):
            outbox.write(table.memory, table.kernel, table.spec, self._rank, None)


@dataclass(frozen=True)
class SavedRows:
    """What a checkpoint takes of one table: the shards of one of those who update it."""

    name: str
    table: Table
    first: int
    last: int

    def write(self, directory: Path) -> None:
        """Write them. OSError where the disk does not take them."""
        path = directory / self.name
        if path.exists():
            # By a process that was killed afterwards, when it may have begun to update.
            return
        table = self.table
        shards = range(self.first, self.last)
        write_rows(path, table.spec, table.export(shards), shards, table.export_counted(shards))


def write_rows(path: Path, spec: TableSpec, rows: Rows, shards: Sequence[int], counted: Counted | None) -> None:
    """Write the rows of some shards of a table, and what these have counted, to a file of a checkpoint. OSError where the
    disk does not take them.
    """
    from safetensors.torch import save_file

    part = path.with_suffix(".part")
    meta = {"table": spec.name, "prefix": prefix_of(spec), "width": str(spec.width), "shards": " ".join(map(str, shards))}
    try:
        save_file(to_tensors(rows, None if counted is None else counted.sketch), part, metadata=meta)
    except Exception as error:
        part.unlink(missing_ok=True)
        raise OSError(str(error)) from None
    os.replace(part, path)


class TableUpdater(Updater):
    """Another updater's chunks, and behind them one for each table: this process's range of its shards.

    A table's own log undoes what a killed process has left half done, and its ledger knows which step a shard has had, so nothing
    is saved before a chunk and nothing put back.
    """

    def __init__(self, inner: Updater, tables: Sequence[Table], own: Owner, steps_done: Callable[[], int]) -> None:
        self.inner = inner
        self.store, self.rank, self.lane = inner.store, inner.rank, inner.lane
        self._tables, self._own, self._steps_done = tables, own, steps_done
        self._merged: Part | None = None
        self._sources = tuple(range(own.workers))
        self._lr_factor = 1.0

    @property
    def count(self) -> int:
        return self.inner.count + len(self._tables)

    @property
    def starts_over(self) -> bool:
        return self.inner.starts_over

    def sum_gradients(self, chunk: int, factor: float) -> None:
        if chunk < self.inner.count:
            self.inner.sum_gradients(chunk, factor)
            self._merged = None
            return
        table = self._tables[chunk - self.inner.count]
        first, last = self._own.shards(table)
        parts = [outbox.read(table.memory, table.spec, rank) for rank in self._sources]
        merged = table.kernel.merge(parts, first, last) if len(parts) > 1 else _cut(parts[0], first, last)
        self._merged = Part(merged.keys, merged.counts, merged.rows * factor, merged.starts) if factor != 1.0 else merged

    def norm_squared(self) -> float:
        if self._merged is None:
            return self.inner.norm_squared()
        rows = self._merged.rows
        return float(torch.linalg.vector_norm(rows, dtype=torch.float64)) ** 2 if len(rows) else 0.0

    def apply(self, chunk: int, scale: float) -> None:
        if chunk < self.inner.count:
            self.inner.apply(chunk, scale)
            return
        assert self._merged is not None
        table, step = self._tables[chunk - self.inner.count], self._steps_done()
        first, last = self._own.shards(table)
        table.push_part(self._merged, first, push_id=step, step=step, scale=scale)
        age = table.spec.max_age
        if age is not None and step and step % max(1, age // 4) == 0:
            table.sweep(step, range(first, last))

    def take_sources(self, stripes: Sequence[int]) -> None:
        self.inner.take_sources(stripes)
        # Tables are for plans in which every rank has a stripe of its own.
        self._sources = tuple(stripes)

    def take_groups(self, groups: Sequence[dict[str, Any]]) -> None:
        self.inner.take_groups(groups)

    def scale_lr(self, factor: float) -> None:
        """Use the rows' learning rates times ``factor`` from the next update on."""
        for table in self._tables:
            table.scale_lr(factor)
        self._lr_factor = factor

    def saved(self, chunk: int) -> Iterator[Saved | SavedRows]:  # type: ignore[override]
        if chunk < self.inner.count:
            yield from self.inner.saved(chunk)
        else:
            number = chunk - self.inner.count
            table = self._tables[number]
            yield SavedRows(f"rows-{number}-{self._own.number}.safetensors", table, *self._own.shards(table))

    def changed(self, chunk: int, scale: float) -> Iterator[Saved | Lines | Applied]:
        if chunk < self.inner.count:
            yield from self.inner.changed(chunk, scale)
            return
        merged = self._merged
        assert merged is not None
        number = chunk - self.inner.count
        yield Applied(number, merged.keys, merged.counts, merged.rows, self._steps_done(), scale, self._lr_factor)

    def save(self, chunk: int) -> None:
        if chunk < self.inner.count:
            self.inner.save(chunk)

    def restore(self, chunk: int) -> None:
        if chunk < self.inner.count:
            self.inner.restore(chunk)

    def reload(self, chunk: int) -> None:
        if chunk < self.inner.count:
            self.inner.reload(chunk)


@dataclass(frozen=True)
class Owner:
    """Which shards a process updates: ``number`` of ``count`` equal ranges, from the gradients of so many workers."""

    number: int
    count: int
    workers: int

    def shards(self, table: Table) -> tuple[int, int]:
        shards = table.spec.shards
        return self.number * shards // self.count, (self.number + 1) * shards // self.count


def _cut(part: Part, first: int, last: int) -> Part:
    begin, end = int(part.starts[first]), int(part.starts[last])
    return Part(part.keys[begin:end], part.counts[begin:end], part.rows[begin:end], part.starts[first : last + 1] - begin)


def first_rows(model: nn.Module) -> dict[str, Rows]:
    """What the tables of a model hold before it is trained: it may be an instance that has been trained before."""
    return {name: module.export() for name, module in embeddings(model) if module.has_rows}


def attach_tables(model: nn.Module, fds: Sequence[int], cold_dir: str | Path, first: Mapping[str, Rows]) -> list[Table]:
    """Let a model use the tables behind descriptors, with the rows that they are to begin with."""
    tables = []
    for number, ((name, module), fd) in enumerate(zip(embeddings(model), fds, strict=True)):
        table = Table.attach(run_spec(module.spec), fd, cold_path(cold_dir, number))
        if name in first:
            table.put(first[name])
        module.use(table)
        tables.append(table)
    return tables


def run_spec(spec: TableSpec) -> TableSpec:
    """The same table with as many shards as a run has: a module's own table needs few."""
    return dataclasses.replace(spec, shards=MOST_SHARDS)


def _restore(table: Table, path: Path) -> None:
    rows, counted = _read(path, table.spec)
    table.put(rows)
    if counted is not None:
        table.put_sketch(counted.sketch, counted.shards)


def read_rows(
    checkpoint: Path, number: int, spec: TableSpec, wanted: Collection[int] | None = None
) -> Iterator[tuple[Rows, Counted | None]]:
    """The rows of a table in a checkpoint and what was counted, file by file. RequestError where it lacks them, or has others.

    ``wanted``: files in which there is nothing of these shards may be left out.
    """
    found = sorted(checkpoint.glob(f"rows-{number}-*.safetensors"))
    if not found:
        raise _another(checkpoint, spec.name)
    for path in needed(found, spec, wanted):
        yield _read(path, spec)


def needed(files: Sequence[Path], spec: TableSpec, wanted: Collection[int] | None) -> list[Path]:
    """Those of a table's files in a checkpoint that have some of these shards; all, where they do not say whose they are.

    It is believed of files that are not looked at as a whole only where all together have every shard once.
    """
    if wanted is None:
        return list(files)
    shards = [_shards_in(path) for path in files]
    if sorted(shard for own in shards for shard in own) != list(range(spec.shards)):
        return list(files)
    return [path for path, own in zip(files, shards, strict=True) if not set(own).isdisjoint(wanted)]


def _shards_in(path: Path) -> tuple[int, ...]:
    """The shards of a table that a file has; none where it does not say so."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return tuple(int(shard) for shard in (file.metadata() or {}).get("shards", "").split())
    except (OSError, SafetensorError, ValueError):
        return ()


def _read(path: Path, spec: TableSpec) -> tuple[Rows, Counted | None]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        meta = file.metadata() or {}
    rows, sketch = from_tensors(tensors)
    if meta.get("table") != spec.name or rows.values.shape[1] != spec.width + spec.state:
        raise _another(path.parent, spec.name)
    return rows, None if sketch is None or spec.admission <= 1 else _counted(path, meta, sketch, spec)


def _counted(path: Path, meta: Mapping[str, str], sketch: np.ndarray, spec: TableSpec) -> Counted:
    cells = (1 << SKETCH_BITS) // spec.shards
    if "shards" in meta:
        shards = tuple(int(shard) for shard in meta["shards"].split())
    else:
        # Earlier they lay side by side, and it was said at which part of the whole they began.
        first = round(float(meta.get("sketch_from", "0")) * spec.shards)
        shards = tuple(range(first, first + sketch.shape[1] // cells))
    if sketch.shape != sketch_shape(spec, len(shards)) or not all(0 <= shard < spec.shards for shard in shards):
        raise _another(path.parent, spec.name)
    return Counted(shards, sketch)


def _another(checkpoint: Path, name: str) -> RequestError:
    return RequestError(
        f"The checkpoint {checkpoint} has no rows of this form for the table {name}; resume with the job that wrote it, or "
        "choose another --run."
    )

