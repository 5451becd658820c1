"""What a job computes on a batch: the model's output, the loss with its weight, and the values to log."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from shoal.errors import JobError
from shoal.job import Job

IGNORED_LABEL = -100


@dataclass
class Outcome:
    """A batch's loss.

    Attributes:
        loss: a scalar tensor: the mean over the batch, or the sum where ``weight`` is measured.
        weight: what the loss is the mean over (samples, tokens).
        is_sum: the loss is a sum, to be divided by the global weight.
        measured: the weight is known only now, not from the number of samples.
        values: name -> mean over the batch, to log.
        output, target: what metrics are computed from; None where the job has its own ``step``.
    """

    loss: torch.Tensor
    weight: float
    is_sum: bool
    measured: bool
    values: dict[str, float] = field(default_factory=dict)
    output: Any = None
    target: Any = None

    def to_backward(self, total: int) -> torch.Tensor:
        """The scalar to differentiate: a share of the mean over ``total`` samples, or the sum where weights are measured."""
        if self.measured:
            if self.weight == 0 and not self.is_sum:
                # The mean over nothing is no number, and so would be every gradient that it had a part in.
                return _zero_of(self.output, self.loss)
            return self.loss if self.is_sum else self.loss * self.weight
        return self.loss if self.weight == total else self.loss * (self.weight / total)

    def loss_sum(self) -> float:
        if self.weight == 0 and not self.is_sum:
            return 0.0
        value = float(self.loss.detach())
        return value if self.is_sum else value * self.weight


def _zero_of(output: Any, loss: torch.Tensor) -> torch.Tensor:
    """0, as a function of what the model made beside its loss, so that its backward pass runs and gives zeros."""
    parts = (
        output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else [output]
    )
    if not isinstance(output, (Mapping, tuple, list, torch.Tensor)):
        parts = vars(output).values() if hasattr(output, "__dict__") else []
    made = [p for p in parts if isinstance(p, torch.Tensor) and p is not loss and p.requires_grad]
    return sum(((p * 0).sum() for p in made), torch.zeros((), dtype=loss.dtype))


def split(batch: Any) -> tuple[Any, Any]:
    """A batch as (input, target): of a mapping both are the batch; of a longer tuple the last entry is the target."""
    if isinstance(batch, Mapping):
        return batch, batch
    if isinstance(batch, (tuple, list)):
        if len(batch) == 2:
            return batch[0], batch[1]
        if len(batch) > 2:
            return tuple(batch[:-1]), batch[-1]
        return batch[0], None
    return batch, None


def call(model: Any, value: Any) -> Any:
    """Call the model: a mapping by keywords, a tuple by position."""
    if isinstance(value, Mapping):
        return model(**value)
    if isinstance(value, (tuple, list)):
        return model(*value)
    return model(value)


def _answer(job: Job, model: Any, batch: Any) -> tuple[Any, Any, Any]:
    """What the job's loss, its step, or the model's own loss returns on a batch; and the output and target, if known."""
    if job.step is not None:
        return job.step(model, batch), None, None
    if job.loss is not None:
        inputs, target = split(batch)
        output = call(model, inputs)
        return job.loss(output, target), output, target
    output = call(model, batch)
    return _own_loss(output), output, batch


def raw_loss(job: Job, model: Any, batch: Any) -> tuple[torch.Tensor, Any]:
    """The loss as the job gives it, and the output: no value is looked at, so that this runs on shapes alone."""
    result, output, _ = _answer(job, model, batch)
    if job.step is not None and isinstance(result, Mapping):
        result = result["loss"]
    return _scalar(result[0] if isinstance(result, (tuple, list)) else result), output


def compute(job: Job, model: Any, batch: Any, count: int) -> Outcome:
    """Run the job's loss, its step, or the model's own loss on a batch of ``count`` samples."""
    values: Mapping[str, Any] = {}
    result, output, target = _answer(job, model, batch)
    if job.step is not None and isinstance(result, Mapping):
        if "loss" not in result:
            raise JobError(
                f'step returned a mapping without "loss" ({", ".join(map(str, result))}); name the loss "loss".'
            )
        values = {str(name): value for name, value in result.items() if name != "loss"}
        result = result["loss"]
    outcome = _outcome(job, model, batch, result, count)
    outcome.values = {name: _number(name, value) for name, value in values.items()}
    outcome.output, outcome.target = output, target
    return outcome


def _own_loss(output: Any) -> Any:
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", output)
    if loss is None:
        raise JobError("The job has no loss and the model returned none; give the job a loss, or the model its labels.")
    return loss


def _outcome(job: Job, model: Any, batch: Any, result: Any, count: int) -> Outcome:
    if isinstance(result, (tuple, list)):
        if len(result) != 2:
            raise JobError(
                f"The loss returned {len(result)} values; return the mean over the samples, or (sum, weight)."
            )
        total, weight = result
        return Outcome(_scalar(total), _number("weight", weight), is_sum=True, measured=True)
    loss = _scalar(result)
    if job.weight is not None:
        return Outcome(loss, _number("weight", job.weight(batch)), is_sum=False, measured=True)
    if job.loss is None and job.step is None:
        labels = count_labels(model, batch)
        if labels is not None:
            return Outcome(loss, float(labels), is_sum=False, measured=True)
    return Outcome(loss, float(count), is_sum=False, measured=False)


def count_labels(model: Any, batch: Any) -> int | None:
    """How many labels a model's own loss is the mean over: those that are not -100; None without integer labels.

    A causal language model shifts its labels by one, so that the first of each row counts for nothing.
    """
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if not isinstance(labels, torch.Tensor) or labels.is_floating_point():
        return None
    kind = getattr(model, "loss_type", None) or type(model).__name__
    if labels.dim() > 1 and any(word in str(kind) for word in ("ForCausalLM", "LMHeadModel")):
        labels = labels[..., 1:]
    return int((labels != IGNORED_LABEL).sum())


def _scalar(loss: Any) -> torch.Tensor:
    if not isinstance(loss, torch.Tensor):
        raise JobError(f"The loss is a {type(loss).__name__}; return a scalar tensor that can be differentiated.")
    if loss.numel() != 1:
        raise JobError(
            f"The loss has the shape {tuple(loss.shape)}; return a scalar, such as its mean over the samples."
        )
    return loss.reshape(())


def _number(name: str, value: Any) -> float:
    if isinstance(value, torch.Tensor) and value.numel() != 1:
        raise JobError(f"{name} has the shape {tuple(value.shape)}; return one number.")
    return float(value.detach() if isinstance(value, torch.Tensor) else value)
