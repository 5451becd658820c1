"""kill -9 of parameter servers and their workers: nothing that was acknowledged is lost, nothing is applied twice."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from counting_job import EPOCHS, SAMPLES, Counted, check_ledger, counting_job
from noisy_job import accuracy, digest, events, history, make_job, processes, settle
from torch import nn
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

import shoal
from shoal.data.order import batch_indices, epoch_order, share_bounds
from shoal.errors import LossNotFiniteError
from shoal.observe.events import read_events
from shoal.train import checkpoint as checkpoints

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


def kill_server(run: Path, step: int) -> Callable[[dict[str, Any]], None]:
    """What to do at every event so that server 0 is killed after a step."""
    killed: list[int] = []

    def watch(event: dict[str, Any]) -> None:
        if event["kind"] == "step" and event["step"] == step and not killed:
            rows = json.loads((run / "processes.json").read_text())
            killed.extend(row["pid"] for row in rows if (row["role"], row["rank"]) == ("server", 0))
            os.kill(killed[0], signal.SIGKILL)

    return watch


def test_sync_gives_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job, plan = make_job(epochs=2), "ps=2,workers=2,sync,threads=1"
    calm = shoal.train(job, plan=plan, run_dir=tmp_path / "calm")
    monkeypatch.setenv("SHOAL_FAULTS", faults(SYNC_KILLS))
    # A checkpoint to die in has to come in time.
    run = shoal.train(job, plan=plan, run_dir=tmp_path / "killed", on_event=settle)

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


def weighted(output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A loss whose weights do not add up exactly."""
    weight = 0.1 + target / 3
    return (torch.nn.functional.cross_entropy(output, target, reduction="none") * weight).sum(), weight.sum()


