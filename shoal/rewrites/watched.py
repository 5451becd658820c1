"""What a module's code may branch on, or change, beside the tensors that it is given.

That is: the attributes of modules, what lies in these (lists, dictionaries, settings that several modules share), and the random
streams, torch's, Python's, NumPy's and those of the modules themselves. A graph stands for code only while all this stays.
"""

from __future__ import annotations

import collections
import copy
import operator
import random
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

PLAIN = (bool, int, float, str, type(None))
HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip

_NOT_ENTERED = (
    nn.Module, torch.Tensor, type, types.ModuleType, types.FunctionType, types.MethodType, types.BuiltinFunctionType, torch.dtype,
)  # fmt: skip
_LOOKED_UP = frozenset({*HOOKS, "_parameters", "_buffers", "forward"})
"""What a graph finds at each call, or the guard looks at by itself."""
_DEEPEST, _MOST_ENTRIES = 4, 500
_PLAINLY_EMPTY = (dict, collections.OrderedDict, list, set, frozenset, tuple)
"""Of these types a container is false where it holds nothing, and nowhere else."""


def same(a: Any, b: Any) -> bool:
    """Whether two values are one, or equal where they are plain."""
    return a is b or (type(a) is type(b) and isinstance(a, PLAIN) and a == b)


def _entries(holder: Any) -> Any:
    """What lies in a list, a dictionary, a set or an object, to be compared entry by entry; None if not known."""
    if isinstance(holder, (list, tuple, set, frozenset, dict)):
        return holder
    # Objects with slots alone, and those of C, keep to themselves what they hold.
    return getattr(holder, "__dict__", None)


def _same_entries(now: Any, before: Any) -> bool:
    if len(now) != len(before):
        return False
    if isinstance(now, dict):
        if all(map(operator.is_, now, before)) and all(map(operator.is_, now.values(), before.values())):
            return True
        return all(a is b and same(now[a], before[b]) for a, b in zip(now, before, strict=True))
    return all(map(operator.is_, now, before)) or all(map(same, now, before))


def _stream(value: Any) -> Any:
    """The state of a random stream, None where it is none."""
    if isinstance(value, torch.Generator):
        return bytes(value.get_state().numpy())
    if isinstance(value, random.Random):
        return value.getstate()
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None and isinstance(value, numpy_random.Generator):
        return copy.deepcopy(value.bit_generator.state)
    return None


def _set_stream(value: Any, state: Any) -> None:
    if isinstance(value, torch.Generator):
        value.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))
    elif isinstance(value, random.Random):
        value.setstate(state)
    else:
        value.bit_generator.state = state


def _within(values: Any, deepest: int, seen: set[int]) -> Iterator[Any]:
    """The containers, objects and random streams that are reached from some values, each once."""
    for value in values:
        if isinstance(value, (*PLAIN, *_NOT_ENTERED)) or id(value) in seen:
            continue
        seen.add(id(value))
        if _stream(value) is not None:
            yield value
            continue
        entries = _entries(value)
        if entries is None or len(entries) > _MOST_ENTRIES:
            continue
        yield value
        if deepest:
            yield from _within(list(entries.values() if isinstance(entries, dict) else entries), deepest - 1, seen)


def _reached(modules: Sequence[nn.Module], but: frozenset[str]) -> list[Any]:
    """What is reached from the attributes of modules, but for these."""
    seen: set[int] = set()
    return [
        held
        for module in modules
        for held in _within([v for k, v in vars(module).items() if k not in but], _DEEPEST, seen)
    ]


