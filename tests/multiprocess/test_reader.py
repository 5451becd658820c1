"""Reading a run's weights while it trains under a parameter server: always a whole, and at the end the trained model."""

from __future__ import annotations

import contextlib
import copy
import json
import threading
import time
from pathlib import Path

import pytest
import torch
from keyed import Keyed, samples
from torch import nn

import shoal
from shoal.data.order import epoch_order


def build() -> nn.Module:
    # Its rows stay alike: half an update of one server would show as rows that differ.
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1200, bias=False), nn.ReLU(), nn.Linear(1200, 1))
    nn.init.constant_(model[1].weight, 0.1)
    nn.init.constant_(model[3].weight, 1e-3)
    return model.double()


@pytest.mark.parametrize("plan", ["ps=1,workers=2,async", "tp=2,ps=1,sync"])
def test_a_reader_keeps_up_and_ends_with_the_trained_model(tmp_path: Path, plan: str) -> None:
    x = torch.rand(600, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    job = shoal.Job(
        name="read", model=build, train_data=(x, x.sum(1, keepdim=True)), loss=nn.functional.mse_loss,
        optimizer=lambda p: torch.optim.SGD(p, lr=1e-4), batch_size=20, epochs=2,
    )  # fmt: skip
    path = tmp_path / "run"
    seen: list[dict[str, torch.Tensor]] = []
    reader: list[shoal.ps.Reader] = []

    def on_event(event: dict) -> shoal.Plan | None:
        # Workers wait for this at every step, so there is a reader from the second one on.
        if event["kind"] == "step" and not thread.is_alive():
            thread.start()
            there.wait(60)
        if event["kind"] == "step" and event["step"] == 40:
            deadline = time.monotonic() + 60
            while not seen and time.monotonic() < deadline:
                time.sleep(0.01)
            # Readers find the server of the new plan by themselves: it counts from step 30 on, an update a step.
            while "async" in plan and reader[0].versions[0] > 50 and time.monotonic() < deadline:
                time.sleep(0.01)
        changes = event["kind"] == "step" and event["step"] == 30 and "async" in plan
        return shoal.Plan.parse("ps=1,workers=1") if changes else None

    def read() -> None:
        reader.append(shoal.ps.Reader(path))
        there.set()
        while reader[0].ended is None:
            try:
                reader[0].wait(reader[0].number + 1)
            except shoal.ShoalError:
                continue
            finally:
                seen.append(reader[0].state_dict())
                numbers.append(reader[0].number)

    numbers: list[int] = []
    there = threading.Event()
    thread = threading.Thread(target=read, daemon=True)
    run = shoal.train(job, plan=plan, run_dir=path, on_event=on_event)
    thread.join(60)
    assert reader and "The run has ended" in reader[0].ended
    assert len(seen) > 1 and numbers == sorted(numbers) and reader[0].versions == (60,)
    for state in seen:
        torch.testing.assert_close(state["1.weight"], state["1.weight"][:1].expand(1200, 3), rtol=1e-10, atol=0.0)
    for name, value in run.weights().items():
        assert torch.equal(value, seen[-1][name]), name
    assert not (path / "read.key").exists()


# -- rows --------------------------------------------------------------------------------------------------------------

SAMPLES, BATCH, EPOCHS, AGE = 120, 12, 3, 9


DATA = samples(SAMPLES)


def keyed() -> Keyed:
    return Keyed(AGE, memory=6_000)


def keyed_job() -> shoal.Job:
    return shoal.Job(
        name="keyed", model=keyed, train_data=DATA, loss=nn.functional.mse_loss, batch_size=BATCH, epochs=EPOCHS,
        optimizer=lambda params: torch.optim.SGD(params, lr=0.05),
    )  # fmt: skip


def plain_states() -> list[dict[str, torch.Tensor]]:
    """What one process has before the first step and after each."""
    torch.manual_seed(0)
    model = keyed()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    keys, target = DATA
    states = [copy.deepcopy(model.state_dict())]
    for epoch in range(EPOCHS):
        for batch in torch.from_numpy(epoch_order(SAMPLES, 0, epoch)).split(BATCH):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(keys[batch]), target[batch]).backward()
            optimizer.step()
            shoal.ps.step(model)
            states.append(copy.deepcopy(model.state_dict()))
    return states


def rows_of(state: dict[str, torch.Tensor], table: str) -> dict[int, torch.Tensor]:
    return dict(zip(state[f"{table}.keys"].tolist(), state[f"{table}.rows"], strict=True))


