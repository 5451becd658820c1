"""Cutting between torch functions, for models that cannot be cut between modules.

Some models have no modules where they could be cut: weights used directly, one layer used many times, results of plain
functions needed much later. Their stages go by the torch functions that the forward calls, counted from its beginning:
before the first one of its own a stage lets those whose results depend on parameters return empty tensors, and then puts
what it received into the ones that are needed later. It costs some microseconds for each function, so this is the second
way, taken where ``pipeline_cut.py`` finds no modules to cut between.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from shoal.axes.pipeline_stage import Boundary, Carried, filled, form_of
from shoal.axes.pipeline_trace import Trace, computes, tensors_in
from shoal.errors import JobError


def boundary_before(trace: Trace, number: int) -> Boundary | None:
    """The boundary before a torch function, if all that crosses there is the result of torch functions."""
    moment = trace.functions[number].moment
    crossing = trace.crossing(moment)
    if not crossing or any(made.origin[0] < 0 for made in crossing):
        return None
    depends = frozenset(n for n, function in enumerate(trace.functions[:number]) if function.depends)
    carries = tuple(Carried(str(made.origin[0]), made.origin[1]) for made in crossing)
    return Boundary(f"torch function {number}", carries, (), function=number, depends=depends)


class Replay(TorchFunctionMode):
    """Goes along with a stage's forward pass: see the module's docstring."""

    def __init__(
        self,
        module: nn.Module,
        entry: Boundary | None,
        leaving: Boundary | None,
        arrive: Callable[[Sequence[torch.Tensor]], None],
        left: Callable[[tuple[torch.Tensor, ...]], BaseException],
    ) -> None:
        super().__init__()
        self._entry, self._exit = entry, leaving
        self._arrive, self._left = arrive, left
        self._buffers = {id(buffer) for buffer in module.buffers()}
        self._wanted = {int(c.path) for boundary in (entry, leaving) if boundary for c in boundary.carries}
        self._results: dict[int, list[torch.Tensor]] = {}
        self._known: dict[Any, Any] = {}
        self._number = 0
        self._arrived = entry is None

    def __enter__(self) -> Any:
        self._number, self._arrived = 0, self._entry is None
        self._results.clear()
        return super().__enter__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not computes(func):
            return func(*args, **kwargs)
        number, self._number = self._number, self._number + 1
        if self._exit is not None and number == self._exit.function:
            raise self._left(tuple(self._find(self._exit)))
        if self._entry is not None and number == self._entry.function:
            self._arrived = True
            self._arrive(self._find(self._entry))
        if self._arrived or (self._entry is not None and number not in self._entry.depends):
            output = func(*args, **kwargs)
        else:
            output = self._empty(number, func, args, kwargs)
        if number in self._wanted:
            # x[...] = y returns nothing; what it made is x.
            named = getattr(func, "__name__", "") == "__setitem__"
            self._results[number] = tensors_in(pytree.tree_leaves(args if named else output))
        return output

    def _find(self, boundary: Boundary) -> list[torch.Tensor]:
        found = []
        for carried in boundary.carries:
            results = self._results.get(int(carried.path), [])
            if carried.leaf >= len(results):
                raise JobError("The model did not compute as on the example batch; use pp=1.")
            found.append(results[carried.leaf])
        return found

    def _empty(self, number: int, func: Any, args: Any, kwargs: Any) -> Any:
        leaves = pytree.tree_leaves((args, kwargs))
        key = (number, *(_told_by(leaf) for leaf in leaves))
        if key not in self._known:
            copied = pytree.tree_map(self._own, (args, kwargs))
            with torch.random.fork_rng(devices=[]):
                output = func(*copied[0], **copied[1])
            own = {id(leaf): index for index, leaf in enumerate(pytree.tree_leaves(copied)) if _is_tensor(leaf)}
            self._known[key] = pytree.tree_map(
                lambda leaf: _Argument(own[id(leaf)]) if id(leaf) in own else form_of(leaf), output
            )
        known = self._known[key]
        return pytree.tree_map(lambda leaf: leaves[leaf.index] if type(leaf) is _Argument else filled(leaf), known)

    def _own(self, leaf: Any) -> Any:
        return leaf.clone() if _is_tensor(leaf) and id(leaf) in self._buffers else leaf


@dataclass(frozen=True)
class _Argument:
    """Stands for an argument that was written into and returned."""

    index: int


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor)


def _told_by(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return (leaf.shape, leaf.dtype)
    return leaf if isinstance(leaf, (int, float, str, bool, type(None), torch.dtype, slice)) else type(leaf)
