"""Metrics over a data set: each worker takes its batches, the parts are put together by whoever asked."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from shoal.data.source import Source
from shoal.errors import JobFailed
from shoal.job import Job
from shoal.process.failure import first_line
from shoal.train import objective, streams
from shoal.train.feed import to_device, to_layout

_HERE = torch.device("cpu")
_ELEMENTWISE = ("dim_zero_sum", "dim_zero_mean", "dim_zero_max", "dim_zero_min")
"""How torchmetrics calls what takes states of one shape."""


@dataclass
class Tally:
    """What one worker found: sums with their weights, and the torchmetrics objects with their state.

    ``sums`` maps a name to (sum, weight); "loss" is one of them.
    """

    sums: dict[str, tuple[float, float]] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)

    def add(self, name: str, total: float, weight: float) -> None:
        old = self.sums.get(name, (0.0, 0.0))
        self.sums[name] = (old[0] + total, old[1] + weight)


class Metrics:
    """A job's metrics, split into functions of a batch and stateful torchmetrics objects."""

    def __init__(self, metrics: Mapping[str, Any]) -> None:
        self.functions = {name: m for name, m in metrics.items() if not is_stateful(m)}
        self.stateful = {name: own_copy(m) for name, m in metrics.items() if is_stateful(m)}

    @torch.no_grad()
    def update(self, outcome: objective.Outcome) -> dict[str, float]:
        """Take in a batch; return what the functions say of it (means over the batch)."""
        if outcome.output is None:
            return {}
        output = detach(outcome.output)
        for metric in self.stateful.values():
            # These gather on the processor, wherever the model is.
            metric.update(to_device(output, _HERE), to_device(outcome.target, _HERE))
        return {name: float(function(output, outcome.target)) for name, function in self.functions.items()}


def own_copy(metric: Any) -> Any:
    """A metric of one worker's own, that is merged by shoal: it must not wait for a process group's other processes."""
    copied = copy.deepcopy(metric)
    for part in copied.modules() if isinstance(copied, nn.Module) else ():
        if hasattr(part, "sync_on_compute"):
            part.sync_on_compute = part._to_sync = False  # type: ignore[assignment]
    return copied


def is_stateful(metric: Any) -> bool:
    """Whether a metric is a torchmetrics object (asked without importing torchmetrics)."""
    return hasattr(metric, "update") and hasattr(metric, "compute") and hasattr(metric, "reset")


def detach(value: Any) -> Any:
    """A model's output, cut off from the graph where it is a plain tensor or a container of them."""
    if isinstance(value, torch.Tensor):
        return value.detach()
    if type(value) in (tuple, list):
        return type(value)(detach(v) for v in value)
    if type(value) is dict:
        return {k: detach(v) for k, v in value.items()}
    return value


@dataclass(frozen=True)
class Slice:
    """Which batches of an evaluation are a worker's.

    Attributes:
        first, every: batch ``first``, and every so many after it.
        in_step: all workers have to call the model equally often; those without a batch left compute one for nobody.
    """

    first: int = 0
    every: int = 1
    channels_last: bool = False
    epoch: int = 0
    in_step: bool = False


Forward = Callable[[Any, int], "objective.Outcome | None"]


