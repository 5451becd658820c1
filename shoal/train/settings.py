"""What a worker has to know beside the job: values that the supervisor sends along."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shoal.axes.server_backup import chosen_bytes
from shoal.comm.arena import ArenaLayout
from shoal.comm.grid import Grid
from shoal.comm.store import arena_layout
from shoal.comm.table import ParameterTable
from shoal.comm.team import team_bytes
from shoal.data.order import share_bounds
from shoal.job import Job
from shoal.plan import Plan
from shoal.ps.lbfgs import DIRECTION, products_bytes
from shoal.ps.ledger import regions
from shoal.ps.portions import portion_bytes, spare_stripes
from shoal.ps.spec import TableSpec
from shoal.train.split import Split


@dataclass(frozen=True)
class JobFacts:
    """What building the job has brought to light.

    Attributes:
        table: the model's tensors and the optimizer's state.
        tables: the rows of its ``shoal.ps.Embedding``.
        samples, eval_samples: sizes of the data sets (0 without evaluation data).
        batchnorm: the model has layers that normalise over the batch.
        statistics_bytes: what a worker gives to the small collectives of one pass through the model (BatchNorm's).
        images: the first batch holds 4-D floating tensors, so that memory layout matters.
        build_s: how long building took.
        batch_size: of the job, or all samples where there are fewer.
        stateful: a metric over the training data keeps a state.
    """

    table: ParameterTable
    tables: tuple[TableSpec, ...]
    samples: int
    eval_samples: int
    batchnorm: bool
    statistics_bytes: int
    images: bool
    build_s: float
    batch_size: int = 1
    stateful: bool = False

    def collective_bytes(self, plan: Plan) -> int:
        """Room for a worker's part in a step's small collectives: all microbatches, each layer used twice, and some."""
        if not self.statistics_bytes:
            return 0
        pieces = (plan.accumulate or 1) * (plan.microbatches or 1)
        if plan.sub_batch:
            pieces *= -(-self.batch_size // plan.sub_batch)
        return (1 << 20) + 2 * pieces * self.statistics_bytes


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """One run of a job under a plan.

    ``split``: how the model is divided, where it is; ``cold_dir``: for tables' cold rows; ``log_dir``: of the servers'
    write-ahead logs, or nothing; ``portions``: see ``portions_of``, where workers share no memory.
    """

    plan: Plan
    layout: ArenaLayout
    total_steps: int
    steps_per_epoch: int
    checkpoint_dir: str = ""
    spin_s: float = 0.0
    guard: bool = True
    wait_for_observer: bool = False
    evaluate: bool = True
    skip_bad_pushes: bool = False
    split: Split | None = None
    cold_dir: str = ""
    log_dir: str = ""
    portions: int = 0

    @property
    def units_per_step(self) -> int:
        """Of how many units of work a step is made that are claimed and pushed."""
        return self.portions or self.grid.dp

    @property
    def grid(self) -> Grid:
        return grid_of(self.plan, self.split)


def grid_of(plan: Plan, split: Split | None) -> Grid:
    """The ranks of a run.

    Where workers push to servers and the model is not known to be split, each counts as one rank: which processes make it up is
    its own matter (``shoal.train.remote.teams``).
    """
    grid = Grid.of(plan)
    return Grid(dp=grid.dp, servers=grid.servers) if split is None and grid.servers else grid


def table_of(facts: JobFacts, split: Split | None) -> ParameterTable:
    """The tensors of a run: the model's, or the parts that it is split into."""
    return facts.table if split is None else split.table


def portions_of(plan: Plan, facts: JobFacts) -> int:
    """Into how many portions a batch is cut that workers take as they come; 0 where each has a share of its own.

    That is batch optimisation, L-BFGS. What belongs to workers and not to the batch keeps them at their own shares: metrics
    with a state, statistics over the global batch, gradients of rows.
    """
    if DIRECTION not in facts.table.state_keys or plan.ps is None or facts.tables or facts.stateful:
        return 0
    if facts.batchnorm and plan.batchnorm != "local":
        return 0
    return (plan.accumulate or 1) * plan.data_ways


def units_of(plan: Plan, facts: JobFacts) -> int:
    """Into how many units a batch is cut that workers claim and push who share no memory."""
    return portions_of(plan, facts) or plan.data_ways


def layout_of(plan: Plan, facts: JobFacts, split: Split | None, private: bool = False) -> ArenaLayout:
    """The arena of a run; ``private``: its workers share no memory."""
    grid, portions = grid_of(plan, split) if private else Grid.of(plan), portions_of(plan, facts)
    if portions and not private:
        grid = dataclasses.replace(grid, spare_stripes=spare_stripes(portions))
    return arena_layout(
        table_of(facts, split),
        grid,
        0 if private else facts.collective_bytes(plan),
        bool(plan.local_steps),
        private,
        team_bytes(grid),
        _server_regions(plan, grid, facts, private),
    )


def _server_regions(plan: Plan, grid: Grid, facts: JobFacts, private: bool) -> Mapping[str, int]:
    """What a parameter server keeps in the arena beside the weights; without shared memory, what is known of its pushes."""
    if plan.ps is not None and private:
        # A worker may do what all others of a step should have done.
        return regions(grid.world_size, grid.servers, max(plan.push_every or 1, units_of(plan, facts)))
    if plan.ps is not None and DIRECTION in facts.table.state_keys:
        portions = portions_of(plan, facts)
        further = {"portions": portion_bytes(grid.dp, portions)} if portions else {}
        return {"products": products_bytes(grid.servers), **further}
    if plan.waits_for_nobody:
        return regions(grid.world_size, grid.servers, plan.push_every or 1)
    return {"chosen": chosen_bytes(grid.world_size)} if plan.backup else {}


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
class BadPush:
    """A gradient, or the loss where ``parameter`` is None, is no number: of these units and samples."""

    rank: int
    units: tuple[int, ...]
    parameter: str | None
    samples: tuple[int, ...]


@dataclass(frozen=True)
class CheckpointTrouble:
    """A worker could not write its part of a checkpoint."""

    step: int
    reason: str


def batch_line(plan: Plan, job: Job, facts: JobFacts) -> str:
    """How the global batch is divided: 'global 100 = 2 × 50'."""
    batch = min(job.batch_size, facts.samples)
    sizes = [b - a for a, b in share_bounds(batch, plan.shares or (1,) * plan.data_ways)]
    if len(set(sizes)) == 1:
        return f"global {batch} = {len(sizes)} × {sizes[0]}"
    return f"global {batch} = " + " + ".join(map(str, sizes))
