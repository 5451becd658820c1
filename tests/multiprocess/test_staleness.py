"""How old weights and rows are when a worker reads them: the model itself records what it reads, and servers what they apply."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

import shoal
from shoal.data.order import batch_indices, epoch_order
from shoal.observe.events import read_events

SAMPLES, BATCH, WORKERS = 180, 6, 2
STEPS = SAMPLES // BATCH
HOT = 10**15 + 7


class Clock(nn.Module):
    """A row that every sample needs, and a weight: each update lowers both by exactly 1, so what is read counts updates."""

    def __init__(self, record: Path) -> None:
        super().__init__()
        self.rows = shoal.ps.Embedding(1, optimizer=shoal.ps.SGD(lr=1.0), init=shoal.ps.Zeros())
        self.weight = nn.Parameter(torch.zeros(1))
        self.record = str(record)

    def forward(self, samples: torch.Tensor) -> torch.Tensor:
        row = self.rows(torch.full_like(samples, HOT))[:, 0]
        read = os.getpid(), samples.tolist(), -row[0].item(), -self.weight.item()
        descriptor = os.open(self.record, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(descriptor, (json.dumps(read) + "\n").encode())
        os.close(descriptor)
        return row + self.weight


@dataclass(frozen=True)
class Read:
    """What was read for a shard of the batch ``step`` (from 0): how many updates were in the row, and in the weight."""

    pid: int
    step: int
    shard: int
    row: float
    weight: float


def train(plan: str, directory: Path) -> tuple[shoal.Run, list[Read]]:
    """A run of one epoch, and what was read in it, in order."""
    record, samples = directory / "read.jsonl", torch.arange(SAMPLES)
    job = shoal.Job(
        name="clock", model=lambda: Clock(record), train_data=lambda: (samples, samples), batch_size=BATCH, epochs=1,
        loss=lambda output, target: output.mean(), optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0),
    )  # fmt: skip
    run = shoal.train(job, plan=f"{plan},workers={WORKERS},threads=1", run_dir=directory / "run")
    order, size = epoch_order(SAMPLES, 0, 0), BATCH // WORKERS
    batches = [batch_indices(order, step, BATCH).tolist() for step in range(STEPS)]
    unit_of = {tuple(b[k * size : (k + 1) * size]): (step, k) for step, b in enumerate(batches) for k in range(WORKERS)}
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    # A model is also tried with a few samples, before and after.
    reads = [Read(pid, *unit_of[key], *counts) for pid, found, *counts in lines if (key := tuple(found)) in unit_of]
    assert len(reads) == STEPS * WORKERS == len({(read.step, read.shard) for read in reads})
    return run, reads


@pytest.mark.parametrize(
    ("plan", "transport"),
    [
        ("ps=1,staleness=1,pull_every=6", "group"),
        ("ps=1,staleness=1,pull_every=6", "arena"),
        ("ps=1,async,pull_every=3", "group"),
        ("ps=2,sync", "group"),
    ],
)
def test_no_row_is_older_than_the_plan_allows(
    plan: str, transport: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOAL_EXPORT", "0")
    monkeypatch.setenv("SHOAL_TRANSPORT", transport)
    run, reads = train(plan, tmp_path)
    pushes = {(e["batch"] - 1, e["shard"]): e for e in read_events(run.path / "events.jsonl", {"push_ack"})}
    own = {pid: [read for read in reads if read.pid == pid] for pid in {read.pid for read in reads}}
    again = [(a, b) for found in own.values() for a, b in zip(found, found[1:], strict=False) if a.row == b.row]
    for read in reads:
        push = pushes[read.step, read.shard]
        # What the ledger says of the copy, which the rows that are kept with it are never behind.
        assert read.weight == max(push["versions"]) - push["staleness"] - 1 <= read.row
        if "staleness" in plan:
            # Stale synchronous parallel: everything up to the step before the last one is in it, whoever pushed that.
            assert read.row >= read.weight >= WORKERS * (read.step - 1)
    if "sync" in plan and "async" not in plan:
        assert all(read.row == read.weight == read.step for read in reads)
    elif transport == "arena":
        # Rows are read where they lie: each worker's own last push is in them.
        assert not again
    else:
        assert again, "no row was kept"
        longest = max(len([r for r in found if r.row == one.row]) for found in own.values() for one in found)
        assert longest <= int(plan[-1])
