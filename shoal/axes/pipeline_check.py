"""Whether the stages of a model, one after the other, compute what the whole model computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from shoal.axes.pipeline_balance import Compute
from shoal.axes.pipeline_stage import Ran, Stage, plain_attention


def difference(model: nn.Module, stages: Sequence[Stage], example: Any, compute: Compute) -> str:
    """What is different when the stages compute the example, one after the other; "" where nothing is.

    Compared in the mode for evaluation, in which nothing is random, and in that for training if nothing is random there.
    """
    for training in (False, True):
        model.train(training)
        before = torch.get_rng_state()
        with plain_attention():
            whole = _fingerprints([_Whole(model)], example, compute)
        if not torch.equal(before, torch.get_rng_state()):
            continue
        for stage in stages:
            stage.module.train(training)
        with plain_attention():
            parts = _fingerprints(stages, example, compute)
        for name, value in whole.items():
            if not _close(value, parts.get(name)):
                return f"{name} is different"
    return ""


class _Whole:
    """A model as the only stage."""

    def __init__(self, model: nn.Module) -> None:
        self.module = model

    def run(self, received: Any, action: Callable[[nn.Module], Any]) -> Any:
        return Ran((), (), action(self.module))


def _fingerprints(stages: Sequence[Any], example: Any, compute: Compute) -> dict[str, torch.Tensor]:
    """The loss, and of every gradient a few sums that tell it from others: linear, so that those of stages add up."""
    found: dict[str, torch.Tensor] = {}
    runs: list[Any] = []
    received: Sequence[torch.Tensor] = ()
    for stage in stages:
        run = stage.run(received, lambda module: compute(module, example))
        runs.append(run)
        received = [t.detach().clone().requires_grad_(t.requires_grad) for t in run.leaving]
    loss = runs[-1].result
    found["the loss"] = loss.detach().double()
    outputs, gradients = [loss], [torch.ones_like(loss)]
    for index in reversed(range(len(stages))):
        run, handles = runs[index], _note_gradients(stages[index].module, found)
        try:
            torch.autograd.backward(outputs, gradients)
        finally:
            for handle in handles:
                handle.remove()
        if index:
            pairs = [
                (sent, leaf.grad if leaf.grad is not None else torch.zeros_like(leaf))
                for sent, leaf in zip(runs[index - 1].leaving, run.leaves, strict=True)
                if sent.requires_grad
            ]
            outputs, gradients = [sent for sent, _ in pairs], [gradient for _, gradient in pairs]
    return found


def _note_gradients(module: nn.Module, found: dict[str, torch.Tensor]) -> list[Any]:
    def note(name: str) -> Callable[[torch.Tensor], None]:
        def add(parameter: torch.Tensor) -> None:
            gradient = parameter.grad
            assert gradient is not None
            gradient = gradient.to_dense() if gradient.is_sparse else gradient
            flat = gradient.detach().reshape(-1)
            few = flat[:: max(1, len(flat) // 4096)].double()
            wave = torch.cos(torch.arange(len(few), dtype=torch.float64, device=few.device))
            own = torch.stack([flat.sum(dtype=torch.float64), few @ wave, few.sum()])
            key = f"the gradient of {name}"
            found[key] = found[key] + own if key in found else own
            parameter.grad = None

        return add

    return [
        parameter.register_post_accumulate_grad_hook(note(name))
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    ]


def _close(left: torch.Tensor, right: torch.Tensor | None) -> bool:
    if right is None:
        return bool((left == 0).all())
    scale = float(left.abs().max())
    return bool(((left - right).abs() <= 1e-4 * scale + 1e-9).all()) or bool((left.isnan() & right.isnan()).all())
