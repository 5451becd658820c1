"""Watching a model compute once: which modules are called when, and which tensors live from where to where.

A clock ticks at every call of a module and every torch function. A tensor is *made* when a torch function returns it that
took a parameter, or another made tensor: what follows from the inputs alone (a mask, an angle for rotary embeddings) is not
made, because every stage can compute it from its own copy of the batch. ``crossing`` says which made tensors are still
needed after a moment: those have to travel if the model is cut there.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

AT_THE_END = 1 << 62

_ONLY_SHAPES = frozenset(
    {"zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "randint_like"}
    | {"new_zeros", "new_ones", "new_empty", "new_full", "new_tensor"}
)
"""Functions that take a tensor for its shape, so that nothing of its values is in what they return."""

_READ_VALUES = frozenset(
    {"item", "tolist", "numpy", "equal", "allclose", "is_nonzero", "__bool__", "__int__", "__float__", "__index__"}
    | {"__contains__", "__array__"}
)
"""Functions that read a tensor's values and return something that is no tensor."""


@dataclass
class Made:
    """A tensor that depends on parameters, and its life; kept, so that no other object gets its identity.

    ``origin``: the torch function (counted from 0) and the leaf of its result that it was first seen as.
    """

    tensor: torch.Tensor
    born: int
    last: int
    origin: tuple[int, int] = (-1, 0)


@dataclass
class Function:
    """A torch function that was called: when, for how long, and whether what it returned depends on parameters."""

    moment: int
    seconds: float = 0.0
    depends: bool = False
    takes_parameter: bool = False


@dataclass
class Call:
    """A call of a module: ``path`` is its name in the model, "" for the model itself."""

    path: str
    module: nn.Module
    start: int
    arguments: list[Any]
    inside: list[Call] = field(default_factory=list)
    stop: int = 0
    results: list[Any] = field(default_factory=list)
    depends: bool = False
    keeps_shape: bool = False
    """It returned one tensor, of the shape and dtype of the first one that it got."""


@dataclass
class Trace:
    """What was seen: the call of the model with all calls inside, the made tensors by identity, uses by name, and functions
    in their order."""

    root: Call
    made: dict[int, Made]
    parameter_uses: dict[str, list[int]]
    buffer_uses: dict[str, list[int]]
    functions: list[Function]
    times_called: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.times_called.update(call.path for call in self.calls())

    def calls(self) -> Iterator[Call]:
        """Every call, in the order in which they begin."""
        return _walk(self.root)

    def forget_tensors(self) -> None:
        """Let go of all activations; what was found out about them stays, but for ``crossing``."""
        self.made.clear()
        for call in self.calls():
            call.arguments.clear()
            call.results.clear()

    def crossing(self, moment: int) -> list[Made]:
        """The made tensors that are born before a moment and used after it, in the order of their birth."""
        return sorted((m for m in self.made.values() if m.born < moment < m.last), key=lambda m: m.born)


def _walk(call: Call) -> Iterator[Call]:
    yield call
    for inner in call.inside:
        yield from _walk(inner)


_ASK = frozenset(
    {"__get__", "size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "element_size", "__len__"}
    | {"is_floating_point", "is_complex", "is_contiguous", "get_device", "data_ptr", "type", "__repr__", "__format__"}
)
"""Functions that ask what a tensor is like."""


def computes(func: Any) -> bool:
    """Whether a torch function counts. Questions do not: how many are asked may depend on the mode of the model."""
    return getattr(func, "__name__", "") not in _ASK


def tensors_in(leaves: list[Any]) -> list[torch.Tensor]:
    """The tensors among some values."""
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def watch(model: nn.Module, action: Callable[[nn.Module], Any]) -> Trace | None:
    """Let ``action`` compute with the model and return what was seen; None where it calls the model not exactly once."""
    watcher = _Watcher(model)
    handles = []
    try:
        for path, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(watcher.entering(path), with_kwargs=True, prepend=True))
            handles.append(module.register_forward_hook(watcher.leaving(), with_kwargs=True))
        with watcher:
            action(model)
    finally:
        for handle in handles:
            handle.remove()
    return watcher.trace()