@torch.no_grad()
def evaluate(
    job: Job, model: nn.Module, source: Source, part: Slice, reach: Callable[[], None] = lambda: None,
    forward: Forward | None = None,
) -> Tally:  # fmt: skip
    """Evaluate a part of a data set.

    Args:
        model: is set to evaluation, and back afterwards.
        reach: called before each batch.
        forward: a batch and its number of samples -> its outcome, or None where another worker has that; by default the
            whole model's.
    """
    forward = forward or (lambda batch, count: objective.compute(job, model, batch, count))
    metrics = Metrics(job.metrics)
    tally = Tally(metrics=metrics.stateful)
    was_training = model.training
    model.eval()
    batches = -(-len(source) // job.batch_size)
    try:
        for start in range(0, batches, part.every):
            mine = start + part.first
            if mine >= batches and not part.in_step:
                break
            reach()
            index = min(mine, batches - 1)
            low = index * job.batch_size
            indices = np.arange(low, min(low + job.batch_size, len(source)), dtype=np.int64)

            def before_item(sample: int) -> None:
                streams.reseed(streams.ITEM, job.seed, part.epoch, sample, 1)

            batch = to_layout(source.fetch(indices, job.collate, before_item), part.channels_last)
            streams.reseed(streams.EVALUATION, job.seed, part.epoch, index)
            outcome = forward(batch, len(indices))
            if outcome is None or mine >= batches:
                continue
            tally.add("loss", outcome.loss_sum(), outcome.weight)
            for name, value in {**outcome.values, **metrics.update(outcome)}.items():
                tally.add(name, value * len(indices), len(indices))
    finally:
        model.train(was_training)
    return tally


def combine(tallies: Iterable[Tally], prefix: str = "") -> dict[str, float]:
    """Put the workers' parts together, in rank order: name -> value, each name with the prefix before it.

    Raises JobFailed where a metric's states are not such as can be put together.
    """
    total = Tally()
    merged: dict[str, Any] = {}
    for rank, tally in enumerate(tallies):
        for name, (value, weight) in tally.sums.items():
            total.add(name, value, weight)
        for name, metric in tally.metrics.items():
            if name not in merged:
                merged[name] = copy.deepcopy(metric)
            else:
                merged[name] = put_together(merged[name], metric, f"{prefix}{name}", rank)
    found = {name: value / weight if weight else math.nan for name, (value, weight) in total.sums.items()}
    for name, metric in merged.items():
        if metric.update_called:
            found.update(flatten(name, metric.compute()))
    return {prefix + name: value for name, value in found.items()}


def put_together(left: Any, right: Any, name: str, rank: int) -> Any:
    """What two torchmetrics objects have seen; the right one is worker ``rank``'s, the left one may be changed. JobFailed."""
    if not right.update_called:
        return left
    try:
        return merge(left, right)
    except Exception as error:  # metrics are the user's, or a library's
        raise JobFailed(
            f'What worker {rank} has of the metric "{name}" cannot be put together with what the others have '
            f"({type(error).__name__}: {first_line(error)}); let it keep states of the same shapes in every "
            "worker, which torchmetrics can merge."
        ) from None


def merge(left: Any, right: Any) -> Any:
    """Merge two torchmetrics objects; the left one may be changed. ValueError where states are to be added of other shapes."""
    if not left.update_called:
        return copy.deepcopy(right)
    for (path, one), (_, other) in zip(_parts_of(left), _parts_of(right), strict=False):
        for name, reduction in one._reductions.items() if one.update_called and other.update_called else ():
            shapes = [tuple(getattr(getattr(part, name), "shape", ())) for part in (one, other)]
            # Torch would stretch the smaller one, and nobody would know.
            if getattr(reduction, "__name__", "") in _ELEMENTWISE and shapes[0] != shapes[1]:
                raise ValueError(f"{path}{name} is of shape {shapes[1]}, not {shapes[0]}")
    left.merge_state(right)
    return left


def _parts_of(metric: Any) -> Iterator[tuple[str, Any]]:
    """A metric and those within it that have states, with what their states' names begin with."""
    for path, part in metric.named_modules() if isinstance(metric, nn.Module) else ():
        if hasattr(part, "_reductions"):
            yield path + "." if path else "", part


def flatten(name: str, value: Any) -> dict[str, float]:
    """A metric's result as plain numbers: a mapping gives ``name_key``, a vector ``name_0`` and so on."""
    if isinstance(value, Mapping):
        return {k: v for key, item in value.items() for k, v in flatten(f"{name}_{key}", item).items()}
    tensor = torch.as_tensor(value, dtype=torch.float64)
    if tensor.numel() == 1:
        return {name: float(tensor)}
    return {f"{name}_{index}": float(item) for index, item in enumerate(tensor.flatten())}
