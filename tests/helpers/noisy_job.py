"""A job with everything that a killed worker could get wrong, and what the tests of faults ask of a run.

Random augmentation in the data set, dropout, BatchNorm over the global batch, gradient clipping and a schedule. It is
also a target for the command line: ``noisy_job.py:job``. What goes wrong in it on purpose is chosen by the environment.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from torch.utils.data import Dataset
from torchmetrics import Metric
from torchmetrics.classification import BinaryAUROC

import shoal

STEPS_PER_EPOCH = 13
HERE = Path(__file__)


class Noisy(Dataset):
    """Rows that look different in each epoch."""

    def __init__(self, rows: int) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(rows, 12, generator=generator)
        self.y = (self.x.sum(1) > 0).long()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.x[index] + 0.1 * torch.randn(12), self.y[index]


def model() -> nn.Module:
    """Large enough that each of two workers updates more than one chunk."""
    return nn.Sequential(
        nn.Linear(12, 800), nn.BatchNorm1d(800), nn.ReLU(), nn.Dropout(0.3),
        nn.Linear(800, 800), nn.ReLU(), nn.Linear(800, 2),
    )  # fmt: skip


def accuracy(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output.argmax(1) == target).float().mean()


class Auc(BinaryAUROC):
    """Keeps everything that it has seen in lists."""

    def update(self, output: torch.Tensor, target: torch.Tensor) -> None:
        super().update(output.softmax(1)[:, 1], target)


class Confusion(Metric):
    """Keeps a table of a fixed size, and a number that is no tensor."""

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("table", torch.zeros(2, 2, dtype=torch.long), dist_reduce_fx="sum")
        self.classes: int | None = None

    def update(self, output: torch.Tensor, target: torch.Tensor) -> None:
        self.classes = output.shape[1]
        self.table += torch.bincount(2 * target + output.argmax(1), minlength=4).view(2, 2)

    def compute(self) -> torch.Tensor:
        assert self.classes == 2
        return self.table.double()


def adam(params: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=1e-3)


def steps_down(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.MultiStepLR(optimizer, [4, 9, 20], gamma=0.7)


def make_job(optimizer: Callable[[Any], torch.optim.Optimizer] = adam, **changes: Any) -> shoal.Job:
    job = shoal.Job(
        name="noisy",
        model=model,
        train_data=lambda: Noisy(12 * STEPS_PER_EPOCH - 5),
        eval_data=lambda: Noisy(40),
        loss=nn.functional.cross_entropy,
        optimizer=optimizer,
        scheduler=steps_down,
        metrics={"accuracy": accuracy, "auc": Auc(), "confusion": Confusion()},
        batch_size=12,
        epochs=4,
        grad_clip=0.5,
    )
    return job.replace(**changes)


class Counting(torch.optim.Optimizer):
    """An optimizer of the user's own that adds noise; its memory is partly in Python numbers: in its state and groups."""

    def __init__(self, params: Any, lr: float = 1e-2) -> None:
        super().__init__(params, {"lr": lr, "calls": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["calls"] += 1
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"], state["mean"] = 0, torch.zeros_like(p)
                state["step"] += 1
                state["mean"].mul_(0.9).add_(p.grad)
                p.add_(torch.randn_like(p), alpha=1e-4 * random.random())
                p.add_(state["mean"], alpha=-group["lr"] / (1 + 0.01 * state["step"] + 0.003 * group["calls"]))


# -- what the command line trains ------------------------------------------------------------------------------------

_calls = 0


def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Cross-entropy; SHOAL_TEST_LOSS="raise:7" goes wrong in this worker's seventh call, "nan:7" returns no number."""
    global _calls
    if torch.is_grad_enabled():
        _calls += 1
    kind, _, at = os.environ.get("SHOAL_TEST_LOSS", "").partition(":")
    value = nn.functional.cross_entropy(output, target)
    if kind and torch.is_grad_enabled() and _calls == int(at):
        if kind == "raise":
            raise ValueError("the user's own mistake")
        return value * float("nan")
    return value


job = make_job(loss=loss, epochs=12)


def never() -> nn.Module:
    time.sleep(1000)
    raise AssertionError("nobody waits so long")


unending = make_job(model=never)


# -- what the tests ask of a run -------------------------------------------------------------------------------------


def command(run: Path, *more: str, target: str = "job") -> list[str]:
    """``shoal train`` of this file's job."""
    return [
        sys.executable, "-m", "shoal", "train", f"{HERE}:{target}", "--plan", "dp=2,threads=1", "--run", str(run),
        "--json", *more,
    ]  # fmt: skip


def held_at(step: int, *ranks: int) -> str:
    """For SHOAL_FAULTS: workers that take hours from this step (from 0) on, so that a run cannot end before it is killed."""
    return ";".join(f"slow(rank={rank},factor=10000000,step={step})" for rank in ranks)


def settle(event: dict[str, Any]) -> None:
    """An observer: no step begins before the checkpoint that is being completed is whole, however slow the disk."""
    if event["kind"] == "step":
        for thread in threading.enumerate():
            if thread.name == "shoal-checkpoint":
                thread.join()


def environment(**more: str) -> dict[str, str]:
    """For a child process: no exported program, checkpoints all the time, unless told otherwise."""
    return {**os.environ, "SHOAL_EXPORT": "0", "SHOAL_CHECKPOINT_S": "0", **more}


def events(run: Path, *kinds: str) -> list[dict[str, Any]]:
    """The events of these kinds that are in the file so far."""
    try:
        lines = (run / "events.jsonl").read_text().splitlines(keepends=True)
    except OSError:
        return []
    # Most lines are steps; whoever asks for something else again and again need not have them parsed.
    signs = [f'"kind": "{kind}"' for kind in kinds]
    return [json.loads(line) for line in lines if line.endswith("\n") and any(sign in line[:80] for sign in signs)]


def history(trained: shoal.Run) -> list[dict[str, Any]]:
    """A run's history without what depends on the clock."""
    return [{name: value for name, value in entry.items() if name != "samples_per_s"} for entry in trained.history]


def digest(trained: shoal.Run) -> str:
    found: str = trained.summary()["weights_sha256"]
    return found


def processes(run: Path, *roles: str) -> list[int]:
    """The pids that processes.json names for these roles (all where none is given)."""
    try:
        rows = json.loads((run / "processes.json").read_text())
    except (OSError, ValueError):
        return []
    return [row["pid"] for row in rows if not roles or row["role"] in roles]


def wait_until(
    condition: Callable[[], Any], process: subprocess.Popen[Any] | None = None, timeout_s: float = 120.0
) -> Any:
    """Wait for something to become true and return it; the test fails where it never does, or the process ends."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        ended = process is not None and process.poll() is not None
        assert not ended, f"the process ended with {process.returncode if process else None} before it came to that"
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)
    return value


def kill(pid: int) -> None:
    """SIGKILL, if it is still there."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def gone(pids: Iterable[int]) -> bool:
    """Whether none of these runs any more."""
    for pid in pids:
        try:
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                return False
        except psutil.NoSuchProcess:
            continue
    return True
