"""Training and serving without torch._dynamo, until somebody needs it.

Much of torch is written so that torch.compile can meet it: an optimizer, an operator on the meta device or a user's own
operator imports torch._dynamo when it is first called, to tell it to keep off. The import takes nearly as long as torch's own.
Where nobody has imported it, nothing can be compiled, so there is nothing to be told, and everything does the same without.

There are two ways in which torch does so. ``torch._disable_dynamo`` wraps a function and keeps what torch._dynamo makes of
it in an attribute of the function: here the function itself is kept there instead. ``step`` of torch's own optimizers sets
the gradient mode between two graph breaks, which mean nothing outside of a graph: here it sets the gradient mode.

Whoever imports torch._dynamo, by ``torch.compile`` or otherwise, finds all of it as torch made it: a finder takes it back just
before. Where torch is written in another way than is known here, nothing is changed, and it imports what it wants.
"""

from __future__ import annotations

import functools
import gc
import importlib.abc
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.machinery import ModuleSpec
from types import CodeType, FunctionType, ModuleType
from typing import Any

NAME = "torch._dynamo"
_KEPT = "__dynamo_disable"
_STEP_NAMES = {
    NAME, "cast", "Optimizer", "is_grad_enabled", "set_grad_enabled", "defaults", "_dynamo", "graph_break",
}  # fmt: skip
"""What the code of an optimizer's ``step`` speaks of, where it is the code that ``_light_step`` stands for."""


class LateDynamo(importlib.abc.MetaPathFinder):
    """What is changed in this process; it finds no module, but hears of torch._dynamo's import in time."""

    def __init__(self) -> None:
        import torch

        self.active = NAME not in sys.modules
        self._functions: list[FunctionType] = []
        self._disable = getattr(torch, "_disable_dynamo", None)
        wrapped = _code_of(self._disable)
        if not self.active or wrapped is None:
            return
        sys.meta_path.insert(0, self)
        for wrapper in gc.get_referrers(wrapped):
            self._keep(wrapper)
        torch._disable_dynamo = self._disable_from_now_on  # type: ignore[assignment]
        code = _code_of(getattr(sys.modules[torch.optim.Optimizer.__module__], "_use_grad_for_differentiable", None))
        if code is None or set(code.co_names) != _STEP_NAMES:
            return
        for kind in _classes(torch.optim.Optimizer):
            step = vars(kind).get("step")
            if isinstance(step, FunctionType) and step.__code__ is code:
                kind.step = self._light_step(step)  # type: ignore[attr-defined]

    def _keep(self, wrapper: Any) -> None:
        """Let a wrapper call its function as it is."""
        function = getattr(wrapper, "__wrapped__", None)
        if isinstance(wrapper, FunctionType) and isinstance(function, FunctionType) and not hasattr(function, _KEPT):
            setattr(function, _KEPT, function)
            self._functions.append(function)

    def _disable_from_now_on(self, fn: Any = None, *args: Any, **kwargs: Any) -> Any:
        """``torch._disable_dynamo`` for what is wrapped later, such as the operators that a user's modules define."""
        assert self._disable is not None
        if fn is None:
            return functools.partial(self._disable_from_now_on, *args, **kwargs)
        wrapper = self._disable(fn, *args, **kwargs)
        if self.active:
            self._keep(wrapper)
        return wrapper

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Nothing; but before torch._dynamo is imported, all is made as it was."""
        if fullname == NAME:
            self.take_back()
        return None

    def take_back(self) -> None:
        """Let everything do what torch made it do, for good."""
        import torch

        if self.active and torch._disable_dynamo == self._disable_from_now_on:
            torch._disable_dynamo = self._disable  # type: ignore[assignment]
        self.active = False
        while self._functions:
            delattr(self._functions.pop(), _KEPT)

    def _light_step(self, theirs: Callable[..., Any]) -> Callable[..., Any]:
        """An optimizer's ``step`` that does what torch's does where nothing is compiled."""
        import torch

        bare: Callable[..., Any] = theirs.__wrapped__  # type: ignore[attr-defined]

        @functools.wraps(bare)
        def step(self_: Any, *args: Any, **kwargs: Any) -> Any:
            if not self.active:
                return theirs(self_, *args, **kwargs)
            before = torch.is_grad_enabled()
            try:
                torch.set_grad_enabled(self_.defaults["differentiable"])
                return bare(self_, *args, **kwargs)
            finally:
                torch.set_grad_enabled(before)

        return step


def _classes(kind: type[Any]) -> Iterator[type[Any]]:
    yield kind
    for other in type.__subclasses__(kind):
        yield from _classes(other)


def _code_of(decorator: Any) -> CodeType | None:
    """The code of what a decorator of torch's makes of a function; None where it is no such decorator."""

    def probe() -> None: ...

    try:
        made = decorator(probe)
    except TypeError:
        return None
    return made.__code__ if isinstance(made, FunctionType) and made is not probe else None
