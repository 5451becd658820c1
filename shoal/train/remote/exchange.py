"""What the processes of one worker say to one another: what to compute, weights, gradients and buffers.

Only the head speaks to servers, so it has the whole model's weights and gradients once: it deals the weights out, each partner's
parts in one message, and adds the gradients of all parts up where it pushes them from. What is large goes between two processes
at a time, through the memory of their machine where they share one; what to do next is told to all.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import nn

from shoal.axes.pipeline_schedule import stages_of_rank
from shoal.comm.group import Group
from shoal.comm.parts import put, take
from shoal.comm.store import Store
from shoal.comm.table import ParameterTable
from shoal.plan import Plan
from shoal.train.own import Own
from shoal.train.remote.teams import grid_within
from shoal.train.saved import as_bytes
from shoal.train.split import Split

_AWAKE_S = 60.0


class Order(IntEnum):
    """What a head tells its partners to do."""

    IDLE = 0
    WEIGHTS = 1
    COMPUTE = 2
    GRADIENTS = 3
    EVALUATE = 4
    END = 5
    FETCH = 6


@dataclass(frozen=True)
class Told:
    """An order. To fetch: the samples of a ``shard`` of a ``step``. To compute: these, as a part of the mean over ``total``
    samples, the first ones of a push where ``fresh``. To evaluate: at the end of the epoch ``total``."""

    order: Order
    step: int = 0
    shard: int = 0
    total: int = 0
    fresh: bool = False


class Exchange:
    """One process's end.

    Args:
        group: the processes of the worker; all make their end together.
        head: the head's rank in it.
        store: of this process's parts.
        buffered: the module that has all buffers.
        table: the model's own, of whole tensors.
        published: of each rank, which of the buffers it computes for the head: indices in the table.
    """

    def __init__(
        self, group: Group, head: int, store: Store, buffered: nn.Module, table: ParameterTable,
        published: Sequence[Sequence[int]],
    ) -> None:  # fmt: skip
        self._group, self._head, self._store = group, head, store
        self._buffered, self._table, self._published = buffered, table, published
        self._told_at = time.monotonic()
        # Whether the partners wait for an order: what a head tells them otherwise would meet them in the midst of another.
        self._awaited = True
        self._pairs = {rank: (min(rank, head), max(rank, head)) for rank in range(group.world_size) if rank != head}
        group.prepare(list(self._pairs.values()))

    # -- orders --------------------------------------------------------------------------------------------------

    def tell(self, told: Told) -> None:
        """The head's: tell all partners what to do."""
        words = torch.tensor([told.order, told.step, told.shard, told.total, told.fresh], dtype=torch.int64)
        self._awaited = False
        self._group.broadcast(words, self._head, "its partners to hear what to do")
        self._told_at = time.monotonic()
        self._awaited = told.order == Order.IDLE

    def done(self) -> None:
        """The head's: what the partners were told is done, and they wait for what comes next."""
        self._awaited = True

    def hear(self) -> Told:
        """A partner's: wait for what to do."""
        words = torch.zeros(5, dtype=torch.int64)
        self._group.broadcast(words, self._head, "the head of its worker")
        order, step, shard, total, fresh = words.tolist()
        return Told(Order(order), step, shard, total, bool(fresh))

    def keep_awake(self) -> None:
        """The head's, while it waits for servers or the lead: no partner that waits for an order shall take it for lost."""
        if self._awaited and time.monotonic() - self._told_at > min(_AWAKE_S, self._group.deadline_s / 4):
            self.tell(Told(Order.IDLE))

    # -- weights and gradients -----------------------------------------------------------------------------------

    def deal(self, whole: Store, parts: Mapping[int, Own]) -> None:
        """The head's: give each rank its parts of a whole model's weights."""
        self.tell(Told(Order.WEIGHTS))
        for rank, own in parts.items():
            specs = own.split.table.trained
            if rank == self._head:
                for index, spec in enumerate(specs):
                    self._store.weights[index].copy_(take(whole.weights[own.whole[index]], spec.regions))
                continue
            page = torch.zeros(own.split.table.trained_bytes, dtype=torch.uint8)
            for index, spec in enumerate(specs):
                spec.view_in(page).copy_(take(whole.weights[own.whole[index]], spec.regions))
            self._pass(page, rank, self._head, "the weights of a part")
        self.done()

    def take_weights(self) -> None:
        """A partner's: take its parts."""
        page = self._store.weight_range(0, self._store.table.trained_bytes, torch.uint8)
        self._pass(page, self._group.rank, self._head, "the weights of its part")

    def gather(self, whole: Store, stripe: int, parts: Mapping[int, Own]) -> None:
        """The head's: add the gradients of all parts up in a stripe of a whole model's."""
        self.tell(Told(Order.GRADIENTS))
        for rank, own in parts.items():
            table = own.split.table
            if rank == self._head:
                marks = torch.from_numpy(self._store.touched[0].copy())
                page = self._store.gradient_range(0, 0, table.trained_bytes, torch.uint8)
            else:
                marks = torch.zeros(len(table.trained), dtype=torch.uint8)
                page = torch.zeros(table.trained_bytes, dtype=torch.uint8)
                self._pass(marks, rank, rank, "the gradients of a part")
                self._pass(page, rank, rank, "the gradients of a part")
            for index, spec in enumerate(table.trained):
                if not marks[index]:
                    continue
                at = own.whole[index]
                gradient = whole.gradient(stripe, at)
                if not whole.touched[stripe, at]:
                    gradient.zero_()
                    whole.touched[stripe, at] = 1
                part = spec.view_in(page)
                if spec.regions:
                    put(gradient, spec.regions, take(gradient, spec.regions) + part)
                else:
                    gradient.add_(part)
        self.done()

    def give_gradients(self) -> None:
        """A partner's: give those of its parts."""
        own, rank = self._store, self._group.rank
        self._pass(torch.from_numpy(own.touched[0].copy()), rank, rank, "the gradients of its part")
        self._pass(own.gradient_range(0, 0, own.table.trained_bytes, torch.uint8), rank, rank, "the gradients of its part")

    def _pass(self, page: torch.Tensor, partner: int, source: int, what: str) -> None:
        """Bring a page from the head to a partner, or the other way."""
        if page.numel():
            self._group.share([(page, source)], self._pairs[partner], what)

    # -- buffers -------------------------------------------------------------------------------------------------

    def share_buffers(self) -> None:
        """All: begin with the head's buffers."""
        everything = range(len(self._table.buffers))
        if not everything:
            return
        page = self._pack(everything)
        self._group.broadcast(page, self._head, "the buffers to begin with")
        if self._group.rank != self._head:
            self._unpack(page, everything)

    def return_buffers(self) -> None:
        """All: let the head have the buffers that its partners have computed."""
        for partner, own in enumerate(self._published):
            if partner == self._head or not own or self._group.rank not in (partner, self._head):
                continue
            page = self._pack(own)
            self._pass(page, partner, partner, "the buffers of a part")
            if self._group.rank == self._head:
                self._unpack(page, own)

    def _present(self, indices: Sequence[int]) -> list[torch.Tensor]:
        found = dict(self._buffered.named_buffers(remove_duplicate=False))
        return [found[self._table.buffers[index].name] for index in indices]

    def _pack(self, indices: Sequence[int]) -> torch.Tensor:
        return torch.cat([as_bytes(buffer.detach().contiguous()) for buffer in self._present(indices)])

    @torch.no_grad()
    def _unpack(self, page: torch.Tensor, indices: Sequence[int]) -> None:
        at = 0
        for buffer in self._present(indices):
            # A copy begins where its type may begin.
            data = page[at : at + buffer.nbytes].clone().view(buffer.dtype)
            buffer.copy_(data.view(buffer.shape))
            at += buffer.nbytes


def published_by(split: Split, plan: Plan, table: ParameterTable) -> list[list[int]]:
    """Of each rank of a worker the buffers that it computes for all: one along the tensor axis for what all there have."""
    grid = grid_within(plan)
    found: list[list[int]] = []
    for rank in range(grid.world_size):
        place = grid.place(rank)
        if place.tensor or split.stages is None:
            found.append([])
            continue
        own = stages_of_rank(plan.schedule or "1f1b", grid.pp, plan.interleave, place.stage)
        names = {name for stage in own for name in split.stages.buffers[stage]}
        found.append([k for k, spec in enumerate(table.buffers) if names.intersection(spec.names)])
    return found
