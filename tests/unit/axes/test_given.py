"""What ranks give to the small sums of a step is found by what all who take part agree on, wherever each keeps it."""

from __future__ import annotations

import threading

import pytest
import torch

from shoal.axes.given import DIFFERENT_LAYERS, NO_ROOM, Given
from shoal.errors import ShoalError

ROOM = 1024


class Together:
    """Three ranks in one process: each has a page, and a count that others wait for."""

    def __init__(self) -> None:
        self.pages = [torch.zeros(ROOM, dtype=torch.uint8) for _ in range(3)]
        self.counts = [0, 0, 0]
        self._changed = threading.Condition()

    def rank(self, rank: int) -> Given:
        return Given(rank, 3, self.pages.__getitem__, 5)

    def post(self, rank: int, count: int) -> None:
        with self._changed:
            self.counts[rank] = max(self.counts[rank], count)
            self._changed.notify_all()

    def await_parts(self, rank: int, count: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self.counts[rank] >= count, timeout=60)

    def add_up(self, own: Given, rank: int, values: torch.Tensor, replicas: list[int]) -> torch.Tensor:
        place = own.give(values, replicas)
        self.post(rank, own.count)
        return sum((own.find(other, place, values, self.await_parts) for other in replicas), torch.zeros_like(values))


def test_who_takes_part_in_fewer_sums_adds_up_what_belongs_together() -> None:
    """Two pieces of a batch, each of 48 samples and then of two: the third rank has none of the latter."""
    together, found = Together(), dict[int, list[list[float]]]()
    pieces = [(2, [0, 1, 2]), (3, [0, 1]), (2, [0, 1, 2]), (3, [0, 1])]

    def work(rank: int) -> None:
        own = together.rank(rank)
        found[rank] = []
        for number, (size, replicas) in enumerate(pieces):
            if rank in replicas:
                values = torch.full((size,), 10.0**rank * (number + 1), dtype=torch.float64)
                found[rank].append(together.add_up(own, rank, values, replicas).tolist())

    def all_work(*ranks: int) -> None:
        threads = [threading.Thread(target=work, args=(rank,)) for rank in ranks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)

    all_work(0, 1, 2)
    assert found[0] == found[1] == [[111.0] * 2, [22.0] * 3, [333.0] * 2, [44.0] * 3]
    assert found[2] == [[111.0] * 2, [333.0] * 2]
    # Whoever comes in another's place finds what that one found.
    pages = [page.clone() for page in together.pages]
    before = dict(found)
    all_work(1)
    assert found == before and all(map(torch.equal, pages, together.pages))


def test_what_cannot_be_kept_or_added_up_is_said_in_a_sentence() -> None:
    together = Together()
    one, other = together.rank(0), together.rank(1)
    one.give(torch.ones(3), [0, 1])
    together.post(0, 1)
    with pytest.raises(ShoalError, match=DIFFERENT_LAYERS):
        together.add_up(other, 1, torch.ones(4), [0, 1])
    with pytest.raises(ShoalError, match=NO_ROOM):
        one.give(torch.ones(ROOM), [0, 1])
    with pytest.raises(ShoalError, match=NO_ROOM):
        for _ in range(5):
            one.give(torch.ones(1), [0, 1])
