"""A live view of a service in the terminal: rates, latencies, batches, the queue, replicas."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

# What is shown, and how wide a terminal has to be for it.
_COLUMNS = {
    "model": 0, "answers/s": 0, "lately": 120, "refused/s": 0, "p50 ms": 90, "p95 ms": 0, "p99 ms": 0, "batch": 0,
    "queue": 0, "open": 100, "replicas": 0, "expired": 110, "failed": 110,
}  # fmt: skip
_TO_THE_LEFT = ("model", "lately")
_BARS = " ▁▂▃▄▅▆▇█"
_LOOKS = 24
_NOTHING = "–"


class ServiceView:
    """Shows what ``show`` is given; nothing where standard error is no terminal."""

    def __init__(self, url: str, console: Console | None = None) -> None:
        self._url = url
        self._console = console or Console(file=sys.stderr)
        self._live: Live | None = None
        self._models: dict[str, _Rates] = {}

    def __enter__(self) -> ServiceView:
        if self._console.is_terminal:
            self._live = Live(console=self._console, auto_refresh=False, transient=True)
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, numbers: Mapping[str, Mapping[str, Any]]) -> None:
        """Show the numbers of each model (see ``shoal.serve.desk.Desk.numbers``)."""
        if self._live is not None:
            self._live.update(self.table(numbers, time.monotonic()), refresh=True)

    def table(self, numbers: Mapping[str, Mapping[str, Any]], now_s: float) -> Table:
        """The table; rates are since the call before, over the seconds that have passed."""
        shown = [name for name, width in _COLUMNS.items() if self._console.width >= width]
        table = Table(title=f"shoal · {self._url}", caption="Ctrl-C finishes what was accepted and ends", box=SIMPLE_HEAD,
                      title_justify="left", caption_justify="left", pad_edge=False, padding=(0, 1, 0, 0))  # fmt: skip
        for name in shown:
            table.add_column(name, justify="left" if name in _TO_THE_LEFT else "right", no_wrap=True)
        for name, found in numbers.items():
            cells = {"model": name, **self._models.setdefault(name, _Rates()).cells(found, now_s)}
            table.add_row(*(Text(cells[column]) for column in shown))
        return table


class _Rates:
    """One model's counts at the last look, and its latest rates."""

    def __init__(self) -> None:
        self._at_s: float | None = None
        self._counts: dict[str, int] = {}
        self._answers: deque[float] = deque(maxlen=_LOOKS)

    def cells(self, found: Mapping[str, Any], now_s: float) -> dict[str, str]:
        """What each column shows."""
        counts = {name: int(found.get(name, 0)) for name in ("answered", "refused", "rows", "batches")}
        passed = None if self._at_s is None else max(now_s - self._at_s, 1e-9)
        # A new gateway begins to count batches anew, a new version everything.
        since = {name: max(0, count - self._counts.get(name, count)) for name, count in counts.items()}
        self._at_s, self._counts = now_s, counts
        if passed is not None:
            self._answers.append(since["answered"] / passed)
        answered = counts["answered"] > 0
        return {
            "answers/s": _rate(since["answered"], passed), "refused/s": _rate(since["refused"], passed),
            "lately": _sparkline(self._answers),
            **{f"{p} ms": f"{found.get(f'{p}_ms', 0.0):.1f}" if answered else _NOTHING for p in ("p50", "p95", "p99")},
            "batch": f"{since['rows'] / since['batches']:.1f}" if since["batches"] else _NOTHING,
            "queue": str(found.get("queued", 0)),
            **{name: f"{found.get(name, 0):,}" for name in ("open", "replicas", "expired", "failed")},
        }  # fmt: skip


def _rate(count: int, passed_s: float | None) -> str:
    return _NOTHING if passed_s is None else f"{count / passed_s:,.0f}"


def _sparkline(rates: deque[float]) -> str:
    """The latest rates as small bars, the highest one full."""
    most = max(rates, default=0.0) or 1.0
    return "".join(_BARS[round(rate / most * (len(_BARS) - 1))] for rate in rates).ljust(_LOOKS)
