"""Jobs of every form that the contract allows, under dp and in plain torch; in float64, so that little tells much."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from plain_torch import IGNORED, PlainLoop, assert_equal
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from torchmetrics.classification import BinaryAUROC

import shoal
from shoal.bundle import read_description
from shoal.data.order import epoch_order
from shoal.observe.compare import difference

SAMPLES, BATCH = 210, 50


@pytest.fixture(scope="module", autouse=True)
def _no_export() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHOAL_EXPORT", "0")
        yield


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., Any]:
    """train(job, plan, steps=None) -> Run"""

    def run(job: shoal.Job, plan: str, steps: int | None = None) -> Any:
        # The layout is named so that nothing is left to be found out by trying.
        return shoal.train(job, plan=f"{plan},threads=1,layout=contiguous", run_dir=tmp_path / plan, steps=steps)

    return run


def points(samples: int = SAMPLES, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """(4 numbers, 0 or 1)"""
    x = torch.randn(samples, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x, (x[:, 0] * x[:, 1] + x[:, 2] > 0).double()


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1), nn.Flatten(0)).double()


def accuracy(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return ((output > 0) == (target > 0.5)).double().mean()


def auroc(output: torch.Tensor, target: torch.Tensor) -> float:
    return float(BinaryAUROC()(output.sigmoid(), target.int()))


class Auroc(BinaryAUROC):
    """Of logits and floating targets."""

    def update(self, preds: torch.Tensor, target: torch.Tensor) -> None:
        super().update(preds.sigmoid(), target.int())


def test_metrics_plateau_schedule_and_patience(train: Callable[..., Any]) -> None:
    """Three workers: the history is that of a plain loop, number for number, and training stops in the same epoch."""
    job = shoal.Job(
        name="metrics",
        model=network,
        train_data=points,
        eval_data=lambda: points(77, seed=2),
        loss=F.binary_cross_entropy_with_logits,
        optimizer=lambda params: torch.optim.SGD(params, lr=3.0, momentum=0.9),
        scheduler=lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=0),
        scheduler_every="epoch",
        metrics={"accuracy": accuracy, "auc": Auroc()},
        batch_size=BATCH,
        epochs=40,
        patience=3,
    )
    run = train(job, "dp=3")
    x, y = points()
    ex, ey = points(77, seed=2)
    history: list[dict[str, float]] = []
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    plateau: list[Any] = []

    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        made = torch.optim.SGD(model.parameters(), lr=3.0, momentum=0.9)
        plateau.append(torch.optim.lr_scheduler.ReduceLROnPlateau(made, factor=0.5, patience=0))
        return made

    def backward(model: nn.Module, rows: torch.Tensor) -> None:
        output = model(x[rows])
        seen.append((output.detach(), y[rows]))
        F.binary_cross_entropy_with_logits(output, y[rows]).backward()

    def after_epoch(model: nn.Module, made: torch.optim.Optimizer) -> bool:
        outputs, targets = (torch.cat(parts) for parts in zip(*seen, strict=True))
        seen.clear()
        with torch.no_grad():
            found = model(ex)
        entry = {"epoch": len(history) + 1}
        for prefix, o, t in (("", outputs, targets), ("eval_", found, ey)):
            entry[f"{prefix}loss"] = float(F.binary_cross_entropy_with_logits(o, t))
            entry[f"{prefix}accuracy"] = float(accuracy(o, t))
            entry[f"{prefix}auc"] = auroc(o, t)
        history.append(entry)
        plateau[0].step(entry["eval_loss"])
        losses = [e["eval_loss"] for e in history]
        return len(losses) - 1 - losses.index(min(losses)) >= 3

    expected = PlainLoop(
        build=network, samples=SAMPLES, batch_size=BATCH, backward=backward, optimizer=optimizer,
        after_epoch=after_epoch,
    ).run(40 * 5)  # fmt: skip
    assert 4 < len(history) < 40
    assert plateau[0].get_last_lr()[0] < 3.0
    assert run.summary()["stopped_by"] == "patience"
    assert [set(e) - {"samples_per_s"} for e in run.history] == [set(e) for e in history]
    for entry, plain in zip(run.history, history, strict=True):
        assert {name: entry[name] for name in plain} == pytest.approx(plain, rel=1e-6)
    assert_equal(run.weights(), expected, within=1e-9)


def test_until_stops_at_the_first_epoch_that_is_good_enough(train: Callable[..., Any]) -> None:
    job = shoal.Job(
        name="until", model=network, train_data=points, eval_data=points, loss=F.binary_cross_entropy_with_logits,
        optimizer=lambda params: torch.optim.Adam(params, lr=0.05), metrics={"accuracy": accuracy}, batch_size=BATCH,
        epochs=50, until={"eval_accuracy": 0.9, "eval_loss": 0.4},
    )  # fmt: skip
    run = train(job, "dp=2")
    good = [entry["eval_accuracy"] >= 0.9 and entry["eval_loss"] <= 0.4 for entry in run.history]
    assert good == [False] * (len(good) - 1) + [True]
    assert len(good) < 50
    assert run.summary()["stopped_by"] == "until"
    assert run.evaluate() == pytest.approx({k: v for k, v in run.history[-1].items() if k.startswith("eval_")})


class Dictionary(Dataset[Any]):
    """Samples as mappings, each shifted by random numbers from all three generators."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict[str, Any]:
        x, y = points()
        shift = torch.rand(1).item() + random.random() + float(np.random.rand())
        return {"numbers": x[index] + shift, "inner": {"target": y[index]}, "shift": shift}


