"""Summing gradients over processes: the arena against gloo's all_reduce, 4 KB to 400 MB.

On both sides every process has its values, and afterwards every process can read the sum of them. gloo sums in place,
each process in its own tensor; in the arena each process sums its slice of everybody's stripes into the one result that
all of them read (see benchmarks/peers/reduce_arena.py). Bandwidth is the bytes that one process gives, by the time.
Processes are started anew for each measurement, in which all sizes are gone through, one after the other.

At the end come the collectives of the process group over shared memory (benchmarks/collectives.py).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import collectives, common  # noqa: E402
from benchmarks.common import Bar, Group, Peer, Result  # noqa: E402

SIZES = (4 << 10, 64 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20, 400_000_000)
PROCESSES = (2, 4)
ARENA, GLOO = "shoal arena", "gloo all_reduce"
_BYTES_A_SIZE = 1_500_000_000
_LATENCY_AT = 64 << 10
_BANDWIDTH_FROM = 4 << 20


def times(size: int, quick: bool) -> int:
    """How often a size is summed: about the same bytes for each, but neither thousands of times nor once or twice."""
    return 5 if quick else max(7, min(1000, _BYTES_A_SIZE // size))


def measure(processes: int, sizes: Sequence[int], options: argparse.Namespace) -> dict[int, dict[str, Result]]:
    """Run both sides in turn; by size, the seconds of each, one number a round."""
    plan = [f"{size}:{times(size, options.quick)}" for size in sizes]
    extra = ["--processes", str(processes), "--plan", *plan, *(["--fresh"] if options.fresh else [])]
    modules = {ARENA: "benchmarks.peers.reduce_arena", GLOO: "benchmarks.peers.reduce_gloo"}
    peers = [Peer(name=name, measure=[sys.executable, "-m", module, *extra]) for name, module in modules.items()]
    print(f"{processes} processes (seconds at {size_name(sizes[0])}):", file=sys.stderr, flush=True)
    rounds = common.alternate(peers, 1 if options.quick else options.repeats, "small_s")
    return {
        size: {
            name: Result(name, [a["sizes"][str(size)]["median_s"] for a in r.details], r.details, r.error)
            for name, r in rounds.items()
        }
        for size in sizes
    }


def size_name(size: int) -> str:
    """'64 KB', '400 MB'; the powers of two are called as they usually are."""
    if size % 1_000_000 == 0:
        return f"{size // 1_000_000} MB"
    return f"{size >> 20} MB" if size >= 1 << 20 else f"{size >> 10} KB"


def group_of(processes: int, size: int, results: Mapping[str, Result]) -> Group:
    """The microseconds of both sides, for the JSON line."""
    in_us = {name: Result(name, [v * 1e6 for v in r.values], error=r.error) for name, r in results.items()}
    title = f"{processes} processes, {size_name(size)}"
    return Group(title=title, results=in_us, references=[GLOO], less_is_better=True)


def table_of(processes: int, found: Mapping[int, Mapping[str, Result]]) -> Any:
    """One row a size: the medians of both sides, and what they make in bytes a second."""
    from rich.table import Table

    table = Table(title=f"{processes} processes", title_justify="left")
    sides = ("arena µs", "min", "max", "gloo µs", "min", "max")
    for heading in ("bytes each", *sides, "gloo / arena", "arena GB/s", "gloo GB/s"):
        table.add_column(heading, justify="right")
    for size, results in found.items():
        arena, gloo = results[ARENA], results[GLOO]
        ratio = f"{gloo.median / arena.median:.1f}" if arena.median and gloo.median else ""
        rates = [f"{size / r.median / 1e9:.3g}" if r.median else "failed" for r in (arena, gloo)]
        cells = [f"{v * 1e6:,.0f}" for r in (arena, gloo) if r.median for v in (r.median, min(r.values), max(r.values))]
        if len(cells) == 6:
            table.add_row(size_name(size), *cells, ratio, *rates)
        else:
            table.add_row(size_name(size), "failed")
    return table


def bars_of(found: Mapping[int, Mapping[str, Result]]) -> list[Bar]:
    """What two processes have to reach."""
    bars = []
    for size, results in found.items():
        arena, gloo = results[ARENA].median, results[GLOO].median
        ratio = gloo / arena if arena and gloo else None
        name = size_name(size)
        if size == _LATENCY_AT:
            value = arena * 1e6 if arena else None
            bars.append(Bar(claim=f"2 processes, {name}: the arena's median", value=value, limit=30.0, unit="µs"))
            bars.append(
                Bar(claim=f"2 processes, {name}: below gloo's median", value=ratio, limit=10.0, unit="×", at_least=True)
            )
        if size >= _BANDWIDTH_FROM:
            claim = f"2 processes, {name}: gloo's bandwidth"
            bars.append(Bar(claim=claim, value=ratio, limit=2.5, unit="×", at_least=True))
    return bars


def draw(path: Path, caption: str, found: Mapping[int, Mapping[int, Mapping[str, Result]]]) -> None:
    """Latency and bandwidth over the number of bytes, one line a side and number of processes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawing, (latency, bandwidth) = pyplot.subplots(1, 2, figsize=(12, 4.4))
    for processes, by_size in found.items():
        for name, colour in ((ARENA, "tab:orange"), (GLOO, "tab:blue")):
            points = [(size, r[name].median) for size, r in by_size.items() if r[name].median]
            sizes, seconds = [p[0] for p in points], [p[1] or 0.0 for p in points]
            style = {"color": colour, "marker": "o", "linestyle": "-" if processes == min(found) else "--"}
            label = f"{name}, {processes} processes"
            latency.loglog(sizes, [s * 1e6 for s in seconds], label=label, **style)
            rates = [size / s / 1e9 for size, s in zip(sizes, seconds, strict=True)]
            bandwidth.semilogx(sizes, rates, label=label, **style)
    latency.set_ylabel("median, µs")
    bandwidth.set_ylabel("bytes a process gives / median, GB/s")
    for axis in (latency, bandwidth):
        axis.set_xlabel("bytes a process gives")
        axis.grid(alpha=0.3)
    latency.legend()
    drawing.text(0.01, 0.01, caption, fontsize=6)
    drawing.tight_layout(rect=(0, 0.04, 1, 1))
    drawing.savefig(path, dpi=130)
    pyplot.close(drawing)


def main() -> int:
    parser = common.arguments(__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--processes", nargs="+", type=int, default=list(PROCESSES), help="how many share the sum")
    parser.add_argument("--sizes", nargs="+", type=int, default=list(SIZES), help="bytes that a process gives")
    parser.add_argument("--fresh", action="store_true", help="write all values anew before each sum, outside the clock")
    parser.add_argument("--sums-only", action="store_true", help="leave out the collectives of the process group")
    options = parser.parse_args()
    machine = common.hardware()
    sizes = [size for size in options.sizes if size <= 4 << 20] if options.quick else options.sizes
    found = {processes: measure(processes, sizes, options) for processes in options.processes}
    groups = [group_of(processes, size, r) for processes, by_size in found.items() for size, r in by_size.items()]
    tables = [table_of(processes, by_size) for processes, by_size in found.items()]
    bars = bars_of(found[2]) if 2 in found else []
    name = "reduce_quick" if options.quick else "reduce"

    def picture(path: Path, caption: str) -> None:
        draw(path, caption, found)

    whole = common.report(name, groups, "µs", vars(options), machine, bars, tables, picture)
    return 0 if (options.sums_only or collectives.run(options, machine)) and whole else 1


if __name__ == "__main__":
    sys.exit(main())
