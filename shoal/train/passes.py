"""Forward and backward passes of one worker: through the whole model, or through its stages of a pipeline.

``train`` gives an outcome for each microbatch on the ranks that know it, ``evaluate`` likewise for a batch. Everything around it
(which samples, what is logged, what becomes of the gradients) is the loop's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from shoal.axes.pipeline import Pipeline
from shoal.axes.tensor_cut import plain
from shoal.comm.arena import Phase, Slot
from shoal.errors import JobError
from shoal.job import Job
from shoal.plan import Plan
from shoal.process.failure import user_code
from shoal.train import objective, streams
from shoal.train.batchnorm import GlobalBatchNorm, without_statistics
from shoal.train.faults import Faults
from shoal.train.feed import SPARE, Feed, Share, to_device
from shoal.train.objective import Outcome
from shoal.train.part import Part


@dataclass(kw_only=True)
class Surroundings:
    """What passes need beside a model.

    Attributes:
        rank: of this worker, for what the user is told.
        replica: which replica it is part of: random streams are the same all over a replica. A worker that waits for nobody
            computes now one's share, now another's.
        precision: the plan's: "bf16" runs the model under autocast.
        batchnorm: is told who takes part in a microbatch; None where nobody else's samples matter.
        device: where the model is.
    """

    job: Job
    rank: int
    replica: int
    slot: Slot
    faults: Faults
    precision: str | None = None
    batchnorm: GlobalBatchNorm | None = None
    device: torch.device = torch.device("cpu")

    def autocast(self) -> AbstractContextManager[Any]:
        """The context in which the model runs."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.precision == "bf16" else contextlib.nullcontext()

    def bring(self, batch: Any) -> Any:
        """A batch where the model is."""
        return batch if self.device.type == "cpu" else to_device(batch, self.device)

    def announce(self, counts: tuple[int, ...]) -> None:
        """Say how many samples each replica has in the microbatch that comes next."""
        if self.batchnorm is not None:
            self.batchnorm.taking_part([replica for replica, n in enumerate(counts) if n])

    def place(self, step: int, micro: int) -> tuple[int, ...]:
        """What the random streams of a microbatch are seeded from."""
        return streams.STEP, self.job.seed, step, self.replica, micro


class Passes(Protocol):
    """How a worker computes."""

    @property
    def knows_loss(self) -> bool:
        """Whether outcomes come out here: this rank has the model's last stage."""

    def train(self, step: int, batches: Sequence[tuple[Share, Any]], total: int) -> Iterator[tuple[Outcome, int]]:
        """Forward and backward over a step's microbatches.

        Args:
            batches: the replica's shares, with their batches; None for one that is empty.
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
        sharded: the sharded axis' hold of the model. With it all workers have to call the model equally often.
        spare: makes a batch for a worker that has none and must call the model all the same.
    """

    knows_loss = True

    def __init__(
        self, model: nn.Module, around: Surroundings, sharded: Any = None, spare: Callable[[], Any] | None = None
    ) -> None:
        self._model = model
        self._around = around
        self._sharded = sharded
        self._spare = spare

    def train(self, step: int, batches: Sequence[tuple[Share, Any]], total: int) -> Iterator[tuple[Outcome, int]]:
        for micro, (share, batch) in enumerate(batches):
            if len(share.indices):
                yield self._plain(self._pass(step, micro, share, batch, total)), len(share.indices)
            elif self._spare is not None:
                with self._sharded.unnoticed(), without_statistics(self._model):
                    self._pass(step, micro, Share(share.indices, ()), self._spare(), total)

    def _pass(self, step: int, micro: int, share: Share, batch: Any, total: int) -> Outcome:
        around, count = self._around, len(share.indices)
        around.slot.enter(Phase.FORWARD, step)
        around.announce(share.counts)
        streams.reseed(*around.place(step, micro))
        batch = around.bring(batch)
        with user_code("the model or its loss", around.rank):
            with around.autocast():
                outcome = objective.compute(around.job, self._model, batch, count or SPARE)
            around.faults.reach("forward", step)
            around.slot.enter(Phase.BACKWARD, step)
            check_learnable(outcome)
            scaled = outcome.to_backward(total)
            (scaled if count else scaled * 0).backward()  # type: ignore[no-untyped-call]
        around.faults.reach("backward", step)
        return outcome

    def evaluate(self, batch: Any, count: int) -> Outcome | None:
        batch = self._around.bring(batch)
        with self._around.autocast():
            return self._plain(objective.compute(self._around.job, self._model, batch, count))

    def _plain(self, outcome: Outcome) -> Outcome:
        """Put together what only some ranks will look at."""
        outcome.output = plain(outcome.output) if self._around.job.metrics else None
        return outcome

    def clear(self) -> None:
        if self._sharded is not None:
            self._sharded.abandon()


