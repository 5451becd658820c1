"""Pictures as PNGs: a run's learning curve, a load test's latencies."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.errors import RequestError
from shoal.observe.lines import brief, epoch_values, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = ("#1f6f8b", "#d1603d", "#5b8c5a", "#7b5ea7", "#b8860b", "#555555")


def learning_curve(
    history: Sequence[Mapping[str, Any]], path: str | os.PathLike[str], *, job: str = "", plan: str = ""
) -> Path:
    """Draw losses on the left and metrics on the right, over epochs, and return the path of the PNG.

    Args:
        history: as ``run.history``. Training values are drawn dashed, evaluation values solid.
        path: where the picture goes; written beside itself first, then moved, so that it is never half a picture.
        job, plan: for the title.

    Raises:
        RequestError: the history is empty.
    """
    # Not pyplot: it would choose a backend for the whole process and keep figures alive.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not history:
        raise RequestError("There is no epoch to draw yet; train at least one epoch.")
    names = list(dict.fromkeys(name for entry in history for name in epoch_values(entry)))
    losses = [name for name in names if name in ("loss", "eval_loss")]
    metrics = [name for name in names if name not in losses]
    figure = Figure(figsize=(9.6 if metrics else 6.0, 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2 if metrics else 1, squeeze=False)[0]
    _panel(panels[0], history, losses, "loss")
    if metrics:
        _panel(panels[1], history, metrics, metrics[0] if len(_bases(metrics)) == 1 else "metrics")
    if job:
        figure.suptitle(f"{job}: learning curve", fontsize=12, fontweight="bold", color="#222222")
    if plan:
        figure.supxlabel("\n".join(textwrap.wrap(f"plan {brief(plan)}", 110)), fontsize=7, color="#777777")
    return _save(figure, path)


def latency_histogram(
    bins: Sequence[tuple[float, float, int]], path: str | os.PathLike[str], *,
    marks: Mapping[str, float], slo_ms: float | None = None, title: str = "",
) -> Path:  # fmt: skip
    """Draw how many requests took how long, on a logarithmic axis, and return the path of the PNG.

    Args:
        bins: (from_ms, to_ms, requests), in order.
        path: as for ``learning_curve``.
        marks: milliseconds to mark, by their names, such as those of percentiles.
        slo_ms: what an answer may take; drawn as a line.

    Raises:
        RequestError: there is no bin.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    if not bins:
        raise RequestError("There is no latency to draw; not one request was answered.")
    figure = Figure(figsize=(8.0, 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    lows, counts = [low for low, _, _ in bins], [count for _, _, count in bins]
    axes.bar(lows, counts, [high - low for low, high, _ in bins], align="edge", color=_COLOURS[0])
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    if max(high for _, high, _ in bins) / lows[0] > 100:
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.xaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    for index, (name, value) in enumerate(marks.items()):
        axes.axvline(value, color="#555555", linestyle=(":", "--", "-.")[index % 3], label=f"{name} {value:.3g} ms")
    if slo_ms is not None:
        axes.axvline(slo_ms, color=_COLOURS[1], linewidth=2.0, label=f"SLO {slo_ms:g} ms")
    axes.set_xlabel("latency (ms), from when the request was meant to be sent")
    axes.set_ylabel("requests")
    _plain(axes)
    if title:
        figure.suptitle(title, fontsize=11, fontweight="bold", color="#222222")
    return _save(figure, path)


def staleness_histogram(staleness: Mapping[str, int], path: str | os.PathLike[str], *, plan: str = "") -> Path:
    """Draw how many pushes had which staleness (updates between pull and application) and return the path."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8.0, 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    ordered = sorted((int(name), count) for name, count in staleness.items())
    axes.bar([name for name, _ in ordered], [count for _, count in ordered], color=_COLOURS[0], width=0.8)
    axes.set_xlabel("staleness: updates between a push's pull and its application")
    axes.set_ylabel("pushes")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _plain(axes)
    if plan:
        figure.suptitle(plan, fontsize=11, fontweight="bold", color="#222222")
    return _save(figure, path)


def _save(figure: Figure, path: str | os.PathLike[str]) -> Path:
    target = Path(path)
    unfinished = target.with_name(f".{target.name}.{os.getpid()}")
    figure.savefig(unfinished, format="png")
    os.replace(unfinished, target)
    return target


def _plain(axes: Axes) -> None:
    axes.grid(True, color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=9)


def _panel(axes: Axes, history: Sequence[Mapping[str, Any]], names: Sequence[str], label: str) -> None:
    from matplotlib.ticker import MaxNLocator

    bases = _bases(names)
    for name in names:
        points = [(float(entry["epoch"]), entry[name]) for entry in history if entry.get(name) is not None]
        if not points:
            continue
        evaluated = name.startswith("eval_")
        # Two curves alone get two colours; of more, training and evaluation of one thing share theirs.
        colour = int(evaluated) if len(bases) == 1 else bases.index(name.removeprefix("eval_"))
        axes.plot(
            [epoch for epoch, _ in points],
            [value for _, value in points],
            color=_COLOURS[colour % len(_COLOURS)],
            linestyle="-" if evaluated else "--",
            linewidth=2.0 if evaluated else 1.5,
            marker="o",
            markersize=3.5,
            label=f"{name} (last {number(points[-1][1])})",
        )
    axes.set_xlabel("epoch")
    axes.set_ylabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _plain(axes)


def _bases(names: Sequence[str]) -> list[str]:
    """The names without eval_, each once."""
    return list(dict.fromkeys(name.removeprefix("eval_") for name in names))