class Held:
    """All of it as it is now: to see whether running the code has changed anything, and to put it back."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._attributes = [(vars(module), dict(vars(module))) for module in modules]
        reached = _reached(modules, frozenset())
        self._streams = [(value, state) for value in reached if (state := _stream(value)) is not None]
        streams = {id(value) for value, _ in self._streams}
        self._contents = [
            (entries, copy.copy(entries)) for value in reached if id(value) not in streams for entries in (_entries(value),)
        ]
        self._global = _global_streams()

    def changed(self) -> bool:
        """Whether anything is not what it was."""
        for now, before in self._attributes:
            if now.keys() != before.keys() or not all(same(now[k], v) for k, v in before.items() if k not in HOOKS):
                return True
        if any(not _same_entries(now, before) for now, before in self._contents):
            return True
        return _global_streams() != self._global or any(_stream(value) != state for value, state in self._streams)

    def put_back(self) -> None:
        for now, before in self._attributes:
            _fill(now, before)
        for now, before in self._contents:
            if isinstance(now, (list, dict, set)):
                _fill(now, before)
        for value, state in self._streams:
            _set_stream(value, state)
        python, of_torch, numpy = self._global
        random.setstate(python)
        torch.set_rng_state(torch.frombuffer(bytearray(of_torch), dtype=torch.uint8))
        if numpy is not None:
            kind, keys, *rest = numpy
            sys.modules["numpy.random"].set_state((kind, sys.modules["numpy"].frombuffer(keys, dtype="uint32"), *rest))


def _fill(now: Any, before: Any) -> None:
    if isinstance(now, list):
        now[:] = before
    else:
        now.clear()
        now.update(before)


def _global_streams() -> tuple[Any, ...]:
    numpy_random = sys.modules.get("numpy.random")
    numpy = None
    if numpy_random is not None:
        kind, keys, *rest = numpy_random.get_state()
        numpy = (kind, keys.tobytes(), *rest)
    return random.getstate(), bytes(torch.get_rng_state().numpy()), numpy


class Guard:
    """Whether a module and all in it are as they were traced: attributes and what lies in them, hooks, forwards of layers."""

    def __init__(self, modules: Sequence[nn.Module], everything: Sequence[nn.Module] = ()) -> None:
        """``modules``: whose code was traced; ``everything``: these, and the layers that they call."""
        traced = set(map(id, modules))
        layers = [module for module in everything if id(module) not in traced]
        self._attributes = [(vars(m), _Known(vars(m), object)) for m in modules]
        # Layers run as they are, but what they are set to (the chance of a dropout, say) may have decided on a rewrite.
        self._attributes += [(vars(m), _Known(vars(m), PLAIN)) for m in layers]
        reached = [_entries(value) for value in _reached(modules, _LOOKED_UP) if _stream(value) is None]
        hooks = [getattr(module, name) for module in everything for name in HOOKS]
        # Most containers of a module are empty, and that takes least to see.
        self._empty = [held for held in hooks if not held]
        self._empty += [held for held in reached if type(held) in _PLAINLY_EMPTY and not held]
        self._contents = [(held, copy.copy(held)) for held in reached if held or type(held) not in _PLAINLY_EMPTY]
        self._forwards = [(vars(m), vars(m).get("forward")) for m in layers]

    def holds(self) -> bool:
        if any(self._empty) or any([own.get("forward") is not known for own, known in self._forwards]):
            return False
        for attributes, known in self._attributes:
            if not known.holds(attributes):
                return False
        return all([_same_entries(now, before) for now, before in self._contents])


class _Known:
    """Attributes by name, as they were. Nearly always each is the very object that it was: that is seen without Python's code."""

    def __init__(self, attributes: Mapping[str, Any], kinds: Any) -> None:
        found = {name: v for name, v in attributes.items() if name not in _LOOKED_UP and isinstance(v, kinds)}
        self._names, self._values = tuple(found), tuple(found.values())
        # Of a single name it would give no tuple.
        self._get = operator.itemgetter(*self._names) if len(self._names) > 1 else None

    def holds(self, attributes: Mapping[str, Any]) -> bool:
        try:
            found = tuple(attributes[name] for name in self._names) if self._get is None else self._get(attributes)
        except KeyError:
            return False
        return all(map(operator.is_, found, self._values)) or all(map(same, found, self._values))
