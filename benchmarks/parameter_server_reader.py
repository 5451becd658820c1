"""How far a reader's model, and a service's answers, are behind the run that they follow while it trains as fast as it can.

What is trained is the time itself: a step's gradient is the difference between the weights and the clock when it was computed,
and the learning rate is 1, so every weight, and every row that a batch reaches, says when its gradient was computed.

*Behind* is for how long the servers have had an update that is not in the model: looked at just before the model is loaded
anew, when it is at its oldest, and of a service when an answer has come back. A worker notes when it begins a step, with the
update of the one before. *From the gradient* contains all there is between: backward, push, update, publication, the reader, the
writing into a model, and the time until the next one. *On the way* is from when the servers' weights were copied until the
publication had arrived, *writing* is ``load_into``.

A checkpoint is what keeps a run longest from updating; the last column says how many were finished while it was looked. Dense,
recommender and service in two minutes: ``--jobs "dense 40 MB" recommender``.
"""

from __future__ import annotations

import argparse
import functools
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
    "dense 10 MB": ("dense_medium", 2_500_000, 0, 0),
    "dense 40 MB": ("dense_large", 10_000_000, 0, 0),
    "recommender": ("rows", 250_000, 200_000, 1000),
}
BEHIND, GRADIENT, WAY, WRITING = "behind", "from the gradient", "on the way", "writing"
_WIDTH, _ZERO, _TICKS = 64, "SHOAL_BENCHMARK_ZERO", "SHOAL_BENCHMARK_TICKS"
_START_S, _WARM_S, _END_S = 60.0, 1.0, 20.0
_TICK = np.dtype([("pid", "i8"), ("at", "f8")])
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


@functools.cache
def _ticks() -> int:
    return os.open(os.environ[_TICKS], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)


def _step(model: Clock, batch: Any) -> torch.Tensor:
    keys, _ = batch
    now = since_zero()
    os.write(_ticks(), np.array([(os.getpid(), now)], _TICK).tobytes())
    # What goes in and out is found out by a call of the model.
    answer = model(keys)
    # The first key is the same in every sample, the others are different ones.
    hot, others = (model.rows(keys[:, k]) - now for k in (0, 1))
    by_rows = hot.square().sum(-1).mean() + others.square().sum(-1).sum()
    return 0.5 * (model.weight - now).square().sum() + 0.5 * by_rows + 0 * answer.sum()


def _job(name: str, size: int, rows: int, batch: int) -> shoal.Job:
    keys = torch.arange(1, max(rows, 6400) + 1)
    keys = torch.stack([torch.zeros_like(keys), keys], 1)
    return shoal.Job(
        name=name, model=lambda: Clock(size), train_data=lambda: (keys, torch.zeros(len(keys))), loss=None, step=_step,
        optimizer=lambda params: torch.optim.SGD(params, lr=1.0), batch_size=max(batch, 8), epochs=1_000_000,
    )  # fmt: skip


dense_small, dense_medium, dense_large, rows = (_job(*arguments) for arguments in JOBS.values())


class Run:
    """A run in training, and when its first worker began its steps."""

    def __init__(self, path: Path, ticks: Path) -> None:
        self.path = path
        self._ticks = ticks

    def checkpoints(self, since: float) -> int:
        """How many were finished after a time of the Unix clock."""
        lines = (self.path / "events.jsonl").read_text().splitlines(keepends=True)
        # The last one may be being written.
        events = [json.loads(line) for line in lines if line.endswith("\n")]
        return sum(event["kind"] == "checkpoint" and event["t"] > since for event in events)

    def behind(self, looks: Sequence[tuple[float, float]]) -> list[float]:
        """Of (when it was looked at, what the weights said), the seconds for which there had been a newer update, 0 for none."""
        ticks = np.fromfile(self._ticks, _TICK)
        pids, counts = np.unique(ticks["pid"], return_counts=True)
        began = np.sort(ticks["at"][ticks["pid"] == pids[counts.argmax()]])
        found = []
        for at, said in looks:
            step = int(np.abs(began - said).argmin())
            # It began the one after the next with the update that is missing.
            newer = began[step + 2 : step + 3]
            found.append(max(0.0, at - float(newer[0])) if len(newer) else 0.0)
        return found


def ages_of(seen: Sequence[float]) -> Ages:
    """Percentiles in ms of ages in seconds."""
    if len(seen) < 2:
        raise PeerFailed("nothing was seen")
    cuts = quantiles(seen, n=100, method="inclusive")
    return {"p50": 1e3 * cuts[49], "p99": 1e3 * cuts[98], "max": 1e3 * max(seen), "seen": float(len(seen))}


