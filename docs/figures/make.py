"""Make the figures of the documentation.

    python docs/figures/make.py step               # how a step travels: docs/figures/step.png
    python docs/figures/make.py cifar-cnn RUN      # the learning curve of a run: docs/figures/cifar-cnn.png
    python docs/figures/make.py cifar-cnn RUN --out other.png

RUN is a run directory; its epochs are read from its events, so a run that is still going on will do.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WORKERS = ("#1f6f8b", "#d1603d")
PALE = ("#cfe3ea", "#f6d9cf")
INK, GREY, LINE = "#222222", "#777777", "#bbbbbb"
# (start, length, name) of what a worker does in a step; worker 1 is a little slower.
PHASES = (
    ((0.0, 0.7, "data"), (0.7, 1.6, "forward"), (2.3, 2.3, "backward")),
    ((0.0, 0.8, "data"), (0.8, 1.8, "forward"), (2.6, 2.5, "backward")),
)
UPDATES = ((5.25, 1.9), (5.25, 1.75))
BARRIERS = ((5.17, "GRADIENTS: every stripe is complete"), (7.25, "UPDATED: every slice is"))


def learning_curve(run: Path, out: Path) -> Path:
    """Draw the epochs of a run directory."""
    sys.path.insert(0, str(ROOT))
    from shoal.observe.events import read_events
    from shoal.observe.figure import learning_curve as draw

    history: dict[int, dict[str, Any]] = {}
    job = plan = ""
    for event in read_events(run / "events.jsonl", kinds={"run_start", "epoch"}):
        if event["kind"] == "run_start":
            job, plan = str(event["job"]), str(event["plan"])
        elif not event.get("partial"):
            history[int(event["epoch"])] = event
    return draw([history[epoch] for epoch in sorted(history)], out, job=job, plan=plan)


def step(out: Path) -> Path:
    """Draw one step of two workers: what they do over time, and where it lies in the arena."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 5.4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    time_axes, memory_axes = figure.subplots(2, 1, height_ratios=(1.0, 1.15))
    _draw_time(time_axes)
    _draw_memory(memory_axes)
    for axes in (time_axes, memory_axes):
        axes.set_axis_off()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out


def _box(axes: Axes, x: float, y: float, width: float, height: float, colours: tuple[str, str], text: str) -> None:
    from matplotlib.patches import Rectangle

    face, edge = colours
    axes.add_patch(Rectangle((x, y), width, height, facecolor=face, edgecolor=edge, linewidth=1.2))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=8.5, color=INK)


def _draw_time(axes: Axes) -> None:
    axes.set_xlim(-1.1, 8.6)
    axes.set_ylim(-0.55, 2.75)
    axes.set_title("One step over time", loc="left", fontsize=11, fontweight="bold", color=INK)
    for rank in (0, 1):
        y = 1.15 - 1.15 * rank
        axes.text(-0.1, y + 0.4, f"worker {rank}", ha="right", va="center", fontsize=9.5, color=WORKERS[rank])
        for start, length, name in PHASES[rank]:
            _box(axes, start, y, length, 0.8, (PALE[rank], WORKERS[rank]), name)
        start, length = UPDATES[rank]
        _box(axes, start, y, length, 0.8, (PALE[rank], WORKERS[rank]), f"sum slice {rank} of all\nstripes, optimizer")
        axes.text(7.4, y + 0.4, "next step", ha="left", va="center", fontsize=8.5, color=GREY)
    for x, name in BARRIERS:
        axes.plot([x, x], [-0.15, 2.2], color=INK, linewidth=2.2)
        axes.text(x, 2.3, name, ha="center", va="bottom", fontsize=8.5, color=INK)
    for x, text in (
        (2.5, "killed here: its share is computed again"),
        (6.2, "killed here: its slice is finished"),
    ):
        axes.text(x, -0.3, text, ha="center", va="center", fontsize=8.5, color=GREY, style="italic")


def _draw_memory(axes: Axes) -> None:
    axes.set_xlim(-2.6, 12.2)
    axes.set_ylim(-0.5, 5.6)
    title = "Where it lies: the arena, shared by all processes"
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)
    rows = (
        (4.2, "stripe of worker 0", (WORKERS[0], WORKERS[0])),
        (3.2, "stripe of worker 1", (WORKERS[1], WORKERS[1])),
        (1.4, "optimizer state, once", None),
        (0.4, "weights, once", None),
    )
    for y, name, writers in rows:
        axes.text(-0.15, y + 0.35, name, ha="right", va="center", fontsize=9, color=INK)
        for half in (0, 1):
            edge = writers[half] if writers else WORKERS[half]
            face = PALE[0 if edge == WORKERS[0] else 1]
            label = f"gradients, slice {half}" if writers else f"slice {half}"
            _box(axes, 4.0 * half, y, 4.0, 0.7, (face, edge), label)
    for half in (0, 1):
        x = 2.0 + 4.0 * half
        axes.annotate(
            "", xy=(x, 2.15), xytext=(x, 3.15),
            arrowprops={"arrowstyle": "-|>", "color": WORKERS[half], "linewidth": 2.0},
        )  # fmt: skip
        axes.text(x + 0.15, 2.65, f"worker {half}", ha="left", va="center", fontsize=8.5, color=WORKERS[half])
    notes = (
        (4.55, "Each worker writes its own stripe;"),
        (4.05, "the colour says who writes."),
        (2.65, "Each sums its own slice of all stripes"),
        (1.55, "and updates its own slice, in chunks"),
        (1.05, "that an undo log can put back."),
        (0.55, "Everybody reads all weights."),
    )
    for y, text in notes:
        axes.text(8.3, y, text, ha="left", va="center", fontsize=8.5, color=GREY)
    axes.plot([-2.5, 8.1], [-0.15, -0.15], color=LINE, linewidth=0.8)
    axes.text(
        -2.5, -0.4, "Nothing is gathered, and of all this only the stripes grow with the number of workers.",
        ha="left", va="center", fontsize=8.5, color=GREY,
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Make the figures of the documentation.")
    figures = parser.add_subparsers(dest="figure", required=True)
    steps = figures.add_parser("step", help="how a step travels")
    steps.add_argument("--out", type=Path, default=HERE / "step.png")
    curve = figures.add_parser("cifar-cnn", help="the learning curve of a run")
    curve.add_argument("run", type=Path, help="a run directory")
    curve.add_argument("--out", type=Path, default=HERE / "cifar-cnn.png")
    options = parser.parse_args(arguments)
    made = step(options.out) if options.figure == "step" else learning_curve(options.run, options.out)
    print(made)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
