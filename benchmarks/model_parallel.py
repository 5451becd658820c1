"""Models that are split: tensor, pipeline and sharded axes against data parallelism, and against one worker's memory.

(a) the tensor axis, in seconds a step: the group over shared memory against gloo, and against dp=2 on the same batch;
(b) the pipeline's schedules against dp=2; (c) the largest worker's memory; (d) whether a model that one worker cannot
hold under ``--memory-limit`` trains under the plan that the refusal names. Everything is ``shoal train`` as a user calls it,
in fresh processes; see benchmarks/README.md for how to read it.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common  # noqa: E402
from benchmarks.common import Bar, Group, Peer, PeerFailed, Result, run_json, shoal_command  # noqa: E402

JOBS = common.ROOT / "benchmarks" / "peers" / "split.py"
PARTS = ("tensor", "pipeline", "memory", "limit")
DP, TP, GLOO = "shoal, dp=2", "shoal, tp=2", "tp=2 on gloo"
# Batch and length: a step of about half a second, and one as small as its messages still make sense.
BATCHES = ((8, 32), (4, 8))
MICROBATCHES = 8
SCHEDULES = ("1f1b", "interleaved", "zbv", "gpipe")
MEMORY = {
    "shoal, one worker": "dp=1", "shoal, tp=2": "tp=2", "shoal, pp=2": "pp=2,microbatches=4,schedule=1f1b",
    "shoal, zero=3 × 4": "dp=4,zero=3",
}  # fmt: skip
_WARMUP = 2
_EVERY_S = 0.1


def train(job: str, plan: str, steps: int, env: Mapping[str, str] | None = None, gloo: bool = False) -> dict[str, Any]:
    """``shoal train`` for some steps; the median seconds of a step after the first two, and the largest worker's memory."""
    from shoal.observe.events import read_events

    folder = tempfile.mkdtemp(prefix="shoal-benchmark-")
    run = str(Path(folder) / "run")
    # No exported program: it is made after the last step, and takes seconds that nobody measures here.
    environment = {"SHOAL_EXPORT": "0", "OMP_NUM_THREADS": "1", **(env or {})}
    if gloo:
        environment["SHOAL_TEAM_ON_GLOO"] = folder
    try:
        command = [*shoal_command(), "train", f"{JOBS}:{job}", "--plan", plan, "--steps", str(steps)]
        with Watch(Path(run)) as watch:
            run_json([*command, "--run", run, "--json"], env=environment)
        seconds = [e["step_s"] for e in read_events(Path(run) / "events.jsonl", ["step"]) if e["step"] > _WARMUP]
        return {"step_s": median(seconds), "peak_mb": watch.largest_mb, "peaks_mb": watch.peaks_mb, "plan": plan}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Watch:
    """Reads the peak resident set of a run's workers from /proc while it lasts; MB are 2**20 bytes."""

    def __init__(self, run: Path) -> None:
        self.peaks_mb: dict[int, float] = {}
        self._list = run / "processes.json"
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    @property
    def largest_mb(self) -> float | None:
        return max(self.peaks_mb.values(), default=None)

    def _look(self) -> None:
        while not self._over.wait(_EVERY_S):
            try:
                rows = json.loads(self._list.read_text())
            except (OSError, ValueError):
                continue
            for pid in (row["pid"] for row in rows if row["role"] == "worker"):
                with contextlib.suppress(OSError, StopIteration):
                    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
                    peak = next(line for line in lines if line.startswith("VmHWM:"))
                    self.peaks_mb[pid] = int(peak.split()[1]) / 1024


def _peer(name: str, job: str, plan: str, steps: int, **how: Any) -> Peer:
    return Peer(name=name, measure=functools.partial(train, job, f"{plan},threads=1", steps, **how))


# -- (a) tensor --------------------------------------------------------------------------------------------------