class ByKeyword(nn.Module):
    """Takes the batch by keywords, as many models do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, *, numbers: torch.Tensor, inner: dict[str, torch.Tensor], **rest: Any) -> torch.Tensor:
        return self.net(numbers)


def stack(items: list[dict[str, Any]]) -> dict[str, Any]:
    """A collate of the user's own: it also notes how many samples it got."""
    batch: dict[str, Any] = torch.utils.data.default_collate(items)
    return {**batch, "count": len(items)}


def test_augmented_dict_data_with_a_collate_is_the_same_under_any_plan(train: Callable[..., Any]) -> None:
    job = shoal.Job(
        name="augmented", model=ByKeyword, train_data=Dictionary(), collate=stack, batch_size=BATCH, epochs=2,
        loss=lambda output, batch: F.binary_cross_entropy_with_logits(output, batch["inner"]["target"]),
        optimizer=lambda params: torch.optim.AdamW(params, lr=0.01),
        metrics={"accuracy": lambda output, batch: accuracy(output, batch["inner"]["target"])},
    )  # fmt: skip
    one, three = train(job, "dp=1"), train(job, "dp=3")
    assert_equal(three.weights(), one.weights(), within=1e-9)
    for a, b in zip(one.history, three.history, strict=True):
        assert b == {**{k: pytest.approx(v, rel=1e-9) for k, v in a.items()}, "samples_per_s": b["samples_per_s"]}


def test_a_step_of_the_users_own_with_weights_and_values_to_log(train: Callable[..., Any]) -> None:
    """The mean is weighted by the samples' own weights; a step logs what it likes."""

    def data() -> dict[str, torch.Tensor]:
        x, y = points()
        return {"x": x, "y": y, "w": torch.rand(SAMPLES, generator=torch.Generator().manual_seed(3)).double() ** 4}

    def step(model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
        output = model(batch["x"])
        each = F.binary_cross_entropy_with_logits(output, batch["y"], reduction="none")
        loss = (each * batch["w"]).sum() / batch["w"].sum()
        return {"loss": loss, "hits": accuracy(output, batch["y"]), "first": float(batch["x"][:, 0].mean())}

    job = shoal.Job(
        name="step", model=network, train_data=data, step=step, weight=lambda batch: float(batch["w"].sum()),
        optimizer=lambda params: torch.optim.SGD(params, lr=0.3), batch_size=BATCH,
    )  # fmt: skip
    run = train(job, "dp=4,accumulate=2")
    rows = data()
    expected = PlainLoop(
        build=network, samples=SAMPLES, batch_size=BATCH,
        backward=lambda model, r: step(model, {k: v[r] for k, v in rows.items()})["loss"].backward(),
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.3),
    ).run(5)  # fmt: skip
    assert_equal(run.weights(), expected, within=1e-9)
    assert run.history[0]["first"] == pytest.approx(float(rows["x"][:, 0].mean()))
    assert 0 < run.history[0]["hits"] < 1
    inputs = read_description(run.path / "model")["inputs"]
    assert inputs == [{"name": "input", "dtype": "FP64", "shape": [-1, 4]}]


class OwnLoss(nn.Module):
    """Returns an object with its loss, the mean over the labels that are not -100."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 6, dtype=torch.float64)
        self.norm = nn.LayerNorm(6, dtype=torch.float64)
        self.out = nn.Linear(6, 5, dtype=torch.float64)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> SimpleNamespace:
        logits = self.out(self.norm(self.embed(input_ids)))
        return SimpleNamespace(loss=F.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits=logits)


def labelled() -> dict[str, torch.Tensor]:
    """Of two samples in three all labels are -100, so that many a worker's share has nothing to learn from."""
    generator = torch.Generator().manual_seed(8)
    ids = torch.randint(0, 12, (60, 7), generator=generator)
    labels = ids % 5
    labels[torch.rand(60, 7, generator=generator) < 0.3] = IGNORED
    labels[torch.rand(60, generator=generator) < 0.66] = IGNORED
    return {"input_ids": ids, "labels": labels}


