"""Reading a run's weights while it trains under a parameter server: always a whole, and at the end the trained model."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from torch import nn

import shoal


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

    def on_event(event: dict) -> None:
        # Workers wait for this at every step, so there is a reader from the second one on.
        if event["kind"] == "step" and not thread.is_alive():
            thread.start()
            there.wait(60)

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

    there = threading.Event()
    thread = threading.Thread(target=read, daemon=True)
    run = shoal.train(job, plan=plan, run_dir=path, on_event=on_event)
    thread.join(60)
    assert reader and "The run has ended" in reader[0].ended
    assert len(seen) > 1
    for state in seen:
        torch.testing.assert_close(state["1.weight"], state["1.weight"][:1].expand(1200, 3), rtol=1e-10, atol=0.0)
    for name, value in run.weights().items():
        assert torch.equal(value, seen[-1][name]), name
    assert not (path / "read.key").exists()
