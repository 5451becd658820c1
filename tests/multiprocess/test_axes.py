"""Every axis, alone and together with others, gives through ``shoal.train`` the weights of one plain torch process.

A covering set: each model under the plans that suit it, each schedule, each habit (accumulating, recomputing, clipping,
uneven shares, a ragged last batch) at least once. Many habits share a run, because each run costs seconds to start.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import model_zoo as zoo
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plain_torch import PlainLoop, assert_equal, moved
from torch import nn
from torch.nn import functional as F
from torch.utils.data import default_collate
from torchmetrics.classification import MulticlassAccuracy

import shoal
from shoal.data.order import share_bounds
from shoal.errors import PlanError
from shoal.observe.compare import difference
from shoal.train.run import Run

STEPS = 20
WITHIN = {torch.float32: 1e-5, torch.float64: 1e-9}


@pytest.fixture(scope="module", autouse=True)
def _no_export() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHOAL_EXPORT", "0")
        yield


def samples_of(job: shoal.Job) -> Callable[[torch.Tensor], Any]:
    """Sample numbers -> batch."""
    data = job.train_data()
    if isinstance(data, tuple):
        return lambda rows: tuple(tensor[rows] for tensor in data)
    return lambda rows: default_collate([data[int(row)] for row in rows])


def one_worker(job: shoal.Job, steps: int = STEPS, pieces: int = 1) -> dict[str, torch.Tensor]:
    """Train a job of the zoo in this process, as anybody would; ``pieces``: microbatches of a batch."""
    fetch = samples_of(job)

    def piece_loss(model: nn.Module, rows: torch.Tensor) -> tuple[torch.Tensor, float]:
        batch = fetch(rows)
        if job.loss is None:
            labels = batch["labels"][:, 1:]
            return model(**batch).loss, float((labels != -100).sum())
        *inputs, target = batch
        found = job.loss(model(*inputs), target)
        return (found[0] / found[1], float(found[1])) if isinstance(found, tuple) else (found, float(len(rows)))

    def backward(model: nn.Module, rows: torch.Tensor) -> None:
        bounds = share_bounds(len(rows), (1,) * pieces)
        found = [piece_loss(model, rows[a:b]) for a, b in bounds if b > a]
        total = sum(weight for _, weight in found)
        for loss, weight in found:
            (loss * (weight / total)).backward()

    return PlainLoop(
        build=job.model, samples=zoo.SAMPLES, batch_size=job.batch_size, backward=backward, seed=job.seed,
        optimizer=lambda model: job.optimizer(model.parameters()), grad_clip=job.grad_clip,
    ).run(steps)  # fmt: skip


def train(job: shoal.Job, plan: str, directory: Path, steps: int = STEPS) -> Run:
    return shoal.train(job, plan=f"{plan},threads=1", run_dir=directory / "run", steps=steps)


# -- every model -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "plan", "dtype", "pieces"),
    [
        ("odd", "tp=3,accumulate=2", torch.float32, 1),
        # Of the last batch's three samples one worker of four gets none.
        ("odd", "dp=4,zero=3", torch.float64, 1),
        ("odd", "dp=2,shares=3+1,pp=2,microbatches=3,schedule=gpipe,zero=3", torch.float64, 1),
        ("vit", "tp=2,pp=2,microbatches=3,schedule=interleaved,recompute=selective", torch.float64, 1),
        ("resnet", "dp=2,pp=2,microbatches=3,schedule=1f1b", torch.float64, 3),
        ("resnet", "dp=4,zero=3", torch.float64, 1),
        # Some of its layers compute in float32 whatever the weights are.
        ("llama", "tp=2,pp=2,microbatches=2", torch.float32, 1),
        ("clicks", "dp=2,tp=2", torch.float64, 1),
        ("padded", "dp=2,pp=2,microbatches=5,schedule=gpipe,zero=2", torch.float32, 1),
    ],
)
def test_weights_are_one_workers(name: str, plan: str, dtype: torch.dtype, pieces: int, tmp_path: Path) -> None:
    job = zoo.job(name, dtype, eval_data=None)
    assert_equal(train(job, plan, tmp_path).weights(), one_worker(job, pieces=pieces), WITHIN[dtype])


# -- every habit, on the model with a tied head ------------------------------------------------------------------------


class OfWords(MulticlassAccuracy):
    """A metric with a state."""

    def update(self, output: torch.Tensor, target: torch.Tensor) -> None:
        super().update(output.flatten(0, 1), target.flatten())


def gpt() -> shoal.Job:
    """Clipping, a schedule by epochs, evaluation, and metrics with and without a state."""
    return zoo.job(
        "gpt", grad_clip=0.5, metrics={"accuracy": zoo.accuracy, "of_words": OfWords(num_classes=zoo.VOCABULARY)},
        scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5), scheduler_every="epoch",
    )  # fmt: skip


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(gpt(), "dp=1", tmp_path_factory.mktemp("alone"))


@pytest.mark.parametrize(
    "plan",
    [
        "tp=4,sequence_parallel=on",
        "pp=4,microbatches=3,schedule=1f1b",
        "dp=2,pp=2,zero=3,microbatches=5,schedule=interleaved,accumulate=2,recompute=full",
        "dp=2,tp=2,zero=3,recompute=full",
        "dp=2,tp=2,pp=2,microbatches=3,schedule=zbv",
    ],
)
def test_weights_losses_and_metrics_are_one_workers(alone: Run, plan: str, tmp_path: Path) -> None:
    run = train(gpt(), plan, tmp_path)
    assert_equal(run.weights(), alone.weights(), within=1e-9)
    assert {"loss", "accuracy", "of_words", "eval_loss", "eval_accuracy", "eval_of_words"} <= set(alone.history[0])
    for found, expected in zip(run.history, alone.history, strict=True):
        found.pop("samples_per_s")
        assert found == pytest.approx({k: v for k, v in expected.items() if k != "samples_per_s"}, rel=1e-8)


def test_bf16_stays_near_one_workers_bf16(tmp_path: Path) -> None:
    job = zoo.job("gpt", torch.float32, eval_data=None, metrics={})
    found = train(job, "tp=2,pp=2,microbatches=2,precision=bf16", tmp_path, steps=10).weights()
    off = difference(one_worker(job, steps=10), found)
    # As far as rounding to eight bits goes, and not nearer, or it was not rounded at all.
    assert 1e-5 < off.max_rel_diff < 0.1, off


def test_dropout_does_not_depend_on_where_a_pipeline_is_cut_and_what_is_recomputed(tmp_path: Path) -> None:
    job = zoo.job("gpt", model=lambda: zoo.Gpt(dropout=0.2).double(), eval_data=None, metrics={})
    plans = ("pp=2,microbatches=2", "tp=2,pp=2,microbatches=2,schedule=zbv,recompute=full")
    first, again = (train(job, plan, tmp_path / str(k), steps=6).weights() for k, plan in enumerate(plans))
    assert_equal(again, first, within=1e-9)
    assert difference(one_worker(job.replace(model=lambda: zoo.Gpt().double()), steps=6), first).max_rel_diff > 1e-3


def test_overrides_of_what_is_split_and_where_it_is_cut(tmp_path: Path) -> None:
    job = zoo.job(
        "odd", eval_data=None, tensor_plan={"0": "replicate", "2": "colwise", "4": "rowwise"}, split_points=["1"]
    )
    run = train(job, "tp=2,pp=2,microbatches=2", tmp_path)
    assert_equal(run.weights(), one_worker(job), within=1e-9)
    why = (tmp_path / "run" / "plan.toml").read_text()
    assert "2 by outputs; 4 by inputs" in why and "Cut into 2 stages before 1" in why


# -- optimizers --------------------------------------------------------------------------------------------------------


def nadam(params: Any) -> torch.optim.Optimizer:
    return torch.optim.NAdam(params, lr=3e-3)


def adafactor(params: Any) -> torch.optim.Optimizer:
    return torch.optim.Adafactor(params, lr=3e-3)


@pytest.mark.parametrize(("optimizer", "plan"), [(nadam, "dp=2,tp=2"), (adafactor, "dp=2,pp=2,microbatches=3")])
def test_optimizers_whose_work_is_not_cut_anywhere(optimizer: Any, plan: str, tmp_path: Path) -> None:
    job = zoo.job("odd", eval_data=None, optimizer=optimizer)
    assert_equal(train(job, plan, tmp_path).weights(), one_worker(job), within=1e-9)


# -- formulas and accidents --------------------------------------------------------------------------------------------


def test_the_second_textbook_formula(tmp_path: Path) -> None:
    """The model in k = 5 parts, y = sum_i y_i, on 2,000 samples: each part is updated by the common gradient."""
    width, parts, samples = 15, 5, 2000

    def data() -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randn(samples, 40, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        return x, x[:, :7].sin()

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(40, parts * width), nn.Tanh(), nn.Linear(parts * width, 7)).double()

    job = shoal.Job(
        name="textbook", model=build, train_data=data, loss=F.mse_loss, batch_size=samples, epochs=3,
        optimizer=lambda params: torch.optim.SGD(params, lr=0.3), tensor_plan={"0": "colwise", "2": "rowwise"},
    )  # fmt: skip
    found = train(job, f"tp={parts}", tmp_path, steps=3).weights()
    torch.manual_seed(0)
    whole = build()
    first, last = whole[0], whole[2]
    rows = [slice(k * width, (k + 1) * width) for k in range(parts)]
    a = [first.weight[r].detach().clone().requires_grad_() for r in rows]
    b = [first.bias[r].detach().clone().requires_grad_() for r in rows]
    c = [last.weight[:, r].detach().clone().requires_grad_() for r in rows]
    bias = last.bias.detach().clone().requires_grad_()
    x, y = data()
    for _ in range(3):
        outputs = [torch.tanh(x @ a[k].T + b[k]) @ c[k].T for k in range(parts)]
        loss = F.mse_loss(sum(outputs[1:], outputs[0]) + bias, y)
        everything = [*a, *b, *c, bias]
        with torch.no_grad():
            for parameter, gradient in zip(everything, torch.autograd.grad(loss, everything), strict=True):
                parameter -= 0.3 * gradient
    expected = {"0.weight": torch.cat(a), "0.bias": torch.cat(b), "2.weight": torch.cat(c, 1), "2.bias": bias}
    assert_equal(found, {name: tensor.detach() for name, tensor in expected.items()}, within=1e-12)


plans = st.sampled_from(
    ["tp=2", "tp=3,dp=2", "pp=2,microbatches=3", "pp=3,microbatches=2,schedule=gpipe", "dp=3,zero=3", "dp=2,tp=2,zero=3",
     "dp=2,pp=2,microbatches=2", "dp=2,pp=2,zero=3,microbatches=2,schedule=1f1b", "tp=2,pp=2,microbatches=3,accumulate=2"]
)  # fmt: skip


@settings(max_examples=3, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(6, 70), min_size=3, max_size=5), st.integers(3, 33), plans, st.integers(0, 3))
def test_any_small_network_under_any_plan(
    tmp_path_factory: pytest.TempPathFactory, widths: list[int], batch: int, plan: str, seed: int
) -> None:
    def build() -> nn.Module:
        sizes = [37, *widths, 10]
        layers = [m for a, b in zip(sizes, sizes[1:], strict=False) for m in (nn.Linear(a, b), nn.Tanh())]
        return nn.Sequential(*layers[:-1]).double()

    # Small layers are split only where somebody asks for it.
    everywhere = {str(2 * k): ("colwise", "rowwise")[k % 2] for k in range(2)}
    job = zoo.job(
        "odd", model=build, batch_size=batch, seed=seed, eval_data=None, tensor_plan=everywhere if "tp" in plan else None
    )
    assert_equal(
        train(job, plan, tmp_path_factory.mktemp("any"), steps=9).weights(), one_worker(job, steps=9), within=1e-9
    )


def test_what_does_not_fit_is_refused_in_one_sentence_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"tp=3 does not fit this model: .* 4 heads") as refused:
        train(zoo.job("gpt"), "tp=3", tmp_path)
    assert refused.value.exit_code == 2
    assert "tp=2 or tp=4 would fit" in str(refused.value) and "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_the_measure_itself() -> None:
    """What is compared above is not the same by accident: training moves every weight."""
    job = zoo.job("gpt")
    torch.manual_seed(job.seed)
    before = job.model().state_dict()
    after = one_worker(job, steps=2)
    assert moved(before, after) == set(before)
