"""Runs without shared memory whose plan changes, and a job whose weights count the pushes that they hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from noisy_job import events, kill
from torch import nn

import shoal
from shoal.data.order import epoch_order
from shoal.plan import Plan
from shoal.ps import moving
from shoal.ps.initialisers import Zeros
from shoal.train.remote.chains import Chains
from shoal.train.remote.elastic import ElasticLead
from shoal.train.remote.moves import Moving
from shoal.train.remote.recovery import Recovery


def changing(changes: dict[int, str]) -> Callable[[dict[str, Any]], Plan | None]:
    """An observer that wants another plan after these steps."""

    def on_event(event: dict[str, Any]) -> Plan | None:
        wanted = changes.get(event["step"]) if event["kind"] == "step" else None
        return Plan.parse(wanted) if wanted else None

    return on_event


def pushes(run: Path) -> list[tuple[int, int, int]]:
    return [(e["epoch"], e["batch"], e["shard"]) for e in events(run, "push_ack")]


class Counted(nn.Module):
    """A weight and a row for each sample, which every push that holds it lowers by one part of its shard."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(96, 200))
        self.rows = shoal.ps.Embedding(1, optimizer=shoal.ps.SGD(lr=1.0), init=Zeros())

    def forward(self, samples: torch.Tensor) -> torch.Tensor:
        return self.weight[samples].mean(1) * 200 + self.rows(samples).squeeze(-1)


def counted(**changes: Any) -> shoal.Job:
    samples = torch.arange(96)
    return shoal.Job(**{
        "name": "counted", "model": Counted, "train_data": lambda: (samples, samples), "batch_size": 8, "epochs": 3,
        "loss": lambda output, target: output.mean(), "optimizer": lambda params: torch.optim.SGD(params, lr=1.0), **changes,
    })  # fmt: skip


def check_counted(run: shoal.Run, workers: Sequence[int], together: Sequence[bool] | None = None) -> None:
    """Each push was acknowledged once, and the weights and the rows hold each once.

    Args:
        workers: how many there were in each step.
        together: of each step, whether its pushes were applied as one, the mean over the batch.
    """
    together = together or [False] * len(workers)
    acknowledged = [(s // 12 + 1, s % 12 + 1, shard) for s, count in enumerate(workers) for shard in range(count)]
    assert sorted(pushes(run.path)) == acknowledged
    expected = torch.zeros(96)
    for step, (count, one) in enumerate(zip(workers, together, strict=True)):
        samples = epoch_order(96, 0, step // 12)[8 * (step % 12) :][:8]
        # A push lowers what is in it by one part of its shard.
        expected[samples] -= (1 if one else count) / 8
    weights = run.weights()
    assert torch.equal(weights["weight"], expected[:, None].expand(96, 200))
    assert torch.equal(weights["rows.rows"][:, 0], expected)


class Strikes:
    """Kills servers while the plan changes: of each change in turn, where in it, and whom.

    ``secure``: as a checkpoint is about to be written; ``leave``: as workers are sent away; ``come``: as servers are waited for
    that have just been forked; ``hand``: when the first keys have gone somewhere; ``part``: when all have, and servers are about
    to forget what they gave; ``copy``: as copies are about to be made; ``log``: as logs begin anew.
    """

    def __init__(self, patch: pytest.MonkeyPatch, plans: list[tuple[str, int] | None]) -> None:
        self.pids: list[int] = []
        self._plans = [None, *plans]
        self._lead: Any = None
        self._begin(patch)
        for phase, owner, name, after in (
            ("secure", ElasticLead, "_secure", False), ("leave", ElasticLead, "_send_away", False),
            ("come", ElasticLead, "_gather", False), ("hand", moving, "_hand_on", True), ("part", Moving, "part", True),
            ("copy", Chains, "begin", False), ("log", Recovery, "begin", False),
        ):  # fmt: skip
            patch.setattr(owner, name, self._struck_at(phase, getattr(owner, name), after))

    def _begin(self, patch: pytest.MonkeyPatch) -> None:
        make = ElasticLead._make

        def note_and_make(lead: ElasticLead, change: Any) -> None:
            self._lead = lead
            self._plans.pop(0)
            make(lead, change)

        patch.setattr(ElasticLead, "_make", note_and_make)

    def _struck_at(self, phase: str, method: Callable[..., Any], after: bool) -> Callable[..., Any]:
        def struck(*arguments: Any) -> Any:
            found = method(*arguments) if after else None
            wanted = self._plans[0] if self._plans else None
            if wanted is not None and wanted[0] == phase:
                if phase == "come":
                    self._lead._members.start("server", wanted[1])
                self._plans[0] = None
                self.pids.append(self._lead._members.of["server", wanted[1]].pid)
                kill(self.pids[-1])
            return found if after else method(*arguments)

        return struck
