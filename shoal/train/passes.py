"""Forward and backward passes of one worker: through the whole model, or through its stages of a pipeline.

``train`` gives an outcome for each microbatch on the ranks that know it, ``evaluate`` likewise for a batch. Everything around it
(which samples, what is logged, what becomes of the gradients) is the loop's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from shoal.axes.tensor_cut import plain
from shoal.comm.arena import Phase, Slot
from shoal.errors import JobError
from shoal.job import Job
from shoal.process.failure import user_code
from shoal.train import objective, streams
from shoal.train.batchnorm import GlobalBatchNorm
from shoal.train.faults import Faults
from shoal.train.feed import Feed, Share
from shoal.train.objective import Outcome
from shoal.train.part import Part


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What passes need beside a model.

    Attributes:
        rank: of this worker, for what the user is told.
        replica: which replica it is part of: random streams are the same all over a replica.
        precision: the plan's: "bf16" runs the model under autocast.
        batchnorm: is told who takes part in a microbatch; None where nobody else's samples matter.
    """

    job: Job
    rank: int
    replica: int
    slot: Slot
    faults: Faults
    precision: str | None = None
    batchnorm: GlobalBatchNorm | None = None

    def autocast(self) -> AbstractContextManager[Any]:
        """The context in which the model runs."""
        return torch.autocast("cpu", torch.bfloat16) if self.precision == "bf16" else contextlib.nullcontext()

    def announce(self, counts: tuple[int, ...]) -> None:
        """Say how many samples each replica has in the microbatch that comes next."""
        if self.batchnorm is not None:
            self.batchnorm.taking_part([replica for replica, n in enumerate(counts) if n])

    def reseed(self, step: int, micro: int) -> None:
        streams.reseed(streams.STEP, self.job.seed, step, self.replica, micro)


class Passes(Protocol):
    """How a worker computes."""

    def train(self, step: int, first: int, share: Share, batch: Any, total: int) -> Iterator[tuple[Outcome, int]]:
        """Forward and backward over a share.

        Args:
            first: number of the share's first microbatch within the step.
            batch: None where the share is empty.
            total: samples that the loss is the mean over.

        Gives outcomes with their numbers of samples; none where another rank has them.
        """

    def evaluate(self, batch: Any, count: int) -> Outcome | None:
        """Forward over a batch; None where another rank has the outcome."""

    def clear(self) -> None:
        """Forget what a computation that was given up has left behind."""


class WholeModel:
    """Passes through a model that is called as one; it may be cut along the tensor axis, or sharded.

    Args:
        spare: makes a batch of one sample, for a worker that has none: with sharded weights all have to call the model equally
            often. None where an empty share is simply skipped.
        abandon: brings the model back to where it can be called again, after an error in the middle.
    """

    def __init__(
        self, model: nn.Module, around: Surroundings, spare: Callable[[], Any] | None = None,
        abandon: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self._abandon = abandon
        self._model = model
        self._around = around
        self._spare = spare

    def train(self, step: int, first: int, share: Share, batch: Any, total: int) -> Iterator[tuple[Outcome, int]]:
        around, count = self._around, len(share.indices)
        if not count and self._spare is None:
            return
        around.slot.enter(Phase.FORWARD, step)
        around.announce(share.counts)
        if not count:
            assert self._spare is not None
            batch = self._spare()
        around.reseed(step, first)
        with user_code("the model or its loss", around.rank):
            with around.autocast():
                outcome = objective.compute(around.job, self._model, batch, count or 1)
            around.faults.reach("forward", step)
            around.slot.enter(Phase.BACKWARD, step)
            if not outcome.loss.requires_grad:
                raise JobError(
                    "The loss does not depend on any parameter that is trained, so there is nothing to learn."
                )
            scaled = outcome.to_backward(total)
            (scaled if count else scaled * 0).backward()  # type: ignore[no-untyped-call]
        around.faults.reach("backward", step)
        if count:
            yield self._plain(outcome), count

    def evaluate(self, batch: Any, count: int) -> Outcome | None:
        with self._around.autocast():
            return self._plain(objective.compute(self._around.job, self._model, batch, count))

    def _plain(self, outcome: Outcome) -> Outcome:
        """Put together what only some ranks will look at."""
        outcome.output = plain(outcome.output) if self._around.job.metrics else None
        return outcome

    def clear(self) -> None:
        self._abandon()


def make_passes(part: Part, around: Surroundings, feed: Feed) -> Passes:
    """The passes that fit a worker's part of the model."""
    if part.sharded is not None:
        return WholeModel(part.model, around, feed.spare, part.sharded.abandon)
    return WholeModel(part.model, around)


def rows(value: Any, size: int, start: int, stop: int) -> Any:
    """Samples ``start`` to ``stop`` of a collated batch of ``size``: of every tensor and list that has so many rows."""
    if isinstance(value, torch.Tensor):
        return value[start:stop] if value.dim() and value.shape[0] == size else value
    if isinstance(value, dict):
        return type(value)({k: rows(v, size, start, stop) for k, v in value.items()})  # type: ignore[call-arg]
    if isinstance(value, tuple):
        parts = [rows(v, size, start, stop) for v in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if isinstance(value, list):
        whole = len(value) == size and not any(isinstance(v, (torch.Tensor, dict, list, tuple)) for v in value)
        return value[start:stop] if whole else [rows(v, size, start, stop) for v in value]
    return value
