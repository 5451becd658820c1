"""kill -9 of parameter servers and their workers: nothing that was acknowledged is lost, nothing is applied twice."""

from __future__ import annotations

from pathlib import Path

import pytest
from noisy_job import digest, events, history, make_job, processes

import shoal

# (role, rank, step from 0, phase) and what the replacement does.
SYNC_KILLS = [
    ("server", 0, 1, "taken", "recomputed"),
    ("server", 1, 2, "reduce", "rolled_forward"),
    ("server", 0, 3, "update", "rolled_forward"),
    ("rank", 1, 4, "backward", "recomputed"),
    ("server", 1, 5, "updated", "rolled_forward"),
    ("server", 0, 6, "committed", "recomputed"),
    ("rank", 0, 7, "published", "rolled_forward"),
    ("server", 1, 8, "checkpoint", "rolled_forward"),
    ("server", 0, 12, "committed", "recomputed"),
    ("rank", 0, 13, "evaluate", "recomputed"),
    ("server", 0, 15, "update", "rolled_forward"),
]


@pytest.fixture(autouse=True)
def _settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_EXPORT", "0")
    monkeypatch.setenv("SHOAL_CHECKPOINT_S", "0")


def faults(kills: list[tuple[str, int, int, str, str]]) -> str:
    return ";".join(f"kill({role}={rank},step={step},phase={phase})" for role, rank, step, phase, _ in kills)


def test_sync_gives_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job, plan = make_job(epochs=2), "ps=2,workers=2,sync,threads=1"
    calm = shoal.train(job, plan=plan, run_dir=tmp_path / "calm")
    monkeypatch.setenv("SHOAL_FAULTS", faults(SYNC_KILLS))
    run = shoal.train(job, plan=plan, run_dir=tmp_path / "killed")

    assert digest(run) == digest(calm) and history(run) == history(calm)
    deaths, recovered = events(run.path, "death"), events(run.path, "recovered")
    assert len(deaths) == len(recovered) == len(SYNC_KILLS)
    for role, rank, step, phase, action in SYNC_KILLS:
        if phase == "checkpoint":
            continue
        name = "server" if role == "server" else "worker"
        at = (name, rank, step + 1 + (phase == "committed"))
        assert [e for e in deaths if (e["role"], e["rank"], e["step"]) == at], (role, rank, step, phase)
        assert [e for e in recovered if (e["role"], e["rank"], e["step"]) == at and e["action"] == action], (at, phase)
    acks = [(e["epoch"], e["batch"], e["shard"]) for e in events(run.path, "push_ack")]
    assert acks == [(e, b, s) for e in (1, 2) for b in range(1, 14) for s in range(2)]
    assert processes(run.path) == []
