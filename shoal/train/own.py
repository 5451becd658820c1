"""What one process has of a model that is split among processes without shared memory.

In an arena every part exists once. Here each process has the parts that it computes with in memory of its own: those that
nobody else has, and copies of those that others have, too (a norm that the tensor axis leaves whole, a weight that two stages
share, everything along the data axis). Parts that the same ranks hold are a *family*. Its gradients are summed over these
ranks, and then either each of them makes the same update, or (``zero=1`` and ``2``) each updates a slice and gives it to the
others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shoal.comm.table import FROZEN, ParameterTable, StateSpec, TensorSpec, align, slice_bounds
from shoal.errors import PlanError
from shoal.train.split import Split


@dataclass(frozen=True)
class Family:
    """Trained parts that the same ranks hold; they lie together, in the same order in each one's memory.

    Attributes:
        ranks: who holds them, in order.
        start, stop: bytes of this process's trained weights.
        slices: what each of the ranks updates of them, in such bytes; empty where each updates all.
    """

    ranks: tuple[int, ...]
    start: int
    stop: int
    slices: tuple[tuple[int, int], ...] = ()

    def speaks(self, rank: int) -> bool:
        """Whether what a rank updates counts towards the norm of all gradients: it is nobody else's, too."""
        return bool(self.slices) or self.ranks[0] == rank


@dataclass(frozen=True)
class Own:
    """One process's part of a run.

    Attributes:
        split: the split as this process sees it: its table has this process's parts only.
        families: of its trained parts, in the order in which every process goes through its own.
        whole: for each trained part the index of its parameter in the model's own table.
        spoken: the names of the parts that this process, and no other, writes into checkpoints (of a sliced one: its slice).
        groups: all sets of ranks that exchange something, over all processes.
    """

    split: Split
    families: tuple[Family, ...]
    whole: tuple[int, ...]
    spoken: frozenset[str]
    groups: tuple[tuple[int, ...], ...]


def own_part(split: Split, base: ParameterTable, rank: int, zero: int = 0, optimizer: str = "") -> Own:
    """What a rank holds of a split model.

    Args:
        split: as seen by all: its table has everybody's parts.
        base: the model's own table, of whole tensors.
        zero: 1 or 2 where ranks with the same parts update a slice each.
        optimizer: the name of its type, for a refusal; empty where servers update, and have whole tensors.
    """
    if optimizer:
        _refuse_optimizer(split, base, zero, optimizer)
    grid, owner = split.grid, split.grid.owner(rank)
    holders = _holders(split)
    echoing = {(echo.parameter, echo.owner) for echo in split.table.echoes}
    mine = [index for index, ranks in enumerate(holders) if rank in ranks]
    table = split.table
    mine.sort(key=lambda i: (table.parameters[i].group == FROZEN, holders[i], _kind(table.parameters[i]), i))
    parts: list[TensorSpec] = []
    families: list[Family] = []
    at = trained_bytes = 0
    for index in mine:
        spec = table.parameters[index]
        # A gradient counts where its rank owns the part or echoes it; of the others' none is kept.
        counts = spec.owner == owner or (index, owner) in echoing
        parts.append(dataclasses.replace(spec, offset=at, owner=owner if counts else spec.owner))
        stop = align(at + spec.nbytes)
        if spec.group != FROZEN:
            if families and families[-1].ranks == holders[index]:
                families[-1] = dataclasses.replace(families[-1], stop=stop)
            else:
                families.append(Family(holders[index], at, stop))
            trained_bytes = stop
        at = stop
    if zero in (1, 2):
        families = [_sliced(family) for family in families]
    sliced = {k for k, part in enumerate(parts) for f in families if f.slices and f.start <= part.offset < f.stop}
    spoken = {part.name for k, part in enumerate(parts) if k in sliced or holders[mine[k]][0] == rank}
    states, state_bytes = _states(table, parts, mine)
    own_table = dataclasses.replace(
        table, parameters=tuple(parts), trained_bytes=trained_bytes, weight_bytes=at, states=states,
        state_bytes=state_bytes, echoes=(), echo_bytes=0, chunk_bytes=base.chunk_bytes,
        ranges=tuple(f.slices[f.ranks.index(rank)] if f.slices else (f.start, f.stop) for f in families),
    )  # fmt: skip
    places = {index: k for k, index in enumerate(mine)}
    holds = {key: places[index] for key, index in split.holds.items() if key[0] == owner}
    named = {name: k for k, spec in enumerate(base.trained) for name in spec.names}
    groups = {*(ranks for ranks in holders if len(ranks) > 1), *(grid.along_data(r) for r in range(grid.world_size))}
    return Own(
        dataclasses.replace(split, table=own_table, holds=holds), tuple(families),
        tuple(named[spec.name] for spec in own_table.trained), frozenset(spoken), tuple(sorted(groups)),
    )  # fmt: skip


def _holders(split: Split) -> list[tuple[int, ...]]:
    """For each part of a split model the ranks that compute with it."""
    owners: list[set[int]] = [set() for _ in split.table.parameters]
    for (owner, _), index in split.holds.items():
        owners[index].add(owner)
    return [tuple(r for r in range(split.grid.world_size) if split.grid.owner(r) in found) for found in owners]


def _kind(spec: TensorSpec) -> tuple[str, int]:
    return str(spec.dtype), spec.group


def _sliced(family: Family) -> Family:
    if len(family.ranks) == 1:
        return family
    bounds = slice_bounds(family.stop - family.start, len(family.ranks))
    return dataclasses.replace(family, slices=tuple((family.start + a, family.start + b) for a, b in bounds))


def _states(
    table: ParameterTable, parts: Sequence[TensorSpec], of: Sequence[int]
) -> tuple[tuple[StateSpec, ...], int]:
    """The state tensors of these parts, laid out anew."""
    by_part: Mapping[int, int] = {index: k for k, index in enumerate(of)}
    found: list[StateSpec] = []
    at = 0
    for state in sorted((s for s in table.states if s.parameter in by_part), key=lambda s: by_part[s.parameter]):
        found.append(dataclasses.replace(state, parameter=by_part[state.parameter], offset=at))
        at = align(at + state.nbytes)
    return tuple(found), at


def _refuse_optimizer(split: Split, base: ParameterTable, zero: int, optimizer: str) -> None:
    """PlanError where the optimizer has to see more than a process has."""
    if base.elementwise:
        return
    if zero in (1, 2) and split.grid.dp > 1:
        raise PlanError(
            f"zero={zero} lets each process update a slice and {optimizer} needs whole tensors; leave zero out, or use SGD, "
            "Adam, AdamW, Adagrad or RMSprop."
        )
    if not base.splittable and split.grid.splits_model:
        raise PlanError(
            f"{optimizer} may look at all parameters at once and each process has a part of them; write dp alone, or use an "
            "optimizer of torch's own."
        )
