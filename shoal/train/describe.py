"""Turning a model and its optimizer into a ParameterTable, and giving the model its place in the arena."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from shoal.comm.parts import take
from shoal.comm.store import Store
from shoal.comm.table import FROZEN, ParameterTable, StateSpec, TensorSpec, align
from shoal.errors import JobError
from shoal.ps.lbfgs import STATE_KEYS as LBFGS_KEYS
from shoal.ps.lbfgs import BatchLBFGS

ELEMENTWISE = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad, torch.optim.RMSprop)
_FUSED = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad)


def make_optimizer(factory: Any, model: nn.Module) -> torch.optim.Optimizer:
    """Call the job's optimizer function with the model's parameters, or the model where it asks for that."""
    if factory == "lbfgs":
        return BatchLBFGS(model.parameters())
    wants_model = False
    try:
        first = next(iter(inspect.signature(factory).parameters.values()), None)
        wants_model = first is not None and first.name == "model"
    except (TypeError, ValueError):
        pass
    optimizer = factory(model) if wants_model else factory(model.parameters())
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise JobError(f"optimizer made a {type(optimizer).__name__}; it must return a torch.optim.Optimizer.")
    if isinstance(optimizer, (torch.optim.LBFGS, torch.optim.SparseAdam)):
        raise JobError(
            f"{type(optimizer).__name__} is not built yet; take SGD, Adam, AdamW, Adagrad or another torch optimizer."
        )
    return optimizer


def hyperparameters(group: dict[str, Any]) -> dict[str, Any]:
    """An optimizer group without its parameters."""
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}


def sliced_group(kind: type, group: dict[str, Any], params: Iterable[torch.Tensor]) -> dict[str, Any]:
    """The same group over other tensors, with the fused kernel where the user did not choose otherwise."""
    new: dict[str, Any] = {**hyperparameters(group), "params": list(params)}
    if kind is torch.optim.Adagrad and any(p.device.type != "cpu" for p in new["params"]):
        # torch has this one for processors only.
        return new
    undecided = new.get("fused") is None and not new.get("foreach") and not new.get("differentiable")
    if kind in _FUSED and undecided and not isinstance(new.get("lr"), torch.Tensor):
        new["fused"] = True
    return new


def optimizer_like(like: torch.optim.Optimizer, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """An optimizer of the same elementwise type over other groups.

    The constructor gets the defaults again: not all that it does follows from the groups (Adagrad's first sum).
    """
    kind: Any = type(like)
    accepted = inspect.signature(kind.__init__).parameters
    defaults = {key: value for key, value in like.defaults.items() if key in accepted}
    made: torch.optim.Optimizer = kind(groups, **defaults)
    return made


def describe(model: nn.Module, optimizer: torch.optim.Optimizer) -> ParameterTable:
    """Return the table of a model and its optimizer; JobError where there is nothing to train."""
    groups: dict[int, int] = {}
    for index, group in enumerate(optimizer.param_groups):
        groups.update({id(p): index for p in group["params"] if p.requires_grad})
    named = _by_identity(model.named_parameters(remove_duplicate=False))
    if not named:
        raise JobError("The model has no parameters, so there is nothing to train.")
    strangers = set(groups) - {id(tensor) for tensor, _ in named}
    if strangers:
        raise JobError(
            "The optimizer holds parameters that are not the model's; build it from the parameters that it is given."
        )
    if not groups:
        raise JobError("The optimizer has no parameter with requires_grad, so there is nothing to train.")
    ranks = {id(t): k for k, (t, _) in enumerate(named)}
    named.sort(key=lambda e: (id(e[0]) not in groups, str(e[0].dtype), groups.get(id(e[0]), 0), ranks[id(e[0])]))
    parameters, trained_bytes, weight_bytes = [], 0, 0
    for tensor, names in named:
        group_index = groups.get(id(tensor), FROZEN)
        parameters.append(TensorSpec(names, tuple(tensor.shape), tensor.dtype, weight_bytes, group_index))
        weight_bytes = align(weight_bytes + parameters[-1].nbytes)
        if group_index != FROZEN:
            trained_bytes = weight_bytes
    keys = tuple(model.state_dict().keys())
    buffers, buffer_bytes = [], 0
    for tensor, names in _by_identity(model.named_buffers(remove_duplicate=False)):
        persistent = any(name in keys for name in names)
        buffers.append(TensorSpec(names, tuple(tensor.shape), tensor.dtype, buffer_bytes, persistent=persistent))
        buffer_bytes = align(buffer_bytes + buffers[-1].nbytes)
    table = ParameterTable(
        parameters=tuple(parameters),
        buffers=tuple(buffers),
        trained_bytes=trained_bytes,
        weight_bytes=weight_bytes,
        buffer_bytes=buffer_bytes,
        elementwise=type(optimizer) in ELEMENTWISE,
        splittable=type(optimizer).__module__.startswith("torch.optim"),
        model_keys=keys,
    )
    return _with_state(table, model, optimizer)


def _by_identity(named: Iterable[tuple[str, Any]]) -> list[tuple[Any, tuple[str, ...]]]:
    """Gather tensors that are known by several names: [(tensor, names)], in order of first appearance."""
    found: dict[int, tuple[Any, list[str]]] = {}
    for name, tensor in named:
        if tensor is not None:
            found.setdefault(id(tensor), (tensor, []))[1].append(name)
    return [(tensor, tuple(names)) for tensor, names in found.values()]


def trained_parameters(model: nn.Module, table: ParameterTable) -> list[nn.Parameter]:
    """The model's own parameter objects in the table's order, the trained ones only."""
    by_name = dict(model.named_parameters(remove_duplicate=False))
    return [by_name[spec.name] for spec in table.trained]


def _with_state(table: ParameterTable, model: nn.Module, optimizer: torch.optim.Optimizer) -> ParameterTable:
    """Find out which state the optimizer keeps by letting a copy of it take one step."""
    import dataclasses

    if isinstance(optimizer, BatchLBFGS):
        return dataclasses.replace(table, elementwise=True, state_keys=LBFGS_KEYS)
    if table.elementwise:
        # Two elements tell a per-element tensor from a 0-dim one.
        probe = torch.zeros(2, dtype=table.parameters[0].dtype, requires_grad=True)
        state_keys: dict[str, None] = {}
        scalars: dict[str, torch.dtype] = {}
        for group in optimizer.param_groups:
            copied = optimizer_like(optimizer, [sliced_group(type(optimizer), group, [probe])])
            probe.grad = torch.zeros_like(probe)
            copied.step()
            for key, value in copied.state[probe].items():
                if isinstance(value, torch.Tensor) and value.shape == probe.shape:
                    state_keys[key] = None
                elif isinstance(value, torch.Tensor):
                    scalars[key] = value.dtype
        dtype = next(iter(scalars.values()), torch.float32)
        return dataclasses.replace(table, state_keys=tuple(state_keys), scalar_keys=tuple(scalars), scalar_dtype=dtype)
    twin_model, twin = copy.deepcopy((model, optimizer))
    twins = trained_parameters(twin_model, table)
    for parameter in twins:
        parameter.grad = torch.full_like(parameter, 1e-3)
    twin.step()
    states, at = [], 0
    for index, parameter in enumerate(twins):
        for key, value in twin.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor):
                states.append(StateSpec(index, key, tuple(value.shape), value.dtype, at))
                at = align(at + states[-1].nbytes)
    return dataclasses.replace(table, states=tuple(states), state_bytes=at)


def fill(store: Store, weights: Mapping[str, torch.Tensor], buffers: Mapping[str, torch.Tensor]) -> None:
    """Write weights and buffers, by the model's own names, into the arena."""
    with torch.no_grad():
        for index, spec in enumerate(store.table.parameters):
            store.weights[index].copy_(take(weights[spec.name], spec.regions))
        for index, spec in enumerate(store.table.buffers):
            for parity in (0, 1):
                store.buffer(parity, index).copy_(buffers[spec.name])


def give_parameters(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], table: ParameterTable) -> None:
    """Let the user's optimizer hold the parts of a table instead of the model's own parameters."""
    for index, group in enumerate(optimizer.param_groups):
        group["params"] = [p for p, spec in zip(parameters, table.trained, strict=True) if spec.group == index]


def move_buffers(model: nn.Module, device: torch.device) -> None:
    """Bring a model's buffers to a device; buffers that are one stay one."""
    moved: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device.type != device.type:
                module._buffers[name] = moved.setdefault(id(buffer), buffer.to(device))


def bind(model: nn.Module, store: Store) -> None:
    """Make the model's parameters views of the arena, so that all workers read the one copy of the weights."""
    by_name = dict(model.named_parameters(remove_duplicate=False))
    for index, spec in enumerate(store.table.parameters):
        by_name[spec.name].data = store.weights[index]
    move_buffers(model, store.arena.device)
