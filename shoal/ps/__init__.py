"""The parameter server: who holds the parameters, who may read them while they change."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shoal.ps.reader import Reader as Reader

_EXPORTS = {"Reader": "shoal.ps.reader"}
__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    """Import a name of the contract when it is first asked for."""
    if name not in _EXPORTS:
        raise AttributeError(f"module 'shoal.ps' has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)
