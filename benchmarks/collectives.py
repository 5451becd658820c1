"""The process group over shared memory against gloo: each collective, its latency and its bandwidth, 2 and 4 processes.

Both sides are torch.distributed, called in the same way (see benchmarks/peers/collectives.py); processes are started
anew for each round. benchmarks/reduce.py runs this at its end; alone it is quicker to start.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common  # noqa: E402
from benchmarks.common import Bar, Group, Peer, Result  # noqa: E402

SIZES = (4 << 10, 64 << 10, 1 << 20, 4 << 20, 16 << 20)
PROCESSES = (2, 4)
SHOAL, GLOO = "shoal group", "gloo"
_BYTES_A_SIZE = 200_000_000
_LATENCY_TO, _BANDWIDTH_FROM = 64 << 10, 4 << 20

Found = Mapping[str, Mapping[int, Mapping[str, Result]]]
"""Collective -> bytes -> side -> seconds, one number a round."""


def times(size: int, processes: int, quick: bool) -> int:
    """How often a call is made; less often where there are more processes than cores and gloo takes milliseconds."""
    if quick:
        return 5
    return max(7, min(200 if processes <= common.cores() else 50, _BYTES_A_SIZE // size))


def measure(processes: int, sizes: Sequence[int], repeats: int, quick: bool) -> Found:
    """Run both sides in turn."""
    plan = [f"{size}:{times(size, processes, quick)}" for size in sizes]
    command = [sys.executable, "-m", "benchmarks.peers.collectives", "--processes", str(processes), "--plan", *plan]
    env = {"OMP_NUM_THREADS": "1"}
    sides = {SHOAL: "shoal", GLOO: "gloo"}
    peers = [Peer(name=name, measure=[*command, "--backend", key], env=env) for name, key in sides.items()]
    print(f"collectives, {processes} processes (seconds of the smallest all_reduce):", file=sys.stderr, flush=True)
    rounds = common.alternate(peers, repeats, "small_s")
    names = {name: list(by_size) for r in rounds.values() for d in r.details for name, by_size in d["times"].items()}
    return {
        name: {
            int(size): {
                side: Result(side, [d["times"][name][size]["median_s"] for d in r.details], r.details, r.error)
                for side, r in rounds.items()
            }
            for size in found
        }
        for name, found in names.items()
    }


def size_name(size: int) -> str:
    return f"{size >> 20} MB" if size >= 1 << 20 else f"{size >> 10} KB"


def table_of(processes: int, found: Found) -> Any:
    """One row a collective and size: the medians of both sides, and what they make in bytes a second."""
    from rich.table import Table

    table = Table(title=f"process group, {processes} processes", title_justify="left")
    table.add_column("collective")
    for heading in (
        "bytes each",
        "shoal µs",
        "min",
        "max",
        "gloo µs",
        "min",
        "max",
        "gloo / shoal",
        "shoal GB/s",
        "gloo GB/s",
    ):
        table.add_column(heading, justify="right")
    for name, by_size in found.items():
        for size, results in by_size.items():
            ours, gloo = results[SHOAL], results[GLOO]
            if not ours.median or not gloo.median:
                table.add_row(name, size_name(size), "failed")
                continue
            cells = [f"{v * 1e6:,.0f}" for r in (ours, gloo) for v in (r.median or 0.0, min(r.values), max(r.values))]
            rates = [f"{size / median / 1e9:.3g}" for median in (ours.median, gloo.median)]
            moved = name != "barrier"
            ratio = f"{gloo.median / ours.median:.1f}"
            table.add_row(name, size_name(size) if moved else "", *cells, ratio, *(rates if moved else ("", "")))
    return table


def bars_of(found: Found) -> list[Bar]:
    """What two processes have to reach."""
    bars = []
    for name, by_size in found.items():
        for size, results in by_size.items():
            ours, gloo = results[SHOAL].median, results[GLOO].median
            ratio = gloo / ours if ours and gloo else None
            what = f"2 processes, {name}" + (f", {size_name(size)}" if name != "barrier" else "")
            if size <= _LATENCY_TO:
                bars.append(Bar(claim=what, value=ours * 1e6 if ours else None, limit=60.0, unit="µs"))
                bars.append(Bar(claim=f"{what}: below gloo", value=ratio, limit=6.0, unit="×", at_least=True))
            elif size >= _BANDWIDTH_FROM:
                bars.append(Bar(claim=f"{what}: gloo's bandwidth", value=ratio, limit=2.0, unit="×", at_least=True))
    return bars


def draw(path: Path, caption: str, everything: Mapping[int, Found]) -> None:
    """One picture a number of processes: how many times as fast as gloo, over the number of bytes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawing, axes = pyplot.subplots(1, 2 * len(everything), figsize=(6 * 2 * len(everything), 4.4), squeeze=False)
    for index, (processes, found) in enumerate(everything.items()):
        latency, ratio = axes[0][2 * index : 2 * index + 2]
        for name, by_size in found.items():
            both = {s: (r[SHOAL].median, r[GLOO].median) for s, r in by_size.items()}
            points = [(s, ours, gloo) for s, (ours, gloo) in both.items() if ours and gloo]
            if len(points) > 1:
                latency.loglog([p[0] for p in points], [p[1] * 1e6 for p in points], marker="o", label=name)
                ratio.semilogx([p[0] for p in points], [p[2] / p[1] for p in points], marker="o", label=name)
        latency.set_ylabel("shoal group, median µs")
        ratio.set_ylabel("gloo's median / shoal's")
        ratio.axhline(1.0, color="black", linewidth=0.8)
        for axis in (latency, ratio):
            axis.set_title(f"{processes} processes")
            axis.set_xlabel("bytes a process gives")
            axis.grid(alpha=0.3)
            axis.legend(fontsize=7)
    drawing.text(0.01, 0.01, caption, fontsize=6)
    drawing.tight_layout(rect=(0, 0.04, 1, 1))
    drawing.savefig(path, dpi=110)
    pyplot.close(drawing)


def run(options: argparse.Namespace, machine: Mapping[str, Any]) -> bool:
    """Measure, print and write everything; whether no side failed."""
    sizes = [size for size in SIZES if size <= 1 << 20] if options.quick else SIZES
    repeats = 1 if options.quick else min(3, options.repeats)
    everything = {processes: measure(processes, sizes, repeats, options.quick) for processes in PROCESSES}
    groups = [
        Group(
            title=f"{name}, {processes} processes, {size_name(size)}",
            results={side: Result(side, [v * 1e6 for v in r.values], error=r.error) for side, r in results.items()},
            references=[GLOO], less_is_better=True,
        )
        for processes, found in everything.items() for name, by_size in found.items() for size, results in by_size.items()
    ]  # fmt: skip
    tables = [table_of(processes, found) for processes, found in everything.items()]

    def picture(path: Path, caption: str) -> None:
        draw(path, caption, everything)

    name = "collectives_quick" if options.quick else "collectives"
    return common.report(name, groups, "µs", vars(options), machine, bars_of(everything[2]), tables, picture)


def main() -> int:
    options = common.arguments(__doc__.splitlines()[0] if __doc__ else "").parse_args()
    return 0 if run(options, common.hardware()) else 1


if __name__ == "__main__":
    sys.exit(main())
