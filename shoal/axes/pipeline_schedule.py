"""In which order each rank of a pipeline works: the schedules of torch.distributed.pipelining, as lists of actions.

    gpipe        all forward passes, then all backward passes. Huang et al. 2019, "GPipe", figure 2c.
    1f1b         after a short beginning one forward and one backward pass in turn, so that a rank holds the activations of
                 at most as many microbatches as there are ranks. Narayanan et al. 2021, "Memory-Efficient
                 Pipeline-Parallel DNN Training" (PipeDream-Flush).
    interleaved  1f1b with several stages on each rank, rank r holding r, r + p, r + 2p, …; the bubble shrinks by as much.
                 Narayanan et al. 2021, "Efficient Large-Scale Language Model Training on GPU Clusters", section 2.2.
    zbv          two stages a rank in the form of a V (rank r holds r and 2p - 1 - r); the backward pass is done in two
                 parts, first for the inputs, which the stage before waits for, and then for the weights, which fills what
                 would be the bubble. Qi et al. 2024, "Zero Bubble Pipeline Parallelism" and "Controllable Memory".

Everything here is pure: numbers in, numbers out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

from shoal.errors import PlanError

SCHEDULES = ("gpipe", "1f1b", "interleaved", "zbv")


class Kind(Enum):
    """What a rank does for one microbatch of one of its stages. The values are torch's letters."""

    FORWARD = "F"
    BACKWARD = "B"
    BACKWARD_INPUT = "I"
    BACKWARD_WEIGHT = "W"
    SEND_FORWARD = "SEND_F"
    RECEIVE_FORWARD = "RECV_F"
    SEND_BACKWARD = "SEND_B"
    RECEIVE_BACKWARD = "RECV_B"


@dataclass(frozen=True)
class Action:
    """One thing to do: for stage ``stage`` (counted over all ranks) and microbatch ``micro``."""

    kind: Kind
    stage: int
    micro: int


def stages_a_rank(schedule: str, interleave: int | None) -> int:
    """How many stages each rank holds; PlanError for a number that the schedule has no use for."""
    if schedule not in SCHEDULES:
        raise PlanError(f"schedule={schedule} makes no sense; give {', '.join(SCHEDULES[:-1])} or {SCHEDULES[-1]}.")
    if schedule == "zbv":
        if interleave not in (None, 1, 2):
            raise PlanError(f"interleave={interleave} does not go with schedule=zbv, which has 2 stages a rank.")
        return 2
    if schedule == "interleaved":
        if interleave == 1:
            raise PlanError("schedule=interleaved needs at least interleave=2; or write schedule=1f1b.")
        return interleave or 2
    if (interleave or 1) != 1:
        raise PlanError(f"interleave={interleave} does not go with schedule={schedule}; write schedule=interleaved.")
    return 1


def rank_of_stage(schedule: str, ranks: int, stage: int) -> int:
    """Which rank of the pipeline holds a stage."""
    if schedule == "zbv":
        return stage if stage < ranks else 2 * ranks - 1 - stage
    return stage % ranks


def stages_of_rank(schedule: str, ranks: int, interleave: int | None, rank: int) -> tuple[int, ...]:
    """The stages that a rank holds, in ascending order."""
    count = ranks * stages_a_rank(schedule, interleave)
    return tuple(stage for stage in range(count) if rank_of_stage(schedule, ranks, stage) == rank)


@lru_cache(maxsize=256)
def orders(
    schedule: str, ranks: int, interleave: int | None, microbatches: int, whole_backward: bool = False
) -> tuple[tuple[Action, ...], ...]:
    """What each rank does, in order, so that nobody ever waits for somebody who waits for them.

    Args:
        microbatches: any number of at least 1. Where torch's schedule takes only some numbers, the order for the next one
            that it takes is used and the microbatches that there are not are left out.
        whole_backward: compute the backward pass in one part also where the schedule has two.
    """
    each = stages_a_rank(schedule, interleave)
    taken = microbatches
    while not _takes(schedule, ranks, taken):
        taken += 1
    found = _torch_orders(schedule, ranks, each, taken)
    return tuple(tuple(_wanted(actions, microbatches, whole_backward)) for actions in found)


