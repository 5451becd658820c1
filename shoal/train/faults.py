"""Faults on purpose: a small vocabulary with which tests and benchmarks disturb a run.

``SHOAL_FAULTS="kill(rank=1,step=3,phase=backward);slow(rank=0,factor=4)"`` in the environment of ``shoal train``:

* ``kill(rank, step, phase[, times])``: SIGKILL to itself at that point, ``times`` times (1); ``server=0`` instead of ``rank``
  for a parameter server;
* ``stall(rank, step, phase[, times])``: stops answering (SIGSTOP), so that it has to be replaced;
* ``slow(rank, factor[, step])``: computes ``factor`` times as long, from ``step`` on.

Phases: data, forward, backward, reduce, update, checkpoint, evaluate; and places between phases: computed (its part of the
model is, where it has one), published (its gradients are), updated (its part of the weights is), committed (the others have
been told so), evaluated (its part is), meeting (those of its team are to begin again), taken (a server has the pushes), logged
(its log has the update). Steps count from 0 here: step 3 is the fourth. A fault in checkpoint strikes at the first checkpoint
from that step on, since it is the clock that decides when one is made. How often a fault has struck is noted in the worker's
slot, so that a replacement knows."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

from shoal.comm.arena import FAULT_NOTES, Slot
from shoal.errors import RequestError

_SLICE_S = 0.05
PHASES = (
    "data",
    "forward",
    "backward",
    "computed",
    "published",
    "reduce",
    "update",
    "updated",
    "committed",
    "checkpoint",
    "evaluate",
    "evaluated",
    "meeting",
    "taken",
    "logged",
)


@dataclass(frozen=True)
class Fault:
    """One disturbance; ``times`` is how often it strikes, ``rank`` the worker's or, where ``server`` says so, the server's."""

    kind: str
    rank: int
    step: int = 0
    phase: str = ""
    times: int = 1
    factor: float = 1.0
    server: bool = False


def parse_faults(text: str) -> list[Fault]:
    """Read the vocabulary; RequestError for anything else."""
    faults = []
    for part in filter(None, (p.strip() for p in text.split(";"))):
        match = re.fullmatch(r"(kill|stall|slow)\((.*)\)", part)
        if not match:
            raise RequestError(
                f'SHOAL_FAULTS has "{part}"; write kill(rank=1,step=3,phase=backward), stall(…) or slow(…).'
            )
        fields = dict(re.findall(r"(\w+)\s*=\s*([\w.]+)", match[2]))
        try:
            fault = Fault(
                match[1], int(fields["server" if "server" in fields else "rank"]), int(fields.get("step", 0)),
                fields.get("phase", ""), int(fields.get("times", 1)), float(fields.get("factor", 1)), "server" in fields,
            )  # fmt: skip
        except (KeyError, ValueError):
            raise RequestError(f'SHOAL_FAULTS has "{part}", which lacks a rank or has a number that is none.') from None
        if fault.kind != "slow" and fault.phase not in PHASES:
            raise RequestError(f'SHOAL_FAULTS has phase "{fault.phase}"; the phases are {", ".join(PHASES)}.')
        faults.append(fault)
    return faults


class Faults:
    """The faults of one worker or server, whose slot outlives it."""

    def __init__(self, rank: int, slot: Slot, text: str | None = None, server: bool = False) -> None:
        found = parse_faults(os.environ.get("SHOAL_FAULTS", "") if text is None else text)
        own = [f for f in found if f.rank == rank and f.server == server]
        self._sudden = [f for f in own if f.kind != "slow"]
        self._slow = [f for f in own if f.kind == "slow"]
        self._slot = slot
        if len(self._sudden) > FAULT_NOTES:
            raise RequestError(
                f"SHOAL_FAULTS has {len(self._sudden)} faults for rank {rank}; give {FAULT_NOTES} at most."
            )

    def reach(self, phase: str, step: int) -> None:
        """Called where a phase of a step begins, or in the midst of it."""
        for index, fault in enumerate(self._sudden):
            here = phase == fault.phase and (step == fault.step or (phase == "checkpoint" and step > fault.step))
            if here and self._slot.count_fault(index, fault.times):
                os.kill(os.getpid(), signal.SIGKILL if fault.kind == "kill" else signal.SIGSTOP)

    def drag(self, step: int, computed_s: float, is_void: Callable[[], bool] | None = None) -> None:
        """Make a computation that took ``computed_s`` take longer; like that, it is given up where it ``is_void``."""
        for fault in self._slow:
            left_s = computed_s * (fault.factor - 1) if step >= fault.step else 0.0
            while left_s > 0 and not (is_void is not None and is_void()):
                time.sleep(min(left_s, _SLICE_S))
                left_s -= _SLICE_S
