"""A process group: workers that share no memory and speak through torch.distributed.

What every process of a job joins, whoever started it (torchrun, Slurm, shoal itself). Every exchange is named, so that
one that does not come to an end says what was waited for and from whom. Nobody hangs because another has failed: who
fails says so in the group's key-value store, and everybody who waits looks there several times a second.

On processors it is gloo, between ranks of one machine also the memory that they can share (``nearby.py``), once
``meet_nearby`` was called. Tensors on GPUs go by way of the processor, or, once ``use_nccl`` was called, by NCCL.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import os
import pickle
import re
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from shoal.comm import nearby, shared_group
from shoal.comm.member import Member
from shoal.comm.port import Port
from shoal.errors import DeadlineError, JobFailed, ShoalError

BUCKET_BYTES = 32 << 20
_SLICE_S = 0.2
_JOIN_S = 300.0
DEADLINE_S = 600.0
_ACKNOWLEDGE_S = 2.0
# What torch calls the threads that carry out a gloo group's exchanges.
_THREADS = "pt_gloo_runloop"


class PeerFailed(ShoalError):
    """Another process of the group has said that it failed; ``value`` is what it said."""

    def __init__(self, value: Any) -> None:
        super().__init__("Another process of the job failed.")
        self.value = value


class Group:
    """The processes of one job, seen from one of them."""

    def __init__(
        self, rank: int, world_size: int, store: Any = None, deadline_s: float = DEADLINE_S
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self.deadline_s = deadline_s
        # Called while this process waits, with the name of what it waits for and for how long it has.
        self.while_waiting: Callable[[str, float], None] = _look_on
        self._store = store
        self._nccl = False
        self._subgroups: dict[tuple[int, ...], Any] = {}
        # Exchanges that were begun and are not known to be over.
        self._under_way: dict[int, Any] = {}
        self._one_machine = False
        self._machines: list[str] = []
        self._port: Port | None = None
        self._looked_at = 0.0

    @property
    def on_one_machine(self) -> bool:
        """Whether all processes are on this machine."""
        return self._one_machine

    # -- joining and leaving -------------------------------------------------------------------------------------

    @classmethod
    @contextlib.contextmanager
    def join(cls, member: Member, deadline_s: float = DEADLINE_S) -> Iterator[Group]:
        """Join the job that this process was started as a part of. DeadlineError where the others do not come."""
        timeout = timedelta(seconds=_JOIN_S)
        if dist.is_initialized():
            # The script has made the process group already: stand beside it, and leave it as it is.
            store = dist.distributed_c10d._get_default_store()
            ours = False
        else:
            with _joining(member.world_size):
                found = dist.rendezvous(member.init_method, member.rank, member.world_size, timeout=timeout)
                store, _, _ = next(iter(found))
            ours = True
        store.set_timeout(timeout)
        # Several runs may follow one another in a job: each has keys of its own.
        number = store.add(f"shoal/runs/{member.rank}", 1)
        store = dist.PrefixStore(f"shoal/{number}", store)
        group = cls(member.rank, member.world_size, store, deadline_s)
        # With torchrun the store outlives this run; elsewhere it lives in rank 0, and a next run needs it again.
        leave = ours and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        with group._joined(ours, leave, member.local_size == member.world_size):
            yield group

    @classmethod
    @contextlib.contextmanager
    def meet(
        cls, path: str | Path, rank: int, world_size: int, deadline_s: float = DEADLINE_S,
        while_joining: Callable[[], None] = lambda: None,
    ) -> Iterator[Group]:  # fmt: skip
        """Join processes of this machine that meet at a file, which must not exist before. Alone, nothing is needed.

        ``while_joining`` is called until all have come, to raise where one of them never will.
        """
        if world_size == 1:
            yield cls(0, 1)
            return
        with cls.at(dist.FileStore(str(path), world_size), rank, world_size, deadline_s, while_joining) as group:
            yield group

    @classmethod
    @contextlib.contextmanager
    def at(
        cls, store: Any, rank: int, world_size: int, deadline_s: float = DEADLINE_S,
        while_joining: Callable[[], None] = lambda: None, one_machine: bool = True,
    ) -> Iterator[Group]:  # fmt: skip
        """Join processes that know the same key-value store of torch's; ``one_machine``: all of them are on this one."""
        group = cls(rank, world_size, store, deadline_s)
        group._await_all(while_joining)
        with group._joined(True, True, one_machine):
            yield group

    @contextlib.contextmanager
    def _joined(self, make: bool, leave: bool, one_machine: bool) -> Iterator[None]:
        self._one_machine = one_machine
        try:
            self._meet_all(make)
            if make and not leave:
                atexit.register(_leave_at_exit, weakref.ref(dist.group.WORLD))
            yield
        except BaseException:
            # An exchange may be under way whose peer has failed. The destructor of gloo's group would wait for it, and so both
            # stay. A thread of gloo's that lets go of an exchange's tensors asks for the interpreter, and aborts the process
            # where that is just ending: so they are not let go of either.
            for held in (*self._subgroups.values(), *self._under_way.values()):
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(held))
            self._give_back(leave)
            raise
        if any(group() is not None for group in self._give_back(leave)):
            # A mesh that the model knows of and that knows of the model, say.
            gc.collect()

    def _meet_all(self, make: bool) -> None:
        everybody = tuple(range(self.world_size))
        with _joining(self.world_size):
            if make:
                with _loopback(self._one_machine):
                    dist.init_process_group(self._backend, None, self._timeout, self.world_size, self.rank, self._store)
                self._subgroups[everybody] = dist.group.WORLD
            else:
                self.prepare([everybody])

    def _give_back(self, leave: bool) -> list[weakref.ref[Any]]:
        """Let go of torch's groups: with the last reference to one its threads end, here and not when the interpreter does.

        Args:
            leave: the default group, too.

        Returns: those that were given back, as long as somebody else knows of them.
        """
        given_back = [
            group for group in self._subgroups.values()
            if isinstance(group, dist.ProcessGroup) and (leave or group is not dist.group.WORLD)
        ]  # fmt: skip
        if not leave:
            for group in given_back:
                dist.destroy_process_group(group)
        elif dist.is_initialized():
            dist.destroy_process_group()
        self._subgroups.clear()
        self._under_way.clear()
        self.while_waiting = _look_on
        if self._port is not None:
            self._port.while_waiting = _look_on
        _forget_defaults(given_back)
        return [weakref.ref(group) for group in given_back]

    def _await_all(self, while_joining: Callable[[], None]) -> None:
        self._store.set(f"here/{self.rank}", "1")
        deadline = time.monotonic() + _JOIN_S
        while not self._store.check([f"here/{rank}" for rank in range(self.world_size)]):
            while_joining()
            if time.monotonic() > deadline:
                raise DeadlineError(f"Rank {self.rank} waited {_JOIN_S:.0f} s for {self.world_size} workers to start.")
            time.sleep(0.02)

    @property
    def _backend(self) -> str:
        return "cpu:gloo,cuda:nccl" if self._nccl else "gloo"

    @property
    def _timeout(self) -> timedelta:
        # A process cannot end before its exchanges have: they give up a little after we do.
        return timedelta(seconds=self.deadline_s + 5)

    def use_nccl(self) -> None:
        """Let tensors on GPUs travel by NCCL from now on: every process has a GPU of its own, and it is the current one.

        All processes call it. Tensors of the processor go by gloo as before.
        """
        if self.world_size > 1 and not self._nccl:
            self._nccl = True
            everybody = tuple(range(self.world_size))
            del self._subgroups[everybody]
            self.prepare([everybody])

    def meet_nearby(self) -> None:
        """Let groups that are prepared from now on speak through shared memory where all their ranks are on one machine.

        All processes call it.
        """
        if self.world_size == 1 or self._machines or self._nccl:
            return
        keys = self.gather_objects(nearby.machine_key(), "the names of the machines")
        self._port = nearby.open_port(keys, self.rank, self.deadline_s, self.gather_objects)
        shared = self.gather_objects(self._port is not None, "the shared memory of each machine")
        self._machines = [key if found else "" for key, found in zip(keys, shared, strict=True)]
        shared_group.register()
        if self._port is not None:
            self._port.while_waiting = self._wait_nearby

    def prepare(self, subsets: Sequence[tuple[int, ...]]) -> None:
        """Make it possible to sum over these ranks alone. All processes call it, with the same subsets."""
        for ranks in subsets:
            if self.world_size > 1 and len(ranks) > 1 and ranks not in self._subgroups:
                with _loopback(self._one_machine):
                    self._subgroups[ranks] = self._make(ranks)

    def _make(self, ranks: tuple[int, ...]) -> Any:
        together = {self._machines[rank] for rank in ranks} if self._machines and len(ranks) > 1 else {""}
        if len(together) == 1 and together != {""}:
            # Who is not among them passes no port, and makes nothing.
            options: Any = self._port if self.rank in ranks else None
            return dist.new_group(list(ranks), self._timeout, shared_group.NAME, options)
        return dist.new_group(list(ranks), self._timeout, self._backend)

    def torch_group(self, ranks: tuple[int, ...]) -> Any:
        """torch's own group of these ranks, which were prepared."""
        return self._subgroups[ranks]

    @property
    def media(self) -> str:
        """What the processes speak through, in words."""
        far = "NCCL" if self._nccl else "gloo"
        if not any(self._machines):
            return far
        machines = len(set(self._machines))
        if machines == 1:
            return f"the memory of their machine within a step, and through {far}"
        return f"the memory of a machine where both are on it, and through {far} between {machines} machines"

    # -- exchanges -----------------------------------------------------------------------------------------------

    def sum_in_place(self, tensors: Sequence[torch.Tensor], what: str, ranks: tuple[int, ...] | None = None) -> None:
        """Replace each tensor (1-D, contiguous) by its sum over all processes (or ``ranks``), the same bits everywhere."""
        if self.world_size == 1:
            return
        subgroup = self._everybody if ranks is None else self._subgroups[ranks]
        everything = [(tensor, 0) for tensor in tensors]
        self._all(everything, what, lambda piece, _: dist.all_reduce(piece, group=subgroup, async_op=True))

    def _all(
        self, tensors: Sequence[tuple[torch.Tensor, int]], what: str, begin: Callable[[torch.Tensor, int], Any]
    ) -> None:
        """Begin an exchange with each bucket of some tensors, from where the group can take them, and wait for all."""
        works = []
        for tensor, detail in tensors:
            for piece in tensor.split(max(1, BUCKET_BYTES // tensor.element_size())):
                moved = piece if self._nccl else piece.cpu()
                works.append((piece, moved, self._begun(begin(moved, detail))))
        for piece, moved, work in works:
            self._wait(work, what, moved.device.type)
            if moved is not piece:
                piece.copy_(moved)

    def sum_at(self, tensors: Sequence[tuple[torch.Tensor, int]], ranks: tuple[int, ...], what: str) -> None:
        """Replace each tensor (1-D, contiguous) by its sum over ``ranks`` at the rank that it comes with; what the others
        have in it afterwards means nothing."""
        subgroup = self._subgroups[ranks]
        self._all(tensors, what, lambda piece, home: dist.reduce(piece, home, group=subgroup, async_op=True))

    def share(self, tensors: Sequence[tuple[torch.Tensor, int]], ranks: tuple[int, ...], what: str) -> None:
        """Give all of ``ranks`` each tensor (1-D, contiguous) as the rank that it comes with has it."""
        subgroup = self._subgroups[ranks]
        self._all(tensors, what, lambda piece, source: dist.broadcast(piece, source, group=subgroup, async_op=True))

    def bring(self, page: torch.Tensor, what: str) -> list[torch.Tensor]:
        """Bring everybody's pages (1-D, contiguous, of one length) to rank 0; nothing comes of it on the others."""
        if self.world_size == 1:
            return [page]
        pages = [torch.empty_like(page) for _ in range(self.world_size)] if self.rank == 0 else None
        self._wait(dist.gather(page, pages, 0, group=self._everybody, async_op=True), what)
        return pages or []

    def gather_rows(self, row: torch.Tensor, what: str) -> torch.Tensor:
        """Every process's row (1-D, of one length), stacked by rank."""
        if self.world_size == 1:
            return row.unsqueeze(0)
        return self._gather(row, tuple(range(self.world_size)), what)

    def sum_small(self, values: torch.Tensor, ranks: Sequence[int], what: str) -> torch.Tensor:
        """Sum over the ranks that take part, in rank order; ``prepare`` has to know them."""
        rows = self._gather(values.reshape(-1), tuple(ranks), what)
        total = rows[0].clone()
        for row in rows[1:]:
            total += row
        return total.view(values.shape)

    def broadcast(self, tensor: torch.Tensor, source: int, what: str) -> None:
        """Give everybody what ``source`` has in a tensor (1-D, contiguous)."""
        if self.world_size == 1:
            return
        everybody = self._everybody
        self._all([(tensor, source)], what, lambda piece, home: dist.broadcast(piece, home, group=everybody, async_op=True))

    def broadcast_object(self, value: Any, source: int, what: str) -> Any:
        """Give everybody a value that ``source`` has; what the others pass is ignored."""
        if self.world_size == 1:
            return value
        data = pickle.dumps(value, protocol=5) if self.rank == source else b""
        size = torch.tensor([len(data)])
        self.broadcast(size, source, what)
        page = torch.frombuffer(bytearray(data) or bytearray(int(size)), dtype=torch.uint8)
        self.broadcast(page, source, what)
        return value if self.rank == source else pickle.loads(page.numpy().tobytes())

    def gather_objects(self, value: Any, what: str) -> list[Any]:
        """Everybody's values, by rank."""
        if self.world_size == 1:
            return [value]
        data = pickle.dumps(value, protocol=5)
        sizes = self.gather_rows(torch.tensor([len(data)]), what).reshape(-1).tolist()
        page = torch.zeros(max(sizes), dtype=torch.uint8)
        page[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        rows = self.gather_rows(page, what)
        return [pickle.loads(row[:size].numpy().tobytes()) for row, size in zip(rows, sizes, strict=True)]

    @property
    def _everybody(self) -> Any:
        return self._subgroups[tuple(range(self.world_size))]

    def _gather(self, row: torch.Tensor, ranks: tuple[int, ...], what: str) -> torch.Tensor:
        rows = row.new_empty((len(ranks), row.numel()))
        subgroup = self._subgroups[ranks]
        self._wait(dist.all_gather(list(rows), row.contiguous(), group=subgroup, async_op=True), what)
        return rows

    def _begun(self, work: Any) -> Any:
        self._under_way[id(work)] = work
        return work

    def _wait(self, work: Any, what: str, where: str = "cpu") -> None:
        """Wait for an exchange."""
        self._begun(work)
        self._wait_in_rounds(work, what, where)
        del self._under_way[id(work)]

    def _wait_in_rounds(self, work: Any, what: str, where: str) -> None:
        """Wait in short rounds, and look around between them."""
        if isinstance(work, shared_group.SharedWork) or where != "cpu":
            # Shared memory looks around by itself. NCCL's watchdog has the deadline; a wait that gives up would break it.
            work.wait()
            return
        began = time.monotonic()
        said = False
        while True:
            try:
                work.wait(timedelta(seconds=_SLICE_S))
                return
            except RuntimeError as error:
                waited_s = time.monotonic() - began
                if work.is_completed():
                    # It may have come to its end just now; where it has failed, it says so once more.
                    broken = _outcome(work)
                    if broken is None:
                        return
                    self._look_for_failure(2.0)
                    self.while_waiting(what, waited_s)
                    raise JobFailed(
                        f"Rank {self.rank} lost the other processes while it waited for {what} ({_first_line(broken)}); "
                        "see what ended them, and go on with --resume."
                    ) from error
                self._look_for_failure(0.0)
            if not said:
                self._store.set(f"waits/{self.rank}", what)
                said = True
            self.while_waiting(what, waited_s)
            if waited_s > self.deadline_s:
                raise DeadlineError(
                    f"Rank {self.rank} waited {waited_s:.0f} s for {what} from {self.name_missing(what)}; "
                    "see what keeps it, and go on with --resume."
                )

    def _wait_nearby(self, what: str, waited_s: float) -> None:
        """What the shared memory's port calls while it waits: now and then, look for who failed."""
        if time.monotonic() - self._looked_at > _SLICE_S:
            self._looked_at = time.monotonic()
            self._look_for_failure(0.0)
            self.while_waiting(what, waited_s)

    def hear_by_itself(self) -> None:
        """Whoever made the group sees by other means which process has gone, and the store may go with it: look there no more."""
        self._store = dist.HashStore()

    def look_for_cause(self, patience_s: float) -> None:
        """After an error: PeerFailed where another process has said that it failed first."""
        if self.world_size > 1:
            with contextlib.suppress(RuntimeError):
                self._look_for_failure(patience_s)

    def missing(self, what: str) -> list[int]:
        """The ranks that do not wait for the same thing: those that everybody else waits for."""
        missing = []
        for rank in range(self.world_size):
            key = f"waits/{rank}"
            if rank != self.rank and not (self._store.check([key]) and self._store.get(key).decode() == what):
                missing.append(rank)
        return missing

    def name_missing(self, what: str) -> str:
        """The same in words."""
        ranks = self.missing(what)
        return " and ".join(f"rank {rank}" for rank in ranks) if ranks else "the network"

    # -- failures ------------------------------------------------------------------------------------------------

    def fail(self, value: Any) -> None:
        """Tell the others that this process fails, and why; wait a moment until they know."""
        if self.world_size == 1:
            return
        # The store itself may be gone: then there is nobody left to tell.
        with contextlib.suppress(RuntimeError):
            if self._store.add("failures", 1) == 1:
                self._store.set("failure", pickle.dumps(value))
            self._acknowledge()

    def _look_for_failure(self, patience_s: float) -> None:
        deadline = time.monotonic() + patience_s
        try:
            while not self._store.check(["failure"]):
                if time.monotonic() >= deadline:
                    return
                time.sleep(0.02)
            value = pickle.loads(self._store.get("failure"))
        except RuntimeError:
            return
        raise PeerFailed(value)

    def _acknowledge(self) -> None:
        """Leave together, so that whoever keeps the store, or watches over the processes, ends nobody too early."""
        self._store.set(f"knows/{self.rank}", "1")
        deadline = time.monotonic() + _ACKNOWLEDGE_S
        others = [f"knows/{rank}" for rank in range(self.world_size)]
        while time.monotonic() < deadline and not self._store.check(others):
            time.sleep(0.02)


def has_threads() -> bool:
    """Whether threads of a process group are alive in this process: those of one that a failure has left behind, say.

    Where the system does not tell, whether there is a group.
    """
    names: list[str] = []
    for path in Path("/proc/self/task").glob("*/comm"):
        # A thread may end meanwhile.
        with contextlib.suppress(OSError):
            names.append(path.read_text().strip())
    return any(name.startswith(_THREADS) for name in names) if names else dist.is_initialized()


def _forget_defaults(groups: Sequence[Any]) -> None:
    """Where torch's differentiable exchanges were imported during a run, each has its group for a default, and for ever."""
    module = sys.modules.get("torch.distributed.nn.functional")
    for function in list(vars(module).values()) if module is not None else ():
        defaults = getattr(function, "__defaults__", None) or ()
        if any(value is group for value in defaults for group in groups):
            # None is the group of the moment in which they are called.
            function.__defaults__ = tuple(None if any(value is g for g in groups) else value for value in defaults)


def _leave_at_exit(group: weakref.ref[Any]) -> None:
    """Leave a group that a next run could have gone on with, before the interpreter ends."""
    if group() is not None and group() is dist.group.WORLD:
        dist.destroy_process_group()


def _look_on(what: str, waited_s: float) -> None:
    """Nobody has anything to do while somebody waits."""


@contextlib.contextmanager
def _joining(world_size: int) -> Iterator[None]:
    """Say in one sentence that the others did not come."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise DeadlineError(
            f"The {world_size} processes of the job did not find one another ({_first_line(error)}); "
            "see whether all were started, and whether MASTER_ADDR and MASTER_PORT can be reached from each machine."
        ) from None


@contextlib.contextmanager
def _loopback(wanted: bool) -> Iterator[None]:
    """Let gloo speak over the loopback interface where all processes are on one machine and nobody chose another."""
    name = "GLOO_SOCKET_IFNAME"
    if not wanted or name in os.environ:
        yield
        return
    os.environ[name] = "lo0" if os.uname().sysname == "Darwin" else "lo"
    try:
        yield
    finally:
        del os.environ[name]


def _outcome(work: Any) -> RuntimeError | None:
    """The error that an exchange ended with, None where it went well."""
    try:
        work.wait()
    except RuntimeError as error:
        return error
    return None


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return re.sub(r"^\[[^\]]*\]\s*", "", text).rstrip(".")
