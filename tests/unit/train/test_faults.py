"""The vocabulary of faults: what is read, when one strikes, and that the slot remembers it, not the worker."""

from __future__ import annotations

import os
import signal
import time

import pytest

from shoal.comm.arena import FAULT_NOTES, Arena, ArenaLayout, Slot
from shoal.errors import RequestError
from shoal.train.faults import PHASES, Faults, parse_faults


@pytest.fixture
def slot() -> Slot:
    return Arena.create(ArenaLayout.plan(1, {})).slots[0]


@pytest.fixture
def struck(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The signals that this process was to send to itself."""
    sent: list[int] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append(number))
    return sent


def test_reads_the_vocabulary() -> None:
    kill, stall, slow = parse_faults(
        "kill(rank=1,step=3,phase=backward); stall(rank=0, step=2, phase=data, times=2);slow(rank=0,factor=1.5);"
    )
    assert (kill.kind, kill.rank, kill.step, kill.phase, kill.times) == ("kill", 1, 3, "backward", 1)
    assert (stall.kind, stall.step, stall.times) == ("stall", 2, 2)
    assert (slow.kind, slow.factor, slow.step) == ("slow", 1.5, 0)
    assert parse_faults("") == []


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("burn(rank=1)", "burn"),
        ("kill(step=3,phase=data)", "rank"),
        ("kill(rank=x,step=3,phase=data)", "kill"),
        ("kill(rank=0,step=3,phase=lunch)", "lunch"),
        ("kill(rank=0,step=3)", ", ".join(PHASES)),
    ],
)
def test_refuses_anything_else(text: str, names: str) -> None:
    with pytest.raises(RequestError, match="SHOAL_FAULTS") as caught:
        parse_faults(text)
    assert names in str(caught.value)


def test_strikes_once_whatever_the_worker(slot: Slot, struck: list[int]) -> None:
    text = "kill(rank=0,step=2,phase=data);stall(rank=0,step=2,phase=update,times=2);kill(rank=1,step=2,phase=data)"
    Faults(0, slot, text).reach("data", 1)
    Faults(0, slot, text).reach("forward", 2)
    assert struck == []
    for _ in range(3):
        Faults(0, slot, text).reach("data", 2)
        Faults(0, slot, text).reach("update", 2)
    assert struck == [signal.SIGKILL, signal.SIGSTOP, signal.SIGSTOP]


def test_checkpoint_is_the_next_one(slot: Slot, struck: list[int]) -> None:
    faults = Faults(0, slot, "kill(rank=0,step=10,phase=checkpoint)")
    for step in (8, 13, 20):
        faults.reach("checkpoint", step)
    assert struck == [signal.SIGKILL]
    assert slot.count_fault(0, 1) is False and slot.count_fault(0, 2) is True


def test_too_many(slot: Slot) -> None:
    text = ";".join(["kill(rank=0,step=1,phase=data)"] * (FAULT_NOTES + 1))
    with pytest.raises(RequestError, match=str(FAULT_NOTES)):
        Faults(0, slot, text)


def test_drags_from_its_step_on(slot: Slot, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    faults = Faults(0, slot, "slow(rank=0,factor=4,step=5)")
    faults.drag(4, 0.5)
    faults.drag(5, 0.5)
    assert sum(slept) == pytest.approx(1.5)
    faults.drag(5, 0.5, lambda: len(slept) > 40)
    assert len(slept) == 41
