"""Whether autograd runs in the way that operators in C know."""

from __future__ import annotations

import torch


def plain_autograd() -> bool:
    """False under autocast, torch.compile, and the transforms of torch.func: these see into tensors, or hold others inside."""
    if torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return False
    return not torch._C._are_functorch_transforms_active()
