"""Memory of all processes together: a 100-million-parameter transformer with Adam, shoal against DDP on gloo.

Both are looked at from outside in the same way: the proportional set size (PSS: a page that k processes share counts
1/k in each) of every process, the launcher and shoal's supervisor, template and standby among them, added up several
times a second from start to end. The largest sum counts. shoal writes checkpoints while it trains; DDP writes none.
A tiny batch keeps activations small, so that weights, gradients and optimizer state are what is compared.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common  # noqa: E402
from benchmarks.common import Bar, Group, Peer, PeerFailed, Result  # noqa: E402

JOBS = "benchmarks/peers/large.py"
WORKERS = (1, 2, 4)
DDP = "DDP on gloo, 4 × 1 thread"
_EVERY_S = 0.2
_LIMIT_S = 900.0


def family(root: int) -> list[int]:
    """The pids of a process and all its descendants."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                # The name in parentheses may hold blanks; the parent is the second field after it.
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, ValueError, IndexError):
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found, todo = [], [root]
    while todo:
        pid = todo.pop()
        found.append(pid)
        todo += children.get(pid, [])
    return found


@dataclass(frozen=True)
class Sample:
    """All processes of a family at one moment; MB are 2**20 bytes. ``shared_mb`` is the part in shared memory."""

    t: float
    processes: int
    pss_mb: float
    shared_mb: float


def sample(pids: list[int]) -> Sample:
    """Add up the proportional set sizes of some processes."""
    sums = {"Pss:": 0, "Pss_Shmem:": 0}
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        for line in lines:
            name, _, rest = line.partition(" ")
            if name in sums:
                sums[name] += int(rest.split()[0])
    return Sample(time.time(), len(pids), sums["Pss:"] / 1024, sums["Pss_Shmem:"] / 1024)


def watch(command: list[str], env: Mapping[str, str]) -> tuple[dict[str, Any], list[Sample]]:
    """Run a command; the JSON object on the last line of its output, and what its processes held while it ran."""
    path = os.pathsep.join(filter(None, (str(common.ROOT), os.environ.get("PYTHONPATH"))))
    samples: list[Sample] = []
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        running = subprocess.Popen(
            command, stdout=out, stderr=err, cwd=common.ROOT, env={**os.environ, "PYTHONPATH": path, **env}
        )
        began = time.monotonic()
        try:
            while running.poll() is None:
                samples.append(sample(family(running.pid)))
                if time.monotonic() - began > _LIMIT_S:
                    raise PeerFailed(f"it took longer than {_LIMIT_S:.0f} s")
                time.sleep(_EVERY_S)
        finally:
            if running.poll() is None:
                for pid in reversed(family(running.pid)):
                    os.kill(pid, 9)
                running.wait()
        out.seek(0)
        err.seek(0)
        lines = out.read().strip().splitlines()
        if running.returncode != 0 or not lines:
            said = err.read().strip().splitlines()
            raise PeerFailed(f"exit code {running.returncode}: {said[-1] if said else 'nothing said'}")
        return json.loads(lines[-1]), samples


def ddp(job: str, steps: int) -> Mapping[str, Any]:
    """DistributedDataParallel with gradient_as_bucket_view, as in benchmarks/peers/ddp.py."""
    command = [
        sys.executable, "-m", "benchmarks.peers.ddp", "--job", f"{JOBS}:{job}", "--warmup", "1",
        "--steps", str(steps - 1), "--processes", "4",
    ]  # fmt: skip
    _, samples = watch(command, {})
    most = max(samples, key=lambda s: s.pss_mb)
    return {"pss_mb": most.pss_mb, "processes": most.processes}


def shoal(job: str, steps: int, workers: int, checkpoint_s: float) -> Mapping[str, Any]:
    """``shoal train`` with checkpoints every ``checkpoint_s`` while it trains."""
    folder = tempfile.mkdtemp(prefix="shoal-benchmark-")
    run = Path(folder) / "run"
    command = [
        *common.shoal_command(), "train", f"{JOBS}:{job}", "--plan", f"dp={workers},threads=1",
        "--steps", str(steps), "--run", str(run), "--json",
    ]  # fmt: skip
    try:
        answer, samples = watch(command, {"SHOAL_CHECKPOINT_S": str(checkpoint_s)})
        from shoal.observe.events import read_events

        events = list(read_events(run / "events.jsonl", ["step", "checkpoint"]))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    last_step_at = max(e["t"] for e in events if e["kind"] == "step")
    training = [s.pss_mb for s in samples if s.t <= last_step_at]
    checkpoints = [e for e in events if e["kind"] == "checkpoint" and e["step"] < steps]
    most = max(samples, key=lambda s: s.pss_mb)
    return {
        "pss_mb": most.pss_mb,
        "processes": most.processes,
        "shared_mb": max(s.shared_mb for s in samples),
        "pss_training_mb": max(training, default=None),
        "pss_said_mb": answer["pss_mb"],
        "checkpoints_while_training": len(checkpoints),
    }