class Pipelined:
    """Passes through a rank's stages of a pipeline: see ``shoal.axes.pipeline`` for how a batch travels.

    Args:
        parts: the paths of the parts between which it may be cut.
        sharded: the sharded axis' hold of the stages. With it all replicas have to go through the same microbatches.
        spare: makes a batch for a replica that has none and must go through its microbatch all the same.
    """

    def __init__(
        self, pipeline: Pipeline, around: Surroundings, microbatches: int, parts: Collection[str],
        sharded: Any = None, spare: Callable[[], Any] | None = None,
    ) -> None:  # fmt: skip
        self._pipeline = pipeline
        self._around = around
        self._sharded, self._spare = sharded, spare
        self._streams = streams.PartStreams()
        for stage in pipeline.stages.values():
            for path in parts:
                self._streams.begin_at(stage.module.get_submodule(path), path)
        self._microbatches = microbatches

    @property
    def knows_loss(self) -> bool:
        return self._pipeline.has_last_stage

    def train(self, step: int, batches: Sequence[tuple[Share, Any]], total: int) -> Iterator[tuple[Outcome, int]]:
        for first in range(0, len(batches), self._microbatches):
            round_ = [
                (first + k, share, batch)
                for k, (share, batch) in enumerate(batches[first : first + self._microbatches])
                if len(share.indices) or (self._spare is not None and any(share.counts))
            ]
            if round_:
                yield from self._go_through(step, round_, total)

    def _go_through(self, step: int, round_: Sequence[tuple[int, Share, Any]], total: int) -> list[tuple[Outcome, int]]:
        around, outcomes = self._around, {}

        def is_spare(at: int) -> bool:
            return not len(round_[at][1].indices)

        def compute(stage_module: nn.Module, batch: Any, at: int, stage: int) -> torch.Tensor:
            micro, share, _ = round_[at]
            around.slot.enter(Phase.FORWARD, step)
            around.announce(() if is_spare(at) else share.counts)
            self._streams.at(*around.place(step, micro))
            quiet = without_statistics(stage_module) if is_spare(at) else contextlib.nullcontext()
            with around.autocast(), quiet:
                outcome = objective.compute(around.job, stage_module, batch, len(share.indices) or SPARE)
            check_learnable(outcome)
            outcomes[at] = outcome
            around.slot.enter(Phase.BACKWARD, step)
            scaled = outcome.to_backward(total)
            return scaled * 0 if is_spare(at) else scaled

        def passing(at: int) -> AbstractContextManager[None]:
            return self._sharded.unnoticed() if is_spare(at) else contextlib.nullcontext()

        with user_code("the model or its loss", around.rank):
            around.faults.reach("forward", step)
            batches = [self._spare() if batch is None and self._spare else batch for _, _, batch in round_]
            self._pipeline.train([around.bring(batch) for batch in batches], compute, passing)
        around.faults.reach("backward", step)
        return [
            (self._detached(outcomes[at]), len(round_[at][1].indices)) for at in sorted(outcomes) if not is_spare(at)
        ]

    def _detached(self, outcome: Outcome) -> Outcome:
        outcome.output = plain(outcome.output) if self._around.job.metrics else None
        return outcome

    def evaluate(self, batch: Any, count: int) -> Outcome | None:
        around = self._around

        def compute(stage_module: nn.Module, given: Any, at: int, stage: int) -> Outcome:
            with around.autocast():
                return objective.compute(around.job, stage_module, given, count)

        self._streams.rest()
        found = self._pipeline.evaluate([around.bring(batch)], compute)
        return self._detached(found[0]) if found else None

    def clear(self) -> None:
        self._pipeline.clear()
        if self._sharded is not None:
            self._sharded.abandon()


def check_learnable(outcome: Outcome) -> None:
    """JobError where a loss has no gradient."""
    if not outcome.loss.requires_grad:
        raise JobError("The loss does not depend on any parameter that is trained, so there is nothing to learn.")


def make_passes(part: Part, around: Surroundings, feed: Feed, plan: Plan) -> Passes:
    """The passes that fit a worker's part of the model."""
    if part.pipeline is not None:
        spare = None if part.sharded is None else feed.spare
        return Pipelined(part.pipeline, around, plan.microbatches or 1, part.parts, part.sharded, spare)
    if part.sharded is not None:
        return WholeModel(part.model, around, part.sharded, feed.spare)
    return WholeModel(part.model, around)
