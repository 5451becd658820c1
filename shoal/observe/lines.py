"""What an event reads like: pure functions from an event to lines of plain text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from shoal.errors import PlanError
from shoal.plan import Plan

Event = Mapping[str, Any]

_NOT_VALUES = frozenset({"t", "kind", "epoch", "samples_per_s", "partial", "step", "train_s", "eval_s"})
_ACTIONS = {"recomputed": "its share was computed again", "rolled_forward": "the step was rolled forward",
            "copied": "it has a copy of its shard again"}
_REASONS = {
    "interrupt": "interrupted",
    "on_event": "on_event asked for it",
    "until": "the target is reached",
    "patience": "the evaluation loss no longer gets better",
    "steps": "as many steps as were asked for",
}


def number(value: Any) -> str:
    """Return a loss or a metric in four decimals, or in exponents where these say nothing; '—' for None."""
    if value is None:
        return "—"
    if isinstance(value, str):
        return value
    size = abs(value)
    return f"{value:.4f}" if 0.001 <= size < 10_000 or size == 0 else f"{value:.4g}"


def duration(seconds: float) -> str:
    """Return a time to wait, as 0:41 or 1:02:03."""
    whole = max(0, round(seconds))
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def step_time(seconds: Any) -> str:
    """Return the time of a step in milliseconds, or '—' for None."""
    return "—" if seconds is None else f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def rate(value: Any) -> str:
    """Return samples a second."""
    return "—" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def epoch_values(entry: Event) -> dict[str, Any]:
    """Return the losses and metrics of an epoch event or a history entry, in their order."""
    return {name: value for name, value in entry.items() if name not in _NOT_VALUES}


def predicted_beside_measured(predicted_s: Any, measured_s: Any) -> str:
    """Return the line that holds the planner to its word."""
    if predicted_s is None:
        return f"step time: predicted — (nothing to predict from yet), measured {step_time(measured_s)}"
    line = f"step time: predicted {step_time(predicted_s)}, measured {step_time(measured_s)}"
    if measured_s:
        line += f" ({(measured_s / predicted_s - 1) * 100:+.0f} %)" if predicted_s > 0 else ""
    return line


def _run_start(event: Event) -> list[str]:
    epochs, steps, total = event.get("epochs_total"), event.get("steps_per_epoch"), event.get("steps_total")
    parts = [f"{event.get('job')}: {_plural(event.get('samples'), 'sample')}, global batch {event.get('batch_size')}"]
    if epochs is not None and steps is not None:
        parts.append(f"{_plural(epochs, 'epoch')} of {_plural(steps, 'step')}")
    if total is not None and (epochs is None or steps is None or total != epochs * steps):
        parts.append(f"{_plural(total, 'step')} in all")
    parts.append(_plural(event.get("world_size"), "worker"))
    lines = [", ".join(parts), f"run: {event.get('run')}"]
    if event.get("resumed_from") is not None:
        lines.append(f"going on from step {event['resumed_from']:,}")
    return lines


def _plan(event: Event) -> list[str]:
    lines = [f"plan: {brief(event.get('plan'))}"]
    lines += [f"  {sentence}" for sentence in _why(event)]
    if event.get("batch"):
        lines.append(f"batch: {event['batch']}")
    return lines


def brief(plan: object) -> str:
    """A plan string without what is at its neutral value, or the text itself where it is no plan."""
    try:
        return Plan.parse(str(plan)).brief()
    except PlanError:
        return str(plan)


def _why(event: Event) -> Sequence[str]:
    why = event.get("why") or ()
    return why.splitlines() if isinstance(why, str) else why


def _epoch(event: Event) -> list[str]:
    parts = [f"epoch {event.get('epoch')}"]
    if event.get("partial"):
        parts[0] += " (part of it)"
    parts += [f"{name} {number(value)}" for name, value in epoch_values(event).items()]
    if event.get("samples_per_s") is not None:
        parts.append(f"{rate(event['samples_per_s'])} samples/s")
    return ["  ".join(parts)]


def _death(event: Event) -> list[str]:
    return [
        f"{_who(event)} (pid {event.get('pid')}) died in step {event.get('step')}"
        f"{_phase(event)}: {event.get('cause')}"
    ]


def _recovered(event: Event) -> list[str]:
    action = str(event.get("action"))
    return [
        f"{_who(event)} is back (pid {event.get('pid')}) in step {event.get('step')}"
        f" after {event.get('after_s') or 0.0:.2f} s: {_ACTIONS.get(action, action)}"
    ]


def _replan(event: Event) -> list[str]:
    line = f"plan changed after step {event.get('step')}: {brief(event.get('before'))} → {brief(event.get('plan'))}"
    if event.get("pause_s") is not None:
        line += f" (pause {event['pause_s']:.2f} s)"
    if event.get("keys") is not None:
        line += f"; {event['keys_moved']} of {_plural(event['keys'], 'key')} moved"
    return [line]


def _stall(event: Event) -> list[str]:
    line = (
        f"{_who(event)} (pid {event.get('pid')}) has not answered for {event.get('waited_s') or 0.0:.1f} s"
        f" in step {event.get('step')}{_phase(event)}"
    )
    if event.get("waits_for"):
        line += f"; it waits for {event['waits_for']}"
    if event.get("replaced_after_s") is not None:
        line += f"; it is replaced after {event['replaced_after_s']:.0f} s"
    return [line, *(f"    {frame}" for frame in str(event.get("stack") or "").splitlines())]


def _run_end(event: Event) -> list[str]:
    status = str(event.get("status"))
    line = f"{status}: {_plural(event.get('steps'), 'step')}, {_plural(event.get('epochs'), 'epoch')}"
    if event.get("wall_s") is not None:
        line += f" in {event['wall_s']:.1f} s"
    beside = [
        f"{name} {event[key]:.1f} s" for name, key in (("start-up", "startup_s"), ("evaluation", "eval_s"))
        if event.get(key) is not None
    ]  # fmt: skip
    line += f" ({', '.join(beside)})" if beside else ""
    line += f", {rate(event['samples_per_s'])} samples/s" if event.get("samples_per_s") is not None else ""
    lines = [line]
    if event.get("step_s") is not None:
        lines.append(predicted_beside_measured(event.get("predicted_step_s"), event["step_s"]))
    if event.get("predicted_memory_mb") is not None and event.get("memory_mb") is not None:
        predicted, measured = event["predicted_memory_mb"], event["memory_mb"]
        lines.append(f"memory of the largest worker: predicted {predicted:,.0f} MB, measured {measured:,.0f} MB")
    if event.get("model"):
        lines.append(f"model: {event['model']}")
    return lines


def _who(event: Event) -> str:
    return f"{event.get('role') or 'worker'} {event.get('rank')}"


def _phase(event: Event) -> str:
    return f" ({event['phase']})" if event.get("phase") else ""


def _count(value: Any) -> str:
    return "—" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def _plural(value: Any, word: str) -> str:
    return f"{_count(value)} {word}{'' if value == 1 else 's'}"


_WRITERS: Mapping[str, Callable[[Event], list[str]]] = {
    "run_start": _run_start,
    "plan": _plan,
    "epoch": _epoch,
    "death": _death,
    "recovered": _recovered,
    "replan": _replan,
    "stall": _stall,
    "run_end": _run_end,
    "warning": lambda event: [f"warning: {event.get('text')}"],
    "stop": lambda event: [
        f"stopping after step {event.get('step')}: {_REASONS.get(str(event.get('reason')), event.get('reason'))}"
    ],
    "checkpoint_failed": lambda event: [
        f"warning: the checkpoint of step {event.get('step')} was not written: {event.get('reason')}"
    ],
    "checkpoint_damaged": lambda event: [f"warning: {event.get('path')} is damaged: {event.get('reason')}"],
}


def describe(event: Event) -> list[str]:
    """Return the lines that a person reads for an event; none for kinds that need no telling.

    An ``error`` has none: whoever asked for the run gets it as an exception, and says it once, at the end.
    """
    writer = _WRITERS.get(str(event.get("kind")))
    return writer(event) if writer else []
