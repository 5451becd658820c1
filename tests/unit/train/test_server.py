"""A server's steps: what readers of the run can see meanwhile."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_store import Net

from shoal.axes.server import Server
from shoal.axes.waiting import Waiting
from shoal.comm.arena import Arena, Note, Signal
from shoal.comm.grid import Grid
from shoal.comm.store import Columns, Store, arena_layout
from shoal.plan import Plan
from shoal.ps import outbox
from shoal.ps.embedding import Gathered
from shoal.ps.optimizers import SGD
from shoal.ps.spec import TableSpec
from shoal.ps.table import Rows, Table
from shoal.train.checkpoint import part_path
from shoal.train.describe import describe, fill
from shoal.train.faults import Faults
from shoal.train.published import PublishedWeights, StepClocks
from shoal.train.row_tables import Owner, TableUpdater, run_spec
from shoal.train.schedule import Schedule
from shoal.train.server import ServerLoop, ServerParts
from shoal.train.settings import RunSettings
from shoal.train.update import make_updater

PLAN = Plan.parse("ps=1,workers=1,sync")
STEPS = 3


class Pausing(Faults):
    """Waits in the midst of a checkpoint."""

    def __init__(self, slot: Any) -> None:
        super().__init__(0, slot, "", server=True)
        self.reached, self.go_on = threading.Event(), threading.Event()

    def reach(self, phase: str, step: int) -> None:
        if phase == "checkpoint":
            self.reached.set()
            assert self.go_on.wait(60)


@pytest.fixture
def table() -> Iterator[Table]:
    made = Table.create(run_spec(TableSpec(name="rows", width=3, optimizer=SGD(lr=0.25))))
    made.put(Rows(np.arange(5), torch.ones(5, 3), np.ones(5, np.uint32), np.zeros(5, np.int64)))
    yield made
    made.close()


def test_readers_see_the_newest_weights_and_rows_while_a_checkpoint_is_written(tmp_path: Path, table: Table) -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    described = describe(model, optimizer)
    store = Store(Arena.create(arena_layout(described, Grid.of(PLAN))), described)
    fill(store, dict(model.named_parameters()), dict(model.named_buffers()))
    arena, (slot,) = store.arena, store.arena.servers
    dense = make_updater(store, 0, optimizer, lambda: list(store.weights))
    updater = TableUpdater(dense, [table], Owner(0, 1, 1), lambda: slot.signal(Signal.UPDATED))
    faults = Pausing(slot)
    settings = RunSettings(
        plan=PLAN, layout=arena.layout, total_steps=STEPS, steps_per_epoch=STEPS + 1, checkpoint_dir=str(tmp_path)
    )
    job = SimpleNamespace(seed=0, grad_clip=None, scheduler=None, scheduler_every="step")
    said: list[Any] = []
    loop = ServerLoop(
        ServerParts(
            job=job, axis=Server(store, 0, updater, Waiting(spin_s=0.0)), updater=updater, faults=faults, settings=settings,
            schedule=Schedule(job, optimizer, store, 1, updater), channel=SimpleNamespace(send=said.append),
        )  # fmt: skip
    )
    published = PublishedWeights(store, StepClocks(arena), [table])
    published.listen()

    def push(step: int) -> None:
        """A worker's gradients of a step: ones."""
        for index in range(len(described.trained)):
            store.touched[0, index] = 1
            store.gradient(0, index).fill_(1.0)
        gathered = Gathered(np.array([1, 2]), np.ones(2, np.uint32), torch.ones(2, 3))
        outbox.write(table.memory, table.kernel, table.spec, 0, gathered)
        record = store.record(0, step)
        record[Columns.STEP], record[Columns.WEIGHT], record[Columns.MEASURED] = step + 1, 1.0, 1.0
        arena.slots[0].post(Signal.GRADIENTS, step + 1)

    arena.supervisor.write(Note.CHECKPOINT_WANTED, 1)
    serving = threading.Thread(target=loop.run, daemon=True)
    serving.start()
    for step in range(STEPS):
        push(step)
        until = time.monotonic() + 60
        while slot.signal(Signal.UPDATED) <= step < STEPS - 1:
            assert time.monotonic() < until and serving.is_alive()
            time.sleep(0.001)
    assert faults.reached.wait(60)
    out = np.zeros(published.size, np.uint8)
    try:
        copied = published.copy((0,), out)
    finally:
        faults.go_on.set()
    # Two updates, whole, and all that they have changed; the third has not begun.
    assert copied is not None and copied.versions == (2,)
    ((number, changes),) = copied.rows
    assert number == 0 and changes is not None and changes.keys.tolist() == [1, 2]
    assert (changes.rows == 0.5).all()
    serving.join(60)
    assert not serving.is_alive() and slot.signal(Signal.UPDATED) == STEPS and not said
    # What is in the checkpoint is what readers saw, and it was whole before the third update.
    assert slot.note(Note.CHECKPOINT_DONE) == 2
    kept = load_file(part_path(tmp_path, 2) / "state.safetensors")
    for tensor in published.tensors:
        if f"weights/{tensor.names[0]}" in kept:
            at = out[tensor.offset : tensor.offset + int(np.prod(tensor.shape)) * 8].view(np.float64)
            assert np.array_equal(at, kept[f"weights/{tensor.names[0]}"].numpy().reshape(-1)), tensor.names
    rows = load_file(part_path(tmp_path, 2) / "rows-0-0.safetensors")
    shown = dict(zip(changes.keys.tolist(), changes.rows, strict=True))
    for key, row in zip(rows["keys"].tolist(), rows["values"][:, :3].numpy(), strict=True):
        assert np.array_equal(row, shown.get(key, np.ones(3, np.float32)))
    assert not torch.equal(store.weights[0], kept["weights/large"])
    arena.memory.close()
