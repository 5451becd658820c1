"""Holding weights against weights: the two measures that the contract fixes."""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shoal.errors import RequestError

if TYPE_CHECKING:
    import numpy
    import torch

_SCALE_FLOOR = 0.001
"""A tensor's own largest value counts, but never less than this part of the model's largest."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How far two models are apart.

    Attributes:
        max_rel_diff: over all tensors; infinite where integers differ or a value is not finite.
        tensor: the name of the tensor that is furthest apart, or None where all are equal.
        unequal_integers: the names of the integer tensors that differ.
    """

    max_rel_diff: float
    tensor: str | None
    unequal_integers: tuple[str, ...]


def max_rel_diff(a: Mapping[str, Any], b: Mapping[str, Any]) -> float:
    """Return the largest over tensors of max|a−b| / max(max|a|, 0.001 × the model's largest |a|).

    Args:
        a, b: name -> torch tensor or NumPy array, the same names and shapes in both.

    Returns:
        0.0 where all are equal; infinity where integer (or bool) tensors differ, or where a value that is not finite
        stands in a floating tensor.

    Raises:
        RequestError: the names or the shapes differ, or one is of integers where the other is not.
    """
    return difference(a, b).max_rel_diff


def difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> Difference:
    """As ``max_rel_diff``, with the tensors named."""
    _check_names(a, b)
    largest = max((_largest(_array(tensor)) for tensor in a.values() if not _is_integer(tensor)), default=0.0)
    worst, worst_name, unequal = 0.0, None, []
    for name in a:
        left, right = _array(a[name]), _array(b[name])
        if left.shape != right.shape:
            raise RequestError(
                f'"{name}" is {_shape(left)} in one and {_shape(right)} in the other; compare runs of the same model.'
            )
        if _is_integer(a[name]) != _is_integer(b[name]):
            raise RequestError(f'"{name}" holds integers in only one of the two; compare runs of the same model.')
        if _is_integer(a[name]):
            apart = 0.0 if (left == right).all() else math.inf
            if apart:
                unequal.append(name)
        else:
            apart = _relative(left, right, max(_largest(left), _SCALE_FLOOR * largest))
        if apart > worst:
            worst, worst_name = apart, name
    return Difference(max_rel_diff=worst, tensor=worst_name, unequal_integers=tuple(unequal))


def weights_sha256(state: Mapping[str, torch.Tensor]) -> str:
    """Return the SHA-256, in hexadecimal, of a state_dict.

    For each name in sorted order: ``name\\0dtype\\0d0,d1,…\\0`` in UTF-8 (dtype as ``float32``), then the tensor's
    contiguous little-endian bytes. Tied names both count.
    """
    import torch  # the tensors have brought it already

    assert sys.byteorder == "little", "a big-endian machine would hash other bytes"
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        dtype = str(tensor.dtype).removeprefix("torch.")
        sizes = ",".join(str(size) for size in tensor.shape)
        digest.update(f"{name}\0{dtype}\0{sizes}\0".encode())
        if tensor.numel():
            # By way of uint8, because NumPy has no bfloat16.
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _check_names(a: Mapping[str, Any], b: Mapping[str, Any]) -> None:
    alone = sorted(set(a) ^ set(b))
    if alone:
        shown = ", ".join(f'"{name}"' for name in alone[:3]) + (" and others" if len(alone) > 3 else "")
        raise RequestError(f"Only one of the two has {shown}; compare runs of the same model.")


def _array(tensor: Any) -> numpy.ndarray[Any, Any]:
    import numpy

    if not hasattr(tensor, "detach"):
        array = numpy.asarray(tensor)
        return array if _is_integer(array) else array.astype(numpy.complex128 if array.dtype.kind == "c" else float)
    tensor = tensor.detach().cpu()
    # double() first: NumPy has no bfloat16, and a difference of float16 would be rounded.
    converted: numpy.ndarray[Any, Any] = (tensor.double() if tensor.is_floating_point() else tensor).numpy()
    return converted


def _is_integer(tensor: Any) -> bool:
    if hasattr(tensor, "is_floating_point"):
        return not (tensor.is_floating_point() or tensor.is_complex())
    import numpy

    return numpy.asarray(tensor).dtype.kind in "iub"


def _largest(array: numpy.ndarray[Any, Any]) -> float:
    return float(abs(array).max()) if array.size else 0.0


def _relative(left: numpy.ndarray[Any, Any], right: numpy.ndarray[Any, Any], scale: float) -> float:
    import numpy

    if not left.size:
        return 0.0
    if not (numpy.isfinite(left).all() and numpy.isfinite(right).all()):
        return math.inf
    apart = float(abs(left - right).max())
    if apart == 0.0:
        return 0.0
    return apart / scale if scale > 0 else math.inf


def _shape(array: numpy.ndarray[Any, Any]) -> str:
    return " × ".join(str(size) for size in array.shape) or "one value"
