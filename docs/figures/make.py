"""Make the figures of the documentation.

    python docs/figures/make.py step               # how a step travels: docs/figures/step.png
    python docs/figures/make.py split              # a model in parts, and a pipeline's schedule: docs/figures/split.png
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
SPLIT_PLAN = "dp=2,pp=2,tp=2"
STAGES, MICROBATCHES, BACKWARD_TIMES = 4, 8, 2.0
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


# -- a model in parts --------------------------------------------------------------------------------------------------


def split(out: Path) -> Path:
    """Draw who holds what under a plan with three axes, and in which order the stages of a pipeline work."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sys.path.insert(0, str(ROOT))
    figure = Figure(figsize=(10.5, 6.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    grid_axes, time_axes = figure.subplots(2, 1, height_ratios=(1.25, 1.0))
    _draw_grid(grid_axes)
    _draw_schedule(time_axes)
    for axes in (grid_axes, time_axes):
        axes.set_axis_off()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out


def _draw_grid(axes: Axes) -> None:
    from shoal.comm.grid import Grid
    from shoal.plan import Plan

    grid = Grid.of(Plan.parse(SPLIT_PLAN))
    axes.set_xlim(-1.6, 12.6)
    axes.set_ylim(-1.1, 4.1)
    title = f"Who holds what: {SPLIT_PLAN}, {grid.world_size} workers"
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)
    for rank in range(grid.world_size):
        place = grid.place(rank)
        x = 6.4 * place.data + 2.6 * place.tensor
        y = 2.1 - 1.7 * place.stage
        shade = PALE[place.stage]
        owners = " and ".join(str(other) for other in grid.ranks_of(grid.owner(rank)))
        text = f"rank {rank}\nstage {place.stage}, tensor part {place.tensor}\nupdated by {owners}"
        _box(axes, x, y, 2.4, 1.2, (shade, WORKERS[place.stage]), text)
        if place.tensor + 1 < grid.tp:
            _arrow(axes, (x + 2.4, y + 0.6), (x + 2.6, y + 0.6))
        if place.stage + 1 < grid.pp:
            _arrow(axes, (x + 1.2, y), (x + 1.2, y - 0.5))
    for data in range(grid.dp):
        x = 6.4 * data
        team = ", ".join(str(rank) for rank in grid.team(grid.rank(data)))
        axes.add_patch(_frame(x - 0.25, 0.15, 5.5, 3.4))
        text = f"replica {data}: share {data} of the batch, computed by ranks {team} as a team"
        axes.text(x - 0.25, 3.7, text, ha="left", va="bottom", fontsize=8.5, color=INK)
    for stage in range(grid.pp):
        y = 2.7 - 1.7 * stage
        axes.text(-0.4, y, f"stage {stage}", ha="right", va="center", fontsize=9.5, color=WORKERS[stage])
    notes = (
        "↔  tensor parts of a layer: activations are added up, some four times a transformer's block",
        "↕  stages: activations go down, their gradients come back; between the replicas only gradients are summed, in the arena",
    )
    for row, text in enumerate(notes):
        axes.text(-1.5, -0.2 - 0.42 * row, text, ha="left", va="center", fontsize=8.5, color=GREY)


def _frame(x: float, y: float, width: float, height: float) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), width, height, facecolor="none", edgecolor=LINE, linewidth=1.2, linestyle="--")


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.annotate(
        "",
        xy=end,
        xytext=start,
        arrowprops={"arrowstyle": "<->", "color": INK, "linewidth": 1.1, "shrinkA": 0, "shrinkB": 0},
    )


def _draw_schedule(axes: Axes) -> None:
    from shoal.axes.pipeline_schedule import Kind, bubble, in_flight

    found = timetable("1f1b", STAGES, MICROBATCHES)
    end = max(start + length for row in found for _, _, start, length in row)
    lost = bubble("1f1b", STAGES, MICROBATCHES)
    axes.set_xlim(-0.12 * end, 1.13 * end)
    axes.set_ylim(-0.85, STAGES + 0.1)
    title = f"One step of a pipeline: pp={STAGES},microbatches={MICROBATCHES},schedule=1f1b"
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)
    for rank, row in enumerate(found):
        y = STAGES - 1 - rank
        axes.text(-0.01 * end, y + 0.4, f"stage {rank}", ha="right", va="center", fontsize=9.5, color=INK)
        for kind, micro, start, length in row:
            side = 0 if kind is Kind.FORWARD else 1
            _box(axes, start, y, length, 0.8, (PALE[side], WORKERS[side]), str(micro))
        most = in_flight("1f1b", STAGES, rank, MICROBATCHES)
        axes.text(1.01 * end, y + 0.4, f"holds at most {most}", ha="left", va="center", fontsize=8.5, color=GREY)
    text = (
        f"Numbers are microbatches, blue their forward and orange their backward pass. A stage holds the activations of a few "
        f"of them,\nand has nothing to do for {100 * lost:.0f} % of the step."
    )
    axes.text(-0.11 * end, -0.45, text, ha="left", va="center", fontsize=8.5, color=GREY)


def timetable(schedule: str, ranks: int, microbatches: int) -> list[list[tuple[Any, int, float, float]]]:
    """When each rank of a pipeline does what: (kind, microbatch, start, length), with a forward pass as the unit of time.

    For schedules with one stage a rank. Passing on takes no time here.
    """
    from shoal.axes.pipeline_schedule import Kind, orders

    works = {Kind.FORWARD: 1.0, Kind.BACKWARD: BACKWARD_TIMES}
    left = [[a for a in order if a.kind in works] for order in orders(schedule, ranks, None, microbatches)]
    rows: list[list[tuple[Any, int, float, float]]] = [[] for _ in left]
    ended: dict[tuple[Any, int, int], float] = {}
    clocks = [0.0] * ranks
    while any(left):
        for rank, order in enumerate(left):
            while order:
                action = order[0]
                first, other = (rank == 0, rank - 1) if action.kind is Kind.FORWARD else (rank == ranks - 1, rank + 1)
                needed = None if first else (action.kind, other, action.micro)
                if needed is not None and needed not in ended:
                    break
                start = max(clocks[rank], 0.0 if needed is None else ended[needed])
                clocks[rank] = ended[action.kind, rank, action.micro] = start + works[action.kind]
                rows[rank].append((action.kind, action.micro, start, works[action.kind]))
                order.pop(0)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Make the figures of the documentation.")
    figures = parser.add_subparsers(dest="figure", required=True)
    steps = figures.add_parser("step", help="how a step travels")
    steps.add_argument("--out", type=Path, default=HERE / "step.png")
    parts = figures.add_parser("split", help="a model in parts, and a pipeline's schedule")
    parts.add_argument("--out", type=Path, default=HERE / "split.png")
    curve = figures.add_parser("cifar-cnn", help="the learning curve of a run")
    curve.add_argument("run", type=Path, help="a run directory")
    curve.add_argument("--out", type=Path, default=HERE / "cifar-cnn.png")
    options = parser.parse_args(arguments)
    if options.figure == "cifar-cnn":
        made = learning_curve(options.run, options.out)
    else:
        made = {"step": step, "split": split}[options.figure](options.out)
    print(made)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
