"""What rewriting gains is found out on the job's own batch: only what gives the same results is ever used."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import shoal
from shoal.rewrites import registry, relu_pool
from shoal.train.host import build
from shoal.train.tune import Question, Tuned, tune


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def rewrite(name: str, change: Any) -> Any:
    return types.SimpleNamespace(NAME=name, ORDER=1, TRAINS=True, INFERS=True, rewrite=change, __doc__="Changes something.")


def wrong(region: Any) -> int:
    """Drop every ReLU."""
    found = [n for n in region.graph.nodes if n.op == "call_module" and isinstance(region.module(n), nn.ReLU)]
    for node in found:
        node.replace_all_uses_with(node.args[0])
        region.graph.erase_node(node)
    return len(found)


def failing(region: Any) -> int:
    raise RuntimeError("a mistake")


def ask(model: nn.Module, monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...] | None = None, **more: Any) -> Tuned:
    rewrites = {"wrong": rewrite("wrong", wrong), "failing": rewrite("failing", failing), "relu_pool": relu_pool}
    monkeypatch.setattr(registry, "all_rewrites", lambda: rewrites)
    data = torch.randn(48, 3, 8, 8), torch.arange(48) % 3
    job = shoal.Job(
        name="tuned", model=model, train_data=lambda: data, loss=nn.functional.cross_entropy,
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1), batch_size=48, epochs=1,
    )  # fmt: skip
    question = Question(
        names=names, forced=names is not None, sub_batches=more.get("sub_batches", ()), layout="contiguous", precision="fp32",
        samples=48, seconds=0.05,
    )  # fmt: skip
    return tune(build(job), question)


def small(*more: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), *more, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 3))


def test_what_gives_other_results_or_fails_is_never_used(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = ask(model, monkeypatch)
    assert not {"wrong", "failing"} & set(found.names)
    trouble = {finding.name: finding.trouble for finding in found.findings}
    assert trouble["wrong"] == "does not give the same results in this model"
    assert trouble["failing"] == "fails in this model (RuntimeError)"
    assert trouble["relu_pool"] is None
    given = ask(model, monkeypatch, ("wrong", "relu_pool"))
    assert given.names == ("relu_pool",)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all("forward" not in vars(module) for module in model.modules())


def test_a_model_without_a_place_is_soon_done_with(monkeypatch: pytest.MonkeyPatch) -> None:
    found = ask(nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), monkeypatch, ("relu_pool",))
    assert [finding.trouble for finding in found.findings] == ["finds nothing to change in this model"]


def test_pieces_are_tried_only_where_they_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["shoal.train.tune"]
    monkeypatch.setattr(module, "_LEAST_CUT_S", 0.0)
    monkeypatch.setattr(module, "SUB_BATCH_GAIN", 0.0)
    assert ask(small(), monkeypatch, sub_batches=(24, 12)).sub_batch == 12
    assert ask(small(nn.Dropout(0.5)), monkeypatch, sub_batches=(24,)).sub_batch == 0
    assert ask(small(nn.BatchNorm2d(4)), monkeypatch, sub_batches=(24,)).sub_batch == 0


def test_passes_that_take_long_are_measured_with_fewer_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["shoal.train.tune"]
    whole = ask(small(), monkeypatch, sub_batches=(24, 12))
    monkeypatch.setattr(module, "_LONG_PASS_S", 0.0)
    part = ask(small(), monkeypatch, sub_batches=(24, 12))
    assert (whole.samples, part.samples) == (48, 8)
    assert {f.name for f in part.findings} == {f.name for f in whole.findings}
    assert part.pass_s and whole.pass_s
    # Pieces of what is a piece already would be no answer.
    assert part.sub_batch == 0
