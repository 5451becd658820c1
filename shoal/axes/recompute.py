"""Recomputing: activations that are dropped after the forward pass and computed again when the backward pass needs them.

``recompute=full`` keeps only what goes into each block (``blocks.py``) and runs the block's forward pass a second time
(Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost"): for about a third more computing, B blocks hold B
inputs and one block's activations instead of B blocks' activations. ``recompute=selective`` also keeps what is dear to
compute, the outputs of matrix multiplications, convolutions and attention, and computes the cheap rest again (Korthikanti
et al. 2022, section 5).

The gradients are the same bit for bit: the random state is put back for the second pass, and so is autocast. (Under
``precision=bf16`` a weight that is used twice has its two gradients added in float32 then, not in bfloat16.) Nothing is
moved between workers by this, except that a tensor-parallel block repeats its forward collectives.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from shoal.errors import PlanError

if TYPE_CHECKING:
    from torch import nn

MODES = ("none", "selective", "full")


def apply(model: nn.Module, mode: str | None, blocks: Iterable[nn.Module] | None = None) -> int:
    """Let blocks be recomputed from now on, in place; return how many.

    Args:
        mode: ``"none"`` (or None), ``"selective"`` or ``"full"``; applying another mode replaces the one before.
        blocks: the blocks; where it is None the blocks that are found and have more than one layer in them.

    The names in the state_dict do not change, nor do the modules: only their class does, to a subclass of the same name
    (as torch FSDP2 does it). Apply it before sharding.
    """
    from torch import nn

    if mode not in (None, *MODES):
        raise PlanError(f"recompute={mode} makes no sense; give full, selective or none.")
    count = 0
    if blocks is None:
        from shoal.axes.blocks import find_blocks

        # A single layer keeps its input and nothing else already.
        blocks = [block for block in find_blocks(model).values() if next(block.children(), None) is not None]
    for block in blocks:
        kind: Any = type(block)
        kind = getattr(kind, "_recomputed_class", kind)
        if mode in (None, "none"):
            block.__class__ = kind
            continue
        if not isinstance(block, nn.Module) or "forward" in vars(block):
            raise PlanError(
                f"{kind.__name__} has a forward of its own on the instance; recompute=none is needed there."
            )
        block.__class__ = _subclass(kind, str(mode))
        count += 1
    return count


@cache
def _subclass(kind: Any, mode: str) -> Any:
    """The class whose forward is the other one's, checkpointed. One for each class, so that blocks stay of one type."""
    import torch
    from torch.utils import checkpoint as torch_checkpoint

    from shoal.axes.opened import closed, opened

    extra: dict[str, Any] = {}
    if mode == "selective":
        extra["context_fn"] = partial(torch_checkpoint.create_selective_checkpoint_contexts, _policy)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return kind.forward(self, *args, **kwargs)

        def inner(*args: Any, **kwargs: Any) -> Any:
            return kind.forward(self, *closed(args), **closed(kwargs))

        # Autocast remembers rounded weights. That keeps all of them alive, and a weight that another block has used already
        # would not be rounded here the first time, but would the second time, which ``selective`` takes for an error.
        cached = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)
        try:
            return torch_checkpoint.checkpoint(
                inner, *opened(args), use_reentrant=False, preserve_rng_state=True, **extra, **opened(kwargs)
            )
        finally:
            torch.set_autocast_cache_enabled(cached)

    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind.__name__, (kind,), {**names, "forward": forward, "_recomputed_class": kind})


@cache
def _dear() -> frozenset[Any]:
    """Operators whose outputs ``selective`` keeps."""
    import torch

    aten = torch.ops.aten
    names = (
        "mm", "bmm", "addmm", "baddbmm", "linear", "convolution", "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_fused_attention_overrideable",
    )  # fmt: skip
    return frozenset(getattr(aten, name).default for name in names if hasattr(aten, name))


def _policy(_context: Any, operator: Any, *args: Any, **kwargs: Any) -> Any:
    from torch.utils.checkpoint import CheckpointPolicy

    if operator in _dear() and not _draws(operator, args, kwargs):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def _draws(operator: Any, args: Any, kwargs: Any) -> bool:
    """Whether it takes random numbers: if those were not drawn again, all that come after in the block would differ."""
    for place, argument in enumerate(operator._schema.arguments):
        if argument.name == "dropout_p":
            value = kwargs.get("dropout_p", args[place] if place < len(args) else argument.default_value)
            return bool(value)
    return False
