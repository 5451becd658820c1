"""A step of plain SGD or Adagrad on single lines by one loop in C, with the bits of torch's optimizer.

Through torch a step of lines means to gather weights and state, to call the optimizer piece by piece, and to put both back:
0.35 ms for the half of a small recommender that a worker updates, of which the arithmetic is a tenth. The loop works where the
lines lie. It is used only where it was seen to give torch's own bits in this process: torch's kernels differ between builds.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from shoal.comm import native
from shoal.comm.lines import LINE_BYTES

_ELEMENTS = {torch.float32: ("f32", ctypes.c_float), torch.float64: ("f64", ctypes.c_double)}
_PROBED_LINES = 256
_ROUNDINGS = ("once", "twice")
_KINDS: dict[Any, tuple[str, ...]] = {torch.optim.SGD: (), torch.optim.Adagrad: ("sum",)}
"""The optimizers, and the kinds of state that each has."""
Kernel = Callable[..., None]


@dataclass(frozen=True)
class LineStep:
    """What steps over lines as torch does: ``state_keys`` are the kinds of state that it takes, in order."""

    kernel: Kernel
    adagrad: bool

    def run(
        self, held: Sequence[torch.Tensor], gradients: torch.Tensor, lines: torch.Tensor, group: dict[str, Any], step: float,
        scale: float,
    ) -> None:  # fmt: skip
        """Update some lines of ``held`` (weights, then state; as bytes) with their gradients times ``scale``.

        Args:
            group: the optimizer's hyperparameters; ``step``: which one this is, from 1.
        """
        rate = group["lr"]
        pointers = (*(tensor.data_ptr() for tensor in held), gradients.data_ptr(), lines.data_ptr(), len(lines), scale)
        if self.adagrad:
            self.kernel(*pointers, rate / (1 + (step - 1) * group["lr_decay"]), group["eps"])
        else:
            self.kernel(*pointers, rate)


def find(optimizer: torch.optim.Optimizer, dtype: torch.dtype, state_keys: Sequence[str]) -> LineStep | None:
    """What steps as this optimizer does, one that zeros leave alone; None where nothing gives the same bits."""
    kind: Any = type(optimizer)
    wanted = _KINDS.get(kind)
    if wanted is None or tuple(state_keys) != wanted or dtype not in _ELEMENTS:
        return None
    groups = optimizer.param_groups
    if any(isinstance(group[key], torch.Tensor) for group in groups for key in ("lr", "lr_decay", "eps") if key in group):
        return None
    fused, foreach = groups[0].get("fused"), groups[0].get("foreach")
    if any((group.get("fused"), group.get("foreach")) != (fused, foreach) for group in groups):
        return None
    return _find(kind, dtype, fused, foreach)


@functools.cache
def _find(kind: Any, dtype: torch.dtype, fused: bool | None, foreach: bool | None) -> LineStep | None:
    library = getattr(native.load(), "library", None)
    if library is None:
        return None
    adagrad = kind is torch.optim.Adagrad
    suffix, number = _ELEMENTS[dtype]
    for rounding in _ROUNDINGS:
        kernel = getattr(library, f"shoal_{'adagrad' if adagrad else 'sgd'}_lines_{rounding}_{suffix}")
        pointers = [ctypes.c_void_p] * (4 if adagrad else 3)
        kernel.argtypes = [*pointers, ctypes.c_int64, *[number] * (3 if adagrad else 2)]
        kernel.restype = None
        found = LineStep(kernel, adagrad)
        if _has_torchs_bits(found, kind, dtype, fused, foreach):
            return found
    return None


def _has_torchs_bits(found: LineStep, kind: Any, dtype: torch.dtype, fused: bool | None, foreach: bool | None) -> bool:
    """Whether two steps over many numbers of all sizes give the same bits as torch's optimizer."""
    made = torch.Generator().manual_seed(5)
    count = _PROBED_LINES * LINE_BYTES // dtype.itemsize

    def numbers(spread: float) -> torch.Tensor:
        sizes = torch.exp(spread * torch.randn(count, generator=made, dtype=torch.float64))
        return (torch.randn(count, generator=made, dtype=torch.float64) * sizes).to(dtype)

    parameter = torch.nn.Parameter(numbers(1.0))
    weights = parameter.detach().clone()
    decay = {"lr_decay": 0.1, "initial_accumulator_value": 0.01} if found.adagrad else {}
    optimizer = kind([parameter], lr=0.05, fused=fused, foreach=foreach, **decay)
    held = [weights, *(t.clone() for k, t in optimizer.state[parameter].items() if k == "sum")]
    lines = torch.arange(_PROBED_LINES)
    for step in (1, 2):
        gradient = numbers(3.0)
        parameter.grad = gradient.clone()
        optimizer.step()
        found.run(held, gradient, lines, optimizer.param_groups[0], float(step), 1.0)
    truth = [parameter.detach(), *(t for k, t in optimizer.state[parameter].items() if k == "sum")]
    return all(torch.equal(_bits(a), _bits(b)) for a, b in zip(truth, held, strict=True))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int64)
