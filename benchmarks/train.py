"""How many samples a second: shoal against what a user would otherwise write, on four unlike jobs.

Peers: (a) tf.keras with MirroredStrategy, (b) plain PyTorch, one process, all cores, with and without torch.compile, (c)
hand-written DDP on gloo, one process a core, (d) shoal. (b) and (c) in both memory layouts where the job has
pictures. Every peer trains the same network on the same bytes with the same batch, for the same number of steps,
in a fresh process for each measurement. ``--regret`` also trains under every plan that ``auto`` chose among, holds the best
of them against the choice in fresh rounds, and prints how far ``auto`` is from it; ``--tuning`` what its measurements take.
See benchmarks/README.md for how to read it.
"""

from __future__ import annotations

import argparse
import functools
import re
import shutil
import statistics
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common  # noqa: E402
from benchmarks.common import Bar, Group, Peer, PeerFailed, Result, run_json, shoal_command  # noqa: E402
from shoal.plan import Plan  # noqa: E402

PEERS = ("tensorflow", "plain", "compile", "ddp", "shoal")


@dataclass(frozen=True)
class Work:
    """A job and how long to train it: steps for three to four seconds at what two cores do of it."""

    job: str
    target: str
    steps: int
    pictures: bool
    times_pytorch: float = 1.15
    times_tensorflow: float | None = 1.0


_JOBS = str(Path(__file__).resolve().parent / "jobs.py")
WORK = (
    Work("cifar-cnn", "cifar-cnn", 300, pictures=True, times_pytorch=2.2, times_tensorflow=1.7),
    Work("resnet18", f"{_JOBS}:resnet18", 5, pictures=True),
    Work("transformer-6", f"{_JOBS}:transformer", 10, pictures=False),
    Work("clicks-wide-deep", "clicks-wide-deep", 600, pictures=False),
    Work("cifar-resnet", "cifar-resnet", 25, pictures=True, times_tensorflow=None),
    Work("text-transformer", "text-transformer", 15, pictures=False, times_tensorflow=None),
)
USUAL_S = 4.0
SCREENED_S, SCREENING_S = 1.0, 75.0
"""What a plan is trained for to see whether it may be the best, and how long a second round of all of them may end."""
FINAL_S, FINALS_S, FINAL_ROUNDS = 3.0, 110.0, 9
"""The same for choice and challenger: of nine rounds the second and the eighth are a 96 % interval of the median."""
LEAST_ROUNDS = 6
"""With fewer rounds no interval has 95 %."""
USUAL = [work.job for work in WORK[:4]]


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
    extra = {
        "plain": ["plain", "--threads", cores],
        "compile": ["plain", "--threads", cores, "--compile"],
        "ddp": ["ddp", "--processes", cores],
    }
    label = {
        "plain": f"plain PyTorch, {cores} threads",
        "compile": f"torch.compile, {cores} threads",
        "ddp": f"DDP on gloo, {cores} × 1 thread",
    }
    peers = []
    for kind in kinds:
        name, *how = extra[kind]
        command = [sys.executable, "-m", f"benchmarks.peers.{name}", "--job", work.target, *length.options(), *how]
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

    @functools.cache
    def compile_once() -> None:
        # As torch.compile's peers compile before their clock starts: from then on auto knows what it gains.
        try:
            run_json([*shoal_command(), "plan", work.target, "--plan", "compile=on", "--json"])
        except PeerFailed as failed:
            print(f"{work.job}: {failed}", file=sys.stderr)

    def measure() -> Mapping[str, Any]:
        if plan == "auto":
            compile_once()
        folder = tempfile.mkdtemp(prefix="shoal-benchmark-")
        run = str(Path(folder) / "run")
        try:
            command = [*shoal_command(), "train", work.target, "--plan", plan, "--steps", steps, "--run", run, "--json"]
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


def tensorflow_peer(work: Work, arrays: Path, batch_size: int, length: Length) -> Peer:
    """Return (a), its arrays exported from the job's own data into ``arrays``."""
    script = str(common.ROOT / "benchmarks" / "peers" / "tensorflow_train.py")

    @functools.cache
    def python() -> str:
        from benchmarks.venvs import peer_python

        return str(peer_python("tensorflow"))

    def measure() -> Mapping[str, Any]:
        try:
            command = [python(), script, "--job", work.job, "--arrays", str(arrays), "--batch-size", str(batch_size)]
        except RuntimeError as error:
            raise PeerFailed(str(error)) from None
        return run_json([*command, *length.options()])

    return Peer(name="tf.keras, MirroredStrategy", measure=measure)


def export_arrays(work: Work, job: Any, folder: Path) -> None:
    """Write a job's training data where an interpreter without shoal can read them: pictures as NHWC bytes."""
    import numpy as np

    if work.pictures:
        from shoal.data import cifar10

        found = cifar10.load()
        inputs, targets = found.train_images, found.train_labels
    else:
        inputs, targets = (tensor.numpy() for tensor in job.train_data())
    np.save(folder / "inputs.npy", inputs)
    np.save(folder / "targets.npy", targets)
    if work.job == "clicks-wide-deep":
        from shoal.jobs.recsys.clicks import FIELDS

        np.save(folder / "starts.npy", np.cumsum([0, *FIELDS.values()]))


