"""One run of benchmarks/parameter_server.py's part on slow workers: how long training takes to a goal."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from torch import nn

import shoal
from shoal.observe.events import read_events

SAMPLES, WIDTH, CLASSES = 20_000, 64, 10


def data(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(x, y): classes are those of a fixed random matrix, with noise beside them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(SAMPLES if seed == 1 else 2_000, WIDTH, generator=generator)
    teacher = torch.Generator().manual_seed(7)
    matrix = torch.randn(WIDTH, CLASSES, generator=teacher)
    return x, (x @ matrix + torch.randn(len(x), CLASSES, generator=generator)).argmax(1)


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, CLASSES))


def accuracy(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output.argmax(1) == target).float().mean()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--plan", required=True)
    parser.add_argument("--goal", type=float, required=True)
    options = parser.parse_args()
    job = shoal.Job(
        name="slow-worker", model=model, train_data=lambda: data(1), eval_data=lambda: data(2),
        loss=nn.functional.cross_entropy, optimizer=lambda p: torch.optim.Adam(p, lr=2e-4), metrics={"accuracy": accuracy},
        batch_size=500, epochs=60, until={"eval_accuracy": options.goal},
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        run = shoal.train(job, plan=options.plan, run_dir=Path(folder) / "run")
        events = list(read_events(run.path / "events.jsonl", {"step", "epoch"}))
        first, last = events[0], events[-1]
        summary = run.summary()
    reached = summary["stopped_by"] == "until"
    print(json.dumps({
        "to_goal_s": last["t"] - first["t"] + first.get("step_s", 0.0) if reached else float("nan"),
        "epochs": len(summary["epochs"]), "final": summary["final"], "staleness": summary.get("staleness"),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
