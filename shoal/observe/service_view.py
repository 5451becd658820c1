"""A live view of a service in the terminal: rates, latencies, batches, the queue, replicas."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

_COLUMNS = (
    "model",
    "answers/s",
    "refused/s",
    "p50 ms",
    "p95 ms",
    "p99 ms",
    "batch",
    "queue",
    "open",
    "replicas",
    "expired",
    "failed",
)


class ServiceView:
    """Shows what ``show`` is given; nothing where standard error is no terminal."""

    def __init__(self, url: str, console: Console | None = None) -> None:
        self._url = url
        self._console = console or Console(file=sys.stderr)
        self._live: Live | None = None
        self._before: dict[str, tuple[float, int, int]] = {}

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
        table = Table(*_COLUMNS, title=f"shoal · {self._url}", caption="Ctrl-C finishes what was accepted and ends")
        for name, found in numbers.items():
            answered, refused = int(found.get("answered", 0)), int(found.get("refused", 0))
            before_s, before, refused_before = self._before.get(name, (now_s - 1.0, answered, refused))
            passed = max(now_s - before_s, 1e-9)
            self._before[name] = (now_s, answered, refused)
            batch = found.get("rows", 0) / max(1, found.get("batches", 0))
            table.add_row(
                name, f"{(answered - before) / passed:,.0f}", f"{(refused - refused_before) / passed:,.0f}",
                *(f"{found.get(key, 0.0):.1f}" for key in ("p50_ms", "p95_ms", "p99_ms")), f"{batch:.1f}",
                *(str(found.get(key, 0)) for key in ("queued", "open", "replicas", "expired", "failed")),
            )  # fmt: skip
        return table
