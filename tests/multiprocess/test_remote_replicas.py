"""Servers with copies: whoever is killed, the run goes on, and every push that was acknowledged is in the weights once."""

from __future__ import annotations

import json
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import shoal
from shoal.observe.events import read_events
from shoal.ps.initialisers import Zeros


class Sums(nn.Module):
    """Linear in everything that it learns, so that what is learned is the sum over pushes, in whatever order they come."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = shoal.ps.Embedding(4, optimizer=shoal.ps.SGD(lr=0.1), init=Zeros(), mode="sum")
        self.weights = nn.ParameterList([nn.Parameter(torch.ones(16)) for _ in range(6)])

    def forward(self, keys: torch.Tensor) -> torch.Tensor:
        found = self.rows(keys).sum(-1)
        for number, weight in enumerate(self.weights):
            found = found + torch.sin(keys[:, :1] * torch.arange(1, 17) + number).to(weight.dtype) @ weight
        return found


def data() -> tuple[torch.Tensor, torch.Tensor]:
    keys = torch.randint(0, 60, (200, 5), generator=torch.Generator().manual_seed(3))
    return keys, torch.cos(keys[:, 1].double())


def job(**changes: Any) -> shoal.Job:
    return shoal.Job(**{
        "name": "sums", "model": lambda: Sums().double(), "train_data": data, "batch_size": 20, "epochs": 6,
        "loss": lambda output, target: (output * target).mean(), "optimizer": lambda p: torch.optim.SGD(p, lr=1e-2), **changes,
    })  # fmt: skip


def kill(run: Path, role: str, rank: int) -> None:
    rows = json.loads((run / "processes.json").read_text())
    os.kill(next(row["pid"] for row in rows if (row["role"], row["rank"]) == (role, rank)), signal.SIGKILL)


def learned() -> dict[str, torch.Tensor]:
    """What the model has after each sample counted once an epoch, in a push that is the mean over ten of them."""
    (keys, target), pushed = data(), 6 / 10
    rows = torch.zeros(60, 4, dtype=torch.float64)
    rows.index_add_(0, keys.reshape(-1), -0.1 * pushed * target.repeat_interleave(5)[:, None].expand(-1, 4))
    found = {"rows.keys": torch.arange(60), "rows.rows": rows}
    for number in range(6):
        features = torch.sin(keys[:, :1] * torch.arange(1, 17) + number).double()
        found[f"weights.{number}"] = 1 - 1e-2 * pushed * target @ features
    return found


def test_servers_are_killed_one_after_the_other_and_every_push_counts_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOAL_EXPORT", "0")
    chance, run, killed = random.Random(7), tmp_path / "run", []
    first = chance.choice([0, 1])

    def lose(rank: int) -> None:
        kill(run, "server", rank)
        killed.append(rank)

    def watch(event: dict[str, Any]) -> None:
        if event["kind"] == "step" and event["step"] >= 6 and not killed:
            lose(first)
        elif event["kind"] == "recovered" and len(killed) < 3:
            # The one that has come back has the only other copy: then that of the first head, and then a tail of the other shard.
            lose([first + 2, 3 - first][len(killed) - 1])

    found = shoal.train(job(), plan="ps=2,workers=2,async,replicas=1,threads=1", run_dir=run, on_event=watch)
    assert killed == [first, first + 2, 3 - first]
    deaths = [(e["role"], e["rank"], e["cause"]) for e in read_events(run / "events.jsonl", {"death"})]
    assert deaths == [("server", rank, "SIGKILL") for rank in killed]
    back = [(e["rank"], e["action"]) for e in read_events(run / "events.jsonl", {"recovered"})]
    assert back[:2] == [(rank, "copied") for rank in killed[:2]]
    pushes = sorted((e["epoch"], e["batch"], e["shard"]) for e in read_events(run / "events.jsonl", {"push_ack"}))
    assert pushes == [(e, b, s) for e in range(1, 7) for b in range(1, 11) for s in (0, 1)]
    weights, expected = found.weights(), learned()
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-9)


def test_steps_that_wait_for_all_have_the_bits_of_a_run_in_which_nobody_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOAL_EXPORT", "0")
    of, run, killed = job(epochs=1000, optimizer=lambda p: torch.optim.Adam(p, lr=1e-3), grad_clip=0.5), tmp_path / "run", []
    # A head at work, the one that answers in its place, a tail of the other shard, and a worker.
    order = [("server", 0), ("server", 2), ("server", 3), ("worker", 1)]

    def watch(event: dict[str, Any]) -> str | None:
        due = (event["kind"] == "step" and event["step"] == 6) if not killed else event["kind"] == "recovered"
        if due and len(killed) == len(order):
            return "stop"
        if due:
            kill(run, *order[len(killed)])
            killed.append(order[len(killed)])
        return None

    found = shoal.train(of, plan="ps=2,workers=2,sync,replicas=1,threads=1", run_dir=run, on_event=watch)
    assert [(e["role"], e["rank"], e["cause"]) for e in read_events(run / "events.jsonl", {"death"})] == [
        (*who, "SIGKILL") for who in order
    ]
    steps = found.summary()["steps"]
    acknowledged = [(e["epoch"], e["batch"], e["shard"]) for e in read_events(run / "events.jsonl", {"push_ack"})]
    assert acknowledged == [(step // 10 + 1, step % 10 + 1, shard) for step in range(steps) for shard in (0, 1)]
    monkeypatch.setenv("SHOAL_TRANSPORT", "group")
    whole = shoal.train(of, plan="ps=2,workers=2,sync,threads=1", run_dir=tmp_path / "whole", steps=steps)
    assert found.summary()["weights_sha256"] == whole.summary()["weights_sha256"]
