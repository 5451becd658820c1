"""How many samples a second: shoal against what a user would otherwise write, on four unlike jobs.

Peers: (a) tf.keras with MirroredStrategy (``cifar-cnn`` only), (b) plain PyTorch, one process, all cores, (c)
hand-written DDP on gloo, one process a core, (d) shoal. (b) and (c) in both memory layouts where the job has
pictures. Every peer trains the same network on the same bytes with the same batch, for the same number of steps,
in a fresh process for each measurement. See benchmarks/README.md for how to read it.
"""

from __future__ import annotations

import argparse
import functools
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common  # noqa: E402
from benchmarks.common import Bar, Group, Peer, PeerFailed, run_json, shoal_command  # noqa: E402

PEERS = ("tensorflow", "plain", "ddp", "shoal")


@dataclass(frozen=True)
class Work:
    """A job and how long to train it: steps for three to four seconds at what two cores do of it."""

    job: str
    steps: int
    pictures: bool


WORK = (
    Work("cifar-cnn", 200, pictures=True),
    Work("cifar-resnet", 25, pictures=True),
    Work("text-transformer", 15, pictures=False),
    Work("clicks-wide-deep", 600, pictures=False),
)


@dataclass(frozen=True, kw_only=True)
class Length:
    """Steps before the clock starts, and steps that count."""

    warmup: int
    steps: int

    def options(self) -> list[str]:
        return ["--warmup", str(self.warmup), "--steps", str(self.steps)]


def torch_peers(work: Work, length: Length, kinds: list[str]) -> list[Peer]:
    """Return (b) and (c) for a job, in both layouts where it has pictures."""
    cores = str(common.cores())
    size = {"plain": ["--threads", cores], "ddp": ["--processes", cores]}
    label = {"plain": f"plain PyTorch, {cores} threads", "ddp": f"DDP on gloo, {cores} × 1 thread"}
    peers = []
    for kind in kinds:
        command = [sys.executable, "-m", f"benchmarks.peers.{kind}", "--job", work.job, *length.options(), *size[kind]]
        if not work.pictures:
            peers.append(Peer(name=label[kind], measure=command))
            continue
        peers.append(Peer(name=f"{label[kind]}, NCHW", measure=command))
        peers.append(Peer(name=f"{label[kind]}, channels_last", measure=[*command, "--channels-last"]))
    return peers


def shoal_peer(work: Work, length: Length, plan: str) -> Peer:
    """Return (d): ``shoal train`` as a user calls it, counted over the same steps as the others."""
    steps = str(length.warmup + length.steps)
    # No exported program: it is made after the last step, and takes seconds that nobody measures here.
    env = {"SHOAL_EXPORT": "0"}

    def measure() -> Mapping[str, Any]:
        folder = tempfile.mkdtemp(prefix="shoal-benchmark-")
        run = str(Path(folder) / "run")
        try:
            command = [*shoal_command(), "train", work.job, "--plan", plan, "--steps", steps, "--run", run, "--json"]
            answer = run_json(command, env=env)
            whole = answer["samples_per_s"]
            return {**answer, "whole_samples_per_s": whole, "samples_per_s": steady(run, length.warmup)}
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    return Peer(name=f"shoal, {plan}", measure=measure)


def steady(run: str, warmup: int) -> float:
    """Samples a second over the steps after the warm-up, from the run's own events (wall clock from step to step)."""
    from shoal.observe.events import read_events

    steps = [event for event in read_events(Path(run) / "events.jsonl", ["step"]) if event["step"] > warmup]
    return float(sum(event["samples"] for event in steps) / sum(event["step_s"] for event in steps))


def tensorflow_peer(arrays: Path, batch_size: int, length: Length) -> Peer:
    """Return (a), its arrays exported from shoal's own data set into ``arrays``."""
    script = str(common.ROOT / "benchmarks" / "peers" / "tensorflow_cifar.py")

    @functools.cache
    def python() -> str:
        from benchmarks.venvs import peer_python

        return str(peer_python("tensorflow"))

    def measure() -> Mapping[str, Any]:
        try:
            command = [python(), script, "--arrays", str(arrays), "--batch-size", str(batch_size), *length.options()]
        except RuntimeError as error:
            raise PeerFailed(str(error)) from None
        return run_json(command)

    return Peer(name="tf.keras, MirroredStrategy", measure=measure)


def export_cifar(folder: Path) -> None:
    """Write the training pixels and labels where an interpreter without shoal can read them."""
    import numpy as np

    from shoal.data import cifar10

    found = cifar10.load()
    np.save(folder / "images.npy", found.train_images)
    np.save(folder / "labels.npy", found.train_labels)


def measure(work: Work, options: argparse.Namespace, arrays: Path) -> Group:
    """Measure all asked-for peers on one job."""
    from shoal.jobs import find

    steps = options.steps or (10 if options.quick else work.steps)
    length = Length(warmup=max(2, steps // 5), steps=steps)
    by_hand = torch_peers(work, length, [kind for kind in ("plain", "ddp") if kind in options.peers])
    peers = list(by_hand)
    if "tensorflow" in options.peers and work.job == "cifar-cnn":
        export_cifar(arrays)
        peers.insert(0, tensorflow_peer(arrays, find(work.job).job.batch_size, length))
    if "shoal" in options.peers:
        peers.append(shoal_peer(work, length, options.plan))
    print(f"{work.job}: {length.warmup} + {length.steps} steps", file=sys.stderr, flush=True)
    results = common.alternate(peers, 1 if options.quick else options.repeats, "samples_per_s")
    note = f"{length.warmup} + {length.steps} steps; reference: the best PyTorch of a user's own"
    return Group(title=work.job, note=note, results=results, references=[peer.name for peer in by_hand])


def bars_of(groups: list[Group]) -> list[Bar]:
    """What shoal has to reach, as a multiple of the best PyTorch of a user's own."""
    bars = []
    for group in groups:
        ours = next((r.median for name, r in group.results.items() if name.startswith("shoal")), None)
        best = group.reference()
        value = ours / best.median if ours and best is not None and best.median else None
        limit = 1.2 if group.title == "cifar-cnn" else 1.0
        claim = f"{group.title}: shoal by the best of (b) and (c)"
        bars.append(Bar(claim=claim, value=value, limit=limit, unit="×", at_least=True))
    return bars


def main() -> int:
    parser = common.arguments(__doc__.splitlines()[0] if __doc__ else "")
    names = [work.job for work in WORK]
    parser.add_argument("--jobs", nargs="+", choices=names, default=names, help="which jobs")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS), help="which peers")
    parser.add_argument("--plan", default="auto", help="the plan that shoal trains under")
    parser.add_argument("--steps", type=int, default=None, help="steps that count, the same for all jobs")
    options = parser.parse_args()
    machine = common.hardware()
    with tempfile.TemporaryDirectory(prefix="shoal-benchmark-") as arrays:
        groups = [measure(work, options, Path(arrays)) for work in WORK if work.job in options.jobs]
    name = "train_cifar_quick" if options.quick else "train_cifar"
    return 0 if common.report(name, groups, "samples/s", vars(options), machine, bars_of(groups)) else 1


if __name__ == "__main__":
    sys.exit(main())
