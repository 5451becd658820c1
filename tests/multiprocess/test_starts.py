"""What processes start with: torch._dynamo takes nearly as long as torch to import, and only who compiles has it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import shoal
from shoal import bundle
from shoal.process.late_dynamo import NAME

STEPS, PLAN = 4, "dp=2,threads=1,layout=contiguous,rewrites=none"


@pytest.fixture(scope="module", autouse=True)
def _no_export() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHOAL_EXPORT", "0")
        yield


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(64, 8, generator=generator), torch.randint(0, 3, (64,), generator=generator)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))


def looking_step(model: nn.Module, batch: Any) -> dict[str, Any]:
    """A loss, and whether the process that computes it has imported torch._dynamo."""
    return {"loss": F.cross_entropy(model(batch[0]), batch[1]), "dynamo": float(NAME in sys.modules)}


@cache
def _compiled() -> tuple[Any, list[Any]]:
    """The loss as torch.compile makes it, by a backend that takes graphs as they are; and the graphs it was given."""
    graphs: list[Any] = []

    def backend(graph: Any, _inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    return torch.compile(F.cross_entropy, backend=backend), graphs


def compiling_step(model: nn.Module, batch: Any) -> dict[str, Any]:
    """The same loss by a user's own torch.compile, which begins in the worker."""
    loss, graphs = _compiled()
    value = loss(model(batch[0]), batch[1])
    return {"loss": value, "dynamo": float(NAME in sys.modules), "graphs": float(len(graphs) > 0)}


def job(step: Any, optimizer: Any = torch.optim.Adam) -> shoal.Job:
    return shoal.Job(name="starts", model=network, train_data=data, step=step, batch_size=16, optimizer=optimizer, epochs=1)


def values(run: shoal.Run, name: str) -> list[float]:
    """The running means of what the steps of a run logged under a name."""
    events = [json.loads(line) for line in (run.path / "events.jsonl").read_text().splitlines()]
    return [event["metrics"][name] for event in events if event["kind"] == "step"]


def same_weights(one: shoal.Run, other: shoal.Run) -> bool:
    return all(torch.equal(weight, other.weights()[name]) for name, weight in one.weights().items())


def test_workers_have_no_dynamo_and_those_whose_code_compiles_get_it(tmp_path: Path) -> None:
    plain = shoal.train(job(looking_step), plan=PLAN, run_dir=tmp_path / "plain")
    assert values(plain, "dynamo") == [0.0] * STEPS
    compiling = shoal.train(job(compiling_step), plan=PLAN, run_dir=tmp_path / "compiling")
    assert values(compiling, "dynamo") == [1.0] * STEPS and values(compiling, "graphs") == [1.0] * STEPS
    # Optimizers that began without it go on with it: not a bit is another.
    assert same_weights(plain, compiling)


@pytest.mark.parametrize("plan", ["tp=2", "ps=1,workers=2,sync"])
def test_other_axes_do_without_it_too(plan: str, tmp_path: Path) -> None:
    optimizer = torch.optim.SGD if "ps" in plan else torch.optim.AdamW
    found = shoal.train(job(looking_step, optimizer), plan=f"{plan},threads=1", run_dir=tmp_path)
    assert values(found, "dynamo") == [0.0] * STEPS


_SOURCE = """\
import sys

import torch
from torch import nn


class Looks(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.one * x + float("torch._dynamo" in sys.modules)
"""


def test_replicas_have_none(tmp_path: Path) -> None:
    source = tmp_path / "looks.py"
    source.write_text(_SOURCE)
    signature = {"dtype": "FP32", "shape": [-1, 2]}
    description = {
        "name": "looks", "factory": "looks:Looks", "labels": None, "inputs": [{"name": "input", **signature}],
        "outputs": [{"name": "output", **signature}],
    }  # fmt: skip
    bundle.write(tmp_path / "looks", {"one": torch.ones(())}, description, source)
    with shoal.serve(tmp_path / "looks", replicas=1) as service, shoal.Client(service.url) as client:
        assert client.infer(torch.zeros(1, 2).numpy())["output"].tolist() == [[0.0, 0.0]]
