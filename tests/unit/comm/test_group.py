"""Exchanges between real processes over gloo on the loopback interface."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import shoal
from shoal.comm.group import Group, PeerFailed, has_threads
from shoal.errors import DeadlineError, JobFailed

SIZE = 3
# Those that a test forks have it from here.
EVERYBODY = multiprocessing.get_context("fork").Barrier(SIZE)


def exchange(group: Group, report: Any) -> None:
    """Everything that a healthy group does."""
    rank = float(group.rank)
    flat = torch.arange(5, dtype=torch.float64) + rank
    halves = torch.full((3,), rank + 0.5, dtype=torch.bfloat16)
    group.sum_in_place([flat, halves, torch.zeros(0)], "sums")
    rows = group.gather_rows(torch.tensor([rank, -rank]), "rows")
    group.prepare([(0, 2), (0, 2), (1,)])
    pair = group.sum_small(torch.tensor([[rank, 1.0]]), (0, 2), "a pair") if group.rank != 1 else None
    page = torch.full((4,), group.rank, dtype=torch.uint8)
    group.broadcast(page, 2, "bytes")
    said = group.broadcast_object({"from": group.rank}, 1, "a word")
    objects = group.gather_objects("x" * group.rank, "words")
    summed = None if pair is None else pair.tolist()
    report.put((group.rank, flat.tolist(), halves.tolist(), rows.tolist(), summed, page.tolist(), said, objects))


def fail_on_one(group: Group, report: Any) -> None:
    """Rank 1 fails while the others wait for it."""
    if group.rank == 1:
        group.fail({"why": "on purpose"})
        return
    try:
        group.gather_rows(torch.zeros(1), "something that never comes")
    except PeerFailed as failed:
        group.fail(None)
        report.put((group.rank, failed.value))


def come_late(group: Group, report: Any) -> None:
    """Rank 2 does not come before the deadline of the others is over."""
    group.deadline_s = 1.5
    EVERYBODY.wait(60)
    try:
        if group.rank != 2:
            group.gather_rows(torch.zeros(1), "step 7")
    except (DeadlineError, JobFailed, PeerFailed) as error:
        report.put((group.rank, type(error).__name__, str(error)))
    # Nobody goes before all have given up: who is gone is another failure.
    EVERYBODY.wait(60)


def end_tied_in_a_knot(group: Group, report: Any) -> None:
    """Leave with somebody else knowing of a group, and being known by it."""
    group.prepare([(0, 1)])
    knot: list[Any] = [group, group.torch_group((0, 1, 2)), group.torch_group((0, 1))]
    knot.append(knot)
    group.while_waiting = lambda what, waited_s: knot.clear()
    group.gather_rows(torch.zeros(1), "rows")
    report.put((group.rank, has_threads()))


def member_to_the_end(task: Callable[[Group, Any], None], path: str, rank: int, report: Any) -> None:
    member(task, path, rank, report)
    report.put((SIZE + rank, has_threads()))


def member(task: Callable[[Group, Any], None], path: str, rank: int, report: Any) -> None:
    with Group.meet(path, rank, SIZE, deadline_s=60.0) as group:
        task(group, report)


def run(task: Callable[[Group, Any], None], path: Path, answers: int, whole: Callable[..., None] = member) -> list[Any]:
    context = multiprocessing.get_context("fork")
    report = context.Queue()
    processes = [context.Process(target=whole, args=(task, str(path), rank, report)) for rank in range(SIZE)]
    for process in processes:
        process.start()
    try:
        found = sorted(report.get(timeout=60) for _ in range(answers))
        for process in processes:
            process.join(timeout=60)
            assert process.exitcode == 0
    finally:
        for process in processes:
            process.kill()
            process.join()
    return found


def test_every_exchange_gives_all_the_same(tmp_path: Path) -> None:
    for rank, flat, halves, rows, pair, page, said, objects in run(exchange, tmp_path / "meeting", SIZE):
        assert flat == [3.0, 6.0, 9.0, 12.0, 15.0] and halves == [4.5] * 3
        assert rows == [[0.0, 0.0], [1.0, -1.0], [2.0, -2.0]]
        assert pair == (None if rank == 1 else [[2.0, 2.0]])
        assert page == [2, 2, 2, 2] and said == {"from": 1} and objects == ["", "x", "xx"]


def test_whoever_waits_hears_of_a_failure(tmp_path: Path) -> None:
    assert run(fail_on_one, tmp_path / "meeting", 2) == [(0, {"why": "on purpose"}), (2, {"why": "on purpose"})]


def test_a_wait_that_is_too_long_names_whom_it_was_for(tmp_path: Path) -> None:
    found = run(come_late, tmp_path / "meeting", 2)
    assert [(rank, kind) for rank, kind, _ in found] == [(0, "DeadlineError"), (1, "DeadlineError")]
    assert all("for step 7 from rank 2;" in sentence for _, _, sentence in found)


def test_no_thread_of_a_group_outlives_it(tmp_path: Path) -> None:
    found = run(end_tied_in_a_knot, tmp_path / "meeting", 2 * SIZE, member_to_the_end)
    assert found == [*((rank, True) for rank in range(SIZE)), *((SIZE + rank, False) for rank in range(SIZE))]


_INTERRUPTED = """
import ctypes
import os
import sys
import time