def tensor(options: argparse.Namespace) -> tuple[list[Group], list[Bar]]:
    """12 layers, 512 wide, split over two workers: seconds a step by batch."""
    groups, bars = [], []
    job, steps = ("wide_small", 5) if options.quick else ("wide", 20)
    for batch, length in BATCHES[:1] if options.quick else BATCHES:
        env = {"BENCHMARK_BATCH": str(batch), "BENCHMARK_LENGTH": str(length)}
        peers = [
            _peer(DP, job, "dp=2", steps, env=env), _peer(TP, job, "tp=2", steps, env=env),
            _peer(GLOO, job, "tp=2", steps, env=env, gloo=True),
        ]  # fmt: skip
        _say(f"tensor axis, {batch} × {length} words")
        results = common.alternate(peers, options.repeats, "step_s")
        title = f"tensor axis, {batch} × {length} words"
        groups.append(Group(title=title, results=results, references=[DP], less_is_better=True))
        bars += [
            Bar(
                claim=f"{title}: faster than gloo", value=_ratio(results, GLOO, TP), limit=2.0, unit="×", at_least=True
            ),
            Bar(claim=f"{title}: speed by dp=2", value=_ratio(results, DP, TP), limit=0.85, unit="×", at_least=True),
        ]
    return groups, bars


# -- (b) pipeline ------------------------------------------------------------------------------------------------


def pipeline(options: argparse.Namespace) -> tuple[list[Group], list[Bar]]:
    """Two stages (or two a rank), 8 microbatches, a vocabulary of 8,000: seconds a step by schedule."""
    job, steps = ("staged_small", 4) if options.quick else ("staged", 6)
    peers = [_peer(DP, job, "dp=2", steps)]
    for schedule in SCHEDULES:
        plan = f"pp=2,microbatches={MICROBATCHES},schedule={schedule}"
        peers.append(_peer(f"shoal, pp=2, {schedule}", job, plan, steps))
    _say("pipeline axis")
    results = common.alternate(peers, options.repeats, "step_s")
    speed = {name: _ratio(results, DP, f"shoal, pp=2, {name}") for name in SCHEDULES}
    finer = [value for name in ("interleaved", "zbv") if (value := speed[name]) is not None]
    what = f"pp=2, {MICROBATCHES} microbatches"
    return [Group(title="pipeline axis", results=results, references=[DP], less_is_better=True)], [
        Bar(claim=f"{what}, 1f1b: speed by dp=2", value=speed["1f1b"], limit=0.8, unit="×", at_least=True),
        Bar(
            claim=f"{what}, interleaved or zbv: speed by dp=2", value=max(finer, default=None), limit=0.85, unit="×",
            at_least=True,
        ),
    ]  # fmt: skip


# -- (c) memory --------------------------------------------------------------------------------------------------


def memory(options: argparse.Namespace) -> tuple[list[Group], list[Bar]]:
    """200 million parameters with Adam: the peak resident memory of the largest worker, shared pages included."""
    job = "heavy_small" if options.quick else "heavy"
    peers = [
        Peer(name=name, measure=functools.partial(train, job, f"{plan},threads=1", 6)) for name, plan in MEMORY.items()
    ]
    _say("memory, MB of the largest worker")
    # Memory hardly differs from round to round, and a round takes minutes.
    results = common.alternate(peers, min(3, options.repeats), "peak_mb")
    one, *others = MEMORY
    bars = [
        Bar(
            claim=f"{name.removeprefix('shoal, ')}: the largest worker's memory by one worker's",
            value=_ratio(results, name, one), limit=0.45 if "zero" in name else 0.6, unit="×",
        )
        for name in others
    ]  # fmt: skip
    note = f"{job}; peak resident set, shared pages included"
    group = Group(title="memory", note=note, results=results, references=[one], less_is_better=True, unit="MB")
    return [group], bars


# -- (d) a limit -------------------------------------------------------------------------------------------------


