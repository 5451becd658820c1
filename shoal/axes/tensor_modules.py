"""Modules whose parameters are split, without their code being touched.

A module keeps its class (a subclass of the same name), its forward, and the names of its parameters; ``module.weight``
is the worker's local tensor as a ``Cut`` of the whole, so that ``F.linear(x, module.weight)``, here or anywhere else,
computes the worker's part.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from shoal.axes.tensor_cut import Cut, Team, plain, ranges_of
from shoal.axes.tensor_layout import Split, Style, TensorLayout
from shoal.comm.parts import take_ranges


class Swapped:
    """Gives modules' parameters to their code as split tensors; ``restore`` undoes it."""

    def __init__(self, team: Team) -> None:
        self.team = team
        self._classes: list[tuple[nn.Module, type[nn.Module]]] = []
        self._handles: list[Any] = []
        self._partial: list[nn.Module] = []

    def parameters(self, module: nn.Module, splits: tuple[Split, ...], origin: str = "") -> None:
        """Split some of a module's own parameters."""
        kind = type(module)
        names = {split.parameter: _as_cut(split, self.team, origin) for split in splits}
        # nn.Module's own lookup comes last, so a property of the class is found before the registered parameter.
        subclass = type(
            kind.__name__, (kind,), {**names, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
        )
        module.__class__ = subclass
        self._classes.append((module, kind))

    def style(self, model: nn.Module, path: str, style: Style) -> None:
        """Split a module as a layout says."""
        by_owner: dict[str, list[Split]] = {}
        for split in style.splits:
            inner, _, leaf = split.parameter.rpartition(".")
            by_owner.setdefault(inner, []).append(Split(leaf, split.dim, split.widths))
        module = model.get_submodule(path)
        if style.role == "experts":
            self.partial(module, style.splits)
            return
        for inner, splits in by_owner.items():
            self.parameters(module.get_submodule(inner), tuple(splits), path)
        if style.gather:
            self.hook(module.register_forward_hook(_gather_output))

    def partial(self, module: nn.Module, splits: tuple[Split, ...]) -> None:
        """Let a module's own code compute with a part of its weights, and add up what the team's parts give."""
        team, whole = self.team, module.forward

        def entering(value: Any) -> Any:
            value = plain(value)
            learns = isinstance(value, torch.Tensor) and value.is_floating_point()
            return team.enter(value) if learns else value

        def forward(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = pytree.tree_map(entering, (args, kwargs))
            if not team.rehearsal:
                return team.reduce([whole(*args, **kwargs)])
            parts, own = [], {split.parameter: module.get_parameter(split.parameter) for split in splits}
            try:
                for t in team.members:
                    for split in splits:
                        part = take_ranges(own[split.parameter], split.dim, ranges_of(split.widths, t))
                        module._parameters[split.parameter] = part  # type: ignore[assignment]
                    parts.append(whole(*args, **kwargs))
            finally:
                module._parameters.update(own)
            return team.reduce(parts)

        module.forward = forward  # type: ignore[method-assign]
        self._partial.append(module)

    def hook(self, handle: Any) -> None:
        self._handles.append(handle)

    def restore(self) -> None:
        for module, kind in reversed(self._classes):
            module.__class__ = kind
        for handle in self._handles:
            handle.remove()
        for module in self._partial:
            del module.forward
        self._classes.clear()
        self._handles.clear()
        self._partial.clear()


def _as_cut(split: Split, team: Team, origin: str) -> property:
    name, origins = split.parameter, frozenset((origin,))
    made: list[Any] = [None, None]

    def cut(self: nn.Module) -> Any:
        parameter = self._parameters[name]
        if parameter is None:
            return None
        if team.rehearsal:
            parts = tuple(take_ranges(parameter, split.dim, ranges_of(split.widths, t)) for t in team.members)
            return Cut(parts, split.dim, split.widths, team, origins)
        # The parts of a cut outlive one use: weights are read from one place from first to last.
        if made[0] is not parameter:
            made[:] = parameter, Cut((parameter,), split.dim, split.widths, team)
        return made[1]

    return property(cut)


def _gather_output(module: nn.Module, args: Any, output: Any) -> Any:
    return plain(output)


def gather_all_but_classes(module: nn.Module, args: Any, output: Any) -> Any:
    """A model's output as plain tensors, but for logits that are split by class."""
    def whole(value: Any) -> Any:
        by_class = isinstance(value, Cut) and value.split_dim == value.ndim - 1
        return value if by_class or not isinstance(value, Cut) else value.whole()

    return pytree.tree_map(whole, output)


def localise(model: nn.Module, layout: TensorLayout, rank: int) -> None:
    """Replace each split parameter by this worker's part of it, on whatever device it is; tied parameters stay tied."""
    made: dict[int, nn.Parameter] = {}
    for path, style in layout.styles.items():
        module = _find(model, path, style)
        if module is None:
            continue
        for split in style.splits:
            inner, _, leaf = split.parameter.rpartition(".")
            owner = module.get_submodule(inner)
            whole = owner._parameters[leaf]
            assert whole is not None
            if id(whole) not in made:
                with torch.no_grad():
                    part = take_ranges(whole.detach(), split.dim, ranges_of(split.widths, rank)).clone()
                made[id(whole)] = nn.Parameter(part, requires_grad=whole.requires_grad)
                made[id(made[id(whole)])] = made[id(whole)]
            owner._parameters[leaf] = made[id(whole)]


def _find(model: nn.Module, path: str, style: Style) -> nn.Module | None:
    """The module of that path, or None where this part of the model does not have it, or another stage has its
    weights."""
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return None
    for split in style.splits:
        inner, _, leaf = split.parameter.rpartition(".")
        if leaf not in module.get_submodule(inner)._parameters:
            return None
    return module


def swap(model: nn.Module, layout: TensorLayout, team: Team) -> None:
    swapped = Swapped(team)
    styles: Mapping[str, Style] = layout.styles
    for path, style in styles.items():
        if _find(model, path, style) is not None:
            swapped.style(model, path, style)
    model.register_forward_hook(gather_all_but_classes if layout.loss_parallel else _gather_output)
