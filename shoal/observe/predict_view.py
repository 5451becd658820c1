"""A live view of a data set being answered: a bar, rows a second, time left."""

from __future__ import annotations

import sys
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from shoal.observe import lines


class PredictView:
    """Shows what ``show`` is given; nothing where standard error is no terminal."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(file=sys.stderr)
        texts = [
            TextColumn("{task.fields[" + name + "]}", markup=False, table_column=Column(no_wrap=True))
            for name in ("rows", "speed", "left")
        ]
        self._progress = Progress(
            texts[0],
            BarColumn(bar_width=None),
            *texts[1:],
            console=self._console,
            auto_refresh=False,  # no thread of its own: it would wake while replicas compute
            transient=True,
            expand=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._task = self._progress.add_task("", total=None, rows="", speed="", left="")

    def __enter__(self) -> PredictView:
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        # One that was never started would print an empty line.
        if self._console.is_terminal:
            self._progress.stop()

    def show(
        self, rows: int, total: int | None, fraction: float | None, rows_per_s: float, left_s: float | None
    ) -> None:
        """Show how far it is: rows answered, of how many; the part of the whole, 0 to 1; what is unknown is None."""
        if not self._console.is_terminal:
            return
        self._progress.update(
            self._task,
            completed=fraction or 0.0,
            total=None if fraction is None else 1.0,
            rows=f"{rows:,} rows" if total is None else f"{rows:,} of {total:,} rows",
            speed=f"{lines.rate(rows_per_s)} rows/s",
            left="" if left_s is None else f"{lines.duration(left_s)} left",
        )
        self._progress.refresh()
