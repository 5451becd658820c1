"""What a run will need of memory, before anything of it starts; and the refusal of a plan that needs more than there is.

In the template (``measure``): the model's activations and what every worker has from the beginning. Here: whether a plan
fits, and which would. The arithmetic is in ``shoal.planner.memory``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from shoal.cluster import Cluster
from shoal.errors import PlanError
from shoal.job import Job
from shoal.plan import Plan
from shoal.planner.memory import PROCESS_BYTES, Limits, ModelMemory, Need, propose, refusal, size_text, worker_need
from shoal.process.failure import user_code
from shoal.process.supervisor import Supervisor
from shoal.train import objective
from shoal.train.activations import Activations, measure_activations, model_memory
from shoal.train.built import Built
from shoal.train.settings import JobFacts, layout_of, portions_of
from shoal.train.split import Split

_MOST_SAMPLES = 8
_WORKERS_PROPOSED = 8
_TOUCHED_LATER_BYTES = 60_000_000
"""Of a worker's own, beside what the template had: library pages that computing touches, and small heaps."""
_NEAR = 0.5


# -- in the template ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """What is known of a model's memory: ``memory`` is for the planner, ``homes`` says which unit uses a parameter first."""

    memory: ModelMemory
    homes: dict[str, tuple[int, ...]]


def measure(built: Built, facts: JobFacts, plan: Plan, cut: Sequence[str]) -> Measured:
    """Find out what a model needs under a plan's precision; it may be left changed: call this in a process of its own.

    Args:
        cut: the parameters that the tensor axis cuts.
    """
    process_bytes = _own_bytes(built)
    batch = min(built.job.batch_size, facts.samples)
    count = min(_MOST_SAMPLES, batch)
    with user_code("train_data"):
        example = built.train.fetch(np.arange(count, dtype=np.int64), built.job.collate, None)
    kept: list[Any] = []

    def loss(model: nn.Module, given: Any) -> Any:
        # What the model made stays until the backward pass is over: metrics look at it.
        kept[:] = objective.raw_loss(built.job, model, given)
        return kept[0]

    modes = sorted({"full", plan.recompute or "none"})
    found: Activations = measure_activations(built.model, example, count, loss, plan.precision or "fp32", modes)
    names = set(cut)
    memory = model_memory(facts.table, found, batch, process_bytes, lambda name: name in names)
    return Measured(dataclasses.replace(memory, portioned=portions_of(plan, facts) > 0), found.homes)


def _own_bytes(built: Built) -> int:
    """What a worker that is forked now would have of its own, but for the model's weights."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        resident = int(lines["RssAnon"].split()[0]) << 10
    except (OSError, KeyError, ValueError):
        return PROCESS_BYTES
    weights = sum(p.numel() * p.element_size() for p in built.model.parameters() if not p.is_meta)
    return max(resident - weights, 0) + _TOUCHED_LATER_BYTES


# -- in the process that asks ------------------------------------------------------------------------------------------


class Forecast:
    """Whether plans for a job fit into a machine. Nothing is measured where there is no doubt."""

    def __init__(self, job: Job, facts: JobFacts, supervisor: Supervisor, machine: Cluster) -> None:
        self._job, self._facts, self._supervisor, self._machine = job, facts, supervisor, machine
        self._known: dict[Any, Measured] = {}
        self.limits = Limits(machine.memory_limit_bytes, machine.memory_bytes, max(_WORKERS_PROPOSED, machine.cores))

    def doubtful(self, plan: Plan) -> bool:
        """Whether a plan has to be looked at: there is a limit, or what it certainly takes comes near what the machine has."""
        if self.limits.worker_bytes is not None:
            return True
        certain = layout_of(plan, self._facts, None).size + (plan.world_size + plan.servers) * PROCESS_BYTES
        return certain > _NEAR * self._machine.memory_bytes

    def need(self, plan: Plan, split: Split | None) -> tuple[ModelMemory, Need]:
        """What a complete plan needs, with the stages and the layers that are really cut."""
        cut = tuple(split.layout.shards) if split is not None and split.layout is not None else ()
        measured = self._measured(plan, cut)
        stages = units_of_stages(measured, split.stages.parameters) if split is not None and split.stages else None
        return measured.memory, worker_need(measured.memory, plan, stages)

    def refuse(self, wanted: Plan, plan: Plan, split: Split | None) -> Need | None:
        """Return what a plan needs, where that is in doubt; PlanError, with what would fit, where it is too much.

        Args:
            wanted: what was asked for.
            plan: the same, complete.
        """
        if not self.doubtful(plan):
            return None
        memory, need = self.need(plan, split)
        if self.limits.hold(memory, plan, need):
            return need
        raise PlanError(refusal(memory, wanted, need, self.limits, self.better(wanted, plan)))

    def fits(self, plan: Plan) -> bool:
        """Whether a complete plan that does not split the model fits."""
        if not self.doubtful(plan):
            return True
        memory, need = self.need(plan, None)
        return self.limits.hold(memory, plan, need)

    def better(self, wanted: Plan, plan: Plan) -> tuple[Plan, Need] | None:
        """The smallest plan that fits and that the model can be split by, or None."""
        pair = Plan(dp=1, tp=2, threads=1).filled()
        try:
            cut = tuple(self._split(pair).layout.shards)
        except PlanError:
            cut = ()
        measured = self._measured(plan, cut)

        def check(candidate: Plan) -> Need | None:
            complete = candidate.replace(threads=candidate.threads or 1).filled()
            try:
                return self.need(complete, self._split(complete))[1]
            except PlanError:
                return None

        return propose(measured.memory, wanted, self.limits, check)

    def too_little(self, wanted: Plan, plan: Plan) -> str:
        """The sentence for a machine that no plan fits into, with what the first one tried would need."""
        memory, need = self.need(plan, None)
        return refusal(memory, wanted, need, self.limits, None)

    def _measured(self, plan: Plan, cut: tuple[str, ...]) -> Measured:
        # What grows with the batch is known by the sample, so that one measurement serves plans with other shares.
        key = (plan.precision, plan.recompute, cut)
        if key not in self._known:
            self._known[key] = self._supervisor.call("forecast", plan, cut)
        return self._known[key]

    def _split(self, plan: Plan) -> Any:
        return self._supervisor.call("split", plan)


def units_of_stages(measured: Measured, parameters: Sequence[Sequence[str]]) -> list[list[int]]:
    """Which units each stage of a pipeline has; a unit whose parts lie in two is counted for the first one."""
    stage_of: dict[str, int] = {}
    for stage, names in enumerate(parameters):
        for name in names:
            stage_of.setdefault(name, stage)
    found: list[list[int]] = [[] for _ in parameters]
    at = 0
    for unit in range(len(measured.memory.units)):
        own = [stage_of[name] for name, homes in measured.homes.items() if homes == (unit,) and name in stage_of]
        at = max(at, min(own, default=at))
        if unit + 1 == len(measured.memory.units) and unit:
            # What comes last is where the loss is.
            at = len(parameters) - 1
        found[at].append(unit)
    return found


def limit_text(limits: Limits) -> str:
    """How a sentence names the limit."""
    if limits.worker_bytes is not None:
        return f"{size_text(limits.worker_bytes)} a worker"
    return f"the {size_text(limits.machine_bytes or 0)} of this machine"
