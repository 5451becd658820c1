"""``shoal compare``: hold two runs against each other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from shoal.cli.answer import Answer, table
from shoal.cli.options import JsonFlag
from shoal.observe.lines import epoch_values, number

_First = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]
_Second = Annotated[Path, typer.Argument(metavar="RUN", help="Another run directory of the same model.")]


def compare(a: _First, b: _Second, json: JsonFlag = False) -> Answer:
    """Hold two runs against each other: weights and histories."""
    from shoal.observe.compare import difference
    from shoal.train.run import open_run

    first, second = open_run(a), open_run(b)
    found = difference(first.weights(), second.weights())
    histories = [list(first.history), list(second.history)]
    result = {
        "max_rel_diff": found.max_rel_diff,
        "tensor": found.tensor,
        "unequal_integers": list(found.unequal_integers),
        "runs": [str(a), str(b)],
        "plans": [str(first.plan), str(second.plan)],
        "history": histories,
    }
    lines = [f"max_rel_diff: {found.max_rel_diff:.3g}" + (f" ({found.tensor})" if found.tensor else "")]
    if found.unequal_integers:
        lines.append(f"integers that differ: {', '.join(found.unequal_integers)}")
    lines += [f"A: {a}  plan {first.plan}", f"B: {b}  plan {second.plan}"]
    return Answer(result, lines + _side_by_side(*histories))


def _side_by_side(first: Sequence[dict[str, Any]], second: Sequence[dict[str, Any]]) -> list[str]:
    names = list(dict.fromkeys(name for entry in (*first, *second) for name in epoch_values(entry)))
    rows = []
    for index in range(max(len(first), len(second))):
        pair = [history[index] if index < len(history) else {} for history in (first, second)]
        row: list[Any] = [next(entry["epoch"] for entry in pair if entry)]
        rows.append(row + [number(entry.get(name)) for name in names for entry in pair])
    return table(rows, ["epoch", *(f"{name} {side}" for name in names for side in "AB")])
