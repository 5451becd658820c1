"""A learning rate that is smaller for a push that comes late (Zhang et al. 2016, "Staleness-aware Async-SGD")."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from shoal.errors import JobError

if TYPE_CHECKING:
    import torch

Optimizer = TypeVar("Optimizer", bound="torch.optim.Optimizer")
_ATTRIBUTE = "_shoal_staleness_factor"


def inverse(staleness: int) -> float:
    """1 / (1 + staleness)."""
    return 1.0 / (1 + staleness)


def staleness_aware(optimizer: Optimizer, factor: Callable[[int], float] = inverse) -> Optimizer:
    """Let ``factor(staleness)`` scale an optimizer's learning rates for each push of a run with ``async`` or ``staleness``.

    ::

        optimizer=lambda params: shoal.ps.staleness_aware(torch.optim.SGD(params, lr=0.1))

    The staleness of a push is the number of updates between its pull and its application, at the server that applies it. The
    rates of rows in ``shoal.ps.Embedding`` are corrected alike. Where workers wait for each other nothing is stale, and
    nothing changes.

    Returns the same optimizer. JobError where ``factor`` is no function of one argument.
    """
    try:
        inspect.signature(factor).bind(0)
    except (TypeError, ValueError):
        raise JobError(
            "factor in shoal.ps.staleness_aware takes the staleness and returns what the learning rate is multiplied by; give "
            "a function of one argument, such as lambda staleness: 1 / (1 + staleness)."
        ) from None
    setattr(optimizer, _ATTRIBUTE, factor)
    return optimizer


def factor_of(optimizer: torch.optim.Optimizer) -> Callable[[int], float] | None:
    """What ``staleness_aware`` has said of an optimizer."""
    return getattr(optimizer, _ATTRIBUTE, None)
