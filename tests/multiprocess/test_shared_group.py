"""The process group over shared memory: real processes, every call against what was computed by hand.

This file is also the script that forks them, as workers are forked: from one thread, with torch imported. What it runs
stands below under "scenarios"; each is run by all ranks of a group, and what a rank raises is what the test shows.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from shoal.comm.meeting import DIRECT_BYTES, MismatchError
from shoal.comm.memory import SharedMemory
from shoal.comm.port import Port, StepAborted
from shoal.comm.region import RegionLayout
from shoal.comm.shared_group import init
from shoal.errors import DeadlineError

# Small pieces, so that small tensors go through many of them.
PIECE = 4096
LETTERS = 8
LIMIT_S = 60.0


# -- scenarios: what every rank of a group does -------------------------------------------------------------------


def values(rank: int, count: int, dtype: torch.dtype, salt: int = 0) -> torch.Tensor:
    """What a rank contributes; products and sums of it are exact in no order of their own."""
    random = torch.Generator().manual_seed(1000 * salt + 10 * count + rank)
    if dtype.is_floating_point or dtype.is_complex:
        return (torch.rand(count, generator=random, dtype=torch.float64) + 0.5).to(dtype)
    return torch.randint(0, 2 if dtype == torch.bool else 5, (count,), generator=random).to(dtype)


def by_hand(given: list[torch.Tensor], op: Any) -> torch.Tensor:
    """Reduce in rank order; half precision in single precision, rounded once."""
    dtype = given[0].dtype
    wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    how = {dist.ReduceOp.MAX: torch.maximum, dist.ReduceOp.MIN: torch.minimum, dist.ReduceOp.PRODUCT: torch.mul}
    total = functools.reduce(how.get(op, torch.add), [value.to(wide) for value in given])
    if op == dist.ReduceOp.AVG:
        total = total / len(given) if wide.is_floating_point else total // len(given)
    return total.to(dtype)


def same(left: torch.Tensor, right: torch.Tensor) -> None:
    assert left.dtype == right.dtype and left.shape == right.shape, (left.dtype, left.shape, right.dtype, right.shape)
    assert torch.equal(left, right), (left, right)


FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
WHOLES = (torch.int64, torch.int32, torch.uint8, torch.bool)
OPS = (dist.ReduceOp.SUM, dist.ReduceOp.AVG, dist.ReduceOp.MAX, dist.ReduceOp.MIN, dist.ReduceOp.PRODUCT)


def sums(port: Port, n: int) -> None:
    rank = port.rank
    borders = [0, 1, 7, PIECE // 4 - 1, PIECE // 4, PIECE // 4 + 1, 3 * PIECE // 4 + 5, 3001]
    for dtype in (*FLOATS, *WHOLES):
        for op in OPS if dtype in (torch.float32, torch.bfloat16, torch.int64) else OPS[:1]:
            for count in borders:
                given = [values(k, count, dtype) for k in range(n)]
                mine = given[rank].clone()
                dist.all_reduce(mine, op)
                same(mine, by_hand(given, op))
    # Every second element, every second column: what lies between stays as it was.
    room = torch.full((50, 60), -1.0)
    grid = room[:, ::2]
    given = [values(k, 1500, torch.float32).view(50, 30) for k in range(n)]
    grid.copy_(given[rank])
    dist.all_reduce(grid)
    same(grid.contiguous(), by_hand(given, dist.ReduceOp.SUM))
    assert bool((room[:, 1::2] == -1).all())
    for root in range(n):
        mine = given[rank].clone()
        dist.reduce(mine, root)
        same(mine, by_hand(given, dist.ReduceOp.SUM) if rank == root else given[rank])
    lists = [[values(k, count, torch.float64) for count in (3, 2000)] for k in range(n)]
    mine_too = [part.clone() for part in lists[rank]]
    with dist.distributed_c10d._coalescing_manager(device=torch.device("cpu")):
        for part in mine_too:
            dist.all_reduce(part)
    for index, part in enumerate(mine_too):
        same(part, by_hand([row[index] for row in lists], dist.ReduceOp.SUM))
    dist.barrier()


def moves(port: Port, n: int) -> None:
    rank = port.rank
    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.bool):
        for count in (1, 5, PIECE // 4 + 3, 2500):
            given = [values(k, count, dtype) for k in range(n)]
            out = [torch.empty(count, dtype=dtype) for _ in range(n)]
            dist.all_gather(out, given[rank])
            for k in range(n):
                same(out[k], given[k])
            whole = torch.empty(n * count, dtype=dtype)
            dist.all_gather_single(whole, given[rank])
            same(whole, torch.cat(given))
            stacked = torch.empty(count, n, dtype=dtype).t()
            dist.all_gather_single(stacked, given[rank])
            same(stacked.contiguous(), torch.stack(given))
            for root in {0, n - 1}:
                mine = given[rank].clone()
                dist.broadcast(mine, root)
                same(mine, given[root])
                gathered = [torch.empty(count, dtype=dtype) for _ in range(n)] if rank == root else None
                dist.gather(given[rank], gathered, root)
                for k, part in enumerate(gathered or []):
                    same(part, given[k])
                part = torch.empty(count, dtype=dtype)
                parts = [values(root, count, dtype, salt=k) for k in range(n)] if rank == root else None
                dist.scatter(part, parts, root)
                same(part, values(root, count, dtype, salt=rank))
            # What k gives to j is made with salt j.
            table = [[values(k, count + j, dtype, salt=j) for j in range(n)] for k in range(n)]
            outs = [torch.empty(count + rank, dtype=dtype) for _ in range(n)]
            dist.all_to_all(outs, table[rank])
            for k in range(n):
                same(outs[k], table[k][rank])
            single = torch.empty(n * (count + rank), dtype=dtype)
            dist.all_to_all_single(single, torch.cat(table[rank]), [count + rank] * n, [count + j for j in range(n)])
            same(single, torch.cat([table[k][rank] for k in range(n)]))
            even = torch.empty(n * count, dtype=dtype)
            dist.all_to_all_single(even, given[rank].repeat(n))
            same(even, torch.cat(given))
    said: list[Any] = [None] * n
    dist.all_gather_object(said, {"rank": rank, "text": "x" * 3000 * rank})
    assert [one["rank"] for one in said] == list(range(n))
    assert [len(one["text"]) for one in said] == [3000 * k for k in range(n)]


def scattered_sums(port: Port, n: int) -> None:
    rank = port.rank
    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.float16):
        for count in (1, 9, PIECE // 4 // n + 1, 2500):
            table = [[values(k, count, dtype, salt=j) for j in range(n)] for k in range(n)]
            for op in OPS[:3]:
                wanted = by_hand([table[k][rank] for k in range(n)], op)
                out = torch.empty(count, dtype=dtype)
                dist.reduce_scatter(out, [part.clone() for part in table[rank]], op)
                same(out, wanted)
                single = torch.empty(count, dtype=dtype)
                dist.reduce_scatter_single(single, torch.cat(table[rank]), op)
                same(single, wanted)
    table = [[values(k, 3 + j, torch.float64, salt=j) for j in range(n)] for k in range(n)]
    uneven = torch.empty(3 + rank, dtype=torch.float64)
    dist.reduce_scatter(uneven, table[rank])
    same(uneven, by_hand([table[k][rank] for k in range(n)], dist.ReduceOp.SUM))
    outs, whole = [torch.empty(2), torch.empty(700)], [torch.empty(2 * n), torch.empty(700 * n)]
    with dist.distributed_c10d._coalescing_manager(device=torch.device("cpu")):
        for out in outs:
            dist.reduce_scatter_single(out, torch.ones(out.numel() * n) * (rank + 1))
    with dist.distributed_c10d._coalescing_manager(device=torch.device("cpu")):
        for out, row in zip(outs, whole, strict=True):
            dist.all_gather_single(row, out)
    assert all(bool((row == n * (n + 1) / 2).all()) for row in whole)


def subgroups(port: Port, n: int) -> None:
    """Overlapping groups, several at work at once, and calls that are waited for in another order."""
    rank = port.rank
    pairs = {(a, b): dist.new_group([a, b]) for a in range(n) for b in range(a + 1, n)}
    mine = {ranks: group for ranks, group in pairs.items() if rank in ranks}
    works, tensors = [], {}
    for ranks, group in mine.items():
        tensors[ranks] = torch.full((3 * PIECE,), 1.0 + rank)
        works.append(dist.all_reduce(tensors[ranks], group=group, async_op=True))
    everybody = torch.full((5,), 1.0 + rank)
    last = dist.all_reduce(everybody, async_op=True)
    second = torch.full((5,), 2.0 * rank)
    dist.all_reduce(second)
    assert last.is_completed()
    for work in reversed(works):
        work.wait()
    assert everybody.tolist() == [n * (n + 1) / 2] * 5 and second.tolist() == [float(n * (n - 1))] * 5
    for (a, b), tensor in tensors.items():
        assert bool((tensor == a + b + 2).all())
    work = dist.all_reduce(everybody, async_op=True)
    (done,) = work.get_future().wait()
    assert done is everybody and work.is_completed()
    # Backwards, so that a rank's place in the group is not its place in the world, and one that has no part.
    backwards = dist.new_group(list(range(n))[::-1], use_local_synchronization=False)
    outs = [torch.zeros(1) for _ in range(n)]
    dist.all_gather(outs, torch.tensor([float(rank)]), group=backwards)
    assert sorted(out.item() for out in outs) == [float(k) for k in range(n)]
    # Groups come and go; there are seats for twelve at a time.
    for _ in range(15):
        group = dist.new_group(list(range(n)))
        dist.barrier(group)
        dist.destroy_process_group(group)
    # What one begins and waits for later must not keep the other from going on.
    if n == 2:
        tensor = torch.full((5 * PIECE,), 1.0 + rank)
        if rank == 0:
            work = dist.all_reduce(tensor, async_op=True)
            dist.send(torch.tensor([4.0]), 1)
            work.wait()
        else:
            got = torch.zeros(1)
            dist.recv(got, 0)
            dist.all_reduce(tensor)
            assert got.item() == 4.0
        assert bool((tensor == 3).all())


def letters(port: Port, n: int) -> None:
    rank = port.rank
    after, before = (rank + 1) % n, (rank - 1) % n
    many, long = 5 * LETTERS, 40 * PIECE
    # All send before anybody receives: more messages, and longer ones, than the rings and pieces hold.
    sends = [dist.isend(torch.full((index,), float(rank + index)), after, tag=1) for index in range(many)]
    sends.append(dist.isend(values(rank, long, torch.float32), after, tag=2))
    got = torch.empty(2 * long)[::2]
    last = dist.irecv(got, before, tag=2)
    parts = [torch.empty(index) for index in range(many)]
    works = [dist.irecv(part, before, tag=1) for part in parts]
    last.wait()
    same(got.contiguous(), values(before, long, torch.float32))
    for work in reversed(works):
        work.wait()
    for index, part in enumerate(parts):
        assert part.tolist() == [float(before + index)] * index
    for send in sends:
        send.wait()
    # Both sides wait until they have sent a lot, and only then receive.
    dist.send(values(rank, long, torch.float64), after)
    whole = torch.empty(long, dtype=torch.float64)
    dist.recv(whole, before)
    same(whole, values(before, long, torch.float64))
    # A group's messages are its own, also with the same tag.
    group = dist.new_group(list(range(n)))
    dist.isend(torch.tensor([1.0]), after, tag=3)
    dist.isend(torch.tensor([2.0]), after, group=group, tag=3)
    one, two = torch.zeros(1), torch.zeros(1)
    dist.recv(two, before, group=group, tag=3)
    dist.recv(one, before, tag=3)
    assert (one.item(), two.item()) == (1.0, 2.0)
    if rank == 0:
        senders = [dist.recv(one, tag=5) for _ in range(n - 1)]
        assert sorted(senders) == list(range(1, n))
    else:
        dist.send(torch.tensor([float(rank)]), 0, tag=5)
    box = [{"from": rank, "text": "x" * 3 * PIECE}] if rank == 0 else [None]
    if rank == 0:
        dist.send_object_list(box, 1)
    elif rank == 1:
        dist.recv_object_list(box, 0)
        assert box[0] is not None and box[0]["from"] == 0 and len(box[0]["text"]) == 3 * PIECE
    ops = [dist.P2POp(dist.isend, torch.tensor([float(rank)]), after), dist.P2POp(dist.irecv, one, before)]
    for work in dist.batch_isend_irecv(ops):
        work.wait()
    assert one.item() == before


class Watch(TorchDispatchMode):
    """Notes every operator that it is told of, as torch's selective recomputing does."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def watched(port: Port, n: int) -> None:
    """What a rank does for others while it waits is no part of what it computes."""
    long, rounds = PIECE // 8, 5
    got = [torch.empty(2 * long)[::2] for _ in range(2 * rounds)]
    # Of half of the messages, rank 1 knows before they come.
    works = [dist.irecv(part, 0) for part in got[:rounds]] if port.rank == 1 else []
    with Watch() as watch:
        for k in range(2 * rounds):
            if port.rank == 0:
                dist.isend(values(k, long, torch.float32), 1)
                # So that the other one waits, and reads what has come meanwhile.
                time.sleep(0.02)
            one = torch.ones(3)
            dist.all_reduce(one, async_op=True).wait()
    if port.rank == 1:
        assert {name.partition(".")[0] for name in watch.seen} <= {"c10d", "aten"}
        assert [name for name in watch.seen if name.startswith("aten.")] == ["aten.ones.default"] * 2 * rounds
        works += [dist.irecv(part, 0) for part in got[rounds:]]
        for k, work in enumerate(works):
            work.wait()
            same(got[k].contiguous(), values(k, long, torch.float32))
    dist.barrier()


