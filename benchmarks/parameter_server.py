"""The parameter server: dense pull + push + update beside what people would take instead, and what a slow worker costs.

Part ``dense``: two workers each copy all parameters from one server into tensors of their own and push a gradient, which the
server applies by SGD, 64 KB to 400 MB, beside Ray actors that hold a tensor and TensorFlow's ParameterServerStrategy. Bandwidth
is the payload, copied into workers and pushed, of both workers by wall clock; the machine's own is that of two processes which
copy tensors. Part ``slow``: the time to a given accuracy with one of two workers slowed four-fold, by mode. Part ``reader``: how
old the weights of a reader and the answers of a service are that follow a run at full speed. Part ``recovery``:
from kill -9 to a table of 1 GB that is whole again, and what that consists of. The dense part also has a row with the
write-ahead log, until all is on disk.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common, parameter_server_reader, venvs  # noqa: E402
from benchmarks.common import Bar, Group, Peer, Result  # noqa: E402

SIZES = (64 << 10, 1 << 20, 10_000_000, 100_000_000, 400_000_000)
LOGGED = "shoal, write-ahead log"
RECOVERIES = {
    "arena": "a server of the arena", "log": "everything: checkpoint and log", "rows": "everything: rows in checkpoint and log",
    "chain": "the head of a chain", "remote": "a server without shared memory: checkpoint and log",
    "remote_rows": "a server of rows without shared memory: checkpoint and log",
}  # fmt: skip
RECOVERY_PARTS = {
    "recovery_s": "in all", "read_s": "reading the log's heads", "hash_s": "checksums", "apply_s": "into memory",
    "begin_s": "another process", "checkpoint_s": "the checkpoint", "log_s": "the log again",
    "cpu_s": "processor time", "start_s": "making the memory (beside it)", "rejoin_s": "a replacement joins (beside it)",
}  # fmt: skip
_RECOVERED_BYTES = 1_000_000_000
SHOAL, RAY, TENSORFLOW, COPY = "shoal", "Ray actors", "TensorFlow ParameterServerStrategy", "the machine's copies"
MODES = {
    "sync": "ps=1,workers=2,sync",
    "staleness=8": "ps=1,workers=2,staleness=8",
    "async": "ps=1,workers=2,async",
    "backup": "ps=1,workers=2,sync,backup=1",
}
_BYTES_A_SIZE = 4_000_000_000
_LATENCY_AT = 64 << 10
_BANDWIDTH_FROM = 1 << 20
_LARGE = 100_000_000


def times(size: int, quick: bool) -> int:
    """How often each worker pulls and pushes."""
    return 5 if quick else max(10, min(3000, _BYTES_A_SIZE // (4 * size)))


def size_name(size: int) -> str:
    if size % 1_000_000 == 0:
        return f"{size // 1_000_000} MB"
    return f"{size >> 20} MB" if size >= 1 << 20 else f"{size >> 10} KB"


# -- dense parameters -------------------------------------------------------------------------------------------------


def dense_peers(size: int, options: argparse.Namespace) -> list[Peer]:
    def command(python: str, module: str) -> list[str]:
        return [python, "-m", module, "--bytes", str(size), "--times", str(times(size, options.quick))]

    peers = [
        Peer(name=SHOAL, measure=command(sys.executable, "benchmarks.peers.ps_shoal")),
        Peer(name=LOGGED, measure=[*command(sys.executable, "benchmarks.peers.ps_shoal"), "--log"], limit_s=900.0),
        Peer(name=COPY, measure=command(sys.executable, "benchmarks.peers.ps_copy")),
    ]
    for name, venv, module in (
        (RAY, "serving", "benchmarks.peers.ps_ray"), (TENSORFLOW, "tensorflow", "benchmarks.peers.ps_tensorflow")
    ):  # fmt: skip
        if venv in options.peers:
            peers.append(Peer(name=name, measure=command(str(venvs.peer_python(venv)), module), limit_s=300.0))
    return peers


def measure_dense(options: argparse.Namespace) -> dict[int, dict[str, Result]]:
    found = {}
    for size in options.sizes:
        print(f"{size_name(size)}, GB/s:", file=sys.stderr, flush=True)
        found[size] = common.alternate(dense_peers(size, options), 1 if options.quick else options.repeats, "gb_s")
    return found


def median_us(result: Result | None) -> float | None:
    """The median time of a pull + push + update, over the rounds."""
    if result is None or not result.details:
        return None
    ordered = sorted(float(detail["median_s"]) for detail in result.details)
    return ordered[len(ordered) // 2] * 1e6


def dense_table(found: Mapping[int, Mapping[str, Result]]) -> Any:
    from rich.table import Table

    table = Table(title="pull + push + update, 1 server, 2 workers", title_justify="left")
    for heading in ("bytes", "peer", "µs each", "GB/s together", "min", "max"):
        table.add_column(heading, justify="left" if heading == "peer" else "right")
    for size, results in found.items():
        for name, result in results.items():
            us = median_us(result)
            rates = [f"{v:.3g}" for v in (result.median, min(result.values), max(result.values)) if v] if result.values else []
            table.add_row(size_name(size), name, f"{us:,.0f}" if us and name != COPY else "", *(rates or ["failed"]))
    return table


def dense_bars(found: Mapping[int, Mapping[str, Result]]) -> list[Bar]:
    bars = []
    for size, results in found.items():
        own = results[SHOAL]
        for peer in (RAY, TENSORFLOW):
            if peer not in results:
                continue
            if size == _LATENCY_AT:
                ours, theirs = median_us(own), median_us(results[peer])
                value = theirs / ours if ours and theirs else None
                claim = f"{size_name(size)}: below {peer}'s latency"
                bars.append(Bar(claim=claim, value=value, limit=20.0, unit="×", at_least=True))
            if size >= _BANDWIDTH_FROM:
                value = own.median / theirs if own.median and (theirs := results[peer].median) else None
                bars.append(Bar(claim=f"{size_name(size)}: {peer}'s rate", value=value, limit=3.0, unit="×", at_least=True))
        if size >= _LARGE:
            copies = results[COPY].median
            value = own.median / copies if own.median and copies else None
            bars.append(Bar(claim=f"{size_name(size)}: the machine's copies", value=value, limit=0.4, unit="×", at_least=True))
    return bars


# -- recovery -----------------------------------------------------------------------------------------------------------


def measure_recovery(options: argparse.Namespace) -> dict[str, Result]:
    """Seconds from kill -9 to a whole table again, by what was killed."""
    size = 64 << 20 if options.quick else _RECOVERED_BYTES
    peers = [
        Peer(
            name=name, measure=[sys.executable, "-m", "benchmarks.peers.ps_recovery", "--kind", kind, "--bytes", str(size)],
            limit_s=600.0,
        )
        for kind, name in RECOVERIES.items()
    ]  # fmt: skip
    return common.alternate(peers, 1 if options.quick else options.repeats, "recovery_s")


def recovery_bars(results: Mapping[str, Result]) -> list[Bar]:
    return [
        Bar(claim=f"recovery of 1 GB after kill -9 of {name}", value=result.median, limit=2.0, unit="s", at_least=False)
        for name, result in results.items()
    ]


def recovery_table(results: Mapping[str, Result]) -> Any:
    """What the recoveries consist of: medians of their parts."""
    from rich.table import Table

    table = Table(title="parts of a recovery, s", title_justify="left")
    table.add_column("killed")
    for name in results:
        table.add_column(name, justify="right")
    for part, heading in RECOVERY_PARTS.items():
        values = [[float(d[part]) for d in result.details if part in d] for result in results.values()]
        table.add_row(heading, *(f"{median(v):.3f}" if v else "" for v in values))
    return table


# -- a slow worker ------------------------------------------------------------------------------------------------------


def measure_slow(options: argparse.Namespace) -> dict[str, Result]:
    """Seconds from the first step to the goal, by mode."""
    peers = []
    for name, plan in MODES.items():
        command = [sys.executable, "-m", "benchmarks.peers.ps_slow", "--plan", f"{plan},threads=1", "--goal", str(options.goal)]
        env = {"SHOAL_FAULTS": "slow(rank=1,factor=4)", "SHOAL_EXPORT": "0"}
        peers.append(Peer(name=name, measure=command, env=env, limit_s=600.0))
    return common.alternate(peers, 1 if options.quick else options.repeats, "to_goal_s")


def slow_bars(results: Mapping[str, Result]) -> list[Bar]:
    sync = results["sync"].median
    best = min((r.median for n, r in results.items() if n in ("async", "staleness=8") and r.median), default=None)
    value = sync / best if sync and best else None
    claim = "time to the goal: sync by the better of async and bounded"
    return [Bar(claim=claim, value=value, limit=1.6, unit="×", at_least=True)]


def main() -> int:
    parser = common.arguments(__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument(
        "--parts", nargs="+", choices=("dense", "slow", "reader", "recovery"), default=["dense", "slow"], help="what is measured"
    )
    parser.add_argument("--sizes", nargs="+", type=int, default=list(SIZES), help="bytes of parameters")
    parser.add_argument(
        "--peers", nargs="*", choices=("serving", "tensorflow"), default=["serving", "tensorflow"],
        help="peers' environments: serving has Ray",
    )  # fmt: skip
    parser.add_argument("--goal", type=float, default=0.84, help="accuracy that the slow part trains to")
    options = parser.parse_args()
    machine = common.hardware()
    groups: list[Group] = []
    bars: list[Bar] = []
    tables: list[Any] = []
    if "dense" in options.parts:
        found = measure_dense(options)
        tables.append(dense_table(found))
        bars += dense_bars(found)
        groups += [Group(title=size_name(s), results=r, references=[RAY, TENSORFLOW], unit="GB/s") for s, r in found.items()]
    if "slow" in options.parts:
        slow = measure_slow(options)
        group = Group(
            title="one of two workers slowed four-fold: seconds to the goal", results=slow, references=["sync"],
            less_is_better=True, unit="s",
        )  # fmt: skip
        tables.append(common.group_table(group, "s"))
        groups.append(group)
        bars += slow_bars(slow)
    if "recovery" in options.parts:
        recovered = measure_recovery(options)
        title = "kill -9: seconds until the table is whole again"
        group = Group(title=title, results=recovered, references=[], less_is_better=True, unit="s")
        tables += [common.group_table(group, "s"), recovery_table(recovered)]
        groups.append(group)
        bars += recovery_bars(recovered)
    if "reader" in options.parts:
        table, age_bars, ages = parameter_server_reader.measure()
        tables.append(table)
        bars += age_bars
        title = "age of what a reader has, p99"
        groups.append(Group(title=title, results=ages, references=[], less_is_better=True, unit="ms"))
    settings = {key: value for key, value in vars(options).items() if key != "func"}
    done = common.report("parameter_server", groups, "GB/s", json.loads(json.dumps(settings, default=str)), machine, bars, tables)
    return 0 if done else 1


if __name__ == "__main__":
    sys.exit(main())