def lasting_mb(job: str, workers: int) -> dict[str, float]:
    """What an arena of so many workers holds, by meaning, from its layout: no run is needed for that."""
    from shoal.comm.grid import Grid
    from shoal.comm.store import arena_layout
    from shoal.jobs import find
    from shoal.train.describe import describe, make_optimizer

    definition = find(f"{common.ROOT / JOBS}:{job}").job
    model = definition.model()
    table = describe(model, make_optimizer(definition.optimizer, model))
    regions = {name: size / 2**20 for name, (_, size) in arena_layout(table, Grid(dp=workers)).regions.items()}
    kept = {name: regions.pop(name) for name in ("weights", "state", "gradients")}
    return {**kept, "rest": sum(regions.values())}


def kept_mb(results: Mapping[str, Result], lasting: Mapping[int, Mapping[str, float]], workers: int) -> float | None:
    """The shared memory that was seen from outside, less gradient stripes and notes: weights and optimizer state."""
    seen = [detail["shared_mb"] for detail in results[f"shoal, dp={workers}"].details]
    return median(seen) - lasting[workers]["gradients"] - lasting[workers]["rest"] if seen else None


def table_of(results: Mapping[str, Result], lasting: Mapping[int, Mapping[str, float]]) -> Any:
    """What the arena holds, by the number of workers: as it was laid out, and as it was seen."""
    from rich.table import Table

    table = Table(title="what the arena holds, MB", title_justify="left")
    table.add_column("workers")
    laid_out = ("weights", "optimizer state", "gradients", "the rest")
    seen = ("seen", "checkpoints", "PSS in training", "said")
    for heading in (*laid_out, *seen):
        table.add_column(heading, justify="right")
    for workers, mb in lasting.items():
        cells = [f"{mb[key]:,.1f}" for key in ("weights", "state", "gradients", "rest")]
        details = results[f"shoal, dp={workers}"].details
        for key in ("shared_mb", "checkpoints_while_training", "pss_training_mb", "pss_said_mb"):
            values = [detail[key] for detail in details if detail[key] is not None]
            cells.append(f"{median(values):,.0f}" if values else "")
        table.add_row(str(workers), *cells)
    return table


def bars_of(results: Mapping[str, Result], lasting: Mapping[int, Mapping[str, float]]) -> list[Bar]:
    ours, theirs = results["shoal, dp=4"], results[DDP].median
    ratio = ours.median / theirs if ours.median and theirs else None
    one, four = kept_mb(results, lasting, 1), kept_mb(results, lasting, 4)
    growth = four / one if one and four else None
    checkpoints = min((d["checkpoints_while_training"] for d in ours.details), default=None)
    return [
        Bar(claim="dp=4: all processes together, of DDP's", value=ratio, limit=0.5, unit="×"),
        Bar(claim="dp=4: checkpoints written while training, fewest", value=checkpoints, limit=1, at_least=True),
        # Pages that were reserved and never touched are not seen: the undo logs are a little smaller than laid out.
        Bar(claim="weights and optimizer state as seen, 4 workers by 1", value=growth, limit=1.02, unit="×"),
    ]


def main() -> int:
    parser = common.arguments(__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--steps", type=int, default=None, help="steps of each run")
    parser.add_argument("--checkpoint-s", type=float, default=None, help="seconds between checkpoints")
    options = parser.parse_args()
    machine = common.hardware()
    job = "small" if options.quick else "large"
    steps = options.steps or (60 if options.quick else 12)
    checkpoint_s = options.checkpoint_s or (0.2 if options.quick else 3.0)
    peers = [Peer(name=DDP, measure=lambda: ddp(job, steps))]
    for workers in WORKERS:
        measure = functools.partial(shoal, job, steps, workers, checkpoint_s)
        peers.append(Peer(name=f"shoal, dp={workers}", measure=measure))
    results = common.alternate(peers, 1 if options.quick else options.repeats, "pss_mb")
    lasting = {workers: lasting_mb(job, workers) for workers in WORKERS}
    note = f"{job}, {steps} steps; the largest PSS of all processes together"
    group = Group(title="memory", note=note, results=results, references=[DDP], less_is_better=True)
    settings = {
        **vars(options), "job": job, "steps": steps, "checkpoint_s": checkpoint_s,
        "arena_mb": {str(workers): mb for workers, mb in lasting.items()},
        "details": {name: result.details for name, result in results.items()},
    }  # fmt: skip
    name = "memory_quick" if options.quick else "memory"
    tables = [common.group_table(group, "MB"), table_of(results, lasting)]
    return 0 if common.report(name, [group], "MB", settings, machine, bars_of(results, lasting), tables) else 1


if __name__ == "__main__":
    sys.exit(main())
