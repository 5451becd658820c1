"""Which samples a worker gets in a step, and fetching them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from shoal.data.order import batch_count, batch_indices, epoch_order, share_bounds
from shoal.data.source import Source
from shoal.job import Job
from shoal.plan import Plan
from shoal.train import streams

SPARE = 2
"""Samples in a batch that only stands for one: layers that normalise over the batch cannot do with one."""


@dataclass(frozen=True)
class Share:
    """What a replica computes of a microbatch of a step.

    Attributes:
        indices: the samples, in order; maybe none.
        counts: how many samples each replica has in this microbatch.
    """

    indices: np.ndarray
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Division:
    """How batches are divided: all of it follows from the job and the plan.

    A batch is cut into ``accumulate`` pieces, each of these into ``microbatches``, and each of these among the replicas by
    ``shares``. What a replica has then is computed ``sub_batch`` samples at a time, all at once where it is 0.
    """

    batch_size: int
    shares: tuple[int, ...]
    accumulate: int
    seed: int
    microbatches: int = 1
    sub_batch: int = 0

    def shares_of(self, batch: np.ndarray, replica: int) -> list[Share]:
        """A replica's shares of a batch: one for each microbatch that is not empty for all."""
        return [Share(batch[start:stop], counts) for start, stop, counts in _cuts(self, len(batch), replica)]

    def cuts(self, size: int, replica: int) -> Iterator[tuple[int, int, tuple[int, ...]]]:
        """Where a replica's shares of a batch of so many samples begin and end, and what each replica has then."""
        for piece in range(self.accumulate):
            yield from self.piece_cuts(size, piece, replica)

    def piece_cuts(self, size: int, piece: int, replica: int) -> Iterator[tuple[int, int, tuple[int, ...]]]:
        """The same for one of the pieces."""
        low, high = share_bounds(size, (1,) * self.accumulate)[piece]
        for a, b in share_bounds(high - low, (1,) * self.microbatches):
            if b > a:
                bounds = share_bounds(b - a, self.shares)
                start, stop = bounds[replica]
                counts = tuple(last - first for first, last in bounds)
                yield from self._in_sub_batches(low + a + start, low + a + stop, counts)

    def _in_sub_batches(
        self, start: int, stop: int, counts: tuple[int, ...]
    ) -> Iterator[tuple[int, int, tuple[int, ...]]]:
        """A microbatch in pieces; replicas have equally many of them, though the last ones of some may be empty."""
        if not self.sub_batch:
            yield start, stop, counts
            return
        size = self.sub_batch
        for at in range(0, max(counts), size):
            own = tuple(min(size, max(0, count - at)) for count in counts)
            yield min(start + at, stop), min(start + at + size, stop), own


@functools.lru_cache(maxsize=64)
def _cuts(division: Division, size: int, replica: int) -> tuple[tuple[int, int, tuple[int, ...]], ...]:
    # The same at nearly every step.
    return tuple(division.cuts(size, replica))


def division_of(job: Job, plan: Plan) -> Division:
    """How a plan divides a job's batches."""
    shares = plan.shares or (1,) * plan.data_ways
    return Division(
        job.batch_size, tuple(shares), plan.accumulate or 1, job.seed, plan.microbatches or 1, plan.sub_batch or 0
    )


class Feed:
    """The batches of one replica, in the one global order. Fetching the next step's early is up to the caller."""

    def __init__(
        self, source: Source, division: Division, replica: int, collate: Callable[[list[Any]], Any] | None,
        channels_last: bool,
    ) -> None:  # fmt: skip
        self.source = source
        self.division = division
        self.replica = replica
        self._collate = collate
        self._channels_last = channels_last
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))
        self._ready: tuple[int, list[tuple[Share, Any]]] = (-1, [])

    @property
    def steps_per_epoch(self) -> int:
        return batch_count(len(self.source), self.division.batch_size)

    def batch(self, step: int) -> np.ndarray:
        """The samples of a step (from 0, counted over all epochs), in order."""
        epoch, index = divmod(step, self.steps_per_epoch)
        if self._order[0] != epoch:
            self._order = (epoch, epoch_order(len(self.source), self.division.seed, epoch))
        return batch_indices(self._order[1], index, self.division.batch_size)

    def shares(self, step: int) -> list[Share]:
        """This replica's shares of a step."""
        return self.division.shares_of(self.batch(step), self.replica)

    def prepare(self, step: int) -> None:
        """Fetch a step's batches now, to be handed out by ``batches``."""
        if self._ready[0] != step:
            self._ready = (step, [(share, self._fetch(step, share)) for share in self.shares(step)])

    def batches(self, step: int) -> list[tuple[Share, Any]]:
        """The step's shares with their batches; None for a batch where it has no samples."""
        self.prepare(step)
        found = self._ready[1]
        self._ready = (-1, [])
        return found

    def portion(self, step: int, piece: int, replica: int) -> list[tuple[Share, Any]]:
        """One of the pieces (``accumulate``) of a replica's share of a step, with its batches; nothing is kept of it."""
        return [(share, self._fetch(step, share)) for share in self.shares_of_portion(step, piece, replica)]

    def shares_of_portion(self, step: int, piece: int, replica: int) -> list[Share]:
        """The same without its batches."""
        batch = self.batch(step)
        return [Share(batch[a:b], counts) for a, b, counts in self.division.piece_cuts(len(batch), piece, replica)]

    def spare(self) -> Any:
        """A batch for a worker without a share that has to call the model all the same."""
        return self._fetch_samples(0, np.zeros(SPARE, dtype=np.int64))

    def _fetch(self, step: int, share: Share) -> Any:
        return self._fetch_samples(step // self.steps_per_epoch, share.indices) if len(share.indices) else None

    def _fetch_samples(self, epoch: int, indices: np.ndarray) -> Any:
        seed = self.division.seed

        def before_item(sample: int) -> None:
            streams.reseed(streams.ITEM, seed, epoch, sample)

        return to_layout(self.source.fetch(indices, self._collate, before_item), self._channels_last)


def to_device(batch: Any, device: torch.device) -> Any:
    """The same batch with its tensors on a device; containers as in ``to_layout``, anything else that has a ``to`` by that."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        values = [to_device(value, device) for value in batch]
        return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)
    return batch.to(device) if hasattr(batch, "to") else batch


def to_layout(batch: Any, channels_last: bool) -> Any:
    """Bring the images (4-D floating tensors) of a batch into the memory layout that the plan names."""
    if isinstance(batch, torch.Tensor):
        if batch.dim() != 4 or not batch.is_floating_point():
            return batch
        return batch.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    if isinstance(batch, dict):
        return {key: to_layout(value, channels_last) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        # A namedtuple is built from positional values; a plain tuple or list from one iterable.
        values = [to_layout(value, channels_last) for value in batch]
        return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)
    return batch
