"""Every kind of optimizer, with groups, schedules and clipping, does under dp what a plain loop does (float64)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_torch import PlainLoop, assert_equal, moved
from torch import nn
from torch.nn import functional as F

import shoal
from shoal.data.order import epoch_order

SAMPLES, BATCH = 203, 48
STEPS = 13  # two epochs of five steps, the last of which has 11 samples, and three more


@pytest.fixture(scope="module", autouse=True)
def _no_export() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHOAL_EXPORT", "0")
        yield


class Routed(nn.Module):
    """Adds up embeddings; samples with a flag also go through an expert, and most batches have no flag.

    So the expert has no gradient in most steps, and where it has one, often only one worker knows.
    """

    def __init__(self, sparse: bool = False) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(40, 6, mode="sum", sparse=sparse)
        self.frozen = nn.Linear(6, 6)
        self.expert = nn.Linear(6, 6)
        self.out = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 1))
        self.double()
        self.frozen.requires_grad_(False)

    def forward(self, words: torch.Tensor, flag: torch.Tensor) -> torch.Tensor:
        x = self.frozen(self.words(words))
        if flag.any():
            x = torch.where(flag[:, None], self.expert(x), x)
        return self.out(x)[:, 0]


def samples() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(five words, flag, target) of each sample; six of the 203 have the flag."""
    generator = torch.Generator().manual_seed(11)
    words = torch.randint(0, 40, (SAMPLES, 5), generator=generator)
    flag = torch.zeros(SAMPLES, dtype=torch.bool)
    # None in the first step, so that the expert's optimizer state begins later than everybody else's.
    flag[epoch_order(SAMPLES, 0, 0)[BATCH::30].copy()] = True
    return words, flag, torch.randn(SAMPLES, generator=generator, dtype=torch.float64)


class Lion(torch.optim.Optimizer):
    """The sign of an interpolated momentum (Chen et al., 2023); its step counter is no tensor."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": 0.01})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                momentum = state.setdefault("momentum", torch.zeros_like(p))
                state["step"] = state.get("step", 0) + 1
                p.mul_(1 - group["lr"] * group["weight_decay"])
                # tanh for sign: a sign would turn rounding noise of a zero into a full step
                p.sub_(torch.tanh(30 * (0.9 * momentum + 0.1 * p.grad)), alpha=group["lr"] / state["step"] ** 0.5)
                momentum.mul_(0.99).add_(p.grad, alpha=0.01)


class Trust(torch.optim.Optimizer):
    """Divides by a running norm over all tensors at once, kept beside the tensors' own state."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        used = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = float(torch.cat([p.grad.flatten() for p in used]).norm())
        whole = self.state["whole"]
        whole["norm"] = 0.7 * whole.get("norm", norm) + 0.3 * norm
        for p in used:
            p.sub_(p.grad / whole["norm"], alpha=self.param_groups[0]["lr"])


def two_groups(kind: Any, **options: Any) -> Callable[[nn.Module], torch.optim.Optimizer]:
    """The last layers with a learning rate and a weight decay of their own; the frozen layer is named, too."""

    def make(model: nn.Module) -> torch.optim.Optimizer:
        rest = [p for name, p in model.named_parameters() if not name.startswith("out")]
        last = {"params": list(model.out.parameters()), "lr": 0.003, "weight_decay": 0.1}
        return kind([{"params": rest}, last], **options)

    return make


def one_group(kind: Any, **options: Any) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda model: kind((p for p in model.parameters() if p.requires_grad), **options)


def warmup(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda s: (s + 1) / 8, lambda s: 1 / (s + 1)])


def one_cycle(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=[0.05, 0.02], total_steps=20)


def decay(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[3, 9], gamma=0.3)


# name: (optimizer, plan, scheduler by step, grad_clip, sparse)
CASES: dict[str, tuple[Callable[[nn.Module], torch.optim.Optimizer], str, Any, float | None, bool]] = {
    "sgd": (
        two_groups(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True), "dp=2,shares=3+1", one_cycle, 0.5, False,
    ),
    "sgd-sparse": (one_group(torch.optim.SGD, lr=0.05), "dp=3", None, None, True),
    "adam-amsgrad": (two_groups(torch.optim.Adam, lr=0.01, amsgrad=True), "dp=3", warmup, 1.0, False),
    "adamw": (two_groups(torch.optim.AdamW, lr=0.01), "dp=2,accumulate=3", one_cycle, None, False),
    "adagrad-sparse": (
        one_group(torch.optim.Adagrad, lr=0.1, lr_decay=0.01, initial_accumulator_value=0.1), "dp=3", decay, None, True,
    ),
    "rmsprop": (two_groups(torch.optim.RMSprop, lr=0.01, momentum=0.5, centered=True), "dp=2", decay, 0.8, False),
    "adafactor": (two_groups(torch.optim.Adafactor, lr=0.02), "dp=3", warmup, None, False),
    "lion": (two_groups(Lion, lr=0.01), "dp=2", decay, None, False),
    "trust": (one_group(Trust, lr=0.01), "dp=2", None, None, False),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_optimizer(name: str, tmp_path: Path) -> None:
    optimizer, plan, scheduler, grad_clip, sparse = CASES[name]
    job = shoal.Job(
        name=name,
        model=lambda: Routed(sparse),
        train_data=samples,
        loss=F.mse_loss,
        optimizer=optimizer,
        scheduler=scheduler,
        grad_clip=grad_clip,
        batch_size=BATCH,
        epochs=5,
    )
    run = shoal.train(job, plan=f"{plan},threads=1", run_dir=tmp_path / "run", steps=STEPS)
    words, flag, target = samples()
    schedulers: list[Any] = []

    def make(model: nn.Module) -> torch.optim.Optimizer:
        made = optimizer(model)
        if scheduler is not None:
            schedulers.append(scheduler(made))
        return made

    def after_step(model: nn.Module, made: torch.optim.Optimizer) -> None:
        for each in schedulers:
            each.step()

    loop = PlainLoop(
        build=lambda: Routed(sparse),
        samples=SAMPLES,
        batch_size=BATCH,
        backward=lambda model, rows: F.mse_loss(model(words[rows], flag[rows]), target[rows]).backward(),
        optimizer=make,
        grad_clip=grad_clip,
        after_step=after_step,
    )
    expected = loop.run(STEPS)
    assert_equal(run.weights(), expected, within=1e-9)
    torch.manual_seed(0)
    before = Routed(sparse).state_dict()
    assert moved(before, expected) == {key for key in before if not key.startswith("frozen")}