class _Watcher(TorchFunctionMode):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._clock = 0
        self._roots: list[Call] = []
        self._open: list[Call] = []
        self._made: dict[int, Made] = {}
        self._kept: list[torch.Tensor] = []
        self._functions: list[Function] = []
        self._parameters = {id(p): name for name, p in model.named_parameters()}
        self._buffers = {id(b): name for name, b in model.named_buffers()}
        self._parameter_uses: dict[str, list[int]] = {name: [] for name in self._parameters.values()}
        self._buffer_uses: dict[str, list[int]] = {name: [] for name in self._buffers.values()}

    def _tick(self) -> int:
        self._clock += 1
        return self._clock

    def trace(self) -> Trace | None:
        if len(self._roots) != 1:
            return None
        # A module whose parameters no torch function was seen to take (a compiled one, say) used them when it was called.
        seen = {name for name, uses in self._parameter_uses.items() if uses}
        for call in _walk(self._roots[0]):
            for own in call.module._parameters.values():
                name = self._parameters.get(id(own))
                if name is not None and name not in seen:
                    self._parameter_uses[name].append(call.start)
        return Trace(self._roots[0], self._made, self._parameter_uses, self._buffer_uses, self._functions)

    # -- modules -------------------------------------------------------------------------------------------------

    def entering(self, path: str) -> Callable[..., None]:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            call = Call(path, module, self._tick(), pytree.tree_leaves((args, kwargs)))
            (self._open[-1].inside if self._open else self._roots).append(call)
            self._open.append(call)

        return enter

    def leaving(self) -> Callable[..., None]:
        def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            call = self._open.pop()
            call.stop = now = self._tick()
            call.results = pytree.tree_leaves(output)
            arguments = tensors_in(call.arguments)
            if not call.inside:
                for tensor in arguments:
                    self._use(tensor, now)
            results = tensors_in(call.results)
            opaque = not call.inside and any(id(t) in self._made for t in arguments)
            if next(module.parameters(), None) is not None or (opaque and _is_opaque(module)):
                for tensor in results:
                    self._make(tensor, now)
            call.keeps_shape = (
                bool(arguments and results) and len(call.results) == 1 and _alike(results[0], arguments[0])
            )
            call.depends = any(id(tensor) in self._made for tensor in results)
            if not self._open:
                for tensor in results:
                    self._use(tensor, AT_THE_END)

        return leave

    # -- torch functions -----------------------------------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        called, number = Function(self._tick()), -1
        if computes(func):
            number = len(self._functions)
            self._functions.append(called)
        began = time.perf_counter()
        output = func(*args, **kwargs)
        called.seconds = time.perf_counter() - began
        results = tensors_in(pytree.tree_leaves(output))
        name = getattr(func, "__name__", "")
        if not results and name not in _READ_VALUES and name != "__setitem__":
            return output
        now = self._tick()
        # The generator of a tree is a generator no more once it is read, so only plain containers are looked into.
        arguments = tensors_in(pytree.tree_leaves((args, kwargs)))
        if name in _ONLY_SHAPES:
            return output
        depends = False
        for tensor in arguments:
            depends = self._use(tensor, now) or depends
            called.takes_parameter = called.takes_parameter or id(tensor) in self._parameters
        called.depends = depends
        if name == "__setitem__":
            results = arguments[:1]
        for leaf, tensor in enumerate(results):
            if depends:
                self._make(tensor, now, (number, leaf))
            else:
                self._kept.append(tensor)
        return output

    def _use(self, tensor: torch.Tensor, now: int) -> bool:
        """Note that a tensor was used; return whether it depends on a parameter."""
        key = id(tensor)
        if key in self._parameters:
            if now != AT_THE_END:
                self._parameter_uses[self._parameters[key]].append(now)
            return True
        if key in self._buffers and now != AT_THE_END:
            self._buffer_uses[self._buffers[key]].append(now)
        made = self._made.get(key)
        if made is not None:
            made.last = max(made.last, now)
        return made is not None

    def _make(self, tensor: torch.Tensor, now: int, origin: tuple[int, int] = (-1, 0)) -> None:
        key = id(tensor)
        if key not in self._made and key not in self._parameters:
            self._made[key] = Made(tensor, now, now, origin)


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype


def _is_opaque(module: nn.Module) -> bool:
    """Whether torch functions inside a module cannot be seen."""
    return isinstance(module, torch.jit.ScriptModule)