def raised(error: type[Exception], call: Callable[[], Any]) -> str:
    """The sentence of what a call raises; where it raises nothing, that is what is wrong."""
    try:
        call()
    except error as found:
        return str(found)
    raise AssertionError(f"no {error.__name__}")


def missing(port: Port, n: int) -> None:
    """Ranks that do not come, or come with something else."""
    rank = port.rank
    pair = dist.new_group([0, 1])
    dist.barrier()
    port.deadline_s = 0.3 if rank == 0 else LIMIT_S
    if rank == 0:
        text = raised(DeadlineError, lambda: dist.all_reduce(torch.ones(3), group=pair))
        assert re.search(r"Rank 0 waited [\d.]+ s for .*all_reduce", text) and text.endswith("from rank 1; see what keeps it.")
        text = raised(DeadlineError, lambda: dist.recv(torch.ones(3), 2, tag=4))
        assert "a message of 12 bytes (tag 4) from rank 2" in text
        text = raised(DeadlineError, lambda: dist.send(torch.ones(100 * PIECE), 2, tag=4))
        assert f"room to send {400 * PIECE} bytes" in text and "from rank 2" in text
        work = dist.barrier(async_op=True)
        port.deadline_s = LIMIT_S
        assert "rank 1 and rank 2" in raised(DeadlineError, lambda: work.wait(timedelta(milliseconds=200)))
        Path(os.environ["SAID"]).touch()
    else:
        while not Path(os.environ["SAID"]).exists():
            time.sleep(0.01)
    if rank == 1:
        # Late, but it comes: what rank 0 gave up waiting for has been begun and is still there.
        dist.all_reduce(torch.ones(3), group=pair)
    (work if rank == 0 else dist.barrier(async_op=True)).wait()
    calls = [lambda: dist.all_reduce(torch.ones(3)), lambda: dist.broadcast(torch.ones(3), 0)]
    text = raised(MismatchError, calls[min(rank, 1)])
    assert "all_reduce (sum) of 12 bytes of float32" in text and "broadcast of 12 bytes" in text


