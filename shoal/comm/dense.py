"""Passes over whole tensors: what dense.c does once through memory, and the same answers without a compiler."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from shoal.comm import native

_NUMPY: dict[torch.dtype, Any] = {torch.float32: np.float32, torch.float64: np.float64}


@dataclass(frozen=True, kw_only=True)
class SgdStep:
    """A step of plain SGD over some pieces of one stretch of weights; see ``Dense.sgd``.

    Attributes:
        spans: int64, first and last element (exclusive) of each piece, counted from the stretch's beginning, ascending.
        rates: minus the learning rate of each, of the weights' dtype.
        factor: the sum of gradients is multiplied by it,
        scale: and then by this; both are rounded.
        undo: where the weights are copied before they change, at their own places; None for nowhere.
        saved: the address of a float64 that says how many of the stretch's first bytes are there.
    """

    spans: np.ndarray
    rates: np.ndarray
    factor: float
    scale: float
    undo: torch.Tensor | None = None
    saved: int = 0


class Dense(Protocol):
    """What can be done with whole tensors."""

    def puller(self, version: int, reading: int, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Callable[[], int]:
        """What copies each pair's second to its first (1-D uint8 of one length) while nobody writes there.

        ``version``: the address of a word that is odd while somebody does; ``reading``: of one that is 1 while this copies,
        whereupon nobody begins to. A call returns the version that the copy is of, or -1 where there was none just then.
        """

    def take(self, target: torch.Tensor, source: torch.Tensor) -> bool | None:
        """Copy a tensor. Whether all of it is finite; None where that was not looked at."""

    def finite(self, source: torch.Tensor) -> bool:
        """Whether all of a tensor is finite."""

    def sgd(self, weights: torch.Tensor, sources: Sequence[torch.Tensor], step: SgdStep) -> None:
        """Step: weights -= lr · ((sources[0] + sources[1] + …) · factor · scale), the last product and difference rounded once.

        Everything is 1-D and of one dtype of ``steps``.
        """

    @property
    def steps(self) -> Sequence[torch.dtype]:
        """The dtypes that ``sgd`` knows here; where there is none, torch is asked piece by piece, as for other optimizers."""


class _Compiled:
    def __init__(self, lib: ctypes.CDLL) -> None:
        pointer, number, integer = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        self._pull = lib.shoal_pull
        self._pull.argtypes, self._pull.restype = [pointer, pointer, integer, pointer, pointer, pointer], number
        self._finite = {torch.float32: lib.shoal_finite_f32, torch.float64: lib.shoal_finite_f64}
        for function in self._finite.values():
            function.argtypes, function.restype = [pointer, pointer, number], integer
        kinds = {torch.float32: (lib.shoal_sgd_f32, ctypes.c_float), torch.float64: (lib.shoal_sgd_f64, ctypes.c_double)}
        self._sgd = kinds if lib.shoal_has_fma() else {}
        for function, kind in kinds.values():
            function.argtypes = [pointer, pointer, integer, pointer, pointer, integer, kind, kind, pointer, pointer]
            function.restype = None

    @property
    def steps(self) -> Sequence[torch.dtype]:
        return list(self._sgd)

    def puller(self, version: int, reading: int, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Callable[[], int]:
        n = len(pairs)
        targets = (ctypes.c_void_p * n)(*(target.data_ptr() for target, _ in pairs))
        sources = (ctypes.c_void_p * n)(*(source.data_ptr() for _, source in pairs))
        sizes = (ctypes.c_int64 * n)(*(target.numel() for target, _ in pairs))
        return functools.partial(self._pull, version, reading, n, targets, sources, sizes)

    def take(self, target: torch.Tensor, source: torch.Tensor) -> bool | None:
        function = self._finite.get(target.dtype)
        alike = source.dtype == target.dtype and source.shape == target.shape and _plain(target) and _plain(source)
        if function is None or not alike:
            target.copy_(source)
            return None
        return bool(function(target.data_ptr(), source.data_ptr(), target.numel()))

    def finite(self, source: torch.Tensor) -> bool:
        function = self._finite.get(source.dtype)
        if function is None or not _plain(source):
            return _TORCH.finite(source)
        return bool(function(None, source.data_ptr(), source.numel()))

    def sgd(self, weights: torch.Tensor, sources: Sequence[torch.Tensor], step: SgdStep) -> None:
        undo = None if step.undo is None else step.undo.data_ptr()
        self._sgd[weights.dtype][0](
            weights.data_ptr(), native.addresses(sources), len(sources), step.spans.ctypes.data, step.rates.ctypes.data,
            len(step.rates), step.factor, step.scale, undo, step.saved,
        )  # fmt: skip


def _plain(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.layout == torch.strided and tensor.is_contiguous()


class _Torch:
    steps: Sequence[torch.dtype] = ()

    def puller(self, version: int, reading: int, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Callable[[], int]:
        shared, own = ctypes.c_uint32.from_address(version), ctypes.c_uint32.from_address(reading)

        def pull() -> int:
            own.value = 1
            while not (before := shared.value) & 1:
                for target, source in pairs:
                    target.copy_(source)
                if shared.value == before:
                    own.value = 0
                    return before
            return -1

        return pull

    def take(self, target: torch.Tensor, source: torch.Tensor) -> bool | None:
        target.copy_(source)
        return None

    def finite(self, source: torch.Tensor) -> bool:
        return bool(torch.isfinite(source).all())

    def sgd(self, weights: torch.Tensor, sources: Sequence[torch.Tensor], step: SgdStep) -> None:
        raise AssertionError("torch's own optimizer steps where there is no compiler")


_TORCH = _Torch()


@functools.lru_cache(maxsize=1)
def load() -> Dense:
    """The functions of dense.c, or the same with torch where there is no compiler."""
    library = getattr(native.load(), "library", None)
    return _TORCH if library is None else _Compiled(library)


def rates(learning_rates: Sequence[float], dtype: torch.dtype) -> np.ndarray:
    """Learning rates as ``SgdStep`` has them."""
    made: np.ndarray = -np.array(learning_rates, dtype=_NUMPY[dtype])
    return made


@functools.lru_cache(maxsize=8)
def steps_as_torch(dtype: torch.dtype, fused: bool | None, foreach: bool | None) -> bool:
    """Whether ``sgd`` gives every bit that torch's SGD gives: tried on random numbers, because torch has several kernels."""
    dense = load()
    if dtype not in dense.steps:
        return False
    generator, count, lr = torch.Generator().manual_seed(0), 10_007, 0.0123
    before = torch.randn(count, dtype=dtype, generator=generator)
    gradient = torch.randn(count, dtype=dtype, generator=generator)
    own, theirs = before.clone(), torch.nn.Parameter(before.clone())
    dense.sgd(own, [gradient], SgdStep(spans=np.array([0, count]), rates=rates([lr], dtype), factor=1.0, scale=1.0))
    theirs.grad = gradient
    torch.optim.SGD([theirs], lr=lr, fused=fused, foreach=foreach).step()
    return torch.equal(own, theirs.detach())
