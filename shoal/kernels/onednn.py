"""Matrix products of float32 by oneDNN, for a process that wants them; see ``rewrites/onednn_matmul.py`` for why.

torch's own operators are exchanged, below autograd: layers, functions, attention's projections, second derivatives and products
in the backward pass all come here, and nobody's code changes. What does not gain goes to torch's kernel as before: small
products, other types of numbers, matrices with holes.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch

_LEAST = 1 << 21
"""Multiplications in a product that oneDNN is called for: with fewer, the call takes what it saves."""
_LEAST_ROWS = 16
"""With fewer rows, a product takes as long as its matrices take to be read."""


class Products:
    """Lets this process multiply by oneDNN between ``begin`` and ``end``; calls ``found`` each time that it does."""

    _users: list[Products] = []
    _library: torch.library.Library | None = None

    def __init__(self, found: Callable[[], None]) -> None:
        self._found = found

    def begin(self) -> None:
        """Take the operators over; nothing happens where torch was built without oneDNN."""
        if not available() or self in Products._users:
            return
        Products._users.append(self)
        if Products._library is None:
            Products._library = library = torch.library.Library("aten", "IMPL")
            for name in _OPERATORS:
                _plain(name)
            with warnings.catch_warnings():
                # That a kernel is overridden is what is wanted.
                warnings.simplefilter("ignore")
                for name, function in _OPERATORS.items():
                    library.impl(name, function, "CPU")

    def end(self) -> None:
        """Give torch's own operators back, once nobody wants others any more."""
        if self in Products._users:
            Products._users.remove(self)
        if not Products._users and Products._library is not None:
            Products._library._destroy()  # type: ignore[no-untyped-call]
            Products._library = None


def available() -> bool:
    """Whether this torch can multiply by oneDNN."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@functools.cache
def _plain(name: str) -> Any:
    """torch's own kernel; looked up before the operator is taken over."""
    return torch.library.get_kernel(f"aten::{name}", "CPU")


@functools.cache
def _keys() -> Any:
    return torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


def _mm(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    if not _gains(left, right):
        return _plain("mm").call_boxed(_keys(), left, right)  # type: ignore[no-any-return]
    return _multiply(left, right, None)


def _addmm(bias: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, beta: Any = 1, alpha: Any = 1) -> torch.Tensor:
    plain = bias.dtype is not torch.float32 or bias.dim() != 1 or bias.stride(0) != 1 or beta != 1 or alpha != 1
    if plain or not _gains(left, right) or bias.shape[0] != right.shape[1]:
        return _plain("addmm").call_boxed(_keys(), bias, left, right, beta=beta, alpha=alpha)  # type: ignore[no-any-return]
    return _multiply(left, right, bias)


def _gains(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether oneDNN is of use to a product of these, which torch has not looked at yet."""
    if left.dtype is not torch.float32 or right.dtype is not torch.float32 or left.dim() != 2 or right.dim() != 2:
        return False
    rows, inner = left.shape
    columns = right.shape[1]
    large = rows >= _LEAST_ROWS and rows * inner * columns >= _LEAST and right.shape[0] == inner
    return large and _is_dense(left, rows, inner) and _is_dense(right, inner, columns)


def _is_dense(matrix: torch.Tensor, rows: int, columns: int) -> bool:
    """Whether the numbers of a row, or of a column, are side by side, and rows (columns) do not overlap."""
    down, along = matrix.stride()
    return (along == 1 and down >= columns) or (down == 1 and along >= rows)


def _multiply(left: torch.Tensor, right: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    for user in Products._users:
        user._found()
    return torch.ops.mkldnn._linear_pointwise.default(left, right.t(), bias, "none", [], "")  # type: ignore[no-any-return]


_OPERATORS = {"mm": _mm, "addmm": _addmm}