def _takes(schedule: str, ranks: int, microbatches: int) -> bool:
    return schedule != "interleaved" or microbatches % max(1, microbatches // ranks) == 0


def _wanted(actions: Sequence[Any], microbatches: int, whole_backward: bool) -> Sequence[Action]:
    known = {kind.value: kind for kind in Kind}
    found = []
    for action in actions:
        kind = known.get(action.computation_type.value)
        if kind is None or action.microbatch_index is None or action.microbatch_index >= microbatches:
            continue
        if whole_backward and kind is Kind.BACKWARD_WEIGHT:
            continue
        if whole_backward and kind is Kind.BACKWARD_INPUT:
            kind = Kind.BACKWARD
        found.append(Action(kind, action.stage_index, action.microbatch_index))
    return found


def _torch_orders(schedule: str, ranks: int, each: int, microbatches: int) -> list[Sequence[Any]]:
    """Ask torch's schedule. It wants stages, of which it reads nothing but where they stand."""
    from torch.distributed.pipelining import ScheduleInterleaved1F1B, ScheduleZBVZeroBubble
    from torch.distributed.pipelining.schedules import _add_send_recv

    count = ranks * each

    def stand_in(stage: int) -> Any:
        return SimpleNamespace(
            stage_index=stage, num_stages=count, group_size=ranks, group_rank=0, is_first=stage == 0,
            is_last=stage == count - 1, submod=None, has_backward=True, stage_index_to_group_rank={},
        )  # fmt: skip

    if schedule in ("gpipe", "1f1b"):
        computing: Any = {rank: _one_stage(schedule, ranks, microbatches, rank) for rank in range(ranks)}
        with_messages: Any = _add_send_recv(computing, stage_to_rank=lambda stage: stage, num_stages=count)
    else:
        several: Any = ScheduleInterleaved1F1B if schedule == "interleaved" else ScheduleZBVZeroBubble
        stages = [stand_in(stage) for stage in range(count) if rank_of_stage(schedule, ranks, stage) == 0]
        with_messages = several(stages, microbatches).pipeline_order_with_comms
    return [with_messages[rank] for rank in range(ranks)]


def _one_stage(schedule: str, ranks: int, microbatches: int, rank: int) -> list[Any]:
    """The order of torch's ScheduleGPipe and Schedule1F1B, which have it in their loops.

    (What ``Schedule1F1B._get_pipeline_order`` says in torch 2.13 is not what it does: its last rank begins with
    microbatch 1.)
    """
    from torch.distributed.pipelining.schedules import _Action, _ComputationType

    forward = [_Action(rank, _ComputationType.FORWARD, micro) for micro in range(microbatches)]
    backward = [_Action(rank, _ComputationType.FULL_BACKWARD, micro) for micro in range(microbatches)]
    ahead = microbatches if schedule == "gpipe" else min(microbatches, ranks - rank)
    pairs = zip(backward, forward[ahead:], strict=False)
    return [*forward[:ahead], *(action for pair in pairs for action in pair), *backward[microbatches - ahead :]]


# -- what it costs ---------------------------------------------------------------------------------------------------


def bubble(schedule: str, ranks: int, microbatches: int, interleave: int | None = None) -> float:
    """The part of a step's time for which a rank has nothing to do, where all stages take equally long.

    With p ranks, m microbatches and v stages a rank: (p - 1) / (m + p - 1) for gpipe and 1f1b (Huang et al. 2019,
    section 2; Narayanan et al. 2021), and (p - 1) / (v m + p - 1) for interleaved, where p divides m (Narayanan et al.
    2021, section 2.2.2, which gives the ratio to the ideal time). Otherwise, and for zbv, by ``idle`` with equally long
    forward passes and parts of the backward pass: for zbv (p - 1) / (6 m + p - 1) from m = 2p - 1 on, which is no bubble
    but the time by which ranks begin and end apart (Qi et al. 2024, table 1).
    """
    each = stages_a_rank(schedule, interleave)
    if schedule == "zbv" or (schedule == "interleaved" and microbatches % ranks):
        return idle(schedule, ranks, microbatches, (1.0, 1.0, 1.0), interleave)
    return (ranks - 1) / (each * microbatches + ranks - 1)


def idle(
    schedule: str, ranks: int, microbatches: int, times_s: tuple[float, float, float], interleave: int | None = None
) -> float:
    """The part of a step's time for which the ranks have nothing to do, on average, found by going through the order.

    ``times_s``: how long a stage takes for the forward pass, for the backward pass to its inputs and to its weights.
    """
    found = orders(schedule, ranks, interleave, microbatches)
    forward, inputs, weights = times_s
    lasts = {
        Kind.FORWARD: forward, Kind.BACKWARD: inputs + weights, Kind.BACKWARD_INPUT: inputs,
        Kind.BACKWARD_WEIGHT: weights,
    }  # fmt: skip
    last_stage = ranks * stages_a_rank(schedule, interleave) - 1
    done: dict[Action, float] = {}
    clocks, positions = [0.0] * ranks, [0] * ranks
    while any(position < len(order) for position, order in zip(positions, found, strict=True)):
        for rank, order in enumerate(found):
            while positions[rank] < len(order):
                action = order[positions[rank]]
                ready = _ready(action, done, last_stage)
                if ready is None:
                    break
                positions[rank] += 1
                if action.kind in lasts:
                    clocks[rank] = max(clocks[rank], ready) + lasts[action.kind]
                    done[action] = clocks[rank]
    busy = sum(lasts[action.kind] for order in found for action in order if action.kind in lasts)
    return 1.0 - busy / (ranks * max(clocks))


def _ready(action: Action, done: dict[Action, float], last_stage: int) -> float | None:
    """When what an action needs is there; None while it is not known."""
    stage, micro = action.stage, action.micro
    needs: list[tuple[Kind, ...]] = []
    at = stage
    if action.kind is Kind.FORWARD and stage:
        needs, at = [(Kind.FORWARD,)], stage - 1
    elif action.kind in (Kind.BACKWARD, Kind.BACKWARD_INPUT) and stage < last_stage:
        needs, at = [(Kind.BACKWARD, Kind.BACKWARD_INPUT)], stage + 1
    elif action.kind in (Kind.BACKWARD, Kind.BACKWARD_INPUT):
        needs = [(Kind.FORWARD,)]
    elif action.kind is Kind.BACKWARD_WEIGHT:
        needs = [(Kind.BACKWARD_INPUT,)]
    if not needs:
        return 0.0
    times = [done[key] for kind in needs[0] if (key := Action(kind, at, micro)) in done]
    return times[0] if times else None


def in_flight(schedule: str, ranks: int, rank: int, microbatches: int, interleave: int | None = None) -> int:
    """Of how many microbatches a rank holds the activations of a stage at the same time, at most, over all its stages."""
    most = now = 0
    order = orders(schedule, ranks, interleave, microbatches)[rank]
    for action in order:
        if action.kind is Kind.FORWARD:
            now += 1
            most = max(most, now)
        elif action.kind in (Kind.BACKWARD, Kind.BACKWARD_WEIGHT):
            now -= 1
    return most


def traffic(schedule: str, ranks: int, boundary_bytes: Sequence[float], rank: int) -> float:
    """Bytes that a rank sends in a step: what leaves its stages forward, and as much again, backward, for what came in.

    ``boundary_bytes``: for each place between two stages, the bytes of what passes there for the whole share of the batch
    (all microbatches together). Two stages of one rank pass nothing over the wire.
    """
    sent = 0.0
    for before, size in enumerate(boundary_bytes):
        left, right = rank_of_stage(schedule, ranks, before), rank_of_stage(schedule, ranks, before + 1)
        if left != right:
            sent += size * ((left == rank) + (right == rank))
    return sent
