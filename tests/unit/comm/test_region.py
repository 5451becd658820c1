"""The cut of the shared memory: nothing overlaps, nothing lies outside."""

from __future__ import annotations

import pytest

from shoal.comm.region import LETTER, RegionLayout, exchange_bytes
from shoal.comm.rounds import seat_bytes
from shoal.errors import RequestError


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_no_two_things_share_a_byte(world_size: int) -> None:
    layout = RegionLayout(
        world_size=world_size, seats=3, piece_bytes=128, letters=4, mail_pieces=2, mail_piece_bytes=64
    )
    ranks = range(world_size)
    taken: list[tuple[int, int]] = []
    for rank in ranks:
        # A word's writer says beside it on which core it was.
        taken += [(layout.met(rank), 4), (layout.asleep(rank), 4)]
        taken += [(layout.head(rank, other), 8) for other in ranks]
        taken += [(layout.tail(rank, other), 8) for other in ranks]
        taken += [(layout.seat(rank, index), seat_bytes(128)) for index in range(3)]
        taken += [(layout.letter(rank, other, number), LETTER) for other in ranks for number in range(4)]
        taken += [(layout.mail_piece(rank, index), 64) for index in range(world_size + 2)]
    taken.sort()
    for (start, size), (following, _) in zip(taken, taken[1:], strict=False):
        assert start + size <= following
    assert taken[0][0] >= 0 and sum(taken[-1]) <= layout.bytes


def test_the_ring_of_letters_begins_again() -> None:
    layout = RegionLayout(world_size=2, letters=4)
    assert layout.letter(0, 1, 5) == layout.letter(0, 1, 1) != layout.letter(1, 1, 1)


def test_a_few_mebibytes_a_rank_suffice() -> None:
    assert exchange_bytes(2) / 2 < 13 << 20 and exchange_bytes(8) / 8 < 13 << 20


@pytest.mark.parametrize("world_size", [0, 65])
def test_a_world_that_fits_no_machine_is_refused(world_size: int) -> None:
    with pytest.raises(RequestError, match="use 1 to 64"):
        exchange_bytes(world_size)