def limit(options: argparse.Namespace, one_worker_mb: float | None) -> tuple[list[Group], list[Bar]]:
    """Refused for one worker under a limit, and trained under the plan that the refusal names."""
    job = "heavy_small" if options.quick else "heavy"
    size_mb = round((one_worker_mb or train(job, "dp=1,threads=1", 3)["peak_mb"]) * 0.8)
    _say(f"a limit of {size_mb} MB for each worker")
    outcome = Result(f"shoal, --memory-limit {size_mb}MB")
    try:
        plan = _proposed(job, size_mb)
        _say(f"refused; proposed: {plan}")
        found = _under_limit(job, plan, size_mb)
        outcome.values.append(found["peak_mb"])
        outcome.details.append({**found, "plan": plan})
    except PeerFailed as error:
        outcome.error = str(error)
        _say(f"left out: {error}")
    note = f"{job}; largest worker under the plan that the refusal named"
    group = Group(title="limit", note=note, results={outcome.name: outcome}, references=[], unit="MB")
    claim = f"{size_mb} MB a worker: trains under the proposed plan within"
    return [group], [Bar(claim=claim, value=outcome.median, limit=float(size_mb), unit="MB")]


def _limited(job: str, plan: str, size_mb: int, steps: int, run: str) -> list[str]:
    limits = ["--memory-limit", f"{size_mb}MB", "--steps", str(steps), "--run", run, "--json"]
    return [*shoal_command(), "train", f"{JOBS}:{job}", "--plan", plan, *limits]


def _proposed(job: str, size_mb: int) -> str:
    """The plan that the sentence of the refusal names; PeerFailed where nothing was refused or none is named."""
    with tempfile.TemporaryDirectory(prefix="shoal-benchmark-") as folder:
        command = _limited(job, "dp=1,threads=1", size_mb, 2, str(Path(folder) / "run"))
        path = os.pathsep.join(filter(None, (str(common.ROOT), os.environ.get("PYTHONPATH"))))
        env = {**os.environ, "PYTHONPATH": path, "SHOAL_EXPORT": "0"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=env, check=False)
    said = " ".join((done.stdout + " " + done.stderr).split())
    if done.returncode == 0:
        raise PeerFailed(f"one worker was not refused under a limit of {size_mb} MB")
    if done.returncode != 2:
        raise PeerFailed(f"exit code {done.returncode} instead of a refusal: {said[-300:]}")
    plans = [
        match
        for match in re.findall(r"\b(?:[a-z_]+=[\w.]+,?)+", said)
        if not match.startswith(("dp=1,threads", "global"))
    ]
    for plan in plans:
        if re.search(r"\b(tp|pp|zero)=[2-9]", plan):
            return plan.rstrip(",.;")
    raise PeerFailed(f"the refusal names no plan that would fit: {said[-300:]}")


def _under_limit(job: str, plan: str, size_mb: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="shoal-benchmark-") as folder:
        run = Path(folder) / "run"
        with Watch(run) as watch:
            answer = run_json(_limited(job, plan, size_mb, 4, str(run)), env={"SHOAL_EXPORT": "0"})
    if watch.largest_mb is None:
        raise PeerFailed("no worker was seen")
    return {"peak_mb": watch.largest_mb, "steps": answer.get("steps")}


# ----------------------------------------------------------------------------------------------------------------


def _ratio(results: Mapping[str, Result], above: str, below: str) -> float | None:
    """Median by median; None where one is missing."""
    a, b = results[above].median, results[below].median
    return a / b if a and b else None


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = common.arguments(__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure")
    options = parser.parse_args(arguments)
    options.repeats = 1 if options.quick else options.repeats
    machine = common.hardware()
    groups: list[Group] = []
    bars: list[Bar] = []
    one_worker_mb: float | None = None
    for name, measure in (("tensor", tensor), ("pipeline", pipeline), ("memory", memory)):
        if name in options.parts:
            found, reached = measure(options)
            groups, bars = groups + found, bars + reached
            if name == "memory":
                one_worker_mb = found[0].results[next(iter(MEMORY))].median
    if "limit" in options.parts:
        found, reached = limit(options, one_worker_mb)
        groups, bars = groups + found, bars + reached
    name = "model_parallel_quick" if options.quick else "model_parallel"
    settings = {**vars(options), "batches": BATCHES, "microbatches": MICROBATCHES, "memory_plans": MEMORY}
    return 0 if common.report(name, groups, "s", settings, machine, bars) else 1


if __name__ == "__main__":
    sys.exit(main())
