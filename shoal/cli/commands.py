"""The list of commands: a new one is a file beside this and a line here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from shoal.cli import compare, data, doctor, evaluate, load, not_built, plan, predict, replan, route, runs, serve, train
from shoal.cli.answer import Answer

HELP = "Train and serve a PyTorch model on all the cores you have: shoal plans it, says why, and does it."


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command: its name, what it does (the function's docstring), and whether this version does it."""

    name: str
    function: Callable[..., Answer]
    built: bool = True
    parser: type[Any] = TyperCommand

    @property
    def help(self) -> str:
        """Return all that ``shoal NAME --help`` says above the options."""
        return (self.function.__doc__ or "").strip()

    @property
    def short_help(self) -> str:
        """Return the line in ``shoal --help``."""
        line = self.help.splitlines()[0]
        return line if self.built else f"{line.rstrip('.')} (not built yet)."


COMMANDS: tuple[Command, ...] = (
    Command(name="plan", function=plan.plan, parser=plan.PlanCommand),
    Command(name="train", function=train.train),
    Command(name="replan", function=replan.replan),
    Command(name="eval", function=evaluate.evaluate),
    Command(name="predict", function=predict.predict),
    Command(name="compare", function=compare.compare),
    Command(name="compress", function=not_built.compress, built=False),
    Command(name="serve", function=serve.serve),
    Command(name="route", function=route.route),
    Command(name="load", function=load.load),
    Command(name="runs", function=runs.runs),
    Command(name="data", function=data.data),
    Command(name="doctor", function=doctor.doctor),
)


def root(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=lambda value: _version(value), help="Say the version.")
    ] = False,
) -> None:
    """The options of ``shoal`` itself."""


def _version(asked: bool) -> None:
    if asked:
        from shoal.cli.doctor import version_of

        typer.echo(f"shoal {version_of('shoal') or '(not installed)'}")
        raise typer.Exit
