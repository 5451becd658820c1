"""What a run keeps in the arena: weights, gradients, optimizer state, buffers, and the notes that outlive a worker.

One copy of the weights, of the buffers and of the optimizer state, whatever the number of workers; a *stripe* of
gradients for each worker, with the same offsets as the weights.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from shoal.comm.arena import Arena, ArenaLayout
from shoal.comm.grid import Grid
from shoal.comm.lines import LINE_BYTES
from shoal.comm.parts import put
from shoal.comm.table import CHUNK_BYTES, Lane, ParameterTable, align, chunks_of_lane, deal_tensors, lane_of
from shoal.errors import JobError

RING_STEPS = 2048
NOTEBOOK_BYTES = 1 << 17
VALUE_COLUMNS = 24


@dataclass(frozen=True)
class Columns:
    """The fields of a step record, float64 each; the values that a job logs follow."""

    STEP = 0
    BEGAN = 1
    ENDED = 2
    COMPUTE = 3
    REDUCE = 4
    WAIT = 5
    DATA = 6
    LOSS = 7
    WEIGHT = 8
    SAMPLES = 9
    LOSS_SUM = 10
    WEIGHT_SUM = 11
    SAMPLES_SUM = 12
    MEASURED = 13
    VALUES = 14
    VALUE_SUMS = 14 + VALUE_COLUMNS
    COUNT = 14 + 2 * VALUE_COLUMNS


_SUMS = (
    (Columns.LOSS, Columns.LOSS_SUM), (Columns.WEIGHT, Columns.WEIGHT_SUM), (Columns.SAMPLES, Columns.SAMPLES_SUM),
)  # fmt: skip


def carry_sums(record: np.ndarray, before: np.ndarray | None) -> None:
    """Fill in a step record's running sums over the epoch; ``before``: the record of the step before, None at a beginning."""
    for now, total in _SUMS:
        record[total] = record[now] + (before[total] if before is not None else 0.0)
    values = before[Columns.VALUE_SUMS : Columns.COUNT] if before is not None else 0.0
    record[Columns.VALUE_SUMS : Columns.COUNT] = record[Columns.VALUES : Columns.VALUE_SUMS] + values


@dataclass(frozen=True)
class SliceLayout:
    """How one worker's part of the optimizer's memory is laid out."""

    scalar_bytes: int
    undo_bytes: int


def scalar_row_bytes(table: ParameterTable) -> int:
    """Bytes of a piece's row: a flag that its state exists, then one slot for each 0-dim state tensor."""
    return 8 * (1 + len(table.scalar_keys))


def slice_layout(table: ParameterTable, grid: Grid, local: bool = False) -> SliceLayout:
    """The most that any worker's part needs."""
    row = scalar_row_bytes(table)
    if table.elementwise:
        lanes = [lane_of(table, part, grid, local) for part in range(grid.updaters)]
        chunks = [chunks_of_lane(table, lane) for lane in lanes]
        pieces = max((sum(len(c.pieces) for c in own) for own in chunks), default=0)
        longest = max((len(c.pieces) for own in chunks for c in own), default=0)
        undo = align(CHUNK_BYTES) * (1 + len(table.state_keys)) + longest * row
        return SliceLayout(align(pieces * row), align(undo))
    held = []
    for hand in deal_tensors(table, 1 if local else grid.updaters):
        own = set(hand)
        state = sum(align(s.nbytes) for s in table.states if s.parameter in own)
        held.append(state + sum(align(table.trained[i].nbytes) for i in hand) + row * len(table.trained))
    return SliceLayout(align(row * len(table.trained)), align(max(held)))


