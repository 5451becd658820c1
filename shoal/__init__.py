"""shoal: many workers, one model.

The names of the contract, imported when first used, so that ``import shoal`` is quick.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shoal import data as data
    from shoal import ps as ps
    from shoal.bundle import load as load
    from shoal.cluster import Cluster as Cluster
    from shoal.errors import ShoalError as ShoalError
    from shoal.job import Job as Job
    from shoal.plan import Plan as Plan
    from shoal.serve.client import Client as Client
    from shoal.serve.predict import predict as predict
    from shoal.serve.service import serve as serve
    from shoal.train.api import plan as plan
    from shoal.train.api import train as train
    from shoal.train.run import Run as Run
    from shoal.train.run import open_run as open  # noqa: F401

__version__ = "0.1.0"

_EXPORTS = {
    "Client": ("shoal.serve.client", "Client"),
    "Cluster": ("shoal.cluster", "Cluster"),
    "Job": ("shoal.job", "Job"),
    "Plan": ("shoal.plan", "Plan"),
    "Run": ("shoal.train.run", "Run"),
    "ShoalError": ("shoal.errors", "ShoalError"),
    "data": ("shoal.data", None),
    "load": ("shoal.bundle", "load"),
    "open": ("shoal.train.run", "open_run"),
    "plan": ("shoal.train.api", "plan"),
    "predict": ("shoal.serve.predict", "predict"),
    "ps": ("shoal.ps", None),
    "serve": ("shoal.serve.service", "serve"),
    "train": ("shoal.train.api", "train"),
}

__all__ = sorted([*_EXPORTS, "__version__"])


def __getattr__(name: str) -> Any:
    """Import a name of the contract when it is first asked for."""
    if name not in _EXPORTS:
        raise AttributeError(f"module 'shoal' has no attribute {name!r}")
    module_name, attribute = _EXPORTS[name]
    module = importlib.import_module(module_name)
    found = module if attribute is None else getattr(module, attribute)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return __all__


class _Package(ModuleType):
    """Keeps the functions ``shoal.train`` and ``shoal.plan``: importing modules of these names would replace them."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and _EXPORTS.get(name, ("", None))[1] is not None:
            return
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
