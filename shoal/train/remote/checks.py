"""Whether what is said to a lead can be meant: of a run with so many workers and servers, a job with these buffers and metrics.

A head that could be decoded has fields of the right types. What their values would do is looked at here, before anything is
taken up: who has the run's keys and says something that cannot be meant is told so, and the run goes on.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from shoal import errors
from shoal.axes.data import COLLECTIVES_A_STEP
from shoal.comm.store import VALUE_COLUMNS, Store
from shoal.errors import RequestError
from shoal.job import Job
from shoal.plan import Plan
from shoal.process.messages import PARTNER, SERVER, WORKER
from shoal.ps import messages
from shoal.ps.checks import MOST, fits
from shoal.ps.ledger import EMPTY, REJECTED, UnitColumns
from shoal.ps.wire import Malformed
from shoal.train import notes
from shoal.train.evaluate import merge
from shoal.train.metric_state import metrics_of
from shoal.train.remote import words
from shoal.train.remote.answers import check_buffers, is_address
from shoal.train.remote.batch_sums import NAME
from shoal.train.remote.keeper import ROLE as KEEPER
from shoal.train.remote.teams import size_of

_WIDTH = UnitColumns.VALUES + VALUE_COLUMNS
_MOST_EPOCHS = 1 << 31
_MOST_KEEPERS = 1 << 20
"""Who keeps nobody under the present plan looks for orders, too."""


@dataclass(frozen=True, kw_only=True)
class SaidCheck:
    """What the words of a run have to be like.

    Attributes:
        workers, servers: how many of these processes there are.
        shards: how many servers hold something different.
        sync: whether pushes wait for others.
        buffers: the model's.
        metrics: the job's, by name.
        versions: no server makes more updates.
        partners: of how many processes a worker is beside its head.
    """

    workers: int
    servers: int
    shards: int
    sync: bool
    buffers: Mapping[str, torch.Tensor]
    metrics: Mapping[str, Any]
    versions: int = MOST
    partners: int = 0

    def __call__(self, said: words.Said, frames: Sequence[Any]) -> None:
        """Raises Malformed."""
        if not 0 < said.number < MOST:
            raise Malformed(f"{said.number} is no number of a question")
        role = getattr(said, "role", SERVER if isinstance(said, words.LogFailed) else WORKER)
        partners = self.workers * self.partners
        count = {WORKER: self.workers, PARTNER: partners, SERVER: self.servers, KEEPER: _MOST_KEEPERS}.get(role, 0)
        if isinstance(said, words.Failed):
            self._look_at_failure(said)
        # Who has failed may have done so before it knew who it was.
        elif not isinstance(said, words.Names) and not 0 <= getattr(said, "rank", 0) < count:
            raise Malformed(f"there is no {role} {getattr(said, 'rank', 0)}")
        if isinstance(said, words.Evaluated):
            self._look_at_evaluation(said, frames)
        elif isinstance(said, words.Report):
            self._look_at_report(said, frames)
        elif isinstance(said, words.Gives):
            self._look_at_given(said, frames)
        elif isinstance(said, words.Leave) and said.role == WORKER and len(frames) == 1:
            self._look_at_metrics(frames)
        elif frames:
            raise Malformed(f"{len(frames)} frames where none belongs")
        elif isinstance(said, words.Join) and self._is_found_at(said.role) and not is_address(said.address):
            raise Malformed(f"{said.address!r} is no address")
        elif isinstance(said, words.Names) and (len(said.names) > VALUE_COLUMNS or len(set(said.names)) != len(said.names)):
            raise Malformed(f"{len(said.names)} values are more than a row has, or one of them is there twice")
        elif isinstance(said, words.Bad) and not (said.units and all(0 <= unit < MOST for unit in said.units)):
            raise Malformed("there is no unit in it")

    def _is_found_at(self, role: str) -> bool:
        """Whether others have to find one of this role."""
        return role == SERVER or (role == WORKER and self.partners > 0)

    def _look_at_failure(self, said: words.Failed) -> None:
        known = getattr(errors, said.kind, None) if said.kind else errors.ShoalError
        if not (isinstance(known, type) and issubclass(known, errors.ShoalError)):
            raise Malformed(f"{said.kind} is no error")
        if not -1 <= said.rank < self.workers * (1 + self.partners) + self.servers:
            raise Malformed(f"there is no process {said.rank}")

    def _look_at_report(self, said: words.Report, frames: Sequence[Any]) -> None:
        if len({row.unit for row in said.rows}) != len(said.rows):
            raise Malformed("a unit is in it twice")
        counted = False
        for row in said.rows:
            if len(row.columns) != _WIDTH or len(row.pulled) not in (0, self.shards):
                raise Malformed(f"unit {row.unit} is in another form; run the same version everywhere")
            push = row.columns[UnitColumns.PUSH]
            sums = row.columns[UnitColumns.LOSS : UnitColumns.SAMPLES + 1]
            if not all(map(fits, (*row.columns[: UnitColumns.LOSS], *row.columns[UnitColumns.MEASURED : UnitColumns.VALUES]))):
                raise Malformed(f"the times of unit {row.unit} are none")
            if not (math.isfinite(push) and -MOST < push < MOST):
                raise Malformed(f"{push} is no push")
            if int(push) < 0 and int(push) not in (EMPTY, REJECTED):
                raise Malformed(f"no worker says {push} of a push")
            if int(push) not in (EMPTY, REJECTED):
                counted = True
                if not all(fits(value) for value in sums):
                    raise Malformed(f"what was found of unit {row.unit} is no number")
        if len(said.made) not in (0, self.shards) or (counted and not self.sync and not said.made):
            raise Malformed(f"{len(said.made)} versions where there are {self.shards} servers")
        if not all(0 <= count <= self.versions for count in (*said.made, *(p for row in said.rows for p in row.pulled))):
            raise Malformed("a version is none")
        check_buffers(self.buffers, said.buffers, frames)

    def _look_at_given(self, said: words.Gives, frames: Sequence[Any]) -> None:
        shards = said.shards
        if not (0 <= said.unit < MOST and 0 <= said.index < COLLECTIVES_A_STEP):
            raise Malformed(f"there is no sum {said.index} of a unit {said.unit}")
        ordered = all(a < b for a, b in zip(shards, shards[1:], strict=False))
        if not (self.sync and ordered and set(shards) <= set(range(self.workers)) and said.unit % self.workers in shards):
            raise Malformed(f"{shards[:9]} are no shards of a step")
        found = messages.unpack_tensors(said.values, frames)
        if list(found) != [NAME] or not found[NAME].is_floating_point() or found[NAME].dim() != 1:
            raise Malformed("what is to be added up is no vector")

    def _look_at_evaluation(self, said: words.Evaluated, frames: Sequence[Any]) -> None:
        if len(frames) != 2 or not 0 < said.epoch < _MOST_EPOCHS or not math.isfinite(said.seconds):
            raise Malformed(f"{len(frames)} frames are no evaluation of epoch {said.epoch}")
        sums = said.sums or {}
        if len(sums) > 1 + len(self.metrics) + VALUE_COLUMNS or any(math.isnan(weight) for _, weight in sums.values()):
            raise Malformed("its sums are none")
        self._look_at_metrics(frames)

    def _look_at_metrics(self, frames: Sequence[Any]) -> None:
        try:
            for frame in frames:
                _look_at_archive(frame)
                found = metrics_of(notes.from_bytes(frame), self.metrics)
                for name, metric in metrics_of(notes.from_bytes(frame), self.metrics).items():
                    merge(metric, found[name])
        except RequestError as error:
            raise Malformed(str(error)) from None
        # Metrics are the user's, and what they make of a state that is none may be anything; it is not kept.
        except Exception as error:
            raise Malformed(f"the state of its metrics is none ({type(error).__name__})") from None


def _look_at_archive(frame: Any) -> None:
    """What is read takes no more memory than what came: nothing in it is compressed, no tensor is larger than its bytes."""
    size = memoryview(frame).nbytes
    with zipfile.ZipFile(io.BytesIO(frame)) as archive:
        files = archive.infolist()
        if any(file.compress_type != zipfile.ZIP_STORED for file in files) or sum(file.file_size for file in files) > size:
            raise Malformed("the state of its metrics is packed")
    pieces = notes.from_bytes(frame)
    tensors = [leaf for piece in pieces for leaf in _leaves(list(piece.values())) if isinstance(leaf, torch.Tensor)]
    if sum(tensor.nbytes for tensor in tensors) > size:
        raise Malformed("the state of its metrics is larger than its bytes")


def _leaves(tree: Any) -> Iterator[Any]:
    if isinstance(tree, Mapping):
        tree = list(tree.values())
    if not isinstance(tree, (list, tuple)):
        yield tree
        return
    for branch in tree:
        yield from _leaves(branch)


def check_of(plan: Plan, store: Store, job: Job, total_steps: int, made: int = 0) -> SaidCheck:
    """What the words of a run under a plan have to be like; ``made``: updates that each server counts as it begins."""
    workers = store.arena.world_size
    buffers = {spec.name: store.buffer(0, k) for k, spec in enumerate(store.table.buffers)}
    return SaidCheck(
        workers=workers, servers=plan.servers * (1 + (plan.replicas or 0)), shards=plan.servers,
        sync=not plan.waits_for_nobody, buffers=buffers, metrics=job.metrics, versions=made + total_steps * (workers + 1),
        partners=size_of(plan) - 1,
    )  # fmt: skip
