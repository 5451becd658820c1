"""kill -9 at random moments of a run whose plan changes: every push counts once, whoever is killed meanwhile."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from counting_job import EPOCHS, SAMPLES, check_ledger, counting_job
from noisy_job import events, kill, processes

import shoal
from shoal.plan import Plan
from shoal.process.supervisor import Supervisor

BATCHES = SAMPLES // 8
PLANS = {
    5: "ps=2,workers=2,staleness=1", 14: "ps=1,workers=2", 24: "ps=3,workers=2,async,pull_every=2",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_EXPORT", "0")
    monkeypatch.setenv("SHOAL_CHECKPOINT_S", "0")


def test_each_push_counts_once_through_kills_and_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers and servers at random, and the template while it is about to take up another plan."""
    draw = random.Random(1)
    run_dir = tmp_path / "run"
    dismiss, changes = Supervisor.dismiss, []

    def dismiss_and_lose(supervisor: Supervisor) -> None:
        dismiss(supervisor)
        changes.append(supervisor.template_pid)
        if len(changes) == 2:
            kill(supervisor.template_pid)

    monkeypatch.setattr(Supervisor, "dismiss", dismiss_and_lose)
    struck: list[int] = []

    def on_event(event: dict[str, Any]) -> Plan | None:
        if event["kind"] != "step":
            return None
        if draw.random() < 0.25:
            # Between two plans, and at the end, there may be nobody.
            for pid in draw.sample(pids := processes(run_dir, "worker", "server", "standby"), min(1, len(pids))):
                struck.append(pid)
                kill(pid)
        return Plan.parse(PLANS[event["step"]]) if event["step"] in PLANS else None

    run = shoal.train(counting_job(), plan="ps=1,workers=2,async,threads=1", run_dir=run_dir, on_event=on_event)
    check_ledger(run)
    assert [e["step"] for e in events(run.path, "step")] == list(range(1, EPOCHS * BATCHES + 1))
    assert [e["step"] for e in events(run.path, "replan")] == list(PLANS) and len(changes) == len(PLANS)
    assert struck and events(run.path, "death") and json.loads((run_dir / "processes.json").read_text()) == []
