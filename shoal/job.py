"""A Job: what to train. It says nothing of machines."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from shoal.errors import JobError, did_you_mean

if typing.TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Job:
    """What the user wants trained: model, data, loss, optimizer, batch size, epochs, metrics.

    Attributes:
        model: ``() -> nn.Module``, called after seeding with ``seed``; or a module instance.
        train_data: ``() ->`` a tuple of tensors, a map-style Dataset, or ``shoal.data.csv(path)`` /
            ``shoal.data.folder(path)``; or one of these itself.
        eval_data: the same, or None.
        name: what the run and the bundle are called.
        collate: list of samples -> batch; torch's ``default_collate`` where it is None.
        loss: ``(output, target)`` -> mean over samples, or ``(sum, weight)``. None with no ``step``: the
            model returns its own loss (``model(**batch).loss``).
        step: instead of ``loss``: ``(model, batch)`` -> a loss as above, or a mapping with ``"loss"`` and
            other values to log.
        weight: ``(batch) -> float``: what a mean loss is the mean over, where that is not the samples.
        optimizer: ``(params) -> Optimizer``; if its argument is called ``model`` it gets the module.
        scheduler: ``(optimizer) -> LRScheduler``.
        scheduler_every: ``"step"`` or ``"epoch"``.
        metrics: name -> ``(output, target) -> mean over the batch``, or a ``torchmetrics.Metric``.
        batch_size: samples in a step over all workers: the same for every plan.
        epochs: in all, also after a resume.
        until: e.g. ``{"eval_accuracy": 0.6}``: stop once an epoch reaches it (a loss: once it is as low).
        patience: stop after so many epochs without a better evaluation loss.
        grad_clip: the largest global gradient norm (Euclidean), or None.
        tensor_plan, split_points: overrides for the tensor and the pipeline axis.
        seed: of the initial weights, the order of samples, and every random stream.
    """

    model: Any
    train_data: Any
    eval_data: Any = None
    name: str = "job"
    collate: Callable[[list[Any]], Any] | None = None
    loss: Callable[..., Any] | None = None
    step: Callable[..., Any] | None = None
    weight: Callable[[Any], float] | None = None
    optimizer: Any = None
    scheduler: Callable[[torch.optim.Optimizer], Any] | None = None
    scheduler_every: str = "step"
    metrics: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int = 32
    epochs: int = 1
    until: Mapping[str, float] | None = None
    patience: int | None = None
    grad_clip: float | None = None
    tensor_plan: Any = None
    split_points: Any = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.optimizer is None:
            object.__setattr__(self, "optimizer", _default_optimizer)
        self._check_numbers()
        self._check_callables()

    def _check_numbers(self) -> None:
        for name, least in (("batch_size", 1), ("epochs", 1), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise JobError(f"{name} is {value!r}; give a whole number of at least {least}.")
        if self.patience is not None and (not isinstance(self.patience, int) or self.patience < 1):
            raise JobError(f"patience is {self.patience!r}; give a whole number of epochs of at least 1, or None.")
        if self.grad_clip is not None and not self.grad_clip > 0:
            raise JobError(f"grad_clip is {self.grad_clip!r}; give a positive norm, or None.")
        if self.scheduler_every not in ("step", "epoch"):
            raise JobError(f'scheduler_every is {self.scheduler_every!r}; give "step" or "epoch".')
        if not isinstance(self.name, str) or not self.name or "/" in self.name or self.name.startswith("."):
            raise JobError(f"name is {self.name!r}; give a job a name that can be part of a file name.")

    def _check_callables(self) -> None:
        if self.loss is not None and self.step is not None:
            raise JobError("A job has either a loss or a step, not both; leave one of them out.")
        for name in ("collate", "loss", "step", "weight", "scheduler"):
            value = getattr(self, name)
            if value is not None and not callable(value):
                raise JobError(f"{name} is {type(value).__name__}, which cannot be called; give a function, or None.")
        if isinstance(self.optimizer, str) and self.optimizer != "lbfgs":
            raise JobError(
                f'optimizer="{self.optimizer}" is not known; write "lbfgs", or give a function from parameters to an optimizer.'
            )
        if not callable(self.optimizer) and self.optimizer != "lbfgs":
            raise JobError("optimizer cannot be called; give a function from parameters to a torch optimizer.")
        if not isinstance(self.metrics, Mapping):
            raise JobError("metrics is not a mapping; give {name: function or torchmetrics.Metric}.")
        for name, metric in self.metrics.items():
            if not callable(metric):
                raise JobError(
                    f'metric "{name}" cannot be called; give (output, target) -> mean, or a torchmetrics.Metric.'
                )
            if "MetricCollection" in {kind.__name__ for kind in type(metric).__mro__}:
                raise JobError(f'metric "{name}" is a MetricCollection; give each of its metrics a name of its own.')
            if name == "loss" or name.startswith("eval_"):
                raise JobError(f'metric "{name}" has a name that shoal uses itself; call it something else.')

    def replace(self, **changes: Any) -> Job:
        """Return the job with some fields changed; an unknown field raises JobError."""
        known = [f.name for f in dataclasses.fields(self)]
        for name in changes:
            if name not in known:
                raise JobError(f'A job has no field "{name}".{did_you_mean(name, known)}')
        return dataclasses.replace(self, **changes)


def _default_optimizer(params: Any) -> torch.optim.Optimizer:
    import torch

    return torch.optim.Adam(params, lr=1e-3)
