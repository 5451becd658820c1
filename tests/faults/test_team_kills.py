"""kill -9 of workers that compute a share together: whoever is left begins the step again with the replacement, bit for bit."""

from __future__ import annotations

from pathlib import Path

import noisy_job
import pytest
from noisy_job import digest, events, history, make_job, processes

import shoal

EDGE = noisy_job.STEPS_PER_EPOCH
# (rank's distance from the first that dies, step from 0, phase) and what the replacement does. Two deaths at one step are of
# two ranks of a team: in the midst of it and where they meet again, or one behind the other.
KILLS: list[tuple[int, int, str, str]] = [
    (1, 1, "data", "recomputed"),
    (0, 2, "forward", "recomputed"),
    (1, 4, "backward", "recomputed"),
    (0, 5, "computed", "rolled_forward"),
    (1, 6, "published", "rolled_forward"),
    (0, 7, "reduce", "rolled_forward"),
    (1, 8, "update", "rolled_forward"),
    (0, 9, "updated", "rolled_forward"),
    (1, 10, "committed", "recomputed"),
    (0, EDGE, "evaluate", "recomputed"),
    (1, EDGE + 1, "backward", "recomputed"),
    (0, EDGE + 1, "meeting", "recomputed"),
    (0, EDGE + 3, "forward", "recomputed"),
    (1, EDGE + 3, "forward", "recomputed"),
    (0, EDGE + 4, "checkpoint", "rolled_forward"),
    (1, 2 * EDGE, "evaluated", "recomputed"),
    (0, 2 * EDGE, "evaluate", "recomputed"),
]


@pytest.fixture(autouse=True)
def _settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_EXPORT", "0")
    monkeypatch.setenv("SHOAL_CHECKPOINT_S", "0")


# In the second a team of two is not alone: the other has to wait for it. In the last all four are one team.
@pytest.mark.parametrize(
    "plan",
    ["tp=2", "dp=2,pp=2,microbatches=2,schedule=1f1b", "dp=2,pp=2,zero=3,microbatches=2,schedule=1f1b"],
    ids=["tp", "dp-pp", "dp-pp-zero"],
)
def test_killed_in_every_phase(plan: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job, plan = make_job(epochs=2), f"{plan},threads=1"
    calm = shoal.train(job, plan=plan, run_dir=tmp_path / "calm")
    assert not events(calm.path, "death", "stall")
    # With four workers the second team.
    first = 2 if plan.startswith("dp=2,pp") else 0
    kills = [(first + rank, step, phase, action) for rank, step, phase, action in KILLS]
    text = ";".join(f"kill(rank={rank},step={step},phase={phase})" for rank, step, phase, _ in kills)
    monkeypatch.setenv("SHOAL_FAULTS", text)
    run = shoal.train(job, plan=plan, run_dir=tmp_path / "killed")

    assert digest(run) == digest(calm)
    assert history(run) == history(calm) and "confusion_3" in run.history[0]
    deaths, recovered = events(run.path, "death"), events(run.path, "recovered")
    assert len(deaths) == len(recovered) and {event["cause"] for event in deaths} == {"SIGKILL"}
    for rank, step, phase, action in kills:
        if phase in ("checkpoint", "evaluated"):
            # The clock decides about the first, and whether the epoch is over already about the other.
            continue
        at = step + 1 + (phase == "committed")
        assert [e for e in deaths if (e["rank"], e["step"]) == (rank, at)], (rank, step, phase)
        assert [e for e in recovered if (e["rank"], e["step"], e["action"]) == (rank, at, action)], (rank, step, phase)
    assert processes(run.path) == []


def test_a_stalled_member_is_named_and_not_those_who_wait_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = "pp=2,microbatches=2,threads=1"
    calm = shoal.train(make_job(), plan=plan, run_dir=tmp_path / "calm", steps=6)
    monkeypatch.setenv("SHOAL_STALL_S", "4")
    monkeypatch.setenv("SHOAL_FAULTS", "stall(rank=1,step=4,phase=forward)")
    run = shoal.train(make_job(), plan=plan, run_dir=tmp_path / "run", steps=6)
    assert digest(run) == digest(calm)
    # A first step may take long on a busy machine, whoever's it is.
    assert {e["rank"] for e in events(run.path, "stall") if e["step"] > 1} == {1}
    deaths = [(e["rank"], e["step"], e["cause"]) for e in events(run.path, "death") if e["step"] > 1]
    assert deaths == [(1, 5, "stalled")]
