"""Letting a process compute with rewritten graphs while the module stays the author's.

``install`` puts a function in the place of ``forward`` on the instance of the model. When it is first called, it traces the
code for this way of calling it, applies the rewrites, and from then on runs the graph; what cannot be traced runs as its author
wrote it, and its children are tried one by one. Nothing is copied: the graph calls the author's own modules and uses their
parameters and buffers, so names, state_dict, hooks on layers and gradients are what they were.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from shoal.rewrites import registry
from shoal.rewrites.trace import Call, Region, Signature, is_leaf, is_plain, trace

_MOST_WAYS = 8


@dataclass
class Applied:
    """What was rewritten: name -> number of places, counted once for each way of calling a module that was seen."""

    places: dict[str, int] = field(default_factory=dict)

    def count(self, name: str, places: int) -> None:
        if places:
            self.places[name] = max(places, self.places.get(name, 0))


class Installed:
    """The rewrites of one model in this process; ``remove`` gives the author's code back."""

    def __init__(self, names: Iterable[str], frozen: bool = False) -> None:
        self.names = registry.in_order(names)
        self.frozen = frozen
        self._forwards: dict[nn.Module, Callable[..., Any]] = {}
        self.applied = Applied()
        self._exchanges = [
            registry.all_rewrites()[name].exchange(functools.partial(self.applied.count, name, 1))
            for name in self.names
            if registry.exchanges(name)
        ]

    def put(self, module: nn.Module) -> None:
        """Take a module over, where it is one that can be."""
        if is_leaf(module) or "forward" in vars(module):
            return
        self._forwards[module] = forward = _Forward(module, self)
        vars(module)["forward"] = forward

    def put_leaves(self, model: nn.Module) -> None:
        """Replace what single layers do, where a rewrite says so and nobody has changed them."""
        for name in self.names:
            one = registry.all_rewrites()[name]
            layers = [m for m in model.modules() if is_plain(m)] if hasattr(one, "replace_leaf") else []
            for layer in layers:
                forward = one.replace_leaf(layer, functools.partial(self.applied.count, name, 1))
                if forward is not None:
                    self._forwards[layer] = vars(layer)["forward"] = forward

    def give_up(self, module: nn.Module) -> None:
        """Give one module back for good."""
        del self._forwards[module]
        vars(module).pop("forward", None)

    def remove(self) -> None:
        """Give all modules back; ``resume`` takes them over again, with what was traced."""
        for exchange in self._exchanges:
            exchange.end()
        for module in self._forwards:
            vars(module).pop("forward", None)

    def resume(self) -> None:
        """Take over what was given back, and how this process computes."""
        for exchange in self._exchanges:
            exchange.begin()
        for module, forward in self._forwards.items():
            vars(module)["forward"] = forward

    def rewrite(self, module: nn.Module, call: Call) -> _Way | None:
        """The rewritten graph of a module, None where it cannot be traced; without a function where nothing applies."""
        own = vars(module).pop("forward")
        try:
            region = trace(module, call)
            if region is None:
                return None
            region.frozen = self.frozen
            places = 0
            for name in self.names:
                one = registry.all_rewrites()[name]
                if not hasattr(one, "rewrite"):
                    continue
                if one.TRAINS if region.training else one.INFERS:
                    found = int(one.rewrite(region))
                    self.applied.count(name, found)
                    places += found
            return _Way(region, region.compile() if places else None)
        finally:
            vars(module)["forward"] = own


@dataclass(frozen=True)
class _Way:
    """A graph for one way of calling a module; ``function`` is None where no rewrite changed it."""

    region: Region
    function: Callable[..., Any] | None


class _Forward:
    """What stands in the place of a module's forward."""

    def __init__(self, module: nn.Module, installed: Installed) -> None:
        self._module = module
        self._installed = installed
        self._signature = Signature(module)
        self._ways: dict[Any, _Way | None] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self._module
        taken = self._signature.take_apart(args, kwargs) if self._signature.simple else None
        if taken is not None:
            call, tensors = taken
            key = (module.training, torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), call)
            if key not in self._ways and len(self._ways) < _MOST_WAYS:
                self._ways[key] = self._installed.rewrite(module, call)
            way = self._ways.get(key)
            if way is not None and way.function is not None and way.region.guard.holds():
                return way.function(*tensors)
            if way is None and len(self._ways) == 1:
                self._descend()
        elif not self._ways:
            self._descend()
        return type(module).forward(module, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Forward:
        installed = Installed(self._installed.names, self._installed.frozen)
        module = copy.deepcopy(self._module, memo)
        installed._forwards[module] = made = _Forward(module, installed)
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        # A model that is pickled, say by the author's step, is the author's.
        return functools.partial, (type(self._module).forward, self._module)

    def _descend(self) -> None:
        """This module cannot be traced: try its children instead."""
        self._installed.give_up(self._module)
        for child in _children(self._module):
            self._installed.put(child)


def _children(module: nn.Module) -> Iterable[nn.Module]:
    """The nearest modules below that are called: lists and dictionaries of modules are not."""
    for child in module.children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from _children(child)
        else:
            yield child


def install(model: nn.Module, names: Iterable[str], frozen: bool = False) -> Installed:
    """Let a model compute with these rewrites, from its next call on; ``frozen``: its weights do not change any more."""
    installed = Installed(names, frozen)
    if not all(map(registry.exchanges, installed.names)):
        installed.put_leaves(model)
        installed.put(model)
    installed.resume()
    return installed
