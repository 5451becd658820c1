"""torch.distributed over shared memory: the backend "shoal", for ranks of one machine.

``init`` makes the default group of this process, and ``dist.new_group``, DeviceMesh, DTensor, ``fully_shard`` and the
pipeline schedules make theirs as ever. What the calls do stands in ``meeting.py`` (collectives) and ``mailbox.py``
(send and receive); here they get torch's signatures, and the Work objects that torch waits for.

A call that torch waits for at once has done its part of the first round when it returns, and the rest in ``wait``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from shoal.comm.mailbox import Receive
from shoal.comm.meeting import Meeting
from shoal.comm.port import DEADLINE_S, Pending, Port, StepAborted
from shoal.comm.region import RegionLayout
from shoal.errors import RequestError

__all__ = ["NAME", "SharedGroup", "SharedWork", "StepAborted", "init", "register"]

NAME = "shoal"
_OPS = {
    op.value: op.name.lower() for op in (
        dist.ReduceOp.SUM, dist.ReduceOp.AVG, dist.ReduceOp.MAX, dist.ReduceOp.MIN, dist.ReduceOp.PRODUCT,
        dist.ReduceOp.BAND, dist.ReduceOp.BOR, dist.ReduceOp.BXOR,
    )
}  # fmt: skip


# Their signatures are pybind11's, overloads and all, which no Python method can repeat.
_Work: Any = dist.Work
_ProcessGroup: Any = dist.ProcessGroup


class SharedWork(_Work):
    """What a call has begun. ``wait`` ends it; DeadlineError or StepAborted where it cannot be."""

    def __init__(
        self,
        port: Port,
        parts: Sequence[Pending],
        result: Any,
        then: Sequence[Callable[[], object]],
        ranks: Sequence[int],
    ) -> None:
        super().__init__()
        self._port, self.parts, self._result, self._then, self._ranks = port, parts, result, then, ranks
        self._future: torch.futures.Future[Any] | None = None
        self._beginning = port.beginnings

    def wait(self, timeout: timedelta | None = None) -> bool:
        self._check()
        for part in self.parts:
            self._port.finish(part, timeout.total_seconds() if timeout else None)
        self.settle()
        return True

    def is_completed(self) -> bool:
        self._check()
        over = all(self._port.poll(part) for part in self.parts)
        if over:
            self.settle()
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
        part = self.parts[0]
        return self._ranks.index(part.sender) if isinstance(part, Receive) and part.sender >= 0 else -1

    def result(self) -> Any:
        return self._result

    def get_future(self) -> torch.futures.Future[Any]:
        """A future of the tensors that the call wrote. Nothing runs in the background: asking for it waits."""
        if self._future is None:
            self._future = torch.futures.Future()
            self.wait()
        return self._future

    def _check(self) -> None:
        if self._beginning != self._port.beginnings and not all(part.done for part in self.parts):
            raise StepAborted("What is waited for was begun before its group began anew.")

    def settle(self) -> None:
        """What is left to do once all parts are done."""
        then, self._then = self._then, ()
        for step in then:
            step()
        if self._future is not None and not self._future.done():
            self._future.set_result(self._result)


class SharedGroup(_ProcessGroup):
    """A process group of ranks that share memory. Made by torch: see ``register``."""

    def __init__(self, port: Port, name: str, ranks: Sequence[int], store: Any = None) -> None:
        super().__init__(ranks.index(port.rank), len(ranks))
        self._port = port
        self._meeting = Meeting(port, name, ranks)
        self._name = name
        self._description = ""
        self._store = store
        self._number = 0
        self._bundle: list[SharedWork] | None = None

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

    def _start_coalescing(self, device: torch.device) -> None:
        self._bundle = []

    def _end_coalescing(self, device: torch.device) -> SharedWork:
        """Everything that was begun since, as one."""
        bundle, self._bundle = self._bundle or [], None
        parts = [part for work in bundle for part in work.parts]
        return SharedWork(self._port, parts, [], [work.settle for work in bundle], self._meeting.ranks)

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
        begun: list[Pending] = []
        then: list[Callable[[], object]] = []
        for output, given in zip(outputs, inputs, strict=True):
            _check_sizes(output, given.numel() * self.size())
            _check_alike(output, given)
            flat, back = _flat(output)
            begun.append(self._meeting.all_gather_flat(flat, _dense(given)))
            then += back
        return self._work(begun, outputs, then)

    def allgather_coalesced(
        self, outputs: list[list[torch.Tensor]], inputs: list[torch.Tensor], opts: Any = None
    ) -> SharedWork:
        # One list a rank here, with one tensor for each input.
        by_input = [[row[index] for row in outputs] for index in range(len(inputs))]
        return self.allgather(by_input, inputs, opts)

    def reduce_scatter(
        self, outputs: list[torch.Tensor], inputs: list[list[torch.Tensor]], opts: Any = None, timeout: Any = None
    ) -> SharedWork:
        op = "sum" if opts is None else _op(opts)
        pairs = zip(outputs, inputs, strict=True)
        return self._work([self._meeting.reduce_scatter(output, given, op) for output, given in pairs], outputs)

    def reduce_scatter_single(self, output: torch.Tensor, given: torch.Tensor, opts: Any = None) -> SharedWork:
        return self.reduce_scatter_single_coalesced([output], [given], opts)

    def reduce_scatter_single_coalesced(
        self, outputs: list[torch.Tensor], inputs: list[torch.Tensor], opts: Any = None
    ) -> SharedWork:
        op = "sum" if opts is None else _op(opts)
        begun: list[Pending] = []
        then: list[Callable[[], object]] = []
        for output, given in zip(outputs, inputs, strict=True):
            _check_sizes(given, output.numel() * self.size())
            _check_alike(output, given)
            flat, back = _flat(output)
            begun.append(self._meeting.reduce_scatter_flat(flat, _dense(given).contiguous(), op))
            then += back
        return self._work(begun, outputs, then)

    def alltoall(
        self, outputs: list[torch.Tensor], inputs: list[torch.Tensor], opts: Any = None, timeout: Any = None
    ) -> SharedWork:
        return self._work([self._meeting.all_to_all(outputs, [_dense(given) for given in inputs])], outputs)

    def all_to_all_single(
        self, output: torch.Tensor, given: torch.Tensor, output_sizes: list[int], input_sizes: list[int],
        opts: Any = None, timeout: Any = None,
    ) -> SharedWork:  # fmt: skip
        if output_sizes or input_sizes:
            outputs, inputs = self._split(output, output_sizes), self._split(_dense(given), input_sizes)
            return self._work([self._meeting.all_to_all(outputs, inputs)], [output])
        rows = output.shape[0]
        if rows % self.size():
            raise RequestError(f"{rows} rows are not the same for each of {self.size()} ranks; say how many each gets.")
        _check_sizes(given, output.numel())
        _check_alike(output, given)
        flat, back = _flat(output)
        return self._work([self._meeting.all_to_all_flat(flat, _dense(given).contiguous())], [output], back)

    def gather(
        self, outputs: list[list[torch.Tensor]], inputs: list[torch.Tensor], opts: Any, timeout: Any = None
    ) -> SharedWork:
        rows = outputs or [[] for _ in inputs]
        begun = [
            self._meeting.gather(row, _dense(given), opts.rootRank) for row, given in zip(rows, inputs, strict=True)
        ]
        return self._work(begun, outputs)

    def scatter(
        self, outputs: list[torch.Tensor], inputs: list[list[torch.Tensor]], opts: Any, timeout: Any = None
    ) -> SharedWork:
        rows = inputs or [[] for _ in outputs]
        begun = [self._meeting.scatter(out, row, opts.rootRank) for out, row in zip(outputs, rows, strict=True)]
        return self._work(begun, outputs)

    # What torch called them before 2.13.
    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced
    alltoall_base = all_to_all_single

    # -- from one to another -------------------------------------------------------------------------------------

    def send(self, tensors: list[torch.Tensor], receiver: int, tag: int = 0) -> SharedWork:
        """Begin to send. What finds no room goes on whenever this rank waits; the tensor is free after ``wait``."""
        rank, key = self._meeting.ranks[receiver], self._meeting.key
        mail = self._port.mail
        return self._work([mail.send(rank, key, tag, _dense(tensor).contiguous()) for tensor in tensors], tensors)

    def recv(self, tensors: list[torch.Tensor], sender: int, tag: int = 0) -> SharedWork:
        """Expect a message; it is there after ``wait``."""
        return self._receive(tensors, [self._meeting.ranks[sender]], tag)

    def recv_anysource(self, tensors: list[torch.Tensor], tag: int = 0) -> SharedWork:
        others = [rank for rank in self._meeting.ranks if rank != self._port.rank]
        return self._receive(tensors, others, tag)

    def _receive(self, tensors: list[torch.Tensor], senders: list[int], tag: int) -> SharedWork:
        key = self._meeting.key
        begun = [self._port.mail.receive(senders, key, tag, _dense(tensor)) for tensor in tensors]
        return self._work(begun, tensors)

    # ------------------------------------------------------------------------------------------------------------

    def _work(self, begun: Sequence[Pending], result: Any, then: Sequence[Callable[[], object]] = ()) -> SharedWork:
        self._number += 1
        self._port.mail.push_all()
        work = SharedWork(self._port, begun, result, then, self._meeting.ranks)
        if self._bundle is not None:
            self._bundle.append(work)
        return work

    def _split(self, tensor: torch.Tensor, sizes: Sequence[int]) -> list[torch.Tensor]:
        if not sizes:
            sizes = [tensor.shape[0] // self.size()] * self.size()
        _check_sizes(tensor, sum(sizes) * (tensor.numel() // max(1, tensor.shape[0])))
        return list(tensor.split(list(sizes)))


def register() -> None:
    """Make the backend "shoal" known to torch, if it is not yet."""
    if NAME.upper() not in dist.Backend._plugins:
        dist.Backend.register_backend(NAME, _create, extended_api=True, devices=["cpu"])


def init(
    region: torch.Tensor, rank: int, world_size: int, *, deadline_s: float = DEADLINE_S, spin_s: float | None = None,
    generation_address: int = 0, layout: RegionLayout | None = None,
) -> Port:  # fmt: skip
    """Make the default process group of this process, without a port or a file to meet at; see Port for the arguments.

    Returns the port, whose ``reset`` all ranks call after a StepAborted. It does not wait for the others: the first
    collective does. ``dist.destroy_process_group`` ends it.
    """
    port = Port(
        region,
        rank,
        world_size,
        deadline_s=deadline_s,
        spin_s=spin_s,
        generation_address=generation_address,
        layout=layout,
    )
    register()
    # torch wants a store; the members find each other in the shared memory, so it may be this process's own.
    dist.init_process_group(
        NAME, store=dist.HashStore(), rank=rank, world_size=world_size, pg_options=port,
        timeout=timedelta(seconds=deadline_s),
    )  # fmt: skip
    return port


def _create(options: Any, port: Any) -> SharedGroup:
    """What torch calls for every new group: the port comes with the first, and from the first for the others."""
    if not isinstance(port, Port):
        world = dist.group.WORLD
        if not isinstance(world, SharedGroup):
            raise RequestError(f'The backend "{NAME}" begins with shoal.comm.shared_group.init; call that first.')
        port = world._port
    ranks = [port.world.index(rank) for rank in options.global_ranks_in_group] or list(range(options.group_size))
    return SharedGroup(port, str(options.group_id), ranks, options.store)


def _op(options: Any) -> str:
    op = _OPS.get(options.reduceOp.op.value)
    if op is None:
        raise RequestError(
            f'The backend "{NAME}" cannot reduce with {options.reduceOp.op}; use one of {", ".join(_OPS.values())}.'
        )
    return op


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.layout != torch.strided or not tensor.is_cpu:
        raise RequestError(
            f'The backend "{NAME}" moves dense tensors of the processor only; use gloo or NCCL for others.'
        )
    return tensor.detach() if tensor.requires_grad else tensor


def _flat(tensor: torch.Tensor) -> tuple[torch.Tensor, list[Callable[[], object]]]:
    """A contiguous tensor to write into, and what takes it back to where it belongs."""
    if tensor.is_contiguous():
        return tensor, []
    flat = torch.empty_like(tensor, memory_format=torch.contiguous_format)
    return flat, [functools.partial(tensor.copy_, flat)]


def _check_sizes(tensor: torch.Tensor, numel: int) -> None:
    if tensor.numel() != numel:
        raise RequestError(
            f"A tensor of {tensor.numel()} elements was given where the ranks need {numel}; see their shapes."
        )


def _check_alike(output: torch.Tensor, given: torch.Tensor) -> None:
    if output.dtype != given.dtype:
        raise RequestError(f"A tensor of {given.dtype} was given and one of {output.dtype} to write to; use one type.")