def plan_cold(work: Work) -> Mapping[str, Any]:
    """What ``shoal plan`` says where nothing is known of the job on this machine yet: all is measured anew."""
    from shoal.cluster.cache import cache_dir

    with tempfile.TemporaryDirectory(prefix="shoal-benchmark-") as folder:
        # Operators are built once for a machine, not once for a job.
        if (cache_dir() / "native").is_dir():
            shutil.copytree(cache_dir() / "native", Path(folder) / "native")
        return run_json([*shoal_command(), "plan", work.target, "--json"], env={"SHOAL_CACHE": folder})


def tuning(work: Work, answer: Mapping[str, Any]) -> Bar:
    """What ``auto`` measured before its plan was there; all the parts that went before and between are in the claim."""
    spent = answer["spent_s"]
    parts = ", ".join(f"{name} {took:.1f} s" for name, took in spent.items() if name != "measuring")
    claim = f"{work.job}: auto's measurements, nothing known before ({parts})"
    return Bar(claim=claim, value=spent["measuring"], limit=15.0, unit="s")


def plans_tried(answer: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The plan that ``auto`` chooses, and all that it chose among, without their rewrites as well."""
    others = {str(entry["plan"]) for entry in answer["candidates"]}
    others |= {re.sub(r"rewrites=[a-z0-9_+]+", "rewrites=none", plan) for plan in others}
    return str(answer["plan"]), sorted(others - {str(answer["plan"])})


def regret(work: Work, answer: Mapping[str, Any], options: argparse.Namespace) -> tuple[list[Group], Bar]:
    """How much slower than the best plan what ``auto`` chose is.

    First all plans that were tried are trained under for a second each, twice where there is time, to find who is to be held
    against the choice. The best of many that were measured once seems faster than it is, so none of that counts: choice and
    challenger meet in fresh rounds, in turn, and the regret is the median of the rounds' ratios, with its interval.
    """
    chosen, others = plans_tried(answer)
    brief = length_of(work, options, SCREENED_S)
    peers = [shoal_peer(work, brief, plan) for plan in (chosen, *others)]
    screened = common.alternate(peers, 1 if options.quick else 2, "samples_per_s", limit_s=SCREENING_S)
    note = f"{brief.steps} steps each, to find who is held against the choice; auto: {Plan.parse(chosen).brief()}"
    groups = [Group(title=f"{work.job}, all plans tried", note=note, results=screened, references=[f"shoal, {chosen}"])]
    found = {plan: median for plan in others if (median := screened[f"shoal, {plan}"].median) is not None}
    claim = f"{work.job}: auto behind the best other plan, head to head"
    if not found:
        return groups, Bar(claim=claim, value=None, limit=5.0, unit="%")
    challenger = max(found, key=lambda plan: found[plan])
    length = length_of(work, options, FINAL_S)
    pair = [shoal_peer(work, length, plan) for plan in (chosen, challenger)]
    finals = common.alternate(pair, 1 if options.quick else FINAL_ROUNDS, "samples_per_s", limit_s=FINALS_S)
    mine, theirs = (finals[peer.name].values for peer in pair)
    lost = [100 * (1 - a / b) for a, b in zip(mine, theirs, strict=False)]
    note = f"{length.steps} steps a round, in turn; reference: what auto chose"
    groups.append(Group(title=f"{work.job}, choice and challenger", note=note, results=finals, references=[pair[0].name]))
    if not lost:
        return groups, Bar(claim=claim, value=None, limit=5.0, unit="%")
    low, high = common.median_interval(lost)
    share = "95 %" if len(lost) >= LEAST_ROUNDS else "all"
    claim = f"{claim} ({share}: {low:.1f} to {high:.1f} %, {len(lost)} rounds; {Plan.parse(challenger).brief()})"
    return groups, Bar(claim=claim, value=statistics.median(lost), limit=5.0, unit="%")


def distance(work: Work, group: Group, machine: Mapping[str, Any]) -> Group | None:
    """What share of the machine's measured peaks each peer reaches: operations and bytes as the network is written."""
    try:
        amount = run_json([sys.executable, "-m", "benchmarks.peers.work", "--job", work.target])
    except PeerFailed as failed:
        print(f"{work.job}: {failed}", file=sys.stderr)
        return None
    gflop, gbyte = amount["flop_a_sample"] / 1e9, amount["bytes_a_sample"] / 1e9
    results = {}
    for name, found in group.results.items():
        if found.median is not None:
            results[f"{name}: 10⁹ operations/s"] = Result(f"{name}: operations", [gflop * value for value in found.values])
            results[f"{name}: 10⁹ bytes/s"] = Result(f"{name}: bytes", [gbyte * value for value in found.values])
    note = (
        f"{gflop:.4g} · 10⁹ operations and {gbyte * 1e3:.4g} MB a sample as written; measured peaks of this machine: "
        f"{machine['matmul_gflop_s']:.0f} · 10⁹ operations/s, {machine['bandwidth_gb_s']:.1f} · 10⁹ bytes/s copied"
    )
    return Group(title=f"{work.job}, distance from the machine", note=note, results=results, references=[], unit="10⁹/s")


def measure(work: Work, options: argparse.Namespace, arrays: Path) -> Group:
    """Measure all asked-for peers on one job."""
    from shoal.jobs import find

    length = length_of(work, options)
    by_hand = torch_peers(work, length, [kind for kind in ("plain", "compile", "ddp") if kind in options.peers])
    peers = list(by_hand)
    if "tensorflow" in options.peers and work.times_tensorflow is not None:
        job = find(work.target).job
        export_arrays(work, job, arrays)
        peers.insert(0, tensorflow_peer(work, arrays, job.batch_size, length))
    if "shoal" in options.peers:
        peers.append(shoal_peer(work, length, options.plan))
    print(f"{work.job}: {length.warmup} + {length.steps} steps", file=sys.stderr, flush=True)
    limit_s = None if options.minutes is None else 60 * options.minutes / len(options.jobs)
    results = common.alternate(peers, 1 if options.quick else options.repeats, "samples_per_s", limit_s=limit_s)
    note = f"{length.warmup} + {length.steps} steps; reference: the best PyTorch of a user's own"
    return Group(title=work.job, note=note, results=results, references=[peer.name for peer in by_hand])


def length_of(work: Work, options: argparse.Namespace, seconds: float = USUAL_S) -> Length:
    """``seconds``: that the steps that count take, where the options do not say."""
    usual = max(2, round(work.steps * (options.seconds or seconds) / USUAL_S))
    steps = options.steps or (min(10, work.steps) if options.quick else usual)
    return Length(warmup=max(2, steps // 5), steps=steps)


def bars_of(groups: list[Group]) -> list[Bar]:
    """What shoal has to reach, as a multiple of the best PyTorch of a user's own and of TensorFlow."""
    bars = []
    for work in WORK:
        group = next((group for group in groups if group.title == work.job), None)
        if group is None:
            continue
        ours = next((r.median for name, r in group.results.items() if name.startswith("shoal")), None)
        best, keras = group.reference(), group.results.get("tf.keras, MirroredStrategy")
        for name, other, limit in (("the best PyTorch", best, work.times_pytorch), ("TensorFlow", keras, work.times_tensorflow)):
            if limit is None or (other is None and name == "TensorFlow"):
                continue
            value = ours / other.median if ours and other is not None and other.median else None
            bars.append(Bar(claim=f"{work.job}: shoal by {name}", value=value, limit=limit, unit="×", at_least=True))
    return bars


def main() -> int:
    parser = common.arguments(__doc__.splitlines()[0] if __doc__ else "")
    names = [work.job for work in WORK]
    parser.add_argument("--jobs", nargs="+", choices=names, default=USUAL, help="which jobs")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS), help="which peers")
    parser.add_argument("--plan", default="auto", help="the plan that shoal trains under")
    parser.add_argument("--steps", type=int, default=None, help="steps that count, the same for all jobs")
    parser.add_argument("--seconds", type=float, default=None, help="that the steps that count take about (4)")
    parser.add_argument("--minutes", type=float, default=None, help="for all jobs; rounds beyond are left out")
    parser.add_argument("--regret", action="store_true", help="also hold what auto chose against the best of what it chose among")
    parser.add_argument("--tuning", action="store_true", help="also print what auto's measurements take where nothing is known")
    options = parser.parse_args()
    machine = {**common.hardware(), **rates()}
    groups: list[Group] = []
    bars: list[Bar] = []
    chosen = [work for work in WORK if work.job in options.jobs]
    for work in chosen:
        with tempfile.TemporaryDirectory(prefix="shoal-benchmark-") as arrays:
            groups.append(measure(work, options, Path(arrays)))
    bars += bars_of(groups)
    groups += [found for work, group in zip(chosen, list(groups), strict=True) if (found := distance(work, group, machine))]
    for work in chosen if options.regret or options.tuning else []:
        answer = plan_cold(work)
        bars.append(tuning(work, answer))
        if options.regret:
            found, bar = regret(work, answer, options)
            groups += found
            bars.append(bar)
    name = "train_quick" if options.quick else "train"
    return 0 if common.report(name, groups, "samples/s", vars(options), machine, bars) else 1


def rates() -> dict[str, float]:
    """The machine's peaks, measured now: 10⁹ operations a second in a matrix product, 10⁹ bytes a second copied.

    The product is that of whichever multiplies faster, the library that torch was built with or oneDNN.
    """
    from shoal.cluster import Cluster
    from shoal.cluster.measure import measure_rates
    from shoal.rewrites import onednn_matmul

    bandwidth, matmul = measure_rates(Cluster.local(measure=False).machines[0])
    return {"bandwidth_gb_s": bandwidth, "matmul_gflop_s": matmul * max(1.0, onednn_matmul.gain())}


if __name__ == "__main__":
    sys.exit(main())
