"""torch.distributed over shared memory: the backend "shoal", for ranks of one machine.

``init`` makes the default group of this process, and ``dist.new_group``, DeviceMesh, DTensor, ``fully_shard`` and the
pipeline schedules make theirs as ever. What the calls do stands in ``meeting.py`` (collectives) and ``mailbox.py``
(send and receive); here they get torch's signatures, and the Work objects that torch waits for.

A call that torch waits for at once has done its part of the first round when it returns, and the rest in ``wait``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from shoal.comm.mailbox import Receive
from shoal.comm.meeting import Meeting
from shoal.comm.port import DEADLINE_S, Pending, Port, StepAborted
from shoal.errors import RequestError

__all__ = ["NAME", "SharedGroup", "SharedWork", "StepAborted", "init", "register"]

NAME = "shoal"
_OPS = {
    dist.ReduceOp.SUM: "sum", dist.ReduceOp.AVG: "avg", dist.ReduceOp.MAX: "max", dist.ReduceOp.MIN: "min",
    dist.ReduceOp.PRODUCT: "product", dist.ReduceOp.BAND: "band", dist.ReduceOp.BOR: "bor", dist.ReduceOp.BXOR: "bxor",
}  # fmt: skip
_KEY_MASK = (1 << 64) - 1


class SharedWork(dist.Work):  # type: ignore[misc]
    """What a call has begun. ``wait`` ends it; DeadlineError or StepAborted where it cannot be."""

    def __init__(self, port: Port, parts: Sequence[Pending], result: Any) -> None:
        super().__init__()
        self._port, self._parts, self._result = port, parts, result
        self._future: torch.futures.Future[Any] | None = None

    def wait(self, timeout: timedelta | None = None) -> bool:
        for part in self._parts:
            self._port.finish(part)
        self._settle()
        return True

    def is_completed(self) -> bool:
        over = all(self._port.poll(part) for part in self._parts)
        if over:
            self._settle()
        return over

    def is_success(self) -> bool:
        return self.is_completed()

    def exception(self) -> None:
        return None

    def synchronize(self) -> None:
        self.wait()

    def source_rank(self) -> int:
        """Who sent what a receive has got."""
        return self._source_rank()

    def _source_rank(self) -> int:
        part = self._parts[0]
        return part.sender if isinstance(part, Receive) else -1

    def result(self) -> Any:
        return self._result

    def get_future(self) -> torch.futures.Future[Any]:
        """A future of the tensors that the call wrote. Nothing runs in the background: asking for it waits."""
        if self._future is None:
            self._future = torch.futures.Future()
            self.wait()
        return self._future

    def _settle(self) -> None:
        if self._future is not None and not self._future.done():
            self._future.set_result(self._result)


class SharedGroup(dist.ProcessGroup):  # type: ignore[misc]
    """A process group of ranks that share memory. Made by torch: see ``register``."""

    def __init__(self, port: Port, name: str, ranks: Sequence[int], store: Any = None) -> None:
        super().__init__(ranks.index(port.rank), len(ranks))
        self._port = port
        self._meeting = Meeting(port, name, ranks)
        self._name = name
        self._description = ""
        self._store = store
        self._number = 0

    # -- what torch asks of a group ------------------------------------------------------------------------------

    def getBackendName(self) -> str:  # noqa: N802
        return NAME

    def getGroupName(self) -> str:  # noqa: N802
        return self._name

    def setGroupName(self, name: str) -> None:  # noqa: N802
        self._name = name

    def getGroupDesc(self) -> str:  # noqa: N802
        return self._description

    def setGroupDesc(self, description: str) -> None:  # noqa: N802
        self._description = description

    def get_group_store(self) -> Any:
        return self._store

    def _get_backend(self, device: torch.device) -> SharedGroup:
        return self

    def supports_tensor_alloc(self, device: torch.device) -> bool:
        return False

    def _set_default_timeout(self, timeout: timedelta) -> None:
        """The deadline is the port's."""

    def _get_sequence_number_for_group(self) -> int:
        return self._number

    def _set_sequence_number_for_group(self) -> None:
        """Every rank counts its own calls."""

    def shutdown(self) -> None:
        self._meeting.leave()

    def abort(self) -> None:
        self._meeting.leave()

    # -- collectives ---------------------------------------------------------------------------------------------

    def allreduce(self, tensors: list[torch.Tensor], opts: Any = None, timeout: Any = None) -> SharedWork:
        op = "sum" if opts is None else _op(opts)
        return self._work([self._meeting.all_reduce(_dense(tensor), op) for tensor in tensors], tensors)

    def allreduce_coalesced(self, tensors: list[torch.Tensor], opts: Any = None) -> SharedWork:
        return self.allreduce(tensors, opts)

    def broadcast(self, tensors: list[torch.Tensor], opts: Any = None, timeout: Any = None) -> SharedWork:
        root = 0 if opts is None else opts.rootRank
        return self._work([self._meeting.broadcast(_dense(tensor), root) for tensor in tensors], tensors)

    def reduce(self, tensors: list[torch.Tensor], opts: Any, timeout: Any = None) -> SharedWork:
        begun = [self._meeting.reduce(_dense(tensor), opts.rootRank, _op(opts)) for tensor in tensors]
        return self._work(begun, tensors)

    def barrier(self, opts: Any = None, timeout: Any = None) -> SharedWork:
        return self._work([self._meeting.barrier()], [])

    def allgather(
        self, outputs: list[list[torch.Tensor]], inputs: list[torch.Tensor], opts: Any = None, timeout: Any = None
    ) -> SharedWork:
        pairs = zip(outputs, inputs, strict=True)
        return self._work([self._meeting.all_gather(output, _dense(given)) for output, given in pairs], outputs)

    def all_gather_single(self, output: torch.Tensor, given: torch.Tensor, opts: Any = None) -> SharedWork:
        return self.all_gather_single_coalesced([output], [given], opts)

    def all_gather_single_coalesced(
        self, outputs: list[torch.Tensor], inputs: list[torch.Tensor], opts: Any = None
    ) -> SharedWork:
        with _back(outputs) as flats:
            begun = [
                self._meeting.all_gather(flat.chunk(self.size()) if flat.numel() else [flat] * self.size(), given)
                for flat, given in zip(flats.tensors, inputs, strict=True)
            ]
            return self._work(begun, outputs, flats.then)

    def allgather_coalesced(
        self, outputs: list[list[torch.Tensor]], inputs: list[torch.Tensor], opts: Any = None
    ) -> SharedWork:
        # One list a rank here, one tensor of it for each input.
        by_input = [[row[index] for row in outputs] for index in range(len(inputs))]
        return self.allgather(by_input, inputs, opts)
