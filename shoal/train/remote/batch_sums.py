"""BatchNorm's sums over the global batch, where workers share no memory: they go through the lead.

Each worker gives what it has found of its shard to the lead, and is answered with the sum over all shards that have samples,
added up in the order of the shards, so that all get the same bits. A sum is kept until its step is done. Whoever computes a
shard again, in the place of a worker that was killed, is given the sums that the others have had, and finds what its
predecessor found; so nobody else begins anew.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence

import torch

from shoal.axes.given import DIFFERENT_LAYERS, NO_ROOM
from shoal.axes.waiting import Aborted
from shoal.errors import DeadlineError
from shoal.ps import messages
from shoal.ps.messages import Refused
from shoal.train.gradients import GivenUp
from shoal.train.remote import words
from shoal.train.remote.desk import Asked, Desk
from shoal.train.remote.line import Line

NAME = "sums"
_Place = tuple[int, tuple[int, ...]]


class BatchSums:
    """The sums of the step in work, as the lead keeps them.

    Args:
        per_step: units of a step, each of them a shard's.
        room_bytes: so much may a worker give in a step.
        first: the first unit that is not done.
    """

    def __init__(self, per_step: int, room_bytes: int, first: int) -> None:
        self._per_step, self._room_bytes = per_step, room_bytes
        self.begin(first)

    def begin(self, first: int) -> None:
        """Everything before a unit is done; of the next step nothing was given yet."""
        self._first = first
        # By which sum over the same shards it is, and over which: what these have given, while some are missing; the sum.
        self._given: dict[_Place, dict[int, torch.Tensor]] = {}
        self._sums: dict[_Place, torch.Tensor] = {}
        self._bytes: Counter[int] = Counter()

    def take(self, said: words.Gives, frames: Sequence[object]) -> str:
        """Hear what was found of a shard; a sentence where that cannot be added up."""
        place = (said.index, said.shards)
        if said.unit < self._first or place in self._sums:
            return ""
        shard = said.unit % self._per_step
        values = messages.unpack_tensors(said.values, frames)[NAME]
        given = self._given.setdefault(place, {})
        if shard not in given:
            self._bytes[shard] += values.nbytes
        if self._bytes[shard] > self._room_bytes:
            return NO_ROOM
        if any((other.shape, other.dtype) != (values.shape, values.dtype) for other in given.values()):
            return DIFFERENT_LAYERS
        # What came lies in a frame that is somebody else's.
        given[shard] = values.clone()
        if len(given) == len(said.shards):
            first, *others = (given[shard] for shard in said.shards)
            total = first.clone()
            for other in others:
                total += other
            self._sums[place] = total
            del self._given[place]
        return ""

    def answer(
        self, desk: Desk, asked: Asked, orders: Callable[[], words.Orders], worker_of: Callable[[int], int | None], waited: bool
    ) -> None:
        """Answer who has given something once the sum is there, or say after a while who is waited for.

        Args:
            orders: the lead's now.
            worker_of: a unit -> who computes it.
        """
        said = asked.said
        assert isinstance(said, words.Gives)
        place = (said.index, said.shards)
        if said.unit < self._first:
            desk.answer(asked, lambda n: words.Summed(n, orders(), over=True))
        elif place in self._sums:
            heads, frames = messages.pack_tensors({NAME: self._sums[place]})
            desk.answer(asked, lambda n: words.Summed(n, orders(), heads), [bytes(frame) for frame in frames])
        elif waited:
            missing = sorted(set(said.shards) - set(self._given.get(place, ())))
            begin = said.unit - said.unit % self._per_step
            names = ", ".join(f"shard {shard} ({_whose(worker_of(begin + shard))})" for shard in missing)
            desk.answer(asked, lambda n: words.Summed(n, orders(), waits_for=names))

    def hear(self, desk: Desk, asked: Asked) -> None:
        """Take what was given, or refuse it."""
        assert isinstance(asked.said, words.Gives)
        reason = self.take(asked.said, asked.frames)
        if reason:
            desk.answer(asked, lambda n: Refused(n, reason))


def _whose(rank: int | None) -> str:
    return "which nobody has taken yet" if rank is None else f"of worker {rank}"


class Adder:
    """Adds up small tensors over the shards of a step, as one worker asks for it.

    Args:
        obey: takes up the lead's orders.
    """

    def __init__(self, line: Line, rank: int, obey: Callable[[words.Orders], None]) -> None:
        self._line, self._rank, self._obey = line, rank, obey
        # Where some shards have no samples, those that have them take part in more sums, or in others.
        self._among: Counter[tuple[int, ...]] = Counter()

    def begin(self) -> None:
        """A unit is begun, or begun again."""
        self._among.clear()

    def add_up(self, values: torch.Tensor, unit: int, step: int, shards: Sequence[int]) -> torch.Tensor:
        """The sum over these shards of what each has found.

        Raises:
            GivenUp: others have done the unit. Aborted: the run has ended. DeadlineError: somebody's part has not come.
        """
        among, began = tuple(shards), time.monotonic()
        index = self._among[among]
        self._among[among] += 1
        heads, frames = messages.pack_tensors({NAME: values.detach().reshape(-1)})
        # Asked for again while it is waited for, what is sent has to stay what it was.
        kept = [bytes(frame) for frame in frames]
        what = f"the batch statistics of step {step + 1}"
        while True:
            answer, further = self._line.ask(
                lambda n: words.Gives(
                    number=n, rank=self._rank, unit=unit, index=index, shards=among, values=heads
                ),
                what, kept,
            )  # fmt: skip
            self._obey(answer.orders)
            if answer.sums:
                return messages.unpack_tensors(answer.sums, further)[NAME].clone().view(values.shape)
            if answer.over:
                raise GivenUp("What is computed counts for nothing any more.")
            if answer.orders.over:
                raise Aborted("The run was ended.")
            waited_s = time.monotonic() - began
            if waited_s > self._line.patience.deadline_s:
                raise DeadlineError(
                    f"Worker {self._rank} waited {waited_s:.0f} s for {what}, which lack {answer.waits_for}; see whether "
                    "it lives, and go on with --resume."
                )