def arena_layout(
    table: ParameterTable, ranks: Grid, collective_bytes: int = 0, local: bool = False, private: bool = False,
    exchange_bytes: int = 0, further: Mapping[str, int] | None = None,
) -> ArenaLayout:  # fmt: skip
    """Lay out an arena for a model and its workers.

    Args:
        table: the tensors; where the model is split, the parts of all owners.
        ranks: the workers.
        collective_bytes: room for what each gives to the small sums within a step.
        local: each trains a replica of its own.
        private: the memory is one worker's own, with room for one stripe of gradients; its peers have the same weights
            in memory of theirs, and servers, where there are some, have theirs.
        exchange_bytes: room for the messages of workers that compute a share together.
        further: regions of others, with their sizes.
    """
    world_size = ranks.world_size
    grid = Grid(servers=ranks.servers) if private else ranks
    parts = grid.updaters
    own = slice_layout(table, grid, local)
    replicas = world_size if local else 0
    state = len(table.state_keys) * table.state_span if table.elementwise else table.state_bytes
    return ArenaLayout.plan(
        world_size,
        {
            "records": world_size * RING_STEPS * Columns.COUNT * 8,
            "notebooks": (world_size + grid.servers) * 2 * NOTEBOOK_BYTES,
            "touched": grid.stripes * max(1, len(table.trained)),
            "marked": grid.stripes * max(1, len(table.trained)),
            "marks": 0 if private else grid.stripes * align(-(-table.trained_bytes // LINE_BYTES)),
            "echoed": grid.stripes * max(1, len(table.echoes)),
            "scalars": parts * own.scalar_bytes,
            "undo": parts * own.undo_bytes,
            "buffers": 2 * table.buffer_bytes,
            "buffer_steps": 8 * max(1, len(table.buffers)),
            "collectives": world_size * collective_bytes,
            "weights": table.weight_bytes,
            "state": (replicas or 1) * align(state),
            "replicas": replicas * table.weight_bytes,
            "gradients": grid.stripes * table.trained_bytes,
            "echoes": grid.stripes * table.echo_bytes,
            "exchange": exchange_bytes,
            **(further or {}),
        },
        grid,
    )


class Store:
    """Views of an arena by the meaning of what lies there."""

    def __init__(self, arena: Arena, table: ParameterTable) -> None:
        self.arena = arena
        self.table = table
        self.local = arena.layout.regions["replicas"][1] > 0
        self.grid = arena.layout.grid
        self._own = slice_layout(table, self.grid, self.local)
        n = arena.world_size
        self.weights = [arena.view("weights", p.offset, p.numel, p.dtype).view(p.shape) for p in table.parameters]
        records = arena.region("records").numpy().view(np.float64)
        self.records = records.reshape(n, RING_STEPS, Columns.COUNT)
        stripes = self.grid.stripes
        self.touched = arena.region("touched")[: stripes * len(table.trained)].view(stripes, -1).numpy()
        # Whether the marks of a parameter's gradient say all that may not be zero in it.
        self.marked = arena.region("marked")[: stripes * len(table.trained)].view(stripes, -1).numpy()
        self.echoed = arena.region("echoed")[: stripes * len(table.echoes)].view(stripes, -1).numpy()
        self.buffer_steps = arena.region("buffer_steps").numpy().view(np.float64)

    @property
    def parts(self) -> int:
        """Into how many parts updates are cut."""
        return self.grid.updaters

    def part_of(self, rank: int) -> int:
        """The place in the grid that is a worker's: its own, or the only one that this memory has."""
        return rank if self.grid.world_size == self.arena.world_size else 0

    def stripe_of(self, rank: int) -> int:
        """The stripe that a worker's gradients go to."""
        return self.grid.stripe(self.part_of(rank))

    def gradient(self, stripe: int, parameter: int) -> torch.Tensor:
        """One gradient of one trained parameter, in the parameter's shape."""
        spec = self.table.parameters[parameter]
        offset = stripe * self.table.trained_bytes + spec.offset
        return self.arena.view("gradients", offset, spec.numel, spec.dtype).view(spec.shape)

    def echo(self, stripe: int, index: int) -> torch.Tensor:
        """The gradient that another stage has for a tied weight."""
        echo = self.table.echoes[index]
        spec = self.table.parameters[echo.parameter]
        offset = stripe * self.table.echo_bytes + echo.offset
        return self.arena.view("echoes", offset, spec.numel, spec.dtype).view(spec.shape)

    def gradient_range(self, stripe: int, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        """Bytes ``start`` to ``stop`` of a stripe."""
        offset = stripe * self.table.trained_bytes + start
        return self.arena.view("gradients", offset, (stop - start) // dtype.itemsize, dtype)

    def marks(self, stripe: int, start: int, stop: int) -> torch.Tensor | None:
        """A byte for each line of a stripe from byte ``start`` to ``stop``; None where there are none."""
        region = self.arena.region("marks")
        if not region.numel():
            return None
        at = stripe * (region.numel() // self.grid.stripes)
        return region[at + start // LINE_BYTES : at + stop // LINE_BYTES]

    def buffer(self, parity: int, index: int) -> torch.Tensor:
        """A buffer's value at the beginning of the even or odd steps."""
        spec = self.table.buffers[index]
        offset = parity * self.table.buffer_bytes + spec.offset
        return self.arena.view("buffers", offset, spec.numel, spec.dtype).view(spec.shape)

    def lane(self, rank: int) -> Lane:
        """What a worker, or a server, updates."""
        return lane_of(self.table, rank, self.grid, self.local)

    def ranges(self, rank: int) -> list[tuple[int, int]]:
        """The bytes of the trained weights that a worker, or a server, really writes: all of its lane, or whole tensors."""
        table = self.table
        if table.elementwise or self.local:
            lane = self.lane(rank)
            return [(lane.start, lane.stop)]
        own = (table.trained[index] for index in deal_tensors(table, self.parts)[rank])
        return [(spec.offset, spec.offset + spec.nbytes) for spec in own]

    @property
    def lanes(self) -> int:
        """How many copies of the optimizer's state there are."""
        return self.arena.world_size if self.local else 1

    def weight_range(self, start: int, stop: int, dtype: torch.dtype, replica: int | None = None) -> torch.Tensor:
        """Bytes ``start`` to ``stop`` of the weights, the shared ones or a replica."""
        count = (stop - start) // dtype.itemsize
        if replica is None:
            return self.arena.view("weights", start, count, dtype)
        return self.arena.view("replicas", replica * self.table.weight_bytes + start, count, dtype)

    def weight(self, index: int, replica: int | None = None) -> torch.Tensor:
        """A parameter in its shape, shared or of a replica."""
        if replica is None:
            return self.weights[index]
        spec = self.table.parameters[index]
        return self.weight_range(spec.offset, spec.offset + spec.nbytes, spec.dtype, replica).view(spec.shape)

    def spread(self) -> None:
        """Give every replica the shared weights."""
        if self.local:
            self.arena.region("replicas").view(self.arena.world_size, -1)[:] = self.arena.region("weights")

    def _state_offset(self, replica: int | None) -> int:
        if not replica:
            return 0
        size: int = self.arena.layout.regions["state"][1]
        return replica * (size // self.lanes)

    def state_range(
        self, key: int, start: int, stop: int, dtype: torch.dtype, replica: int | None = None
    ) -> torch.Tensor:
        """Bytes ``start`` to ``stop`` of an elementwise optimizer's key-th state tensor."""
        offset = self._state_offset(replica) + key * self.table.state_span + self.table.state_place(start)
        return self.arena.view("state", offset, (stop - start) // dtype.itemsize, dtype)

    def state_tensor(self, index: int, replica: int | None = None) -> torch.Tensor:
        """A state tensor of an optimizer that is not elementwise."""
        spec = self.table.states[index]
        offset = self._state_offset(replica) + spec.offset
        return self.arena.view("state", offset, spec.numel, spec.dtype).view(spec.shape)

    def scalar_bytes(self, rank: int) -> torch.Tensor:
        """A worker's rows of per-piece scalars, as bytes."""
        size = self._own.scalar_bytes
        return self.arena.region("scalars")[rank * size : (rank + 1) * size]

    def undo_bytes(self, rank: int) -> torch.Tensor:
        """A worker's undo log, as bytes."""
        size = self._own.undo_bytes
        return self.arena.region("undo")[rank * size : (rank + 1) * size]

    def collective_bytes(self, rank: int) -> torch.Tensor:
        """Where a worker keeps what it gave to the small collectives of the step in work."""
        region = self.arena.region("collectives")
        size = region.numel() // self.arena.world_size
        return region[rank * size : (rank + 1) * size]

    def write_notebook(self, place: int, step: int, value: Any) -> None:
        """Keep a small value of a worker or server that holds at the beginning of ``step``.

        The one of ``step - 1`` stays readable.
        """
        data = pickle.dumps(value, protocol=5)
        if len(data) > NOTEBOOK_BYTES - 8:
            raise JobError(
                f"The scheduler and the optimizer's groups take {len(data)} bytes to remember and {NOTEBOOK_BYTES - 8} "
                "fit; keep large values out of them."
            )
        page = self._notebook(place, step)
        page[8 : 8 + len(data)] = np.frombuffer(data, dtype=np.uint8)
        page[:8].view(np.int64)[0] = len(data)

    def read_notebook(self, place: int, step: int) -> Any:
        """What ``write_notebook`` kept for that step, or None."""
        page = self._notebook(place, step)
        size = int(page[:8].view(np.int64)[0])
        return pickle.loads(page[8 : 8 + size].tobytes()) if size else None

    def _notebook(self, place: int, step: int) -> np.ndarray:
        region = self.arena.region("notebooks").numpy()
        at = (place * 2 + step % 2) * NOTEBOOK_BYTES
        page: np.ndarray = region[at : at + NOTEBOOK_BYTES]
        return page

    def record(self, rank: int, step: int) -> np.ndarray:
        """A worker's record of a step; it holds that step where its STEP column says so (step + 1)."""
        row: np.ndarray = self.records[rank, step % RING_STEPS]
        return row

    def state_dict(self, parity: int) -> dict[str, torch.Tensor]:
        """The model's state_dict under every name, in the model's own order: views, but for what is kept in parts."""
        found: dict[str, torch.Tensor] = {}
        for index, spec in enumerate(self.table.parameters):
            if not spec.regions:
                found.update(dict.fromkeys(spec.names, self.weights[index]))
                continue
            if spec.name not in found:
                found.update(dict.fromkeys(spec.names, torch.empty(spec.whole_shape, dtype=spec.dtype)))
            put(found[spec.name], spec.regions, self.weights[index])
        for index, spec in enumerate(self.table.buffers):
            if spec.persistent:
                found.update(dict.fromkeys(spec.names, self.buffer(parity, index)))
        return {name: found[name] for name in self.table.model_keys if name in found}
