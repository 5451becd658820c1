"""Reading graphs: the same operation has several spellings, as a module, a function and a method."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from shoal.rewrites.trace import Region, is_plain


def module_of(region: Region, node: Any, kind: type | tuple[type, ...]) -> nn.Module | None:
    """The module that a node calls with one tensor, where it is exactly of this type and nobody has changed it."""
    if not isinstance(node, fx.Node) or node.op != "call_module" or len(node.args) != 1 or node.kwargs:
        return None
    module = region.module(node)
    kinds = kind if isinstance(kind, tuple) else (kind,)
    return module if type(module) in kinds and is_plain(module) else None


def calls(node: Any, functions: tuple[Any, ...] = (), methods: tuple[str, ...] = ()) -> bool:
    """Whether a node calls one of these functions or methods."""
    if not isinstance(node, fx.Node):
        return False
    if node.op == "call_function":
        return node.target in functions
    return node.op == "call_method" and node.target in methods


def argument(node: Any, place: int, name: str, default: Any = None) -> Any:
    """An argument of a call, given by place or by name."""
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def only_user(node: Any) -> Any:
    """The one node that uses another's result; None where there are none or several."""
    users = list(node.users)
    return users[0] if len(users) == 1 else None


def is_relu(region: Region, node: Any) -> bool:
    """Whether it is a ReLU, in place or not; nobody sees the difference where its input has no other user."""
    if module_of(region, node, nn.ReLU) is not None:
        return True
    if not calls(node, (F.relu, F.relu_, torch.relu, torch.relu_), ("relu", "relu_")):
        return False
    return len(node.args) == 1 and set(node.kwargs) <= {"inplace"}


def is_batch_size(node: Any, of: Any) -> bool:
    """Whether it is ``x.size(0)``, ``x.shape[0]`` or ``len(x)``-like of a tensor."""
    if calls(node, (), ("size",)):
        return node.args[0] is of and tuple(node.args[1:]) == (0,)
    if calls(node, (operator.getitem,)):
        shape, index = node.args
        if index != 0 or not isinstance(shape, fx.Node):
            return False
        if calls(shape, (), ("size",)):
            return tuple(shape.args) == (of,)
        return calls(shape, (getattr,)) and tuple(shape.args) == (of, "shape")
    return False


def flattened(node: Any) -> Any:
    """What a node flattens behind its first dim; None where it does something else."""
    if not isinstance(node, fx.Node):
        return None
    if calls(node, (torch.flatten,), ("flatten",)):
        start, end = argument(node, 1, "start_dim", 0), argument(node, 2, "end_dim", -1)
        return node.args[0] if (start, end) == (1, -1) else None 
    if calls(node, (torch.reshape,), ("view", "reshape")):
        source, shape = node.args[0], node.args[1:]
        if len(shape) == 1 and isinstance(shape[0], (tuple, list)):
            shape = tuple(shape[0])
        if isinstance(source, fx.Node) and len(shape) == 2 and shape[1] == -1 and is_batch_size(shape[0], source):
            return source
    return None


def replace(node: Any, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> fx.Node:
    """Put a call of a function in the place of a node."""
    graph = node.graph
    with graph.inserting_before(node):
        made = graph.call_function(function, args, kwargs or {})
    node.replace_all_uses_with(made)
    graph.erase_node(node)
    return made


def attribute(region: Region, module_node: Any, name: str) -> fx.Node | None:
    """A node for a parameter or buffer of the module that another node calls; None where it has none."""
    if getattr(region.module(module_node), name, None) is None:
        return None
    with region.graph.inserting_before(module_node):
        return region.graph.get_attr(f"{module_node.target}.{name}")
