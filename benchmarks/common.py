"""What every benchmark here shares: the machine in words, peers run in turn, a table, a JSON line and a figure.

A benchmark names its peers; each peer measures itself, in a fresh process wherever memory, threads or
allocators could leak from one into the next, and answers with a mapping. The runner takes them in turn,
round after round, every second round in reverse, so that a machine that grows slower meanwhile is slower for all.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import datetime
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
_PR_SET_PDEATHSIG = 1
_SETS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "asimd", "sve")


@dataclass(frozen=True, kw_only=True)
class Peer:
    """One way to do the work.

    Attributes:
        name: what the table calls it.
        measure: a function that returns a mapping of numbers, or a command whose last line on standard output is
            one as JSON.
        limit_s: a command that takes longer is ended and counts as failed.
        env: added to the environment of a command.
    """

    name: str
    measure: Callable[[], Mapping[str, Any]] | Sequence[str]
    limit_s: float = 900.0
    env: Mapping[str, str] = field(default_factory=dict)

    def __call__(self) -> Mapping[str, Any]:
        if callable(self.measure):
            return self.measure()
        return run_json(self.measure, self.limit_s, self.env)


@dataclass
class Result:
    """What a peer measured, one number a round; ``error`` is set and the numbers end where it failed."""

    name: str
    values: list[float] = field(default_factory=list)
    details: list[Mapping[str, Any]] = field(default_factory=list)
    error: str | None = None

    @property
    def median(self) -> float | None:
        return median(self.values) if self.values else None

    def as_dict(self) -> dict[str, Any]:
        spread = {"min": min(self.values), "max": max(self.values)} if self.values else {}
        return {"name": self.name, "median": self.median, **spread, "values": self.values, "error": self.error}


class PeerFailed(Exception):
    """A peer's command ended badly or said nothing that could be read."""


def run_json(command: Sequence[str], limit_s: float = 900.0, env: Mapping[str, str] | None = None) -> Mapping[str, Any]:
    """Run a command and return the JSON object on the last line of its standard output; PeerFailed otherwise."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, **(env or {})}
    try:
        done = subprocess.run(
            list(command), capture_output=True, text=True, timeout=limit_s, env=environment, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PeerFailed(str(error)) from None
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        said = done.stderr.strip().splitlines()
        raise PeerFailed(f"exit code {done.returncode}: {said[-1] if said else 'nothing said'}")
    try:
        answer = json.loads(lines[-1])
    except ValueError:
        answer = None
    if not isinstance(answer, Mapping):
        raise PeerFailed(f"its last line is no JSON object: {lines[-1][:200]}")
    return answer


def leave_on_sigterm() -> None:
    """Let SIGTERM, as ``timeout`` sends it, end this process by SystemExit: what it has begun is then ended, too."""

    def leave(number: int, frame: Any) -> None:
        # Once: ending takes a while.
        signal.signal(number, signal.SIG_IGN)
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, leave)


def end_with_parent() -> None:
    """For a process that has just been forked: it gets SIGTERM when its parent is gone, even by SIGKILL."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


@contextlib.contextmanager
def ended(process: subprocess.Popen[Any], leave_s: float) -> Iterator[None]:
    """End a process at last, and all that descend from it, in whichever group or session: kindly, then not."""
    import psutil

    family: list[psutil.Process] = []
    try:
        yield
    finally:
        with contextlib.suppress(psutil.Error):
            family = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(leave_s)
        process.kill()
        process.wait()
        # Who ends with its parent needs a moment.
        _, left = psutil.wait_procs(family, timeout=1.0)
        for one in left:
            with contextlib.suppress(psutil.Error):
                one.kill()
        if process.stdout is not None:
            process.stdout.close()