def hesitant() -> torch.nn.Module:
    """A model of which one call goes wrong, where SHOAL_TEST_CALLS names a folder: it ends its process (in a folder "killed"),
    or waits until another process was given the same batch."""

    class Hesitant(torch.nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            folder = os.environ.get("SHOAL_TEST_CALLS")
            if folder and self.training:
                name = hashlib.sha256(x.numpy().tobytes()).hexdigest()
                (Path(folder) / f"{name}-{os.getpid()}").touch()
                with contextlib.suppress(FileExistsError):
                    (Path(folder) / "struck").touch(exist_ok=False)
                    if Path(folder).name == "killed":
                        os.kill(os.getpid(), signal.SIGKILL)
                    until = time.monotonic() + 100
                    while len(list(Path(folder).glob(f"{name}-*"))) < 2:
                        assert time.monotonic() < until
                        time.sleep(0.001)
            return super().forward(x)

    return Hesitant(*make_job().model())


@pytest.mark.parametrize("transport", ["arena", "group"])
def test_portions_of_slow_and_of_killed_workers_are_computed_by_others(
    transport: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """L-BFGS, with whatever might depend on who computes a portion: dropout, running statistics, weights that are no round
    numbers. A worker that is slow hands in what others have computed long since, or gives it up."""
    job = make_job(
        model=hesitant, epochs=2, grad_clip=None, scheduler=None, optimizer="lbfgs", metrics={"accuracy": accuracy},
        loss=weighted, batch_size=64,
    )  # fmt: skip
    monkeypatch.setenv("SHOAL_TRANSPORT", transport)
    plan = "ps=2,workers=2,sync,batchnorm=local,accumulate=4,threads=1"
    runs, trouble = {}, {"calm": "", "slow": "slow(rank=1,factor=50)", "killed": "kill(server=0,step=4,phase=taken)"}
    for name in trouble:
        if name != "calm":
            (tmp_path / "calls" / name).mkdir(parents=True)
            monkeypatch.setenv("SHOAL_TEST_CALLS", str(tmp_path / "calls" / name))
        logged, watch = None, None
        if name == "killed" and transport == "group":
            # Without an arena a server comes back by its log.
            logged, watch = True, kill_server(tmp_path / name, 4)
        monkeypatch.setenv("SHOAL_FAULTS", trouble[name])
        runs[name] = run = shoal.train(job, plan=plan, run_dir=tmp_path / name, push_log=logged, on_event=watch)
        again = events(run.path, "portion_rerun")
        assert sum(e["times"] - 1 for e in again) == run.summary()["portions_rerun"]
        acks = [(e["epoch"], e["batch"], e["shard"]) for e in events(run.path, "push_ack")]
        assert len(acks) == len(set(acks)) and {shard for _, _, shard in acks} == set(range(8))
    calm, slow, killed = runs.values()
    assert digest(slow) == digest(killed) == digest(calm) and history(slow) == history(killed) == history(calm)
    assert slow.summary()["portions_rerun"] >= 1 and events(slow.path, "death") == []
    assert killed.summary()["portions_rerun"] >= 1
    assert sorted(e["role"] for e in events(killed.path, "death")) == ["server", "worker"]
    assert processes(killed.path) == []


# -- workers that wait for nobody ----------------------------------------------------------------------------------------

ASYNC_KILLS = (
    "kill(server=0,step=1,phase=taken);kill(server=1,step=2,phase=reduce);kill(server=0,step=3,phase=update);"
    "kill(server=1,step=4,phase=updated);kill(server=0,step=5,phase=committed);kill(rank=0,step=6,phase=data);"
    "kill(rank=1,step=7,phase=backward);kill(rank=0,step=8,phase=published);kill(rank=1,step=9,phase=committed);"
    "kill(rank=0,step=12,phase=evaluate);kill(rank=1,step=15,phase=forward);kill(server=1,step=20,phase=update)"
)


@pytest.mark.parametrize("mode", ["async", "staleness=1"])
def test_each_push_counts_once_wherever_somebody_dies(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOAL_FAULTS", ASYNC_KILLS)
    run = shoal.train(counting_job(), plan=f"ps=2,workers=2,{mode},threads=1", run_dir=tmp_path / "run")
    check_ledger(run)
    deaths = events(run.path, "death")
    # Which worker has which step is not fixed here, so that not every fault meets its worker; every server's does.
    assert sum(e["role"] == "server" for e in deaths) == 6 and any(e["role"] == "worker" for e in deaths)
    assert len(events(run.path, "recovered")) == len(deaths)
    clocks = events(run.path, "clock")
    assert len(clocks) == EPOCHS * SAMPLES // 8 * 2
    if mode != "async":
        assert max(e["clock"] - e["slowest"] for e in clocks) <= 1
    assert [e["step"] for e in events(run.path, "step")] == list(range(1, EPOCHS * SAMPLES // 8 + 1))
    assert sum(run.summary()["staleness"].values()) == EPOCHS * SAMPLES // 8 * 2
    assert processes(run.path) == []


def test_each_push_counts_once_over_stops_and_other_plans(tmp_path: Path) -> None:
    """Stopped in the midst of an epoch and gone on with in other modes and numbers; pushes and pulls of several units."""
    run_dir = tmp_path / "run"
    stopped = shoal.train(
        counting_job(), plan="ps=1,workers=2,async,push_every=3,pull_every=2,threads=1", run_dir=run_dir,
        on_event=lambda event: "stop" if event["kind"] == "step" and event["step"] == 5 else None,
    )  # fmt: skip
    assert stopped.summary()["steps"] == 5
    plans = ("ps=3,workers=2,staleness=0", "ps=1,workers=2,sync", "ps=2,workers=2,async,pull_every=4")
    for plan, steps in zip(plans, (14, 19, None), strict=True):
        run = shoal.train(counting_job(), plan=f"{plan},threads=1", run_dir=run_dir, resume=True, steps=steps)
    # Five steps of a sync run move a weight half as far: its shards are means over the whole batch.
    acks = Counter((e["epoch"], e["batch"], e["shard"]) for e in events(run.path, "push_ack"))
    assert len(acks) == EPOCHS * SAMPLES // 8 * 2 and set(acks.values()) == {1}
    moved = run.weights()["weight"][:, 0]
    assert sorted(set(moved.tolist())) == [-0.75, -0.625] and int((moved == -0.625).sum()) == 5 * 8
    weights = run.weights()["weight"]
    assert torch.equal(weights, weights[:, :1].expand_as(weights))


def check_corrected(run: shoal.Run, steps: int) -> None:
    """Each push of three workers moved weights by 1 / (1 + its own staleness)."""
    acks = events(run.path, "push_ack")
    assert len(acks) == steps * 3 and any(e["staleness"] for e in acks)
    expected = torch.zeros(SAMPLES, dtype=torch.float64)
    for e in acks:
        rows = batch_indices(epoch_order(SAMPLES, 0, e["epoch"] - 1), e["batch"] - 1, 8)
        first, last = share_bounds(8, (1, 1, 1))[e["shard"]]
        expected[rows[first:last]] -= 1 / (last - first) / (1 + e["staleness"])
    found = run.weights()["weight"]
    assert torch.allclose(found[:, 0].double(), expected, atol=1e-5)
    assert torch.allclose(found, found[:, :1].expand_as(found), atol=1e-6)


def test_late_pushes_move_weights_less_where_that_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each push by 1 / (1 + its own staleness), whoever dies: of slices, and with an optimizer that works on whole tensors."""

    class Whole(torch.optim.SGD):
        pass

    monkeypatch.setenv(
        "SHOAL_FAULTS", "kill(server=0,step=3,phase=update);kill(server=0,step=9,phase=updated);slow(rank=1,factor=5)"
    )
    for kind in (torch.optim.SGD, Whole):
        job = counting_job(optimizer=lambda params, kind=kind: shoal.ps.staleness_aware(kind(params, lr=1.0)))
        run = shoal.train(job, plan="ps=1,workers=3,async,threads=1", run_dir=tmp_path / kind.__name__, steps=15)
        check_corrected(run, 15)
        assert len(events(run.path, "death")) == 2


def test_late_pushes_move_weights_less_where_no_memory_is_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that a server has done once more, from its log."""
    monkeypatch.setenv("SHOAL_TRANSPORT", "group")
    monkeypatch.setenv("SHOAL_FAULTS", "slow(rank=1,factor=5)")
    monkeypatch.setenv("SHOAL_CHECKPOINT_S", "1000")
    job = counting_job(optimizer=lambda params: shoal.ps.staleness_aware(torch.optim.SGD(params, lr=1.0)))
    plan = "ps=1,workers=3,async,threads=1"
    watch = kill_server(tmp_path / "run", 7)
    found = shoal.train(job, plan=plan, run_dir=tmp_path / "run", steps=15, push_log=True, on_event=watch)
    assert [e["action"] for e in events(found.path, "recovered")] == ["replayed"]
    check_corrected(found, 15)


def test_workers_that_wait_for_nobody_go_on_while_a_checkpoint_is_hashed_and_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They rest while it is written. Here it is not completed before they have come further."""
    complete, run, waited = checkpoints.complete, tmp_path / "run", list[int]()

    def late(directory: Path, step: int, meta: dict[str, Any], *rest: Any) -> Any:
        deadline = time.monotonic() + 100.0
        while not waited and step and time.monotonic() < deadline:
            if any(e["step"] > step for e in read_events(run / "events.jsonl", ["step"])):
                waited.append(step)
            time.sleep(0.02)
        return complete(directory, step, meta, *rest)

    monkeypatch.setattr(checkpoints, "complete", late)
    shoal.train(make_job(epochs=2), plan="ps=1,workers=2,async,threads=1", run_dir=run)
    assert waited
    steps = [e["step"] for e in events(run, "checkpoint")]
    assert steps == sorted(set(steps)) and waited[0] in steps


def check_dropped(run: shoal.Run, workers: int) -> None:
    """Each step holds the mean over exactly the pushes that are acknowledged, and all others are said to be dropped."""
    acks, dropped = ([(e["epoch"], e["batch"], e["shard"]) for e in events(run.path, k)] for k in ("push_ack", "push_dropped"))
    batches = [(e, b) for e in range(1, EPOCHS + 1) for b in range(1, SAMPLES // 8 + 1)]
    assert dropped and sorted(acks + dropped) == [(e, b, s) for e, b in batches for s in range(workers)]
    expected = torch.zeros(SAMPLES, dtype=torch.float64)
    for epoch, batch in batches:
        rows = batch_indices(epoch_order(SAMPLES, 0, epoch - 1), batch - 1, 8)
        bounds = share_bounds(8, (1,) * workers)
        counted = [rows[a:b] for s, (a, b) in enumerate(bounds) if (epoch, batch, s) in acks]
        assert len(counted) >= workers - 1
        for shard in counted:
            expected[shard] -= 1 / sum(map(len, counted))
    found = run.weights()["weight"]
    assert torch.allclose(found, expected[:, None].expand_as(found), rtol=0, atol=1e-9)


def test_late_pushes_are_dropped_and_said_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of three workers is slow, others die."""
    monkeypatch.setenv(
        "SHOAL_FAULTS",
        "slow(rank=1,factor=40);kill(server=0,step=3,phase=taken);kill(server=1,step=5,phase=update);"
        "kill(rank=0,step=7,phase=backward);kill(rank=2,step=9,phase=published)",
    )  # fmt: skip
    job = counting_job(model=lambda: Counted().double())
    run = shoal.train(job, plan="ps=2,workers=3,sync,backup=1,threads=1", run_dir=tmp_path / "run")
    check_dropped(run, 3)
    assert sum(e["role"] == "server" for e in events(run.path, "death")) == 2


def test_late_pushes_are_dropped_where_no_memory_is_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As above, with a log of what servers are told: what a run that goes on has of it is what counted."""
    monkeypatch.setenv("SHOAL_TRANSPORT", "group")
    monkeypatch.setenv("SHOAL_FAULTS", "slow(rank=1,factor=20);kill(rank=0,step=7,phase=backward)")
    monkeypatch.setenv("SHOAL_CHECKPOINT_S", "1000")
    job, plan = counting_job(model=lambda: Counted().double()), "ps=2,workers=3,sync,backup=1,threads=1"
    shoal.train(job, plan=plan, run_dir=tmp_path / "run", push_log=True, steps=14)
    run = shoal.train(job, plan=plan, run_dir=tmp_path / "run", resume=True)
    check_dropped(run, 3)
    # A step waits for two of three, whoever is slow.
    assert len(events(run.path, "push_dropped")) == EPOCHS * SAMPLES // 8


class Seen(Metric):
    """A number from which follows which samples were taken in."""

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("rows", [], dist_reduce_fx="cat")

    def update(self, output: torch.Tensor, target: torch.Tensor) -> None:
        self.rows.append(target)

    def compute(self) -> torch.Tensor:
        return (dim_zero_cat(self.rows).double() + 1).sqrt().sum()


def check_seen(run: shoal.Run, workers: int) -> None:
    """The metric has seen the samples of all pushes that are acknowledged, and in the evaluation all."""
    for entry in run.history:
        order, seen = epoch_order(SAMPLES, 0, entry["epoch"] - 1), 0.0
        for e in events(run.path, "push_ack"):
            if e["epoch"] == entry["epoch"]:
                first, last = share_bounds(8, (1,) * workers)[e["shard"]]
                seen += float(np.sqrt(batch_indices(order, e["batch"] - 1, 8)[first:last] + 1.0).sum())
        assert entry["seen"] == pytest.approx(seen)
        assert entry["eval_seen"] == pytest.approx(np.sqrt(np.arange(SAMPLES) + 1.0).sum())


@pytest.mark.parametrize("plan", ["ps=1,workers=3,sync,backup=1", "ps=1,workers=3,sync,backup=1,replicas=1"])
def test_what_is_dropped_counts_for_no_metric(plan: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the server that has taken the pushes is killed, and its copy goes on."""
    monkeypatch.setenv("SHOAL_FAULTS", "slow(rank=1,factor=20)")
    copied, job = "replicas" in plan, counting_job(model=lambda: Counted().double(), metrics={"seen": Seen()})
    watch = kill_server(tmp_path / "run", 5) if copied else None
    run = shoal.train(job, plan=f"{plan},threads=1", run_dir=tmp_path / "run", on_event=watch)
    check_dropped(run, 3)
    assert [(e["role"], e["rank"]) for e in events(run.path, "death")] == [("server", 0)] * copied
    check_seen(run, 3)


def test_a_gradient_that_is_no_number_is_not_applied(tmp_path: Path) -> None:
    class Root(Counted):
        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            found = super().forward(rows)
            # A loss that is a number, with a gradient that is none.
            return found + torch.where(rows == 17, found * 0, 0 * rows).abs().sqrt() * 0

    plan = "ps=1,workers=2,async,threads=1"
    skipped = shoal.train(counting_job(model=Root), plan=plan, run_dir=tmp_path / "skipped", skip_bad_pushes=True)
    assert len(events(skipped.path, "push_rejected")) == EPOCHS
    assert len(events(skipped.path, "push_ack")) == (SAMPLES // 8 * 2 - 1) * EPOCHS
    assert bool(torch.isfinite(skipped.weights()["weight"]).all())
    with pytest.raises(LossNotFiniteError, match=r"gradient of weight is no number in the push of worker \d for epoch 1"):
        shoal.train(counting_job(model=Root), plan=plan, run_dir=tmp_path / "run")
    (rejected,) = events(tmp_path / "run", "push_rejected")
    assert rejected["parameter"] == "weight" and 17 in rejected["samples"]


class Lost(Counted):
    """Of sample 17 the loss is no number, and neither are the running statistics that it leaves."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(1, affine=False)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        found = super().forward(rows)
        if not self.training:
            return found
        return found + 0 * self.norm(torch.where(rows == 17, torch.nan, rows.to(found.dtype))[:, None])[:, 0]


@pytest.mark.parametrize(
    ("transport", "plan"),
    [
        ("arena", "ps=2,workers=2,sync,batchnorm=local"),
        ("arena", "ps=1,workers=2,async,push_every=3"),
        ("group", "ps=2,workers=2,staleness=1,push_every=2"),
    ],
)
def test_a_push_whose_loss_is_no_number_is_left_out_with_all_that_it_leaves(
    transport: str, plan: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOAL_TRANSPORT", transport)
    job = counting_job(model=lambda: Lost().double(), metrics={"seen": Seen()})
    run = shoal.train(job, plan=f"{plan},threads=1", run_dir=tmp_path / "run", skip_bad_pushes=True)
    acks, rejected = ([(e["epoch"], e["batch"], e["shard"]) for e in events(run.path, k)] for k in ("push_ack", "push_rejected"))
    each = [(e, b, s) for e in range(1, EPOCHS + 1) for b in range(1, SAMPLES // 8 + 1) for s in range(2)]
    assert sorted(acks + rejected) == each and {e for e, _, _ in rejected} == set(range(1, EPOCHS + 1))
    assert all(17 in e["samples"] and e["parameter"] is None for e in events(run.path, "push_rejected"))
    expected = torch.zeros(SAMPLES, dtype=torch.float64)
    for epoch, batch, shard in acks:
        rows = batch_indices(epoch_order(SAMPLES, 0, epoch - 1), batch - 1, 8)
        expected[rows[4 * shard :][:4]] -= 1 / 8 if "sync," in plan and "async" not in plan else 1 / 4
    weights = run.weights()
    assert torch.equal(weights["weight"], expected[:, None].expand(SAMPLES, 6000))
    assert all(bool(torch.isfinite(weights[f"norm.running_{name}"]).all()) for name in ("mean", "var"))
    check_seen(run, 2)
    assert all(np.isfinite(entry["loss"]) for entry in run.history)
