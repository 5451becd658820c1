"""Who may go on, and who has to begin again, when ranks of a team are lost: the supervisor's words and the ranks' answers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from shoal.comm.arena import Arena, ArenaLayout, Signal
from shoal.comm.grid import Grid
from shoal.comm.port import Port
from shoal.comm.team import Recovery, StepAborted, Team, TeamWords, team_bytes
from shoal.errors import DeadlineError

GRID = Grid(tp=2)


class Ranks:
    """A team of two, seen from the supervisor; the ranks' signals are set by hand."""

    def __init__(self) -> None:
        self.arena = Arena.private(ArenaLayout.plan(2, {"exchange": team_bytes(GRID)}, GRID))
        self.recovery = Recovery(self.arena, GRID.team(0))
        self.words = TeamWords(self.arena, GRID.team(0))

    def did(self, rank: int, computed: int, evaluated: int = 0) -> None:
        self.arena.slots[rank].post(Signal.COMPUTED, computed)
        self.arena.slots[rank].post(Signal.EVALUATED, evaluated)

    def meets(self, rank: int) -> None:
        """What ``Port.reset`` says first."""
        from shoal.comm.region import RegionLayout

        offset = self.words.offset + 4096 + RegionLayout(world_size=2).met(rank)
        self.arena.native.post(self.arena.memory.address + offset, self.words.generation)


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    made = Ranks()
    yield made
    made.arena.memory.close()


def test_nothing_is_laid_out_where_nobody_needs_another() -> None:
    assert team_bytes(Grid(dp=4)) == 0
    assert team_bytes(Grid(dp=2, tp=2)) == 2 * team_bytes(GRID)


def test_a_death_before_its_step_was_computed_calls_that_off_at_once(ranks: Ranks) -> None:
    ranks.did(0, 4)
    ranks.did(1, 3)
    assert ranks.recovery.lose(1) == 3
    assert (ranks.words.announced, ranks.words.generation, ranks.words.void) == (1, 1, (3, 0))


def test_what_needs_nothing_more_from_the_dead_is_finished_first(ranks: Ranks) -> None:
    ranks.did(0, 3)
    ranks.did(1, 4)
    assert ranks.recovery.lose(1) == 4
    assert (ranks.words.announced, ranks.words.generation) == (1, 0)
    ranks.did(0, 4)
    ranks.recovery.attend()
    assert (ranks.words.generation, ranks.words.void) == (1, (4, 0))


def test_an_evaluation_counts_beyond_its_last_step(ranks: Ranks) -> None:
    ranks.did(0, 13, 0)
    ranks.did(1, 13, 1)
    ranks.recovery.lose(1)
    assert ranks.words.generation == 0
    ranks.did(0, 13, 1)
    ranks.recovery.attend()
    assert ranks.words.void == (13, 1)


def test_two_deaths_what_one_has_not_done_nobody_can_finish(ranks: Ranks) -> None:
    ranks.did(0, 3)
    ranks.did(1, 4)
    ranks.recovery.lose(1)
    ranks.recovery.lose(0)
    assert (ranks.words.generation, ranks.words.void) == (2, (3, 0))


def test_who_dies_before_taking_back_what_is_void_does_not_count_with_it(ranks: Ranks) -> None:
    ranks.did(0, 4)
    ranks.did(1, 3)
    ranks.recovery.lose(1)
    # Rank 0 has computed its part of a step that was called off, and is killed before it has looked.
    assert ranks.recovery.lose(0) == 3
    assert (ranks.words.generation, ranks.words.void) == (2, (3, 0))
    # Once it has met the others, what it says holds.
    ranks.meets(0)
    ranks.did(0, 4)
    assert ranks.recovery.lose(0) == 4


@pytest.fixture
def member(ranks: Ranks) -> Iterator[Callable[..., Team]]:
    """Makes a team's rank in this process: one at a time, as torch has one default group."""
    made: list[Team] = []

    def make(rank: int, **more: Any) -> Team:
        made.append(Team(ranks.arena, GRID, rank, 0.0, 10.0, **more))
        return made[-1]

    yield make
    if made:
        dist.destroy_process_group()


def other(ranks: Ranks, generation: int) -> threading.Thread:
    """The other rank, ready to meet in a generation."""
    begin = ranks.words.offset + 4096
    region = ranks.arena.memory.bytes[begin : ranks.words.offset + ranks.words.size]
    port = Port(region, 1, 2, spin_s=0.0, generation_address=ranks.words.address)
    thread = threading.Thread(target=port.reset, args=(generation,))
    thread.start()
    return thread


def test_a_member_gives_up_and_meets_the_successor(ranks: Ranks, member: Callable[..., Team]) -> None:
    beats: list[int] = []
    team = member(0, beat=lambda: beats.append(1))
    assert not team.apart
    total = dist.all_reduce(torch.ones(3), async_op=True)
    ranks.recovery.lose(1)
    with pytest.raises(StepAborted):
        total.wait()
    with pytest.raises(StepAborted):
        team.check()
    assert team.apart
    thread = other(ranks, 1)
    team.gather()
    thread.join()
    assert not team.apart
    team.check()


def test_a_successor_waits_until_nobody_reads_what_its_predecessor_said(
    ranks: Ranks, member: Callable[..., Team]
) -> None:
    ranks.did(0, 3)
    ranks.did(1, 4)
    ranks.recovery.lose(1)
    beats = 0

    def beat() -> None:
        nonlocal beats
        beats += 1
        if beats == 3:
            # Now the other has finished.
            ranks.did(0, 4)
            ranks.recovery.attend()

    team = member(1, beat=beat)
    assert beats == 3 and team.apart
    assert ranks.arena.slots[1].signal(Signal.COMPUTED) == 4


def test_a_successor_takes_back_what_became_void(ranks: Ranks, member: Callable[..., Team]) -> None:
    ranks.did(0, 4)
    ranks.did(1, 3)
    ranks.recovery.lose(1)
    ranks.recovery.lose(0)
    member(0)
    assert ranks.arena.slots[0].signal(Signal.COMPUTED) == 3


def test_a_wait_names_who_is_missing(ranks: Ranks) -> None:
    ranks.did(0, 4)
    ranks.did(1, 3)
    ranks.recovery.lose(1)
    team = Team(ranks.arena, GRID, 0, 0.0, 0.2)
    try:
        with pytest.raises(DeadlineError, match="a new beginning from rank 1"):
            team.gather()
    finally:
        dist.destroy_process_group()
