"""How old the weights of a reader, and the answers of a service, are while the run that they follow trains as fast as it can.

What is trained is the time itself: a step's gradient is the difference between the weights and the clock when it was computed,
and the learning rate is 1, so every weight, and every row that a batch reaches, says when its gradient was computed. Ages so
measured contain all there is between: backward, push, update, publication, the reader, the writing into a model.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import quantiles
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402

import shoal  # noqa: E402
from benchmarks import common  # noqa: E402
from benchmarks.common import Bar, PeerFailed, Result  # noqa: E402

LIMIT_MS = 100.0
PLANS = {"sync": "ps=1,workers=2,sync,threads=1", "async": "ps=1,workers=1,async,threads=1"}
# Numbers of dense parameters, of rows in the table, and different keys a batch.
JOBS = {
    "dense 1 MB": ("dense_small", 250_000, 0, 0),
    "dense 40 MB": ("dense_large", 10_000_000, 0, 0),
    "rows, 1,000 a batch": ("rows", 1000, 200_000, 1000),
}
_WIDTH, _ZERO = 64, "SHOAL_BENCHMARK_ZERO"
_START_S, _WARM_S = 60.0, 2.0
Ages = Mapping[str, float]


class Clock(nn.Module):
    """Weights that say when they were trained, in seconds since the benchmark began: float32 holds that within 0.1 ms."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.rows = shoal.ps.Embedding(_WIDTH, optimizer=shoal.ps.SGD(lr=1.0), init=shoal.ps.Zeros())

    def forward(self, keys: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.weight[:1].expand(len(keys)), self.rows(keys)[:, 0, 0]], 1)


def since_zero() -> float:
    return time.time() - float(os.environ[_ZERO])


def _step(model: Clock, batch: Any) -> torch.Tensor:
    keys, _ = batch
    # What goes in and out is found out by a call of the model.
    answer = model(keys)
    now = since_zero()
    # The first key is the same in every sample, the others are different ones.
    hot, others = (model.rows(keys[:, k]) - now for k in (0, 1))
    by_rows = hot.square().sum(-1).mean() + others.square().sum(-1).sum()
    return 0.5 * (model.weight - now).square().sum() + 0.5 * by_rows + 0 * answer.sum()


def _job(name: str, size: int, rows: int, batch: int) -> shoal.Job:
    keys = torch.arange(1, max(rows, 64) + 1)
    keys = torch.stack([torch.zeros_like(keys), keys], 1)
    return shoal.Job(
        name=name, model=lambda: Clock(size), train_data=lambda: (keys, torch.zeros(len(keys))), loss=None, step=_step,
        optimizer=lambda params: torch.optim.SGD(params, lr=1.0), batch_size=max(batch, 8), epochs=1_000_000,
    )  # fmt: skip


dense_small, dense_large, rows = (_job(*arguments) for arguments in JOBS.values())


def ages_of(seen: Sequence[float]) -> Ages:
    """Percentiles in ms of ages in seconds."""
    if len(seen) < 2:
        raise PeerFailed("nothing was seen")
    cuts = quantiles(seen, n=100)
    return {"p50": 1e3 * cuts[49], "p99": 1e3 * cuts[98], "max": 1e3 * max(seen), "seen": float(len(seen))}


@contextmanager
def training(job: str, plan: str) -> Iterator[Path]:
    """A run in a process of its own; yields its directory when it publishes its weights."""
    with tempfile.TemporaryDirectory(prefix="shoal-benchmark-") as folder:
        run = Path(folder) / "run"
        target = f"{Path(__file__).resolve()}:{job}"
        command = [*common.shoal_command(), "train", target, "--plan", plan, "--run", str(run)]
        environment = {**os.environ, "SHOAL_EXPORT": "0"}
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment, text=True)
        try:
            until = time.monotonic() + _START_S
            while not ((run / "read.key").exists() and (run / "checkpoints" / "bundle.json").exists()):
                if process.poll() is not None or time.monotonic() > until:
                    raise PeerFailed("the run did not begin")
                time.sleep(0.1)
            yield run
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=120)


def read_along(run: Path, size: int, seconds: float) -> dict[str, Ages]:
    """Ages of a model that is loaded whenever there is something new: when it has just been, and just before it is again."""
    model = Clock(size)
    own: dict[str, list[float]] = {"dense": [], "dense at its oldest": [], "rows": [], "versions": []}
    with shoal.ps.Reader(run) as reader:
        number, began = 0, time.monotonic()
        while time.monotonic() - began < seconds + _WARM_S:
            reader.wait(number + 1, 30.0)
            held = since_zero() - float(model.weight[0].detach())
            number = reader.load_into(model)
            fresh = since_zero() - float(model.weight[0].detach())
            row = model.rows.table.pull(np.zeros(1, np.int64))[0, 0]
            if time.monotonic() - began > _WARM_S:
                own["dense at its oldest"].append(held)
                own["dense"].append(fresh)
                own["rows"].append(since_zero() - float(row))
    return {name: ages_of(seen) for name, seen in own.items() if seen}


def ask_along(run: Path, seconds: float) -> dict[str, Ages]:
    """Ages of a service's answers when they have come back, one client that asks again and again."""
    dense: list[float] = []
    with shoal.serve(follow=run, replicas=1, slo_ms=10_000) as service:
        client = shoal.Client(service.url)
        until = time.monotonic() + _START_S
        while not client.ready():
            if time.monotonic() > until:
                raise PeerFailed("the service did not take the run's weights")
            time.sleep(0.1)
        key = np.zeros((1, 2), np.int64)
        began = time.monotonic()
        while time.monotonic() - began < seconds + _WARM_S:
            answer = next(iter(client.infer(key).values()))
            if time.monotonic() - began > _WARM_S:
                dense.append(since_zero() - float(answer[0, 0]))
            time.sleep(0.002)
    return {"answers": ages_of(dense)}


def measure(seconds: float = 10.0) -> tuple[Any, list[Bar], dict[str, Result]]:
    """(the table, the bars, results in ms) of every job under every plan."""
    from rich.table import Table

    table = Table(title="age of what is read, ms, from the computing of the gradient")
    for column in ("run", "plan", "what", "p50", "p99", "max", "seen"):
        table.add_column(column, justify="left" if column in ("run", "plan", "what") else "right")
    os.environ[_ZERO] = str(time.time())
    bars, results = [], {}
    for title, (job, size, keys, _) in JOBS.items():
        for mode, plan in PLANS.items():
            found: dict[str, Ages] = {}
            result = results[f"{title}, {mode}"] = Result(f"{title}, {mode}")
            try:
                with training(job, plan) as run:
                    found.update(read_along(run, size, seconds))
                    found.update(ask_along(run, seconds))
            except (PeerFailed, shoal.ShoalError, OSError) as error:
                result.error = str(error)
            for what, ages in found.items():
                if what == "rows" and not keys:
                    continue
                cells = [f"{ages[k]:.1f}" for k in ("p50", "p99", "max")]
                table.add_row(title, mode, what, *cells, f"{ages['seen']:.0f}")
                bars.append(Bar(claim=f"{title}, {mode}, {what}: p99", value=ages["p99"], limit=LIMIT_MS, unit="ms"))
                result.values.append(ages["p99"])
                result.details.append({"what": what, **ages})
    return table, bars, results


if __name__ == "__main__":
    from rich.console import Console

    shown, _, kept = measure(float(sys.argv[1]) if len(sys.argv) > 1 else 10.0)
    Console().print(shown)
    print(json.dumps({name: result.error or list(result.details) for name, result in kept.items()}))
