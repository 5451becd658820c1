"""The sharded axis inside a pipeline: the workers that have the same stage hold its weights once together.

How a microbatch travels is the pipeline's business (``pipeline.py``), and how a weight is gathered and its gradient
scattered that of ``zero.py``. What is particular to both together:

* Each stage is sharded by itself, over the workers that have it. They go through the same microbatches in the same
  order, so their exchanges meet; one that has no samples in a microbatch computes a spare one all the same.
* Blocks are gathered and dropped for each microbatch, forward and backward, and their gradients reduced and dropped with
  each backward pass, into sums that stay in shards. Keeping a stage's weights and gradients whole from the first microbatch
  to the last, as torch's schedules do, moves less and holds twice a stage: more than is saved by sharding it.
* A stage is left by an exception, so that FSDP2 does not see its forward pass end. ``leave`` tells it.
* A backward pass is computed in one part, also with ZBV: gradients are scattered as soon as its inputs' are known, so
  those of the weights must be there.

What it moves: ``zero.moved`` of the stage's blocks, for each microbatch. What it holds: ``zero.held`` of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING

from shoal.axes.zero import SMALLEST_SHARE, Sharded, apply, leave

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["ShardedStages", "leave", "shard_stage"]


def shard_stage(module: nn.Module, mesh: DeviceMesh, parts: Collection[str]) -> Sharded:
    """Shard a stage's module in place, before it is made a stage; its end has to be told by ``leave``.

    Args:
        mesh: the workers that have this stage.
        parts: paths of the modules that this stage calls; only inside of them a block is gathered by itself.
    """
    from shoal.axes.blocks import find_blocks

    def inside(path: str) -> bool:
        return any(path == part or path.startswith(f"{part}.") for part in parts)

    blocks = find_blocks(module, SMALLEST_SHARE, shared=False)
    return apply(module, mesh, [block for path, block in blocks.items() if inside(path)])


class ShardedStages:
    """All sharded stages of a worker, as one: see ``zero.Sharded`` for what can be asked of it."""

    def __init__(self, stages: Sequence[Sharded]) -> None:
        self.stages = tuple(stages)
        self.kept_whole = tuple(sorted({name for stage in stages for name in stage.kept_whole}))

    def materialise(self, local: Callable[[str], torch.Tensor]) -> None:
        for stage in self.stages:
            stage.materialise(local)

    def touched(self) -> dict[str, bool]:
        found: dict[str, bool] = {}
        for stage in self.stages:
            for name, reached in stage.touched().items():
                found[name] = found.get(name, False) or reached
        return found

    def begin(self) -> None:
        for stage in self.stages:
            stage.begin()

    @contextlib.contextmanager
    def unnoticed(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for stage in self.stages:
                stack.enter_context(stage.unnoticed())
            yield

    def abandon(self) -> None:
        for stage in self.stages:
            stage.abandon()