@contextmanager
def training(job: str, plan: str) -> Iterator[Run]:
    """A run in a process of its own; yields it when it publishes its weights."""
    with tempfile.TemporaryDirectory(prefix="shoal-benchmark-") as folder:
        run = Run(Path(folder) / "run", Path(folder) / "ticks")
        target = f"{Path(__file__).resolve()}:{job}"
        command = [*common.shoal_command(), "train", target, "--plan", plan, "--run", str(run.path)]
        environment = {**os.environ, "SHOAL_EXPORT": "0", "SHOAL_CHECKPOINT_S": "10", _TICKS: str(Path(folder) / "ticks")}
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment, text=True)
        try:
            until = time.monotonic() + _START_S
            while not (run.path / "read.key").exists():
                if process.poll() is not None or time.monotonic() > until:
                    raise PeerFailed("the run did not begin")
                time.sleep(0.1)
            yield run
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.communicate(timeout=_END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()


def read_along(run: Run, size: int, with_rows: bool, seconds: float) -> dict[str, Ages]:
    """Ages of a model that is loaded whenever there is something new."""
    model = Clock(size)
    own: dict[str, list[tuple[float, float]]] = {"reader": []} | ({"reader, rows": []} if with_rows else {})
    ways, writings = list[float](), list[float]()
    with shoal.ps.Reader(run.path, _START_S) as reader:
        number, began = reader.load_into(model), time.monotonic()
        while time.monotonic() - began < seconds + _WARM_S:
            reader.wait(number + 1, 30.0)
            number = reader.number
            # Until it is written the old one is what a user has: the copying counts.
            before = float(model.weight[0].detach()), float(model.rows.table.pull(np.zeros(1, np.int64))[0, 0])
            way, start = reader.lag_s, since_zero()
            number = reader.load_into(model)
            now = since_zero()
            if time.monotonic() - began > _WARM_S:
                ways.append(way)
                writings.append(now - start)
                for looks, said in zip(own.values(), before, strict=False):
                    looks.append((now, said))
        found = _both(run, own, seconds)
    return {**found, f"reader: {WAY}": ages_of(ways), f"reader: {WRITING}": ages_of(writings)}


def ask_along(run: Run, with_rows: bool, seconds: float) -> dict[str, Ages]:
    """Ages of a service's answers when they have come back, one client that asks again and again."""
    own: dict[str, list[tuple[float, float]]] = {"service": []} | ({"service, rows": []} if with_rows else {})
    with shoal.serve(follow=run.path, replicas=1, slo_ms=10_000) as service:
        client = shoal.Client(service.url)
        until = time.monotonic() + _START_S
        while not client.ready():
            if time.monotonic() > until:
                raise PeerFailed("the service did not take the run's weights")
            time.sleep(0.1)
        # It answers with the first weights already while it takes in what has changed since.
        while not all((numbers.get("weights") or {}).get("updates", 0) > 1 for numbers in service.numbers().values()):
            if time.monotonic() > until:
                raise PeerFailed("the service did not follow the run")
            time.sleep(0.1)
        key = np.zeros((1, 2), np.int64)
        began = time.monotonic()
        while time.monotonic() - began < seconds + _WARM_S:
            answer = next(iter(client.infer(key).values()))
            now = since_zero()
            if time.monotonic() - began > _WARM_S:
                for column, looks in enumerate(own.values()):
                    looks.append((now, float(answer[0, column])))
            time.sleep(0.002)
        return _both(run, own, seconds)


def _both(run: Run, own: Mapping[str, Sequence[tuple[float, float]]], seconds: float) -> dict[str, Ages]:
    found = {}
    checkpoints = run.checkpoints(time.time() - seconds)
    for name, looks in own.items():
        found[f"{name}: {BEHIND}"] = {**ages_of(run.behind(looks)), "checkpoints": float(checkpoints)}
        found[f"{name}: {GRADIENT}"] = ages_of([at - said for at, said in looks])
    return found


def measure(
    seconds: float = 5.0, jobs: Sequence[str] = tuple(JOBS), plans: Sequence[str] = tuple(PLANS), service: bool = True
) -> tuple[Any, list[Bar], dict[str, Result]]:
    """(the table, the bars, results in ms) of jobs under plans; each takes twice ``seconds`` and some 20 s to start and end."""
    from rich.table import Table

    table = Table(title="age of what is read, ms")
    for column in ("run", "plan", "what", "p50", "p99", "max", "seen", "checkpoints"):
        table.add_column(column, justify="left" if column in ("run", "plan", "what") else "right")
    os.environ[_ZERO] = str(time.time())
    bars, results = [], {}
    for title in jobs:
        job, size, keys, _ = JOBS[title]
        for mode in plans:
            found: dict[str, Ages] = {}
            result = results[f"{title}, {mode}"] = Result(f"{title}, {mode}")
            try:
                with training(job, PLANS[mode]) as run:
                    found.update(read_along(run, size, bool(keys), seconds))
                    if service:
                        found.update(ask_along(run, bool(keys), seconds))
            except (PeerFailed, shoal.ShoalError, OSError) as error:
                result.error = str(error)
                print(f"{title}, {mode}: {error}", file=sys.stderr, flush=True)
            for what, ages in found.items():
                cells = [f"{ages[k]:.1f}" for k in ("p50", "p99", "max")]
                checkpoints = f"{ages['checkpoints']:.0f}" if "checkpoints" in ages else ""
                table.add_row(title, mode, what, *cells, f"{ages['seen']:.0f}", checkpoints)
                print(f"{title}, {mode}, {what}: p50 {cells[0]}, p99 {cells[1]} ms", file=sys.stderr, flush=True)
                if what.endswith(BEHIND):
                    bars.append(Bar(claim=f"{title}, {mode}, {what}, p99", value=ages["p99"], limit=LIMIT_MS, unit="ms"))
                    result.values.append(ages["p99"])
                result.details.append({"what": what, **ages})
    return table, bars, results


def main() -> None:
    from rich.console import Console

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=5.0, help="how long each is looked at")
    parser.add_argument("--jobs", nargs="+", choices=list(JOBS), default=list(JOBS))
    parser.add_argument("--plans", nargs="+", choices=list(PLANS), default=list(PLANS))
    parser.add_argument("--no-service", action="store_true", help="readers only")
    options = parser.parse_args()
    shown, _, kept = measure(options.seconds, options.jobs, options.plans, not options.no_service)
    Console().print(shown)
    print(json.dumps({name: result.error or list(result.details) for name, result in kept.items()}))


if __name__ == "__main__":
    main()
