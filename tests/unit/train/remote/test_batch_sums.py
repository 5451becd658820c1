"""The sums of a step's batch statistics as a lead keeps them: the same bits for all, also for who comes in another's place."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from shoal.axes.waiting import Aborted
from shoal.errors import DeadlineError
from shoal.ps import messages
from shoal.ps.client import Patience
from shoal.train.gradients import GivenUp
from shoal.train.remote import words
from shoal.train.remote.batch_sums import NAME, Adder, BatchSums
from shoal.train.remote.desk import Asked

ROOM = 256


class Answers:
    """A desk that keeps what it is to say."""

    def __init__(self) -> None:
        self.said: list[Any] = []

    def answer(self, asked: Asked, make: Any, frames: Any = ()) -> None:
        found = make(asked.said.number)
        sums = messages.unpack_tensors(found.sums, frames) if getattr(found, "sums", ()) else {}
        self.said.append(sums[NAME].tolist() if sums else found)


def gives(unit: int, index: int, values: list[float], shards: tuple[int, ...] = (0, 2)) -> Asked:
    heads, frames = messages.pack_tensors({NAME: torch.tensor(values, dtype=torch.float64)})
    said = words.Gives(number=1, rank=0, unit=unit, index=index, shards=shards, values=heads)
    return Asked(b"", said, [bytearray(frame) for frame in frames])


def answered(sums: BatchSums, asked: Asked, waited: bool = False, workers: dict[int, int] | None = None) -> Any:
    desk: Any = Answers()
    sums.answer(desk, asked, words.Orders, (workers or {}).get, waited)
    return desk.said[0] if desk.said else None


def test_all_shards_get_the_same_sum_in_their_order_and_so_does_who_computes_one_again() -> None:
    sums, desk = BatchSums(3, ROOM, 30), Answers()
    late, early = gives(32, 0, [1e16, 1.0]), gives(30, 0, [1.0, 2.0])
    sums.hear(desk, late)
    # It lies in the frame of a message, which is somebody else's afterwards.
    late.frames[0][:] = bytes(16)  # type: ignore[index]
    assert answered(sums, late) is None
    assert answered(sums, late, True, {30: 7}).waits_for == "shard 0 (of worker 7)"
    assert answered(sums, late, True).waits_for == "shard 0 (which nobody has taken yet)"
    sums.hear(desk, early)
    assert answered(sums, late) == answered(sums, early) == [1.0 + 1e16, 3.0]
    # One that was killed is in the midst of the next sum; another begins from the first, and finds what it found.
    sums.hear(desk, gives(30, 1, [5.0]))
    for index, values, found in ((0, [9.0, 9.0], [1.0 + 1e16, 3.0]), (1, [5.0], None)):
        again = gives(30, index, values)
        sums.hear(desk, again)
        assert answered(sums, again) == found
    last = gives(32, 1, [6.0])
    sums.hear(desk, last)
    assert answered(sums, last) == [11.0] and not desk.said
    # When the step is done, whoever is at it still computes for nothing.
    sums.begin(33)
    sums.hear(desk, last)
    assert answered(sums, last).over and answered(sums, gives(33, 0, [1.0])) is None


def test_what_cannot_be_added_up_is_refused_in_a_sentence() -> None:
    sums, desk = BatchSums(3, ROOM, 0), Answers()
    sums.hear(desk, gives(0, 0, [1.0, 2.0]))
    sums.hear(desk, gives(2, 0, [1.0]))
    sums.hear(desk, gives(0, 1, [1.0] * 31))
    assert ["call different layers" in desk.said[0].reason, "no room" not in desk.said[0].reason] == [True, True]
    assert "than there is room for" in desk.said[1].reason and len(desk.said) == 2


class Hearing:
    """Three workers' line to a lead that has the sums: whose part completes none is answered when it asks again."""

    patience = Patience(deadline_s=60.0)

    def __init__(self) -> None:
        self._sums = BatchSums(3, ROOM, 0)
        self._lock = threading.Lock()

    def ask(self, make: Any, what: str, frames: Any) -> Any:
        asked = Asked(b"", make(1), [bytearray(frame) for frame in frames])
        with self._lock:
            self._sums.hear(None, asked)  # type: ignore[arg-type]
            desk = Frames()
            self._sums.answer(desk, asked, words.Orders, lambda unit: unit, True)  # type: ignore[arg-type]
        return desk.answered


class Frames:
    """A desk that keeps an answer as it goes out."""

    answered: tuple[Any, Any]

    def answer(self, asked: Asked, make: Any, frames: Any = ()) -> None:
        self.answered = make(asked.said.number), frames


def test_who_takes_part_in_fewer_sums_adds_up_what_belongs_together() -> None:
    """Two pieces of a batch, each of 48 samples and then of two: the third shard has none of the latter."""
    line, found = Hearing(), dict[int, list[float]]()
    pieces = [(0, 1, 2), (0, 1), (0, 1, 2), (0, 1)]

    def work(rank: int) -> None:
        to_lead: Any = line
        adder = Adder(to_lead, rank, lambda orders: None)
        found[rank] = [
            float(adder.add_up(torch.tensor([10.0**rank * (number + 1)], dtype=torch.float64), rank, 0, shards))
            for number, shards in enumerate(pieces)
            if rank in shards
        ]

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == {0: [111.0, 22.0, 333.0, 44.0], 1: [111.0, 22.0, 333.0, 44.0], 2: [111.0, 333.0]}


class Lead:
    """A line to a lead that answers always the same."""

    patience = Patience(deadline_s=0.0)

    def __init__(self, **said: Any) -> None:
        self._said = said

    def ask(self, make: Any, what: str, frames: Any) -> Any:
        return words.Summed(make(1).number, **{"orders": words.Orders(), **self._said}), []


@pytest.mark.parametrize(
    ("said", "error", "sentence"),
    [
        ({"waits_for": "shard 1 (of worker 1)"}, DeadlineError, r"Worker 0 waited .* the batch statistics of step 4, which lack "
         r"shard 1 \(of worker 1\); .*--resume"),
        ({"over": True}, GivenUp, "counts for nothing"), ({"orders": words.Orders(over=1)}, Aborted, "was ended"),
    ],
)  # fmt: skip
def test_who_gets_no_sum_says_why(said: dict[str, Any], error: type[Exception], sentence: str) -> None:
    line: Any = Lead(**said)
    with pytest.raises(error, match=sentence):
        Adder(line, 0, lambda orders: None).add_up(torch.ones(3), 6, 3, (0, 1))
