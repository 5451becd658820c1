"""Cheaper ways to compute a model, for models whose owner has said how far answers may be off: bf16 weights, bf16 in autocast,
linear layers in int8.

Each is tried at the start, in the template, before any replica is forked, so all replicas share its weights. It is compared with
the model as it is on sample rows, and the quickest within the tolerance is taken.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from shoal.serve.computing import FP32, Candidate, Precision
from shoal.serve.latency import GAIN
from shoal.serve.tolerance import Distance, Tolerance

_RUNS, _MOST_S = 5, 0.5
# One run that takes so many times as long as the model as it is: no kernel for this processor, no need for another run.
_HOPELESS = 3.0
_LEVELS, _ZERO = 127.0, 128
_LEAST_SCALE = 1e-12

Inputs = Sequence[np.ndarray]
Run = Callable[[nn.Module, Inputs], list[np.ndarray]]


def choose(
    model: nn.Module, run: Run, tolerance: Tolerance, samples: Sequence[Inputs], rows: str, timed: Inputs,
    only: str | None = None,
) -> tuple[nn.Module, Precision]:  # fmt: skip
    """The quickest way to compute a model within its tolerance: (the module to call, what was found out).

    Args:
        run: computes a batch with a module.
        samples: what answers are compared on; ``rows`` says what they are.
        timed: a batch that stands for the usual ones.
        only: what an older version uses: that is tried alone, and not timed.
    """
    exact = [run(model, inputs) for inputs in samples]
    usual_s = _seconds(model, run, timed)
    tried: list[tuple[Candidate, nn.Module | None]] = []
    for name, make in _candidates(model).items():
        if only is None or name == only:
            tried.append(_try(name, make, run, (tolerance, samples, exact), (timed, usual_s)))
    best: tuple[str, nn.Module, float] = (FP32, model, 1 + GAIN if only is None else 0.0)
    for candidate, module in tried:
        if module is not None and candidate.speedup is not None and candidate.speedup > best[2]:
            best = (candidate.name, module, candidate.speedup)
    return best[1], Precision(best[0], str(tolerance), rows, tuple(candidate for candidate, _ in tried))


def _try(
    name: str, make: Callable[[], nn.Module], run: Run, accuracy: tuple[Tolerance, Sequence[Inputs], list[list[np.ndarray]]],
    speed: tuple[Inputs, float],
) -> tuple[Candidate, nn.Module | None]:  # fmt: skip
    """Return a candidate, and its module where it may be taken."""
    tolerance, samples, exact = accuracy
    timed, usual_s = speed
    try:
        module = make()
        began = time.perf_counter()
        run(module, timed)
        run(module, samples[0])
        if time.perf_counter() - began > _MOST_S + 2 * _HOPELESS * usual_s:
            return Candidate(name, refused="far slower"), None
        off = Distance()
        for inputs, wanted in zip(samples, exact, strict=True):
            off = off.worse(Distance.between(wanted, run(module, inputs)))
        speedup = usual_s / _seconds(module, run, timed)
    except Exception as error:
        return Candidate(name, refused=f"raises {type(error).__name__}"), None
    bad = "outside the tolerance" if tolerance.refuses(off) else None
    return Candidate(name, speedup, off.cosine, off.max_error, bad), None if bad else module


def _candidates(model: nn.Module) -> dict[str, Callable[[], nn.Module]]:
    found: dict[str, Callable[[], nn.Module]] = {
        "bf16": lambda: InBf16(copy.deepcopy(model).to(torch.bfloat16)),
        "bf16 autocast": lambda: InAutocast(model),
    }
    if any(_plain(layer) for layer in model.modules()) and _has_dot_products():
        found["int8"] = lambda: with_int8(copy.deepcopy(model))
    return found


def _seconds(model: nn.Module, run: Run, inputs: Inputs) -> float:
    """Shortest seconds of some runs after one that does not count."""
    run(model, inputs)
    times: list[float] = []
    until = time.monotonic() + _MOST_S
    while not times or (len(times) < _RUNS and time.monotonic() < until):
        start = time.perf_counter()
        run(model, inputs)
        times.append(time.perf_counter() - start)
    return min(times)


def _has_dot_products() -> bool:
    """Whether the processor multiplies bytes four at a time without losing any (VNNI; on ARM dotprod)."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    return "vnni" in text or "asimddp" in text


# -- bf16 --------------------------------------------------------------------------------------------------------------


class InBf16(nn.Module):
    """A model whose weights are bf16, for numbers that are not."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *tensors: torch.Tensor, **named: torch.Tensor) -> Any:
        return self.model(*map(_halved, tensors), **{name: _halved(t) for name, t in named.items()})


class InAutocast(nn.Module):
    """A model as it is, computed in bf16 where torch deems that right."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *tensors: torch.Tensor, **named: torch.Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return self.model(*tensors, **named)


def _halved(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.bfloat16) if tensor.dtype is torch.float32 else tensor


# -- int8 --------------------------------------------------------------------------------------------------------------


class Int8Linear(nn.Module):
    """A linear layer whose weights are int8, scaled for each output; inputs are scaled for each row.

    So what a row is multiplied with does not depend on the rows beside it.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        weight = layer.weight.detach()
        scales = (weight.abs().amax(1) / _LEVELS).clamp_(min=_LEAST_SCALE)
        rounded = (weight / scales[:, None]).round_().clamp_(-_LEVELS, _LEVELS).to(torch.int8)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        # What oneDNN makes of weights cannot be a buffer: it has no storage of its own.
        self._packed = torch.ops.onednn.qlinear_prepack(rounded, None)
        self._scales = scales
        self._zeros = torch.zeros(len(scales), dtype=torch.int64)
        self._bias = torch.zeros(len(scales)) if layer.bias is None else layer.bias.detach().clone()

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        rows = given.reshape(-1, self.in_features)
        scale = rows.abs().amax(1, keepdim=True).clamp_(min=_LEAST_SCALE).mul_(1 / _LEVELS)
        # oneDNN has quick kernels for unsigned inputs alone (signed ones: a thousand times slower).
        levels = (rows / scale).round_().add_(_ZERO).to(torch.uint8)
        product = torch.ops.onednn.qlinear_pointwise(
            levels, 1.0, _ZERO, self._packed, self._scales, self._zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return torch.addcmul(self._bias, product, scale).reshape(*given.shape[:-1], self.out_features)


def with_int8(model: nn.Module) -> nn.Module:
    """The model with its linear layers replaced, in place."""
    if _plain(model):
        assert isinstance(model, nn.Linear)
        return Int8Linear(model)
    for name, child in model.named_children():
        setattr(model, name, with_int8(child))
    return model


def _plain(layer: nn.Module) -> bool:
    """Whether a layer is nothing but a linear one, in fp32; classes made of it may do anything."""
    return type(layer) is nn.Linear and layer.weight.dtype is torch.float32 and not layer._forward_hooks