def test_a_model_with_its_own_loss(train: Callable[..., Any]) -> None:
    rows = labelled()
    order = epoch_order(60, 0, 0)
    lone = [bool((rows["labels"][order[low : low + 2].copy()] == IGNORED).all()) for low in range(0, 60, 2)]
    assert any(lone), "no share without a label, so this test would show nothing"
    job = shoal.Job(
        name="own-loss", model=OwnLoss, train_data=labelled, eval_data=labelled, batch_size=12,
        optimizer=lambda params: torch.optim.Adam(params, lr=0.02),
        metrics={"words": lambda output, batch: (output.logits.argmax(-1) == batch["input_ids"] % 5).double().mean()},
    )  # fmt: skip
    run = train(job, "dp=3,accumulate=2")
    expected = PlainLoop(
        build=OwnLoss, samples=60, batch_size=12,
        backward=lambda model, r: model(**{k: v[r] for k, v in rows.items()}).loss.backward(),
        optimizer=lambda model: torch.optim.Adam(model.parameters(), lr=0.02),
    ).run(5)  # fmt: skip
    assert_equal(run.weights(), expected, within=1e-9)
    model = OwnLoss()
    model.load_state_dict(expected)
    assert run.history[-1]["eval_loss"] == pytest.approx(float(model(**rows).loss.detach()))


# -- BatchNorm ---------------------------------------------------------------------------------------------------------


def convolution() -> nn.Module:
    """BatchNorm after a convolution and after a linear layer, one of them with a cumulative average."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 4 * 4, 6),
        nn.BatchNorm1d(6, momentum=None), nn.Tanh(), nn.Linear(6, 3),
    ).double()  # fmt: skip


def pictures() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(104, 2, 6, 6, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    x += torch.linspace(-2, 3, 104, dtype=torch.float64).view(-1, 1, 1, 1)
    return x, x.mean((1, 2, 3)).mul(2).long() % 3


def batchnorm_job() -> shoal.Job:
    return shoal.Job(
        name="batchnorm", model=convolution, train_data=pictures, loss=F.cross_entropy, batch_size=25,
        optimizer=lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9), epochs=2,
    )  # fmt: skip


def plain_batchnorm(
    batch: int, parts: int, cut: Callable[[torch.Tensor], list[torch.Tensor]] = lambda part: [part], steps: int | None = None
) -> dict[str, torch.Tensor]:
    """One worker that computes each batch in so many parts, each of them cut further."""
    x, y = pictures()

    def backward(model: nn.Module, rows: torch.Tensor) -> None:
        for part in (piece for whole in rows.tensor_split(parts) for piece in cut(whole)):
            (F.cross_entropy(model(x[part]), y[part]) * len(part) / len(rows)).backward()

    return PlainLoop(
        build=convolution, samples=104, batch_size=batch, backward=backward,
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
    ).run(steps or 2 * -(-104 // batch))  # fmt: skip


def test_batchnorm_normalises_over_the_global_batch(train: Callable[..., Any]) -> None:
    """Running averages and the count of batches too; the last batch of an epoch has four samples."""
    expected = plain_batchnorm(25, 1)
    assert_equal(train(batchnorm_job(), "dp=2,shares=2+1").weights(), expected, within=1e-9)
    assert_equal(train(batchnorm_job(), "dp=3").weights(), expected, within=1e-9)


def test_local_batchnorm_is_another_computation(train: Callable[..., Any]) -> None:
    off = difference(plain_batchnorm(25, 1), train(batchnorm_job(), "dp=2,batchnorm=local").weights())
    assert off.max_rel_diff > 1e-4


def test_accumulation_uses_the_statistics_of_each_microbatch(train: Callable[..., Any]) -> None:
    """The oracle is one worker with the same microbatches."""
    job = batchnorm_job().replace(batch_size=26)
    expected = plain_batchnorm(26, 4)
    assert_equal(train(job, "dp=1,accumulate=4,batchnorm=micro").weights(), expected, within=1e-9)
    assert_equal(train(job, "dp=2,accumulate=4,batchnorm=micro").weights(), expected, within=1e-9)


@pytest.mark.parametrize(("transport", "plan"), [("arena", "dp=3"), ("group", "dp=3"), ("group", "ps=1,workers=3,sync")])
def test_a_worker_without_the_last_samples_of_a_piece_takes_part_in_the_next(
    train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, transport: str, plan: str
) -> None:
    """Of 50 samples the workers have 17, 17 and 16, of which 16 pass at a time: first 48, then one each of two workers."""

    def cut(part: torch.Tensor) -> list[torch.Tensor]:
        shares = part.tensor_split(3)
        return [torch.cat([share[at : at + 16] for share in shares]) for at in range(0, len(shares[0]), 16)]

    monkeypatch.setenv("SHOAL_TRANSPORT", transport)
    found = train(batchnorm_job().replace(batch_size=100), f"{plan},accumulate=2,sub_batch=16,batchnorm=micro", steps=2)
    assert_equal(found.weights(), plain_batchnorm(100, 2, cut, steps=2), within=1e-9)


def test_many_microbatches_of_a_wide_batchnorm_have_room(train: Callable[..., Any]) -> None:
    def wide() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(72, 1500), nn.BatchNorm1d(1500), nn.Linear(1500, 3)).double()

    job = batchnorm_job().replace(model=wide, batch_size=104)
    one = train(job, "dp=1,accumulate=26,batchnorm=micro", steps=2)
    assert_equal(train(job, "dp=2,accumulate=26,batchnorm=micro", steps=2).weights(), one.weights(), within=1e-7)
