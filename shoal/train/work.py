"""A worker's passes over some samples, outside of any run: to try something out, or to warm it up."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from shoal.job import Job
from shoal.train import objective, streams
from shoal.train.built import Built
from shoal.train.feed import to_layout

PLACE = (streams.STEP, 0, 0, 0, 0)
Tensors = list[torch.Tensor | None]
_FURTHER, _FURTHER_BYTES = 15, 16 << 20


class Work:
    """What a worker does with ``samples`` samples, the batch that is given; ``precision`` is the plan's."""

    def __init__(self, job: Job, model: nn.Module, batch: Any, samples: int, precision: str | None) -> None:
        self.job, self.model, self.batch, self.samples, self.precision = job, model, batch, samples, precision

    def train(self, size: int = 0, keep: bool = False, few: int | None = None) -> torch.Tensor:
        """A worker's forward and backward pass over its samples, or a few of them, so many at a time."""
        samples = few or self.samples
        for micro, start in enumerate(range(0, samples, size or samples)):
            # As a worker does before each piece.
            streams.reseed(*PLACE[:-1], micro)
            stop = min(samples, start + (size or samples))
            batch = self.batch if stop - start == self.samples else samples_of(self.batch, start, stop)
            bf16 = self.precision == "bf16"
            with torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext():
                outcome = objective.compute(self.job, self.model, batch, stop - start)
            if self.job.metrics:
                # They will ask for the output.
                tensors(outcome.output)
            outcome.to_backward(samples).backward()  # type: ignore[no-untyped-call]
        if not keep:
            self.forget()
        return outcome.loss.detach()

    def evaluate(self, few: int | None = None) -> Any:
        """A worker's pass over its samples where nothing is trained."""
        samples = few or self.samples
        batch = self.batch if few is None else samples_of(self.batch, 0, samples)
        bf16 = self.precision == "bf16"
        self.model.eval()
        try:
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext():
                return objective.compute(self.job, self.model, batch, samples).output
        finally:
            self.model.train()

    def forget(self) -> None:
        for parameter in self.model.parameters():
            parameter.grad = None


def work_of(built: Built, samples: int, layout: str | None, precision: str | None) -> Work:
    """A worker's passes over the first samples of the training data, in training mode; ``layout``, ``precision``: the plan's."""
    streams.reseed(*PLACE)
    indices = np.arange(samples, dtype=np.int64)
    batch = to_layout(built.train.fetch(indices, built.job.collate, None), layout == "channels_last")
    built.model.train()
    return Work(built.job, built.model, batch, samples, precision)


def further_batches(built: Built, samples: int, layout: str | None) -> list[Any]:
    """As many samples again, and again, each as a batch, where that is one gather and takes little memory.

    A worker's steps are of other samples each time. Where these say which rows of a table are read, a single batch would have
    them all in the nearest cache from the second pass on.
    """
    batches: list[Any] = []
    nbytes = 0
    for start in range(samples, min(len(built.train), (1 + _FURTHER) * samples) - samples + 1, samples):
        if not built.train.vectorised or nbytes > _FURTHER_BYTES:
            break
        indices = np.arange(start, start + samples, dtype=np.int64)
        batches.append(to_layout(built.train.fetch(indices, built.job.collate, None), layout == "channels_last"))
        nbytes += sum(tensor.nbytes for tensor in tensors(batches[-1]) if tensor is not None)
    return batches


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Put the model's buffers back afterwards."""
    held = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in held:
                buffer.copy_(value)


def close(a: torch.Tensor | None, b: torch.Tensor | None, tolerance: float) -> bool:
    """Whether two tensors differ by rounding only, by the largest of their values."""
    if a is None or b is None:
        return a is b
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return bool(torch.equal(a, b))
    if not a.numel():
        return True
    if not torch.equal(torch.isfinite(a), torch.isfinite(b)):
        return False
    a, b = a.nan_to_num(), b.nan_to_num()
    return float((a - b).abs().max()) <= tolerance * max(float(a.abs().max()), 1e-3)


def tensors(value: Any) -> list[torch.Tensor]:
    """The tensors of an output, in order."""
    if isinstance(value, torch.Tensor):
        return [value.detach()]
    if isinstance(value, Mapping):
        return [tensor for entry in value.values() for tensor in tensors(entry)]
    if isinstance(value, (tuple, list)):
        return [tensor for entry in value for tensor in tensors(entry)]
    return []


def samples_of(batch: Any, start: int, stop: int) -> Any:
    """Some samples of a batch; ValueError where it cannot be cut."""
    return map_tensors(batch, lambda tensor: tensor[start:stop])


def map_tensors(batch: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(batch, torch.Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        return {key: map_tensors(value, change) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        values = [map_tensors(value, change) for value in batch]
        return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)
    return batch
