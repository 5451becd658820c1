"""The parameter server: who holds the parameters, rows that live in tables, and who may read while they change."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shoal.ps.embedding import Embedding as Embedding
    from shoal.ps.embedding import step as step
    from shoal.ps.initialisers import Constant as Constant
    from shoal.ps.initialisers import Normal as Normal
    from shoal.ps.initialisers import Uniform as Uniform
    from shoal.ps.initialisers import Zeros as Zeros
    from shoal.ps.optimizers import FTRL as FTRL
    from shoal.ps.optimizers import SGD as SGD
    from shoal.ps.optimizers import Adagrad as Adagrad
    from shoal.ps.optimizers import Adam as Adam
    from shoal.ps.optimizers import RowWiseAdagrad as RowWiseAdagrad
    from shoal.ps.reader import Reader as Reader
    from shoal.ps.staleness import staleness_aware as staleness_aware

_EXPORTS = {
    "Reader": "shoal.ps.reader",
    "staleness_aware": "shoal.ps.staleness",
    **dict.fromkeys(("Embedding", "step"), "shoal.ps.embedding"),
    **dict.fromkeys(("Constant", "Normal", "Uniform", "Zeros"), "shoal.ps.initialisers"),
    **dict.fromkeys(("FTRL", "SGD", "Adagrad", "Adam", "RowWiseAdagrad"), "shoal.ps.optimizers"),
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    """Import a name when it is first asked for: settings do not bring torch along."""
    if name not in _EXPORTS:
        raise AttributeError(f"module 'shoal.ps' has no attribute {name!r}")
    found = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return __all__
