"""Commands of the contract that this version does not have yet."""

from __future__ import annotations

from typing import Annotated

import typer

from shoal.cli.answer import Answer
from shoal.cli.options import JsonFlag
from shoal.errors import NotBuiltError

_Words = Annotated[list[str] | None, typer.Argument(metavar="...", help="Not read yet.")]


def compress(words: _Words = None, json: JsonFlag = False) -> Answer:
    """Shrink a finished model."""
    return _not_built("compress", "the bundle in a run's model directory is what it will read")


def _not_built(name: str, remedy: str) -> Answer:
    raise NotBuiltError(f"shoal {name} is not built yet; {remedy}.")
