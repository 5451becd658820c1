from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from shoal.comm import memory, native
from shoal.comm.arena import Arena, ArenaLayout, Note, Phase, Signal
from shoal.comm.memory import SharedMemory
from shoal.errors import RequestError


@pytest.fixture(params=["c", "torch"])
def arena(request: pytest.FixtureRequest) -> Iterator[Arena]:
    helpers = native.load() if request.param == "c" else native._Fallback()
    if helpers.name != request.param:
        pytest.skip("no C compiler here")
    layout = ArenaLayout.plan(3, {"data": 8000, "empty": 0, "more": 1})
    made = Arena(SharedMemory.create(layout.size), layout, helpers)
    yield made
    made.memory.close()


def test_regions_are_apart_and_all_zero(arena: Arena) -> None:
    spans = sorted((offset, offset + size) for offset, size in arena.layout.regions.values())
    assert all(left[1] <= right[0] for left, right in zip(spans[:-1], spans[1:], strict=True))
    assert spans[-1][1] <= arena.layout.size
    assert all(offset % mmap.PAGESIZE == 0 for offset, _ in arena.layout.regions.values())
    assert not arena.memory.bytes.any()
    assert arena.view("data", 16, 3, torch.float64).shape == (3,)


def test_what_was_written_before_a_post_is_there_after_the_wait_in_another_process(arena: Arena) -> None:
    """Each side waits for the other a thousand times; a lost wake-up would run into the deadline."""
    rounds = 1000
    data = arena.view("data", 0, 8, torch.int64)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            ok = True
            for turn in range(1, rounds + 1):
                ok &= arena.slots[0].wait(Signal.GRADIENTS, turn, timeout_s=20.0)
                ok &= bool((data.numpy() == turn).all())
                data.numpy()[:] = -turn
                arena.slots[1].post(Signal.GRADIENTS, turn)
            code = 0 if ok else 2
        finally:
            os._exit(code)
    for turn in range(1, rounds + 1):
        data.numpy()[:] = turn
        arena.slots[0].post(Signal.GRADIENTS, turn)
        assert arena.slots[1].wait(Signal.GRADIENTS, turn, timeout_s=20.0)
        assert (data.numpy() == -turn).all()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_deadline_names_the_first_that_is_missing(arena: Arena) -> None:
    arena.slots[0].post(Signal.UPDATED, 7)
    arena.slots[2].post(Signal.UPDATED, 8)
    assert arena.wait_all(Signal.UPDATED, 7, 0.0, 0.01) == 1
    arena.slots[1].post(Signal.UPDATED, 9)
    assert arena.wait_all(Signal.UPDATED, 7, 0.0, 0.01) == -1
    assert arena.wait_all(Signal.UPDATED, 8, 1e-5, 0.01) == 0
    assert not arena.slots[0].wait(Signal.UPDATED, 8, timeout_s=0.01)


def test_counters_go_on_past_the_end_of_32_bits(arena: Arena) -> None:
    arena.slots[0].post(Signal.COLLECTIVE, 2**32 - 1)
    assert arena.slots[0].wait(Signal.COLLECTIVE, 2**32 - 1, timeout_s=0.0)
    assert not arena.slots[0].wait(Signal.COLLECTIVE, 2**32 + 1, timeout_s=0.0)
    arena.slots[0].post(Signal.COLLECTIVE, 2**32 + 1)
    assert arena.slots[0].wait(Signal.COLLECTIVE, 2**32 - 1, timeout_s=0.0)


def test_slots_do_not_share_a_byte(arena: Arena) -> None:
    for rank, slot in enumerate([*arena.slots, arena.supervisor]):
        for signal in Signal:
            slot.post(signal, 100 * rank + int(signal))
        for note in Note:
            slot.write(note, 1000 * rank + int(note))
    for rank, slot in enumerate([*arena.slots, arena.supervisor]):
        assert [slot.signal(signal) for signal in Signal] == [100 * rank + int(signal) for signal in Signal]
        assert [slot.note(note) for note in Note] == [1000 * rank + int(note) for note in Note]
    arena.slots[1].enter(Phase.REDUCE, 12)
    assert [arena.slots[1].note(n) for n in (Note.PHASE, Note.STEP, Note.WAITS_FOR)] == [Phase.REDUCE, 12, -1]


def test_an_attached_arena_is_the_same_memory(arena: Arena) -> None:
    other = Arena.attach(os.dup(arena.memory.fd), arena.layout)
    other.view("data", 0, 4, torch.float32).fill_(2.5)
    assert arena.view("data", 0, 4, torch.float32).tolist() == [2.5] * 4
    other.memory.close()


def test_memory_that_there_is_not_is_refused_before_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    # Really asking for more than there is would have the kernel kill whatever else runs here.
    monkeypatch.setattr(memory, "find_memory", lambda root: (1 << 30, 1 << 20))
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(RequestError, match="needs 2 MiB of shared memory"):
        SharedMemory.create(2 << 20)
    assert len(os.listdir("/proc/self/fd")) == before
    SharedMemory.create(1 << 20).close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_both_helpers_give_the_same_bits_for_zeros_infinities_and_nan(n: int, dtype: torch.dtype) -> None:
    compiled = native.load()
    if compiled.name != "c":
        pytest.skip("no C compiler here")
    special = torch.tensor([-0.0, 0.0, float("inf"), -float("inf"), float("nan"), 1e30, -1e-40, 3.0], dtype=dtype)
    sources = [special[torch.randint(0, 8, (2051,), generator=torch.Generator().manual_seed(k))] for k in range(n)]
    for scale in (1.0, -0.25, 1 / 3):
        found = [torch.empty_like(sources[0]) for _ in range(2)]
        compiled.sum_into(found[0], sources, scale)
        native._Fallback().sum_into(found[1], sources, scale)
        assert torch.equal(found[0].isnan(), found[1].isnan())
        bits = torch.int32 if dtype == torch.float32 else torch.int64
        plain = ~found[0].isnan()
        assert torch.equal(found[0][plain].view(bits), found[1][plain].view(bits))


def test_memory_that_is_let_go_keeps_what_is_in_it() -> None:
    def resident_bytes() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        line = next(line for line in lines if line.startswith("RssShmem"))
        return int(line.split()[1]) << 10

    held = SharedMemory.create(8 << 20)
    held.bytes.fill_(3)
    before = resident_bytes()
    held.let_go(held.address + 5000, (7 << 20) - 5000)
    assert before - resident_bytes() >= 6 << 20
    assert bool((held.bytes == 3).all())
    held.let_go(held.address, held.size)
    held.close()
