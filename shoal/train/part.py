"""What one worker has of the model, and how the model is cut for that."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from shoal.axes.zero import SMALLEST_SHARE
from shoal.comm.grid import Grid
from shoal.comm.store import Store
from shoal.comm.table import ParameterTable
from shoal.errors import PlanError
from shoal.plan import Plan
from shoal.process.failure import user_code
from shoal.train import objective
from shoal.train.built import Built
from shoal.train.describe import trained_parameters
from shoal.train.gradients import Shards, Target
from shoal.train.split import Split, Ways, kept_whole_of, split_table

_MOST_SAMPLES_TRIED = 8
_MOST_NAMED = 8


@dataclass(frozen=True)
class Part:
    """What one worker has of the model.

    Attributes:
        model: its modules; the whole model, or a list of its stages.
        parameters: the trained ones by their index in the table, for an optimizer that steps whole tensors.
        targets, shards: where gradients go.
        sharded: the sharded axis' hold of the model, where there is one.
        pipeline: what the microbatches go through, where the model is cut into stages.
        publishes: the names of the buffers that this worker computes; None for all.
        parts: paths of the modules between which a pipeline may be cut.
    """

    model: nn.Module
    parameters: Sequence[nn.Parameter]
    targets: Sequence[Target]
    shards: Shards | None = None
    sharded: Any = None
    pipeline: Any = None
    publishes: frozenset[str] | None = None
    parts: tuple[str, ...] = ()


# -- cutting -----------------------------------------------------------------------------------------------------------


def cut_model(built: Built, table: ParameterTable, plan: Plan) -> Split | None:
    """Decide how a model is split under a plan; None where every worker has all of it. PlanError where it does not fit.

    The model is run on a few samples, to find out what it computes and what it costs, and may be left changed: call this
    in a process of its own.
    """
    grid = Grid.of(plan)
    if not grid.splits_model:
        return None
    job, model = built.job, built.model
    samples = _samples_tried(built, plan)
    with user_code("train_data"):
        batch = built.train.fetch(np.arange(samples, dtype=np.int64), job.collate, None)
    explanation: list[str] = []
    layout: Any = None
    users: dict[str, Sequence[int]] = {}
    stages: Any = None
    if grid.tp > 1:
        from shoal.axes import tensor

        def example(candidate: nn.Module) -> Any:
            return objective.compute(job, candidate, batch, samples).loss

        # Stages are cut from the model as it is; without them, nobody needs it any more.
        layout = tensor.find_layout(
            copy.deepcopy(model) if grid.pp > 1 else model, grid.tp, job.tensor_plan, bool(plan.sequence_parallel),
            example=example,
            samples=samples,
        )  # fmt: skip
        if layout.why is not None:
            raise PlanError(layout.why)
        explanation += _explain(layout)
    if grid.pp > 1:
        stages, users = _cut_stages(built, plan, batch, samples)
        explanation += stages.explanation
        if grid.sharded and any(boundary.function is not None for boundary in stages.boundaries):
            raise PlanError(
                "pp and zero=3 need a model whose stages begin at a module, and this one is cut between two functions; "
                "use zero=2 with pp, or give the model's layers as modules of their own."
            )
    if grid.sharded:
        explanation.append(_explain_shards(model, table, grid.dp))
    shards = layout.shards if layout is not None else {}
    regions = {name: [(region,) for region in own] for name, own in shards.items()}
    parts, holds = split_table(table, grid, Ways(users, regions), type(built.optimizer).__name__)
    return Split(grid, parts, holds, stages, layout, tuple(explanation))


def _samples_tried(built: Built, plan: Plan) -> int:
    share = min(built.job.batch_size, len(built.train)) // (plan.data_ways * (plan.microbatches or 1))
    return max(1, min(_MOST_SAMPLES_TRIED, share, len(built.train)))


def _explain(layout: Any) -> list[str]:
    """What a tensor layout splits and what not, in two sentences; layers that differ only by a number are named together."""
    layers = "1 layer" if len(layout.split) == 1 else f"{len(layout.split)} layers"
    split = f"tp={layout.ways} splits {layers}: {_grouped(entry.split(': ', 1) for entry in layout.split)}."
    if not layout.replicated:
        return [split]
    return [split, f"Not split: {_grouped((path, f'({why})') for path, why in layout.replicated)}."]


def _grouped(entries: Iterable[Sequence[str]]) -> str:
    """(path, what is said of it) -> "a.*.b, c by outputs; d.*.e by inputs"."""
    said: dict[str, dict[str, None]] = {}
    for path, what in entries:
        *above, last = path.split(".")
        pattern = ".".join(["*" if word.isdigit() else word for word in above] + [last])
        said.setdefault(what, {})[pattern or "the model's own parameters"] = None
    return "; ".join(f"{_few(list(patterns))} {what}" for what, patterns in said.items())


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:_MOST_NAMED]) + (f" and {rest} more" if (rest := len(names) - _MOST_NAMED) > 0 else "")


def _explain_shards(model: nn.Module, table: ParameterTable, ways: int) -> str:
    from shoal.axes.blocks import find_blocks

    blocks = len(find_blocks(model, SMALLEST_SHARE, shared=False))
    said = f"zero=3 keeps 1/{ways} of the rows of every weight on each worker"
    said += f" and gathers {blocks} blocks one at a time" if blocks > 1 else " and gathers all of them at once"
    whole = sorted(kept_whole_of(table))
    return said + (f"; whole stay {', '.join(whole[:6])}." if whole else ".")


def _cut_stages(built: Built, plan: Plan, batch: Any, samples: int) -> tuple[Any, dict[str, Sequence[int]]]:
    """Cut a model into the stages of a plan; also which ranks along the pipeline use which parameter."""
    from shoal.axes import pipeline

    schedule, ranks = plan.schedule or "1f1b", plan.pp or 1
    count = ranks * pipeline.stages_a_rank(schedule, plan.interleave)
    # What makes several stages a rank has to be in the refusal of too many.
    said = {"pp": ranks, "schedule": schedule if count > ranks else None, "interleave": plan.interleave}
    asked = ",".join(f"{key}={value}" for key, value in said.items() if value is not None)

    def compute(model: nn.Module, example: Any) -> torch.Tensor:
        return objective.compute(built.job, model, example, samples).loss

    cut = pipeline.find_cut(
        built.model, count, batch, compute=compute, split_points=built.job.split_points, asked=asked,
        holders=[pipeline.rank_of_stage(schedule, ranks, stage) for stage in range(count)],
    )  # fmt: skip
    users: dict[str, Sequence[int]] = {}
    for stage, names in enumerate(cut.parameters):
        rank = pipeline.rank_of_stage(schedule, ranks, stage)
        for name in names:
            users[name] = sorted({*users.get(name, ()), rank})
    return cut, users


# -- a worker's part ---------------------------------------------------------------------------------------------------


def whole_part(built: Built, table: ParameterTable, store: Store, rank: int) -> Part:
    """The whole model, bound to the arena by the host."""
    parameters = trained_parameters(built.model, table)
    if store.local:
        for index, parameter in enumerate(parameters):
            parameter.data = store.weight(index, rank)
    targets = [Target(parameter, index) for index, parameter in enumerate(parameters)]
    ours = {id(p) for p in parameters}
    targets += [Target(p) for p in built.model.parameters() if p.requires_grad and id(p) not in ours]
    return Part(built.model, parameters, targets)


Prepare = Callable[[nn.Module], None]


def take_part(
    built: Built, split: Split, plan: Plan, store: Store, rank: int, prepare: Prepare, mesh: Any = None
) -> Part:
    """Shape this process's copy of the model, whose parameters are on the meta device, into the part of a rank.

    ``prepare`` is called with each module that the user's code will run, before its parameters are put in their place.
    ``mesh``: the ranks along each axis, "dp", "pp" and "tp"; where it is None, torch's default group is this rank's team.
    """
    from torch.distributed.device_mesh import init_device_mesh

    from shoal.axes import tensor

    grid = split.grid
    owner = grid.owner(rank)
    if mesh is None:
        shape = {"dp": grid.dp if grid.sharded else 1, "pp": grid.pp, "tp": grid.tp}
        mesh = init_device_mesh("cpu", tuple(shape.values()), mesh_dim_names=tuple(shape))

    def local(name: str) -> torch.Tensor:
        # With a version counter of its own: autograd must not take every write into the arena for one to this weight.
        return store.weights[split.holds[owner, name]].data

    def shape_module(module: nn.Module) -> None:
        if split.layout is not None:
            tensor.apply(module, split.layout, mesh["tp"])
        prepare(module)

    parameters = [nn.Parameter(store.weights[index]) for index in range(len(split.table.trained))]
    if grid.pp > 1:
        return _take_stages(built, split, plan, owner, mesh, local, shape_module, parameters)
    model, sharded = built.model, None
    shape_module(model)
    if grid.sharded:
        from shoal.axes import zero

        sharded = zero.apply(model, mesh["dp"])
        sharded.materialise(local)
    else:
        tensor.materialise(model, local)
    targets, shards = _targets([model], split, owner, sharded)
    return Part(model, parameters, targets, shards, sharded)


def _take_stages(
    built: Built, split: Split, plan: Plan, owner: int, mesh: Any, local: Callable[[str], torch.Tensor],
    shape_module: Prepare, parameters: Sequence[nn.Parameter],
) -> Part:  # fmt: skip
    from shoal.axes import pipeline, tensor, zero_stages

    schedule, cut, group = plan.schedule or "1f1b", split.stages, mesh["pp"].get_group()
    rank = torch.distributed.get_rank(group)
    own = pipeline.stages_of_rank(schedule, split.grid.pp, plan.interleave, rank)
    shared: list[Any] = []

    def prepared(index: int) -> Prepare:
        def shape(module: nn.Module) -> None:
            shape_module(module)
            if split.grid.sharded:
                shared.append(zero_stages.shard_stage(module, mesh["dp"], cut.blocks[index]))

        return shape

    stages = [pipeline.build_stage(built.model, cut, index, prepare=prepared(index)) for index in own]
    sharded = zero_stages.ShardedStages(shared) if shared else None
    for stage in stages:
        if sharded is None:
            tensor.materialise(stage.module, local)
        else:
            stage.leaving = functools.partial(zero_stages.leave, stage.module)
    if sharded is not None:
        sharded.materialise(local)
    # A recomputed backward pass would be computed twice, and a sharded one must be whole.
    whole = sharded is not None or (plan.recompute or "none") != "none"
    line = pipeline.Pipeline(stages, group, schedule, plan.interleave, whole_backward=whole)
    targets, shards = _targets([stage.module for stage in stages], split, owner, sharded)
    publishes = frozenset(name for index in own for name in cut.buffers[index])
    parts = tuple(path for blocks in cut.blocks for path in blocks if path)
    return Part(
        nn.ModuleList([stage.module for stage in stages]), parameters, targets, shards, sharded, pipeline=line,
        publishes=publishes, parts=parts,
    )  # fmt: skip


def _targets(
    modules: Sequence[nn.Module], split: Split, owner: int, sharded: Any
) -> tuple[list[Target], Shards | None]:
    """Where the gradient of each parameter of a worker's part goes."""
    table, grid = split.table, split.grid
    echoes = {(echo.parameter, echo.owner): at for at, echo in enumerate(table.echoes)}
    trained = len(table.trained)
    targets: list[Target] = []
    shards = Shards(sharded, [], {}, [], {})
    for name, parameter in (entry for module in modules for entry in module.named_parameters()):
        if not parameter.requires_grad or (owner, name) not in split.holds:
            continue
        index = split.holds[owner, name]
        is_cut = sharded is not None and name not in sharded.kept_whole
        if index >= trained:
            targets.extend([] if is_cut else [Target(parameter)])
        elif not is_cut:
            mine = table.parameters[index].owner == owner
            targets.append(Target(parameter, index) if mine else Target(parameter, echo=echoes.get((index, owner))))
        else:
            # A process that shares no memory knows of its own part alone.
            peers = [(other, split.holds.get((other, name))) for other in _peers(grid, owner)]
            if table.parameters[index].owner == owner:
                shards.own.append((index, parameter))
                shards.parts[name] = [part for _, part in peers if part is not None]
            elif (index, owner) in echoes:
                shards.echoes.append((echoes[index, owner], parameter))
                found = (echoes.get((part, other)) for other, part in peers if part is not None)
                shards.echo_parts[name] = [echo for echo in found if echo is not None]
    return targets, shards if sharded is not None else None


def _peers(grid: Grid, owner: int) -> list[int]:
    """The owners that share a part with this one: those of the same stage and tensor part, along the data axis."""
    return [grid.owner(rank) for rank in grid.along_data(grid.ranks_of(owner)[0])]


# -- parameters that are elsewhere -------------------------------------------------------------------------------------


def to_meta(model: nn.Module) -> None:
    """Give back the memory of a model's parameters: what is left knows their shapes only. Tied ones stay tied."""
    made: dict[int, nn.Parameter] = {}
    emptied: list[nn.Parameter] = []
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or parameter.is_meta:
                continue
            if id(parameter) not in made:
                meta = torch.empty_like(parameter, device="meta")
                made[id(parameter)] = nn.Parameter(meta, requires_grad=parameter.requires_grad)
                emptied.append(parameter)
            module._parameters[name] = made[id(parameter)]
    for parameter in emptied:
        # The optimizer still knows the old objects.
        parameter.data = torch.empty(0, dtype=parameter.dtype)
