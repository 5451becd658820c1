"""``shoal data``: fetch and check the data sets that shipped jobs train on."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated

import typer

from shoal.cli.answer import Answer, table
from shoal.cli.options import JsonFlag
from shoal.errors import DataError, did_you_mean

DATA_SETS: Mapping[str, str] = MappingProxyType(
    {
        "cifar10": "60,000 colour pictures of 32 × 32 pixels in 10 classes (about 180 MB once unpacked)",
        "movielens": "100,000 ratings of 1,682 films by 943 people, in the order of time (3 MB); for research only",
    }
)
"""Name of a module in shoal.data with ``load(progress, check=)`` -> what it holds."""

_Name = Annotated[str | None, typer.Argument(metavar="[NAME]", help="Which one; left out: list them.")]


def data(name: _Name = None, json: JsonFlag = False) -> Answer:
    """Fetch a data set and check it, or list those there are."""
    if name is None:
        listed = [{"name": known, "about": about} for known, about in DATA_SETS.items()]
        return Answer({"data_sets": listed}, table(DATA_SETS.items()))
    if name not in DATA_SETS:
        near = did_you_mean(name, DATA_SETS)
        raise DataError(f'There is no data set called "{name}".{near} There is {", ".join(DATA_SETS)}.')
    # check=True: who asks for the data wants to know that it is whole, also where it came earlier.
    loaded = importlib.import_module(f"shoal.data.{name}").load(_say, check=True)
    arrays = {field: list(array.shape) for field, array in vars(loaded).items() if hasattr(array, "shape")}
    lines = [f"{name} is in {loaded.path} and has the right checksums."]
    lines += [f"  {line}" for line in table((field, " × ".join(map(str, shape))) for field, shape in arrays.items())]
    return Answer({"name": name, "path": str(loaded.path), "arrays": arrays}, lines)


def _say(line: str) -> None:
    typer.echo(line, err=True)
