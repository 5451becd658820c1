"""Who holds what: from a model, its optimizer's table and a plan to the table of parts.

The tensor axis says which parameters are cut and how, the pipeline axis which stages use which, the sharded axis who has
which rows. Here these three are put together: one ``TensorSpec`` for each part, laid out owner by owner (see ``Grid``), and
an ``Echo`` where a rank computes a gradient of a weight that another one owns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shoal.axes import zero
from shoal.axes.owners import owning_stages
from shoal.comm.grid import Grid
from shoal.comm.parts import Region, part_shape
from shoal.comm.table import FROZEN, Echo, ParameterTable, StateSpec, TensorSpec, align
from shoal.errors import PlanError

_PAGE = 4096
ELEMENT_BY_ELEMENT = ("NAdam", "RAdam", "Adamax", "Adadelta", "ASGD", "Rprop")
"""Optimizers of torch that treat every element alike, beside those whose work is cut anywhere (``describe.ELEMENTWISE``)."""


@dataclass(frozen=True)
class Split:
    """A model in parts.

    Attributes:
        grid: the ranks.
        table: the parts, and the gradients beside them.
        holds: (owner, parameter's name) -> index in the table of the part that this owner's ranks compute with.
        stages: what the pipeline axis needs to build a stage; None without one.
        layout: what the tensor axis needs to cut a stage; None without one.
        explanation: sentences about what was split how.
    """

    grid: Grid
    table: ParameterTable
    holds: Mapping[tuple[int, str], int]
    stages: Any = None
    layout: Any = None
    explanation: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ways:
    """What the axes say of the parameters, by the model's own names.

    Attributes:
        users: the ranks along the pipeline whose stages use a parameter, in order; () for one that nobody uses.
        regions: of a parameter that the tensor axis cuts, the region of each rank along it.
    """

    users: Mapping[str, Sequence[int]]
    regions: Mapping[str, Sequence[tuple[Region, ...]]]


def split_table(
    base: ParameterTable, grid: Grid, ways: Ways, optimizer: str
) -> tuple[ParameterTable, dict[tuple[int, str], int]]:
    """Cut a table into parts.

    Args:
        base: the model's table, of whole tensors.
        grid: the ranks.
        ways: what the axes say.
        optimizer: the name of its type, for a refusal.

    Returns the new table, and ``Split.holds``. PlanError where the optimizer needs whole tensors and they are cut.
    """
    whole = kept_whole_of(base) if grid.sharded else set()
    stages = {spec.name: _stages_of(spec, ways) for spec in base.parameters}
    homes = owning_stages({spec.name: spec.nbytes for spec in base.parameters}, stages)
    found = [
        _Found(index, part, users, echoing)
        for index, spec in enumerate(base.parameters)
        for part, users, echoing in _parts_of(
            spec, grid, ways, (homes[spec.name], stages[spec.name]), spec.name not in whole
        )
    ]
    _refuse_cut_tensors(base, [entry.part for entry in found], optimizer)
    # Trained ones first; then by owner, dtype and group, so that neighbours can be updated together.
    found.sort(key=lambda f: (f.part.group == FROZEN, f.part.owner, str(f.part.dtype), f.part.group, f.index))
    parts, trained_bytes, weight_bytes = _lay_out([entry.part for entry in found])
    holds = {(owner, name): k for k, entry in enumerate(found) for owner in entry.users for name in entry.part.names}
    echoes, echo_bytes = _echoes(parts, found)
    states, state_bytes = _states(base, parts, [entry.index for entry in found])
    table = dataclasses.replace(
        base, parameters=tuple(parts), trained_bytes=trained_bytes, weight_bytes=weight_bytes, echoes=echoes,
        echo_bytes=echo_bytes, states=states, state_bytes=state_bytes,
    )  # fmt: skip
    return table, holds


@dataclass(frozen=True)
class _Found:
    """A part of the base table's ``index``-th parameter.

    ``users``: the owners whose ranks compute with it; ``echoing``: those whose gradients must be added to its own owner's.
    """

    index: int
    part: TensorSpec
    users: tuple[int, ...]
    echoing: tuple[int, ...]


def _stages_of(spec: TensorSpec, ways: Ways) -> list[int]:
    """The ranks along the pipeline that use a parameter."""
    return sorted({user for name in spec.names for user in ways.users.get(name, ())}) or [0]


def _parts_of(
    spec: TensorSpec, grid: Grid, ways: Ways, at: tuple[int, Sequence[int]], shards: bool
) -> Iterator[tuple[TensorSpec, tuple[int, ...], tuple[int, ...]]]:
    """The parts of one parameter, each with its users and those that echo (see ``_Found``).

    ``at``: the rank along the pipeline that owns it, and all that use it.
    """
    home, stages = at
    cut = next((ways.regions[name] for name in spec.names if name in ways.regions), None)
    leads = True
    for tensor in range(grid.tp if cut is not None else 1):
        regions = tuple(cut[tensor]) if cut is not None else ()
        local = part_shape(spec.shape, regions)
        rows = zero.shards({spec.name: local}, grid.dp).get(spec.name) if grid.sharded and shards else None
        for data in range(grid.dp if rows is not None else 1):
            own = regions if rows is None else (*regions, rows[data])
            part = dataclasses.replace(
                spec, shape=part_shape(spec.shape, own), whole=spec.shape if own else None, regions=own,
                owner=grid.owner_at(home, tensor, data),
            )  # fmt: skip
            part = dataclasses.replace(part, leads=leads and (part.numel > 0 or spec.numel == 0))
            leads = leads and not part.leads
            tensors = [tensor] if cut is not None else range(grid.tp)
            datas = [data] if rows is not None else range(grid.dp if grid.sharded else 1)
            users = tuple(grid.owner_at(s, t, d) for s in stages for t in tensors for d in datas)
            # Along the tensor axis the gradients of what is not cut are the same everywhere: one of them is enough.
            same = {grid.owner_at(s, tensor, d) for s in stages for d in datas} - {part.owner}
            yield part, users, tuple(sorted(same))


def _lay_out(found: Sequence[TensorSpec]) -> tuple[list[TensorSpec], int, int]:
    parts: list[TensorSpec] = []
    at = trained_bytes = 0
    for part in found:
        if parts and parts[-1].owner != part.owner:
            # A page of memory that two owners share would count for both.
            at = -(-at // _PAGE) * _PAGE
        parts.append(dataclasses.replace(part, offset=at))
        at = align(at + part.nbytes)
        if part.group != FROZEN:
            trained_bytes = at
    return parts, trained_bytes, at


def _echoes(parts: Sequence[TensorSpec], found: Sequence[_Found]) -> tuple[tuple[Echo, ...], int]:
    """A place for each gradient that is computed by somebody else than the weight's owner."""
    echoes: list[Echo] = []
    size = 0
    for index, (part, entry) in enumerate(zip(parts, found, strict=True)):
        for owner in entry.echoing if part.group != FROZEN else ():
            echoes.append(Echo(index, owner, size))
            size = align(size + part.nbytes)
    return tuple(echoes), size


def _states(
    base: ParameterTable, parts: Sequence[TensorSpec], of: Sequence[int]
) -> tuple[tuple[StateSpec, ...], int]:
    """The state tensors of the parts: cut like the parameter where they have its shape."""
    states: list[StateSpec] = []
    at = 0
    for index, part in enumerate(parts):
        for state in base.states:
            if state.parameter == of[index]:
                shape = part.shape if state.shape == part.whole_shape else state.shape
                states.append(StateSpec(index, state.key, shape, state.dtype, at))
                at = align(at + states[-1].nbytes)
    return tuple(states), at


def kept_whole_of(base: ParameterTable) -> set[str]:
    """The names of the parameters that the sharded axis does not cut."""
    return zero.kept_whole(
        {spec.name: spec.dtype for spec in base.parameters},
        {spec.name: spec.shape for spec in base.parameters},
        {spec.name: spec.nbytes for spec in base.trained},
    )


def _refuse_cut_tensors(base: ParameterTable, parts: Sequence[TensorSpec], optimizer: str) -> None:
    if base.elementwise or optimizer in ELEMENT_BY_ELEMENT:
        return
    cut = next((part.name for part in parts if part.regions and part.group != FROZEN), None)
    if cut is not None:
        raise PlanError(
            f"{optimizer} needs whole tensors and the plan cuts {cut}; use dp and pp only, or an optimizer that treats every "
            "element alike (SGD, Adam, AdamW, Adagrad, RMSprop)."
        )
