"""A run on a terminal: a bar that moves, and a line for everything worth one."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from shoal.observe import lines

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

_REFRESH_S = 0.1
_MEMORY = 0.95
"""What the past counts at each redraw, so that the shown speed is about that of the last two seconds."""


class Display:
    """An observer that shows a run, on standard error unless told otherwise.

    On a terminal: a progress bar, redrawn at most ten times a second, and lines above it. Elsewhere the lines alone.
    A step event between two redraws costs one comparison and a few additions.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        resume_command: str | None = None,
        clock: Callable[[], float] = time.monotonic,
        width: int | None = None,
    ) -> None:
        """Args: where to write; the command that resumes this run, shown when it stops; a clock in seconds; columns."""
        from rich.console import Console

        self.run_ended = False
        self.resume_command = resume_command
        self._clock = clock
        self._console: Console = Console(
            file=stream or sys.stderr,
            highlight=False,
            markup=False,
            width=width,
            force_jupyter=False,  # plain lines in a notebook cell, where every redraw would be one more output
        )
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._start: Mapping[str, Any] = {}
        self._first_metric: str | None = None
        self._next_refresh = 0.0
        self._since, self._samples, self._steps = 0.0, 0, 0
        self._past_s, self._past_samples, self._past_steps = 0.0, 0.0, 0.0
        self._eval_s = 0.0

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Show one event."""
        kind = event["kind"]
        if kind == "step":
            self._step(event)
            return
        if kind == "run_start":
            self._start = event
        if kind in ("run_end", "error"):
            self.close()
        self._print(self._epoch_line(event) if kind == "epoch" else lines.describe(event))
        if kind == "epoch":
            self._eval_s = event.get("eval_s") or 0.0
            self._forget_time()
        if kind == "run_end":
            self.run_ended = True
            if event.get("status") == "stopped" and self.resume_command:
                self._print([f"go on with: {self.resume_command}"])

    def picture(self, path: str | Path) -> None:
        """Say where the learning curve is."""
        self._print([f"picture: {path}"])

    def say(self, text: str) -> None:
        """Show a line of the caller's own."""
        self._print([text])

    def close(self) -> None:
        """Take the bar away; a second call does nothing."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _step(self, event: Mapping[str, Any]) -> None:
        now = self._clock()
        if self._since == 0.0:
            # The first step after a pause has no beginning to be timed from: its own time stands in.
            self._since = now - (event.get("step_s") or 0.0)
        self._samples += event.get("samples") or 0
        self._steps += 1
        if now < self._next_refresh or not self._console.is_terminal:
            return
        self._next_refresh = now + _REFRESH_S
        self._measure(now)
        self._draw(event)

    def _measure(self, now: float) -> None:
        self._past_s = _MEMORY * self._past_s + now - self._since
        self._past_samples = _MEMORY * self._past_samples + self._samples
        self._past_steps = _MEMORY * self._past_steps + self._steps
        self._since, self._samples, self._steps = now, 0, 0

    def _forget_time(self) -> None:
        """Evaluation is no training: the next rate is counted from the next step on."""
        self._since, self._samples, self._steps = 0.0, 0, 0

    def _draw(self, event: Mapping[str, Any]) -> None:
        step, epoch = event.get("step") or 0, event.get("epoch") or 1
        per_epoch, epochs, total = (self._start.get(k) for k in ("steps_per_epoch", "epochs_total", "steps_total"))
        if total is None and per_epoch and epochs:
            total = per_epoch * epochs
        values = f"loss {lines.number(event.get('loss_mean', event.get('loss')))}"
        for name, value in list((event.get("metrics") or {}).items())[:1]:
            values += f"  {name} {lines.number(value)}"
        fields: dict[str, Any] = {
            "where": f"epoch {epoch}/{epochs}" if epochs else f"epoch {epoch}",
            "values": values,
            "speed": f"{lines.rate(self._past_samples / self._past_s if self._past_s > 0 else None)} samples/s",
            "left": f"{lines.duration(self._seconds_left(step, epoch))} left" if total else "",
        }
        if self._progress is None:
            self._progress = self._bar()
            self._task = self._progress.add_task("", total=total, **fields)
            self._progress.start()
        assert self._task is not None
        self._progress.update(self._task, completed=step, **fields)
        self._progress.refresh()

    def _seconds_left(self, step: int, epoch: int) -> float:
        per_epoch, epochs, total = (self._start.get(k) for k in ("steps_per_epoch", "epochs_total", "steps_total"))
        if total is None:
            total = (per_epoch or 0) * (epochs or 0)
        evaluations = max(0, (epochs or epoch) - epoch + 1)
        if per_epoch:
            evaluations = min(evaluations, -(-max(0, total - step) // per_epoch))
        step_s = self._past_s / self._past_steps if self._past_steps else 0.0
        return float(max(0, total - step) * step_s + evaluations * self._eval_s)

    def _bar(self) -> Progress:
        from rich.progress import BarColumn, Progress, TextColumn
        from rich.table import Column

        texts = [
            TextColumn("{task.fields[" + name + "]}", markup=False, table_column=Column(no_wrap=True))
            for name in ("where", "values", "speed", "left")
        ]
        return Progress(
            texts[0],
            BarColumn(bar_width=None),
            *texts[1:],
            console=self._console,
            auto_refresh=False,  # no thread of its own: it would wake while workers compute
            transient=True,
            expand=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )

    def _epoch_line(self, event: Mapping[str, Any]) -> list[str]:
        epochs = self._start.get("epochs_total")
        described = lines.describe(event)
        if epochs is None:
            return described
        number = f"{event.get('epoch'):>{len(str(epochs))}}/{epochs}"
        return [described[0].replace(f"epoch {event.get('epoch')}", f"epoch {number}", 1)]

    def _print(self, texts: list[str]) -> None:
        for text in texts:
            self._console.print(text, soft_wrap=True)

    def __enter__(self) -> Display:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
