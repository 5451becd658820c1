"""Data parallelism gives one worker's weights: the transformer for k = 1…5, padded text, and the textbook's formula."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from plain_torch import PlainLoop, TinyTransformer, assert_equal, mean_loss, moved, text, word_loss
from torch import nn
from torch.nn import functional as F

import shoal
from shoal.train.run import Run

SAMPLES, BATCH, STEPS = 1003, 100, 30
WORKERS = (1, 2, 3, 4, 5)
SOME_WORKERS = (1, 3, 5)
Runs = dict[tuple[str, int], Run]


@pytest.fixture(scope="module", autouse=True)
def _no_export() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHOAL_EXPORT", "0")
        yield


def float32_job() -> shoal.Job:
    """Mean loss, SGD with momentum."""
    return shoal.Job(
        name="transformer",
        model=lambda: TinyTransformer(torch.float32),
        train_data=lambda: text(SAMPLES, padded=False),
        loss=mean_loss,
        optimizer=lambda params: torch.optim.SGD(params, lr=0.02, momentum=0.9),
        batch_size=BATCH,
        epochs=9,
    )


def float64_job() -> shoal.Job:
    """Padded text with a (sum, weight) loss, Adam."""
    return float32_job().replace(
        name="padded-text",
        model=lambda: TinyTransformer(torch.float64),
        train_data=lambda: text(SAMPLES, padded=True),
        loss=word_loss,
        optimizer=lambda params: torch.optim.Adam(params, lr=3e-3),
        seed=3,
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """The first job under each number of workers, the second under some."""
    directory = tmp_path_factory.mktemp("runs")
    return {
        (job.name, k): shoal.train(job, plan=f"dp={k},threads=1", run_dir=directory / f"{job.name}-{k}", steps=STEPS)
        for job, numbers in ((float32_job(), WORKERS), (float64_job(), SOME_WORKERS))
        for k in numbers
    }


@functools.cache
def plain_float32() -> dict[str, torch.Tensor]:
    words, targets = text(SAMPLES, padded=False)
    return PlainLoop(
        build=lambda: TinyTransformer(torch.float32),
        samples=SAMPLES,
        batch_size=BATCH,
        backward=lambda model, rows: mean_loss(model(words[rows]), targets[rows]).backward(),
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9),
    ).run(STEPS)


@functools.cache
def plain_float64() -> dict[str, torch.Tensor]:
    words, targets = text(SAMPLES, padded=True)

    def backward(model: nn.Module, rows: torch.Tensor) -> None:
        total, weight = word_loss(model(words[rows]), targets[rows])
        (total / weight).backward()

    return PlainLoop(
        build=lambda: TinyTransformer(torch.float64),
        samples=SAMPLES,
        batch_size=BATCH,
        backward=backward,
        optimizer=lambda model: torch.optim.Adam(model.parameters(), lr=3e-3),
        seed=3,
    ).run(STEPS)


@pytest.mark.parametrize("k", WORKERS)
def test_float32_with_sgd_and_momentum_equals_one_worker_and_plain_torch(runs: Runs, k: int) -> None:
    found = runs["transformer", k].weights()
    assert_equal(found, runs["transformer", 1].weights(), within=1e-5)
    assert_equal(found, plain_float32(), within=1e-5)


@pytest.mark.parametrize("k", SOME_WORKERS)
def test_float64_padded_text_with_adam_equals_one_worker_and_plain_torch(runs: Runs, k: int) -> None:
    found = runs["padded-text", k].weights()
    assert_equal(found, runs["padded-text", 1].weights(), within=1e-9)
    assert_equal(found, plain_float64(), within=1e-9)
    assert runs["padded-text", k].history == [
        {**entry, "loss": pytest.approx(entry["loss"], rel=1e-9), "samples_per_s": pytest.approx(0, abs=1e9)}
        for entry in runs["padded-text", 1].history
    ]


def test_training_moves_everything_but_the_unused_layer_and_keeps_the_tie(runs: Runs) -> None:
    torch.manual_seed(0)
    before = TinyTransformer(torch.float32).state_dict()
    after = runs["transformer", 5].weights()
    assert set(before) - moved(before, after) == {"unused.weight", "unused.bias"}
    assert torch.equal(after["head.weight"], after["words.weight"])


def test_the_same_plan_and_seed_give_the_same_bits(runs: Runs, tmp_path: Path) -> None:
    again = shoal.train(float32_job(), plan="dp=3,threads=1", run_dir=tmp_path / "again", steps=STEPS)
    assert again.summary()["weights_sha256"] == runs["transformer", 3].summary()["weights_sha256"]
    assert again.summary()["weights_sha256"] != runs["transformer", 1].summary()["weights_sha256"]


def test_the_textbook_formula(tmp_path: Path) -> None:
    """theta <- theta - alpha * (1/k) * sum_i grad_i, with grad_i the mean over a shard: k = 5 shards of 2,000."""

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 3)).double()

    def data() -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randn(10_000, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        return x, x[:, :3].argmax(1)

    job = shoal.Job(
        name="textbook", model=build, train_data=data, loss=F.cross_entropy, batch_size=10_000,
        optimizer=lambda params: torch.optim.SGD(params, lr=0.5),
    )  # fmt: skip
    run = shoal.train(job, plan="dp=5,threads=1", run_dir=tmp_path / "run")
    assert run.summary()["steps"] == 1
    x, y = data()
    torch.manual_seed(0)
    full = build()
    F.cross_entropy(full(x), y).backward()
    torch.manual_seed(0)
    model = build()
    shards = [F.cross_entropy(model(x[i::5]), y[i::5]) for i in range(5)]
    by_shard = [torch.autograd.grad(loss, list(model.parameters())) for loss in shards]
    with torch.no_grad():
        for index, parameter in enumerate(full.parameters()):
            assert parameter.grad is not None
            torch.testing.assert_close(sum(g[index] for g in by_shard) / 5, parameter.grad, rtol=1e-12, atol=1e-15)
            parameter -= 0.5 * parameter.grad
    assert_equal(run.weights(), full.state_dict(), within=1e-12)