def aborted(port: Port, n: int) -> None:
    """The last rank is killed in the middle, again and again; the others go on together with its replacement."""
    rank, last = port.rank, n - 1
    group = dist.new_group([0, last])
    held: list[Any] = []

    def together() -> None:
        tensor = torch.ones(10 * PIECE)
        dist.all_reduce(tensor)
        assert bool((tensor == n).all())
        if rank in (0, last):
            dist.all_reduce(tensor, group=group)
            assert bool((tensor == 2 * n).all())
        got = torch.zeros(1)
        dist.isend(torch.tensor([7.0]), (rank + 1) % n)
        dist.recv(got, (rank - 1) % n)
        assert got.item() == 7.0

    def killed() -> None:
        together()
        # Begun, never ended: what it wrote must not be taken for something later.
        dist.all_reduce(torch.ones(10 * PIECE), async_op=True)
        dist.isend(torch.full((50,), 9.0), 0)
        os.kill(os.getpid(), signal.SIGKILL)

    def bereft() -> None:
        together()
        held.append(dist.irecv(torch.ones(3), last, tag=8))
        dist.isend(torch.ones(50 * PIECE), last)
        if generation % 2:
            dist.recv(torch.ones(1), last, tag=9)
        for _ in range(2):
            dist.all_reduce(torch.ones(10 * PIECE))

    for generation in (1, 2, 3):
        if rank == last:
            # The one that is killed is a fork of this process, which then takes its place: nothing begun, words as left.
            pid = os.fork()
            if pid == 0:
                killed()
            assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
            word(port).value = generation
        else:
            assert "another rank" in raised(StepAborted, bereft)
        # Until it is reset it stays so.
        raised(StepAborted, lambda: dist.barrier())
        port.reset(generation)
        for work in held:
            raised(StepAborted, work.wait)
    together()