def read_along(job: shoal.Job, plan: str, path: Path) -> tuple[shoal.Run, shoal.ps.Reader, list[tuple[tuple[int, ...], dict]]]:
    """Train, and follow: what a model that is loaded again and again had, with the versions."""
    seen: list[tuple[tuple[int, ...], dict]] = []
    reader: list[shoal.ps.Reader] = []
    there = threading.Event()

    def on_event(event: dict) -> None:
        if event["kind"] == "step" and not thread.is_alive() and not final:
            thread.start()
            there.wait(60)
        # Workers wait meanwhile: there is more to be seen, and now and then they wait until something was.
        time.sleep(0.02)
        deadline = time.monotonic() + 60
        while event["kind"] == "step" and event["step"] % 5 == 0 and len(seen) <= event["step"] // 5 and thread.is_alive():
            if time.monotonic() > deadline:
                break
            time.sleep(0.005)

    def read() -> None:
        reader.append(shoal.ps.Reader(path))
        model, other = keyed(), keyed()
        while reader[0].ended is None or reader[0].number != (seen[-1][2] if seen else 0):
            number = reader[0].load_into(model)
            with reader[0]._lock:
                if reader[0].number != number:
                    continue
                versions, state = reader[0].versions, reader[0].state_dict()
            if len(seen) % 4 == 0:
                # One that begins in the midst of it has the same.
                reader[0].load_into(other)
            seen.append((versions, copy.deepcopy(model.state_dict()), number))
            assert all(torch.equal(state[name], value) for name, value in seen[-1][1].items()), versions
            there.set()
            with contextlib.suppress(shoal.ShoalError):
                reader[0].wait(number + 1)
        final.append(other)
        reader[0].load_into(other)

    final: list[nn.Module] = []
    thread = threading.Thread(target=read, daemon=True)
    run = shoal.train(job, plan=plan, run_dir=path, on_event=on_event)
    thread.join(60)
    assert final and "The run has ended" in str(reader[0].ended)
    assert all(torch.equal(value, seen[-1][1][name]) for name, value in final[0].state_dict().items())
    return run, reader[0], [(versions, state) for versions, state, _ in seen]


@pytest.mark.parametrize("plan", ["ps=2,workers=2,sync", "ps=2,workers=2,async"])
def test_rows_are_followed_through_the_death_of_a_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plan: str
) -> None:
    monkeypatch.setenv("SHOAL_EXPORT", "0")
    monkeypatch.setenv("SHOAL_FAULTS", "kill(server=1,step=8,phase=update);kill(server=0,step=15,phase=updated)")
    run, reader, seen = read_along(keyed_job(), plan, tmp_path / "run")
    assert len([e for e in map(json.loads, (run.path / "events.jsonl").open()) if e["kind"] == "death"]) == 2
    assert len(seen) > 5
    for name, value in run.weights().items():
        assert torch.equal(value, seen[-1][1][name]), name
    assert any(len(table) < len(rows_of(seen[-1][1], "bag")) for table in reader._copy.tables[1:])
    if "sync" in plan.split(","):
        assert_each_is_of_one_step(seen)


def assert_each_is_of_one_step(seen: list[tuple[tuple[int, ...], dict]]) -> None:
    """Whatever was seen is what one process has after as many steps, as a whole."""
    states = plain_states()
    aged = 0
    for versions, state in seen:
        step = versions[0]
        assert versions == (step, step)
        for name in (name for name in state if name.startswith("out.")):
            torch.testing.assert_close(state[name], states[step][name], rtol=1e-9, atol=1e-12)
        for table in ("rows", "bag"):
            mine, plain = rows_of(state, table), rows_of(states[step], table)
            assert mine.keys() <= plain.keys()
            for key in plain.keys() - mine.keys():
                # Dropped by its age, which one process does when it is needed next.
                assert table == "bag" and torch.equal(plain[key], rows_of(states[step - AGE], table)[key])
                aged += 1
            for key, row in mine.items():
                torch.testing.assert_close(row, plain[key], rtol=1e-9, atol=1e-12)
    assert aged


@pytest.mark.parametrize("plan", ["ps=2,workers=2,sync,threads=1", "ps=2,workers=2,async,threads=1"])
def test_a_run_whose_processes_share_no_memory_is_followed_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plan: str
) -> None:
    monkeypatch.setenv("SHOAL_EXPORT", "0")
    monkeypatch.setenv("SHOAL_TRANSPORT", "group")
    run, reader, seen = read_along(keyed_job(), plan, tmp_path / "run")
    assert len(seen) > 5 and not (run.path / "read.key").exists()
    for name, value in run.weights().items():
        assert torch.equal(value, seen[-1][1][name]), name
    assert sum(reader.versions) == (60 if "async" not in plan else 120)
    if "async" not in plan:
        assert_each_is_of_one_step(seen)
