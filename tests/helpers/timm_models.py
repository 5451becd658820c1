"""timm's models where torchvision is missing: there is no build of it for every build of torch.

timm's models need torch alone, but importing the package imports its data loaders, and these import torchvision. Where
that is not installed, empty stand-ins take its place before timm is imported; nothing here ever calls them.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import types
from typing import Any


class _AnyName(type):
    """The type of empty classes on which every attribute is found."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return f"{cls.__name__}.{name}"


class _StandIn(types.ModuleType):
    """A module in which every name is an empty class, and every submodule another stand-in."""

    __path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = _AnyName(name, (), {})
        setattr(self, name, made)
        return made


class _Finder:
    """Finds ``torchvision`` and everything under it."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.split(".")[0] == "torchvision":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def create(name: str, **options: Any) -> Any:
    """``timm.create_model`` without pretrained weights."""
    import torchmetrics  # noqa: F401  (it asks for torchvision too, and takes a missing one well)

    if importlib.util.find_spec("torchvision") is None:
        finder = _Finder()
        sys.meta_path.append(finder)  # type: ignore[arg-type]
        try:
            import timm
        finally:
            sys.meta_path.remove(finder)  # type: ignore[arg-type]
            for loaded in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
                del sys.modules[loaded]
    else:
        import timm
    return timm.create_model(name, pretrained=False, **options)
