"""The rewrites there are: each is a module of this package with the constants and the function that are listed here.

- ``NAME``: what a plan calls it; the first line of the docstring says what it does.
- ``ORDER``: lower ones are applied first.
- ``TRAINS``, ``INFERS``: whether it applies in training, and where nothing is trained (evaluation, serving).
- ``replace_leaf(layer, found) -> forward or None``: another forward for a single layer of torch's own, which calls ``found``
  when it turns out to be of use; or
- ``exchange(found) -> Exchange``: another way for the whole process to compute in float32, from ``begin()`` to ``end()``,
  whatever it has of the model; with ``gain() -> float``: how many times as fast this machine computes so, on one thread; or
- ``rewrite(region) -> int``: change ``region.graph``; return in how many places. Only what is equal for every input may be
  changed; what depends on the input (its layout, say) is looked at when it comes.

To add one is to add one file.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Iterable, Sequence
from typing import Any

from shoal.errors import PlanError, did_you_mean


@functools.cache
def all_rewrites() -> dict[str, Any]:
    """The modules of all rewrites by name, in the order in which they are applied."""
    import shoal.rewrites as package

    found = [importlib.import_module(f"{package.__name__}.{entry.name}") for entry in pkgutil.iter_modules(package.__path__)]
    rewrites = [module for module in found if hasattr(module, "NAME")]
    return {module.NAME: module for module in sorted(rewrites, key=lambda module: (module.ORDER, module.NAME))}


def names(training: bool) -> tuple[str, ...]:
    """The names of those that apply in training, or where nothing is trained."""
    return tuple(name for name, one in all_rewrites().items() if (one.TRAINS if training else one.INFERS))


def in_order(chosen: Iterable[str]) -> tuple[str, ...]:
    """The chosen names in the order in which they are applied, whatever order they were given in."""
    wanted = set(chosen)
    return tuple(name for name in all_rewrites() if name in wanted)


def exchanges(name: str) -> bool:
    """Whether it changes how a process computes in float32, and nothing in other types of numbers."""
    return hasattr(all_rewrites()[name], "exchange")


def describe(name: str) -> str:
    """What a rewrite does, in one line."""
    line = str(all_rewrites()[name].__doc__).splitlines()[0].rstrip(".")
    return line[0].lower() + line[1:]


def check_names(chosen: Sequence[str]) -> None:
    """PlanError where a name is unknown."""
    known = list(all_rewrites())
    for name in chosen:
        if name not in known:
            raise PlanError(
                f'There is no rewrite "{name}".{did_you_mean(name, known)} The rewrites are {", ".join(known)}.'
            )
