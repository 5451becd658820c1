"""Metrics that several shipped jobs share."""

from __future__ import annotations

import typing

if typing.TYPE_CHECKING:
    import torch


def accuracy(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the share of samples whose largest logit is the target: a scalar, from (N, classes) and (N,)."""
    return (output.argmax(dim=1) == target).float().mean()