import torch

from shoal.comm.group import Group


class Last:
    # What is left when the interpreter ends: by then no other thread may enter it, and those that wait for it are ended.
    def __init__(self):
        self.write, self.is_finalizing, self.sleep = os.write, sys.is_finalizing, time.sleep

    def __del__(self):
        assert self.is_finalizing()
        self.sleep(0.2)
        self.write(1, b"ended")


def interrupted(what, waited_s):
    raise KeyboardInterrupt


last = Last()
try:
    with Group.meet(sys.argv[1], int(sys.argv[2]), 2, deadline_s=60.0) as group:
        peer = group.gather_objects(os.getpid(), "who is there")[0]
        if group.rank == 0:
            time.sleep(300)
        group.while_waiting = interrupted
        group.gather_rows(torch.zeros(3), "what never comes")
except KeyboardInterrupt:
    pass
# From here on this thread keeps the interpreter to itself: when the exchange fails, its thread would have to wait.
sys.setswitchinterval(1000)
holding = ctypes.PyDLL(None)
holding.kill(peer, 9)
holding.usleep(1_000_000)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="calls the C library")
def test_an_exchange_that_fails_while_the_interpreter_ends_does_not_abort_it(tmp_path: Path) -> None:
    """Its thread lets go of tensors that Python knows, for which it would ask an interpreter that lets nobody in."""
    root = str(Path(shoal.__file__).resolve().parents[1])
    command = [sys.executable, "-c", _INTERRUPTED, str(tmp_path / "meeting")]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    peer, other = (
        subprocess.Popen([*command, rank], env={**os.environ, "PYTHONPATH": root}, **pipes) for rank in ("0", "1")
    )
    try:
        assert other.communicate(timeout=100) == ("ended", "")
        assert other.returncode == 0
    finally:
        for process in (peer, other):
            process.kill()
            process.communicate()


def test_alone_every_exchange_is_with_oneself(tmp_path: Path) -> None:
    with Group.meet(tmp_path / "meeting", 0, 1) as group:
        flat = torch.ones(2)
        group.sum_in_place([flat], "sums")
        assert flat.tolist() == [1.0, 1.0] and group.gather_objects("me", "words") == ["me"]
        assert group.broadcast_object(5, 0, "a word") == 5
        assert group.gather_rows(torch.ones(1), "rows").tolist() == [[1.0]]
    assert not (tmp_path / "meeting").exists()


def test_joining_says_who_never_came(tmp_path: Path) -> None:
    def nobody_else() -> None:
        raise JobFailed("rank 1 is gone")

    with (
        pytest.raises(JobFailed, match="rank 1 is gone"),
        Group.meet(tmp_path / "meeting", 0, 2, while_joining=nobody_else),
    ):
        pass
