"""``shoal replan``: let a running run go on under another plan."""

from __future__ import annotations

from typing import Annotated

import typer

from shoal.cli.answer import Answer
from shoal.cli.options import JsonFlag, RunArgument
from shoal.observe.lines import brief

_DEADLINE_S = 600.0

_Plan = Annotated[
    str,
    typer.Option(
        "--plan", metavar="PLAN", help='What is to be different, such as "ps=2,workers=3"; what it says nothing of stays.'
    ),
]


def replan(run: RunArgument, plan: _Plan, json: JsonFlag = False) -> Answer:
    """Change the plan of a running run.

    Workers and servers are added or removed after the step that it is at; the command ends when it goes on.
    """
    from shoal.plan import Plan
    from shoal.train.orders import ask

    told = ask(run, str(Plan.parse(plan)), _DEADLINE_S)
    lines = [
        f"{brief(told['before'])} → {brief(told['plan'])}",
        f"from step {told['step'] + 1} on, after a pause of {told['pause_s']:.2f} s",
    ]
    if "keys_moved" in told:
        lines.append(f"{told['keys_moved']} of {told['keys']} keys moved, {told['bytes_moved']:,} bytes")
    return Answer(told, lines)
