"""Turning a module's forward into a graph, or saying no where the graph would not do everything that the code does.

torch.fx runs the code once on stand-ins for the tensors. What the code does beside computing on them would be done then and
never again, so a graph is made only where nothing of that kind is seen: no attribute of a module changes, no random stream
moves, no container has hooks, and every branch hangs on values that are compared at each call (``Guard``). Nor does a graph know
of what the code has set around its operations (no gradients, autocast, checkpoints), or of gradients that the author has written.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from shoal.rewrites.watched import HOOKS, PLAIN, Guard, Held


@dataclass(frozen=True)
class Call:
    """How a module was called: the names of the arguments that were tensors, and the values of the others.

    The order of ``tensors`` is that of the signature.
    """

    tensors: tuple[str, ...]
    constants: tuple[tuple[str, Any], ...]


class Signature:
    """Takes calls of a module apart."""

    def __init__(self, module: nn.Module) -> None:
        self._signature = inspect.signature(type(module).forward)
        parameters = list(self._signature.parameters.values())[1:]
        kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        self.simple = all(p.kind in kinds for p in parameters)
        self._names = tuple(p.name for p in parameters if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD)
        self._only = len(parameters) == 1

    def take_apart(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Call, tuple[torch.Tensor, ...]] | None:
        """(call, tensors); None where an argument is neither a tensor nor a plain value."""
        if self._only and len(args) == 1 and not kwargs and isinstance(args[0], torch.Tensor):
            return Call(self._names[:1], ()), tuple(args)
        try:
            bound = self._signature.bind(None, *args, **kwargs)
        except TypeError:
            # The author's own code says what is wrong.
            return None
        bound.apply_defaults()
        tensors: dict[str, torch.Tensor] = {}
        constants: list[tuple[str, Any]] = []
        for name, value in list(bound.arguments.items())[1:]:
            if isinstance(value, torch.Tensor):
                tensors[name] = value
            elif isinstance(value, PLAIN):
                constants.append((name, value))
            else:
                return None
        return Call(tuple(tensors), tuple(constants)), tuple(tensors.values())


class _Tracer(fx.Tracer):
    def __init__(self, call: Call) -> None:
        super().__init__(autowrap_modules=(math,))
        # A buffer that were taken as it is would stay what it was.
        self.proxy_buffer_attributes = True
        self._call = call
        self._modes = modes()
        self.bent = False
        """An operation stood under another mode than the call itself."""

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        # The author's code may catch what is raised here.
        self.bent = self.bent or modes() != self._modes
        return super().create_node(*args, **kwargs)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        names, constants = self._call.tensors, dict(self._call.constants)
        inputs = [self.create_proxy("placeholder", name, (), {}) for name in names]

        def function(root: nn.Module, *given: Any) -> Any:
            return root_fn(root, **constants, **dict(zip(names, given, strict=True)))

        return function, [self.root, *inputs]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_leaf(m)


def modes() -> tuple[Any, ...]:
    """What is set around the operations that run now: gradients, autocast, hooks on what is saved for the backward pass."""
    autocast = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if autocast else None
    saved = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast, dtype, saved


class _OwnGradients:
    """Sees whether code calls an autograd Function: on stand-ins its forward runs like any code, and its backward is lost."""

    def __init__(self) -> None:
        self.seen = False

    def _look(self, frame: Any, event: str, called: Any) -> None:
        if event == "c_call" and getattr(called, "__name__", None) == "apply":
            own = getattr(called, "__self__", None)
            self.seen = self.seen or (isinstance(own, type) and issubclass(own, torch.autograd.Function))

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        before = sys.getprofile()
        sys.setprofile(self._look)
        try:
            yield
        finally:
            sys.setprofile(before)


def is_leaf(module: nn.Module) -> bool:
    """Whether a module is called as one: torch's own, but not the containers that run others in turn."""
    own = type(module).__module__.startswith(("torch.nn", "torch.ao", "torch.quantization"))
    return own and not isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict))


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody watches or changes what goes through a module."""
    return any(getattr(module, name, None) for name in HOOKS)


def is_plain(module: nn.Module) -> bool:
    """Whether nothing but its class decides what a module does: no hooks, no forward of the instance, no parametrization."""
    return not has_hooks(module) and "forward" not in vars(module) and not hasattr(module, "parametrizations")


@dataclass
class Region:
    """A traced module: the graph of its forward for one way of calling it.

    Attributes:
        graph: what rewrites change; its ``call_module`` and ``get_attr`` nodes name the author's own modules and tensors.
        training: whether it is for training.
        guard: whether the graph may still be used.
        frozen: weights do not change any more, so what is made of them alone may be kept.
    """

    root: nn.Module
    graph: fx.Graph
    training: bool
    guard: Guard
    frozen: bool = False

    def module(self, node: fx.Node) -> nn.Module:
        """The module that a ``call_module`` node calls."""
        return self.root.get_submodule(str(node.target))

    def compile(self) -> Callable[..., Any]:
        """The graph as a function of the tensors of a call."""
        self.graph.lint()
        made = fx.GraphModule(self.root, self.graph)
        # The code looks its weights up in the author's own module at each call: they may be exchanged, even for one call.
        return functools.partial(type(made).forward, self.root)


def trace(module: nn.Module, call: Call) -> Region | None:
    """The graph of a module's forward in its present mode, or None where a graph would not do all that the code does."""
    inner = [m for m in module.modules() if not is_leaf(m)]
    if any(has_hooks(m) or hasattr(m, "parametrizations") for m in inner if m is not module):
        return None
    if any("forward" in vars(m) for m in inner if m is not module) or type(module).__call__ is not nn.Module.__call__:
        return None
    everything = list(module.modules())
    held, tracer, own_gradients = Held(everything), _Tracer(call), _OwnGradients()
    try:
        with own_gradients.watched():
            graph = tracer.trace(module)
    except Exception:
        # Whatever goes wrong is left to the author's own code, which knows how to run.
        graph = None
    changed = held.changed()
    # Also the tensors that the code makes anew, which torch.fx would keep for ever.
    held.put_back()
    if graph is None or changed or tracer.bent or own_gradients.seen:
        return None
    if any(node.op == "get_attr" and not _belongs(module, str(node.target)) for node in graph.nodes):
        return None
    return Region(module, graph, module.training, Guard(inner, everything))


def _belongs(module: nn.Module, name: str) -> bool:
    """Whether a name is one of the module's own parameters, buffers or modules, not a tensor that tracing has made."""
    path, _, attribute = name.rpartition(".")
    try:
        owner = module.get_submodule(path)
    except AttributeError:
        return False
    return attribute in owner._parameters or attribute in owner._buffers or attribute in owner._modules
