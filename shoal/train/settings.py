"""What a worker has to know beside the job: values that the supervisor sends along."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from shoal.comm.arena import ArenaLayout
from shoal.comm.table import ParameterTable
from shoal.plan import Plan


@dataclass(frozen=True)
class JobFacts:
    """What building the job has brought to light.

    Attributes:
        table: the model's tensors and the optimizer's state.
        samples, eval_samples: sizes of the data sets (0 without evaluation data).
        batchnorm: the model has layers that normalise over the batch.
        statistics_bytes: what a worker gives to the small collectives of one pass through the model (BatchNorm's).
        images: the first batch holds 4-D floating tensors, so that memory layout matters.
        build_s: how long building took.
    """

    table: ParameterTable
    samples: int
    eval_samples: int
    batchnorm: bool
    statistics_bytes: int
    images: bool
    build_s: float

    def collective_bytes(self, plan: Plan) -> int:
        """Room for a worker's part in a step's small collectives: all microbatches, each layer used twice, and some."""
        return (1 << 20) + 2 * (plan.accumulate or 1) * self.statistics_bytes if self.statistics_bytes else 0


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """One run of a job under a plan."""

    plan: Plan
    layout: ArenaLayout
    total_steps: int
    steps_per_epoch: int
    checkpoint_dir: str = ""
    spin_s: float = 0.0
    guard: bool = True
    wait_for_observer: bool = False
    evaluate: bool = True


@dataclass(frozen=True)
class EpochPart:
    """A worker's part of an epoch's evaluation, and of the training metrics that keep a state."""

    epoch: int
    rank: int
    evaluation: object | None
    training: object
    seconds: float


@dataclass(frozen=True)
class MetricPieces:
    """The state of a worker's training metrics at the beginning of a step, for whoever writes its notes to disk."""

    rank: int
    step: int
    pieces: Any


@dataclass(frozen=True)
class ValueNames:
    """The names of the values in the step records, in order; sent once by each worker that computes."""

    names: tuple[str, ...]


@dataclass(frozen=True)
class NotFinite:
    """The loss of a step is NaN or infinite: its samples, as far as this worker had them."""

    step: int
    rank: int
    loss: float
    samples: tuple[int, ...]


@dataclass(frozen=True)
class CheckpointTrouble:
    """A worker could not write its part of a checkpoint."""

    step: int
    reason: str