def alternate(
    peers: Sequence[Peer], repeats: int, key: str, say: Callable[[str], None] | None = None, limit_s: float | None = None
) -> dict[str, Result]:
    """Run all peers ``repeats`` times in turn and return what each measured under ``key``, by name.

    A peer that fails is left out of the later rounds; its error stands in its result. ``limit_s``: no round begins, but the
    first, that would end after so many seconds if it took as long as the one before.
    """
    say = say or (lambda text: print(text, file=sys.stderr, flush=True))
    results = {peer.name: Result(peer.name) for peer in peers}
    began = time.monotonic()
    round_s = 0.0
    for number in range(repeats):
        start = time.monotonic()
        if number and limit_s is not None and start - began + round_s > limit_s:
            say(f"{_gone(began)}  no time for round {number + 1}/{repeats}")
            break
        for peer in peers if number % 2 == 0 else list(reversed(peers)):
            result = results[peer.name]
            if result.error is not None:
                continue
            try:
                answer = peer()
                value = float(answer[key])
            except (PeerFailed, KeyError, TypeError, ValueError) as error:
                result.error = f"{key} is missing" if isinstance(error, KeyError) else str(error)
                say(f"{_gone(began)}  round {number + 1}/{repeats}  {peer.name}: failed: {result.error}")
                continue
            result.values.append(value)
            result.details.append(answer)
            say(f"{_gone(began)}  round {number + 1}/{repeats}  {peer.name}: {_number(value)}")
        round_s = time.monotonic() - start
    return results


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Between which of the values the median of what they are drawn from lies, with this confidence at least.

    Distribution-free, by order statistics: so many of n draws are below the median as of n coins show heads. From six values
    on; of fewer the interval is all of them, which says less.
    """
    ordered, n = sorted(values), len(values)
    outside, cut = 0.0, 0
    while cut < (n - 1) // 2:
        outside += 2 * math.comb(n, cut) / 2**n
        if outside > 1 - confidence:
            break
        cut += 1
    cut = max(0, cut - 1)
    return ordered[cut], ordered[n - 1 - cut]


def _gone(began: float) -> str:
    minutes, seconds = divmod(int(time.monotonic() - began), 60)
    return f"{minutes:3d}:{seconds:02d}"


def hardware() -> dict[str, Any]:
    """Return processor, cores this process may use, memory, instruction sets and versions."""
    model, flags = platform.processor() or platform.machine(), ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = dict(line.split(":", 1) for line in cpuinfo.read_text().splitlines() if ":" in line)
        entries = {name.strip(): value.strip() for name, value in lines.items()}
        model = entries.get("model name", model)
        flags = entries.get("flags", entries.get("Features", ""))
    import torch

    return {
        "cpu": model,
        "cores": cores(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "instruction_sets": [name for name in _SETS if name in flags.split()],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "load_before": round(os.getloadavg()[0], 2),
    }


def shoal_command() -> list[str]:
    """Return the words that start shoal: the script beside this interpreter, or the module."""
    script = Path(sys.executable).parent / "shoal"
    return [str(script)] if script.exists() else [sys.executable, "-m", "shoal"]


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def hardware_line(machine: Mapping[str, Any]) -> str:
    """Return the machine in one line."""
    sets = ", ".join(machine["instruction_sets"]) or "no vector sets known"
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB, {sets};"
        f" torch {machine['torch']}, Python {machine['python']}, {machine['system']}; load {machine['load_before']}"
    )


@dataclass(frozen=True, kw_only=True)
class Group:
    """One table of a benchmark: a title, a note on it, its results, and the peers that the others are held against.

    The reference is the best of ``references`` (the largest median, or the smallest where less is better). A group
    without a unit of its own has the report's.
    """

    title: str
    results: Mapping[str, Result]
    references: Sequence[str]
    note: str = ""
    less_is_better: bool = False
    unit: str = ""

    def reference(self) -> Result | None:
        ready = [r for name, r in self.results.items() if name in self.references and r.median is not None]
        best = min if self.less_is_better else max
        return best(ready, key=lambda r: r.median or 0.0) if ready else None


@dataclass(frozen=True, kw_only=True)
class Bar:
    """What a benchmark has to reach: ``value`` at most (or at least) ``limit``; None where it was not measured."""

    claim: str
    value: float | None
    limit: float
    unit: str = ""
    at_least: bool = False

    @property
    def passed(self) -> bool:
        if self.value is None:
            return False
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def as_dict(self) -> dict[str, Any]:
        return {
            "claim": self.claim, "value": self.value, "limit": self.limit, "unit": self.unit,
            "at_least": self.at_least, "passed": self.passed,
        }  # fmt: skip


def report(
    name: str,
    groups: Sequence[Group],
    unit: str,
    settings: Mapping[str, Any],
    machine: Mapping[str, Any],
    bars: Sequence[Bar] = (),
    tables: Sequence[Any] | None = None,
    draw: Callable[[Path, str], None] | None = None,
) -> bool:
    """Print the tables and bars, add a JSON line to ``results/<name>.jsonl`` and draw ``results/<name>.png``.

    Args:
        machine: ``hardware()``, called before the first measurement, so that it holds the load before them.
        tables: rich tables to print instead of one for each group.
        draw: makes another figure than ``figure`` does, from (path, caption).

    Returns whether no peer failed; a bar that was missed is shown and written down, and is no failure.
    """
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=130)
    groups = [group if group.unit else replace(group, unit=unit) for group in groups]
    console.print(f"[bold]{name}[/bold] · {hardware_line(machine)}", highlight=False)
    for table in [group_table(group, unit) for group in groups] if tables is None else tables:
        console.print(table)
    for error in dict.fromkeys(f"{r.name} failed: {r.error}" for g in groups for r in g.results.values() if r.error):
        console.print(error, style="red", highlight=False)
    if bars:
        console.print(_bar_table(bars))
    line = {
        "t": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "benchmark": name,
        "unit": unit,
        "hardware": machine,
        "settings": dict(settings),
        "groups": [_group_dict(group) for group in groups],
        "bars": [bar.as_dict() for bar in bars],
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    with (RESULTS / f"{name}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    if not groups:
        console.print(f"Written: {RESULTS / name}.jsonl", highlight=False)
        return True
    if draw is not None:
        draw(RESULTS / f"{name}.png", hardware_line(machine))
    else:
        figure(RESULTS / f"{name}.png", groups, unit, hardware_line(machine))
    console.print(f"Written: {RESULTS / name}.jsonl and .png", highlight=False)
    return all(result.error is None for group in groups for result in group.results.values())


def group_table(group: Group, unit: str) -> Any:
    """Return a rich table of a group: median, smallest, largest, and the ratio to the reference."""
    from rich.table import Table

    reference = group.reference()
    table = Table(title=": ".join(filter(None, (group.title, group.note))), title_justify="left")
    table.add_column("peer")
    for heading in (f"median {group.unit or unit}", "min", "max", "× reference"):
        table.add_column(heading, justify="right")
    for result in group.results.values():
        table.add_row(*_row(result, reference))
    return table


def _bar_table(bars: Sequence[Bar]) -> Any:
    from rich.table import Table

    table = Table(title="bars", title_justify="left")
    for heading in ("claim", "measured", "bar", ""):
        table.add_column(heading, justify="left" if heading in ("claim", "") else "right")
    for bar in bars:
        measured = "not measured" if bar.value is None else f"{_number(bar.value)} {bar.unit}".strip()
        wanted = f"{'≥' if bar.at_least else '≤'} {_number(bar.limit)} {bar.unit}".strip()
        short = "" if bar.value is None else "[red]falls short[/red]"
        table.add_row(bar.claim, measured, wanted, "[green]pass[/green]" if bar.passed else short)
    return table


def _row(result: Result, reference: Result | None) -> list[str]:
    if result.median is None:
        return [result.name, "failed", "", "", ""]
    ratio = ""
    if reference is not None and reference.median:
        ratio = f"{result.median / reference.median:.2f}" + (" (reference)" if result is reference else "")
    numbers = (result.median, min(result.values), max(result.values))
    return [result.name, *(_number(value) for value in numbers), ratio]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _group_dict(group: Group) -> dict[str, Any]:
    reference = group.reference()
    return {
        "title": group.title,
        "unit": group.unit,
        "note": group.note,
        "reference": reference.name if reference else None,
        "results": [result.as_dict() for result in group.results.values()],
    }


def figure(path: Path, groups: Sequence[Group], unit: str, caption: str) -> None:
    """Draw the groups' medians as bars, the whiskers from the smallest to the largest value."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawing, axes = pyplot.subplots(1, len(groups), figsize=(6.5 * len(groups), 4.2), squeeze=False)
    for axis, group in zip(axes[0], groups, strict=True):
        ready = [result for result in group.results.values() if result.median is not None]
        medians = [result.median or 0.0 for result in ready]
        below = [result.median - min(result.values) for result in ready if result.median is not None]
        above = [max(result.values) - result.median for result in ready if result.median is not None]
        colours = ["tab:orange" if result.name.startswith("shoal") else "tab:blue" for result in ready]
        axis.barh([result.name for result in ready], medians, xerr=[below, above], color=colours, capsize=3)
        axis.invert_yaxis()
        axis.set_xlabel(group.unit or unit)
        axis.set_title(group.title)
    drawing.text(0.01, 0.01, caption, fontsize=6)
    drawing.tight_layout(rect=(0, 0.04, 1, 1))
    drawing.savefig(path, dpi=130)
    pyplot.close(drawing)


def arguments(description: str) -> argparse.ArgumentParser:
    """Return a parser with the options that every benchmark has: ``--repeats`` and ``--quick``."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--repeats", "--rounds", type=int, default=5, help="rounds; the median of them counts")
    parser.add_argument("--quick", action="store_true", help="one short round, to see that everything runs")
    return parser