def word(port: Port) -> ctypes.c_uint32:
    return ctypes.c_uint32.from_address(port.generation_address)


def mlp() -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(12, 32), nn.GELU(), nn.Linear(32, 7)).double()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(6)
    return torch.rand(8, 12, generator=random, dtype=torch.float64), torch.rand(
        8, 7, generator=random, dtype=torch.float64
    )


def trained(model: nn.Module, loss_of: Callable[[nn.Module], torch.Tensor]) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(4):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()


def whole_loss(model: nn.Module) -> torch.Tensor:
    x, y = batch()
    return nn.functional.mse_loss(model(x), y)


def close(model: nn.Module, reference: nn.Module) -> None:
    theirs = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        value = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
        torch.testing.assert_close(value.detach(), theirs[name].detach(), rtol=1e-11, atol=1e-12)


def splits(port: Port, n: int) -> None:
    """DTensor, fully_shard and both together, unchanged, against one process."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    reference = mlp()
    trained(reference, whole_loss)
    mesh = init_device_mesh("cpu", (n,), mesh_dim_names=("tp",))
    model = parallelize_module(mlp(), mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    trained(model, whole_loss)
    close(model, reference)

    shards = mlp()
    shard_mesh = init_device_mesh("cpu", (n,), mesh_dim_names=("dp",))
    for layer in (shards[0], shards[2], shards):
        fully_shard(layer, mesh=shard_mesh)

    def share_loss(module: nn.Module) -> torch.Tensor:
        x, y = batch()
        return nn.functional.mse_loss(module(x.chunk(n)[port.rank]), y.chunk(n)[port.rank])

    trained(shards, share_loss)
    close(shards, reference)
    copies = nn.parallel.DistributedDataParallel(mlp())
    trained(copies, share_loss)
    close(copies.module, reference)
    # An abort comes out of torch's layers as what it is.

    def abort() -> None:
        dist.barrier()
        if port.rank == 1:
            word(port).value = 41
        trained(model, whole_loss)

    raised(StepAborted, abort)
    port.reset(41)
    trained(model, whole_loss)

    def abort_backward(module: nn.Module) -> torch.Tensor:
        loss = share_loss(module)
        if port.rank == 1:
            loss.register_hook(lambda gradient: setattr(word(port), "value", 42))
        return loss

    raised(StepAborted, lambda: trained(shards, abort_backward))
    port.reset(42)
    trained(model, whole_loss)


def both_splits(port: Port, n: int) -> None:
    """tp inside, zero=3 outside: overlapping groups of one mesh."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    reference = mlp()
    trained(reference, whole_loss)
    mesh = init_device_mesh("cpu", (n // 2, 2), mesh_dim_names=("dp", "tp"))
    model = parallelize_module(mlp(), mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    share = mesh.get_local_rank("dp")

    def share_loss(module: nn.Module) -> torch.Tensor:
        x, y = batch()
        return nn.functional.mse_loss(module(x.chunk(n // 2)[share]), y.chunk(n // 2)[share])

    trained(model, share_loss)
    close(model, reference)


def pipelines(port: Port, n: int) -> None:
    """Four stages on two ranks, and two, under torch's schedules: the gradients of one process."""
    from torch.distributed import pipelining

    def layers() -> list[nn.Module]:
        torch.manual_seed(8)
        return [nn.Sequential(nn.Linear(12, 12), nn.Tanh()).double() for _ in range(4)]

    x = torch.rand(8, 12, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    y = x.flip(0)
    loss_of = nn.functional.mse_loss
    alone = layers()
    sum(loss_of(nn.Sequential(*alone)(a), b) for a, b in zip(x.chunk(4), y.chunk(4), strict=True)).backward()  # type: ignore[union-attr]
    wanted = [[parameter.grad / 4 for parameter in layer.parameters()] for layer in alone]  # type: ignore[operator]
    two = {0: [0, 1], 1: [2, 3]}
    plans: list[tuple[Any, dict[int, list[int]]]] = [
        (pipelining.ScheduleGPipe, two), (pipelining.Schedule1F1B, two),
        (pipelining.ScheduleInterleaved1F1B, {0: [0, 2], 1: [1, 3]}),
        (pipelining.schedules.ScheduleZBVZeroBubble, {0: [0, 3], 1: [1, 2]}),
    ]  # fmt: skip
    for schedule_of, owned in plans:
        mine = owned[port.rank]
        made = layers()
        if owned is two:
            stage = pipelining.PipelineStage(nn.Sequential(*(made[k] for k in mine)), port.rank, 2, torch.device("cpu"))
            schedule = schedule_of(stage, 4, loss_fn=loss_of)
        else:
            stages = [pipelining.PipelineStage(made[k], k, 4, torch.device("cpu")) for k in mine]
            schedule = schedule_of(stages, 4, loss_fn=loss_of)
        first, last = 0 in mine, 3 in mine
        losses: list[torch.Tensor] = []
        for _ in range(2):
            for layer in made:
                layer.zero_grad()
            schedule.step(*([x] if first else []), **({"target": y, "losses": losses} if last else {}))
        assert not last or len(losses) == 4
        for k in mine:
            for parameter, gradient in zip(made[k].parameters(), wanted[k], strict=True):
                torch.testing.assert_close(parameter.grad, gradient, rtol=1e-11, atol=1e-12)


def large(port: Port, n: int) -> None:
    """Pieces as they are by default, around the size at which sums go another way; the same bits whoever is early."""
    rank = port.rank
    for count in (DIRECT_BYTES // 4, DIRECT_BYTES // 4 + 1, (128 << 10) // 4 * n + 1, 700_001):
        given = [values(k, count, torch.float32) for k in range(n)]
        for early in range(2):
            mine = given[rank].clone()
            if rank != early:
                time.sleep(0.002)
            dist.all_reduce(mine)
            same(mine, by_hand(given, dist.ReduceOp.SUM))


# -- the script: it forks the ranks of each scenario ---------------------------------------------------------------

SCENARIOS: dict[str, tuple[Callable[[Port, int], None], int]] = {
    **{f"{do.__name__}-{n}": (do, n) for do in (sums, moves, scattered_sums, subgroups, letters) for n in (2, 3, 5)},
    "sums-without-compiler": (sums, 2), "letters-without-compiler": (letters, 2), "large": (large, 3),
    "watched": (watched, 2), "missing": (missing, 3), "aborted": (aborted, 3),
    "splits": (splits, 2), "both-splits": (both_splits, 4), "pipelines": (pipelines, 2),
}  # fmt: skip


def run_rank(name: str, memory: SharedMemory, rank: int, said: Path) -> None:
    function, n = SCENARIOS[name]
    if name.endswith("without-compiler"):
        os.environ["SHOAL_NATIVE"] = "0"
    os.environ["SAID"] = str(said / f"{name}.flag")
    small = RegionLayout(world_size=n, piece_bytes=PIECE, mail_piece_bytes=PIECE, mail_pieces=3, letters=LETTERS)
    layout = RegionLayout(world_size=n) if name == "large" else small
    # The last page of the memory is the supervisor's, who would say there that a rank was lost.
    port = init(
        memory.bytes[: layout.bytes], rank, n, deadline_s=LIMIT_S, layout=layout,
        generation_address=memory.address + memory.size - 4096,
    )  # fmt: skip
    function(port, n)
    dist.destroy_process_group()


def script(said: Path) -> None:
    import torch.distributed.fsdp
    import torch.distributed.pipelining
    import torch.distributed.tensor.parallel  # noqa: F401

    torch.set_num_threads(1)
    for name, (_, n) in SCENARIOS.items():
        memory = SharedMemory.create(RegionLayout(world_size=n).bytes + 4096)
        children = []
        for rank in range(n):
            pid = os.fork()
            if pid == 0:
                try:
                    run_rank(name, memory, rank, said)
                except BaseException:
                    (said / f"{name}.{rank}.error").write_text(traceback.format_exc())
                finally:
                    os._exit(0)
            children.append(pid)
        for pid in children:
            os.waitpid(pid, 0)
        memory.close()
        (said / f"{name}.done").write_text(json.dumps(n))


# -- the tests -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the ranks of all scenarios have left what they raised."""
    place = tmp_path_factory.mktemp("said")
    root = Path(__file__).resolve().parents[2]
    paths = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, __file__, str(place)], env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    yield place


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_rank_gets_what_was_computed_by_hand(said: Path, name: str) -> None:
    errors = [path.read_text() for path in sorted(said.glob(f"{name}.*.error"))]
    assert not errors, "\n".join(errors)
    assert (said / f"{name}.done").exists()


if __name__ == "__main__":
    if len(sys.argv) > 2:
        SCENARIOS = {name: entry for name, entry in SCENARIOS.items() if name.startswith(sys.argv[2])}
    script(Path(sys.argv[1]))
