"""The blocks of a model: the repeated parts that hold most of its parameters, such as a transformer's layers.

Sharding gathers one block at a time and recomputing keeps one block's activations at a time, so both need parts that
are many, alike in size, and called like any module. They are the elements of ``nn.ModuleList`` and ``nn.Sequential``.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn


def find_blocks(model: nn.Module, smallest_share: float = 0.0, shared: bool = True) -> dict[str, nn.Module]:
    """Return the blocks of a model by name, in the order of ``named_modules``; none where it has no repeated part.

    An element that holds more than half of all parameters and has blocks inside it is opened up instead of being taken
    whole. Elements without parameters or without a ``forward`` of their own are no blocks.

    Args:
        smallest_share: leave out those that hold less than this part of what the largest one holds.
        shared: also those that share a parameter with something outside of themselves.
    """
    found = dict(_walk(model, "", _held(model)))
    least = smallest_share * max((_held(block) for block in found.values()), default=0)
    owners = _owners(model)
    return {
        name: block for name, block in found.items() if _held(block) >= least and (shared or not _shares(block, owners))
    }


def _walk(module: nn.Module, prefix: str, total: int) -> Iterator[tuple[str, nn.Module]]:
    inside = isinstance(module, (nn.ModuleList, nn.Sequential))
    for child_name, child in module.named_children():
        name = f"{prefix}{child_name}"
        if not inside or not _callable(child):
            yield from _walk(child, f"{name}.", total)
        elif 2 * _held(child) > total and (opened := list(_walk(child, f"{name}.", total))):
            yield from opened
        elif _held(child):
            yield name, child


def _callable(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward and not isinstance(module, (nn.ModuleList, nn.ModuleDict))


def _held(module: nn.Module) -> int:
    """How many elements its parameters have, each counted once."""
    return sum(p.numel() for p in module.parameters())


def _owners(model: nn.Module) -> dict[int, int]:
    """How many modules hold each parameter (by identity) directly."""
    count: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                count[id(parameter)] = count.get(id(parameter), 0) + 1
    return count


def _shares(block: nn.Module, owners: dict[int, int]) -> bool:
    own = _owners(block)
    return any(count != owners[key] for key, count in own.items())
