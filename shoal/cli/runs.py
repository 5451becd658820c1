"""``shoal runs``: list runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shoal.cli.answer import Answer, table
from shoal.cli.options import JsonFlag
from shoal.errors import RunDirectoryError
from shoal.observe.lines import brief, number
from shoal.observe.runs import RunRow, ago, is_run, list_runs, read_run

_Root = Annotated[Path, typer.Argument(metavar="[DIR]", help="Where the runs are.", show_default=False)]


def runs(root: _Root = Path("runs"), json: JsonFlag = False) -> Answer:
    """List the runs in a directory, by default ./runs."""
    if root != Path("runs") and not root.is_dir():
        raise RunDirectoryError(f"There is no directory {root}; give the one that holds your runs.")
    rows = [read_run(root)] if is_run(root) else list_runs(root)
    text = table([_cells(row) for row in rows], ("run", "job", "status", "steps", "last evaluation", "started", "plan"))
    return Answer(
        {"runs": [row.as_dict() for row in rows]},
        text or [f"There are no runs in {root} yet; shoal train TARGET makes one."],
    )


def _cells(row: RunRow) -> tuple[object, ...]:
    value = "—" if row.metric is None else f"{row.metric.removeprefix('eval_')} {number(row.value)}"
    return row.name, row.job, row.status, row.steps, value, ago(row.started), brief(row.plan)
