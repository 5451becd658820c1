"""The pipeline axis: the layers of a model are cut into stages, one or several for each rank, and microbatches pass them.

How a batch travels. Every rank of a pipeline has the whole share of the batch, cut into microbatches (pieces of any size;
all of them are computed as they are, so 13 samples in 4 microbatches are 4, 3, 3 and 3). For each microbatch

    1. every stage calls the user's own loss on the user's own model, of which it holds a part (``pipeline_stage.py``);
    2. what one stage's last module gave is sent to the rank that has the next stage: the activations, and only they, for
       masks, positions and labels come out of each rank's own copy of the batch;
    3. the last stage's call returns the loss, and its backward pass begins there;
    4. the gradients of what was received are sent back to the stage that sent it, which goes on with its backward pass.

Parameters' gradients add up in their ``grad`` over the microbatches, so that hooks see each. Nothing is scaled here.

In which order a rank computes and sends is fixed beforehand by the schedule (``pipeline_schedule.py``: gpipe, 1f1b,
interleaved, zbv, from torch.distributed.pipelining) and simply gone through by ``Pipeline.train``. Sends are begun and not
waited for; what is received is waited for right before it is needed. The first message of a shape is preceded by a line
that says its shapes; from then on both sides know them by the shapes of the microbatch, which both have.

What it moves: per step and boundary between two ranks the activations of the share of the batch there, and as many bytes of
gradients back (``traffic``). What a rank holds: the parameters of its stages (so a p-th of the model, and of gradients and
optimizer state), and the activations of as many microbatches as are under way (``in_flight``). For how long it is idle:
``bubble``. How the stages are found: ``pipeline_cut.py``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils import _pytree as pytree

from shoal.axes.pipeline_backward import input_gradients
from shoal.axes.pipeline_cut import Cut, build_stage, find_cut
from shoal.axes.pipeline_schedule import (
    SCHEDULES,
    Action,
    Kind,
    bubble,
    idle,
    in_flight,
    orders,
    rank_of_stage,
    stages_a_rank,
    stages_of_rank,
    traffic,
)
from shoal.axes.pipeline_stage import Stage, plain_attention
from shoal.errors import JobError

__all__ = [
    "SCHEDULES",
    "Cut",
    "Pipeline",
    "Stage",
    "bubble",
    "build_stage",
    "find_cut",
    "idle",
    "in_flight",
    "orders",
    "rank_of_stage",
    "stages_a_rank",
    "stages_of_rank",
    "traffic",
]

Compute = Callable[[nn.Module, Any, int, int], Any]
"""(module, microbatch, its number, the stage) -> the scalar to differentiate (training) or any result (evaluation)."""

Passing = Callable[[int], AbstractContextManager[None]]

_HEADER = 128
_DTYPES = (
    torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.complex64, torch.complex128,
)  # fmt: skip


@dataclass(frozen=True)
class _Form:
    """What a tensor that travels is like."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool


@dataclass
class _Flight:
    """One microbatch in one stage: what is known of it between its forward and its backward pass."""

    received: Sequence[torch.Tensor] = ()
    arriving: Sequence[Any] = ()
    leaves: Sequence[torch.Tensor] = ()
    leaving: Sequence[torch.Tensor] = ()
    loss: torch.Tensor | None = None
    gradients: Sequence[torch.Tensor | None] = ()
    returning: Sequence[Any] = ()
    input_gradients: Sequence[torch.Tensor] = ()
    weights: Callable[[], None] | None = None


class Pipeline:
    """A rank's part in a pipeline: its stages, and how it exchanges microbatches with the other ranks."""

    def __init__(
        self,
        stages: Sequence[Stage],
        group: Any,
        schedule: str = "1f1b",
        interleave: int | None = None,
        whole_backward: bool = False,
        device: str | torch.device = "cpu",
    ) -> None:
        """Put a rank's part together.

        Args:
            stages: this rank's, in ascending order (``stages_of_rank``).
            group: a torch process group of the pipeline's ranks, in their order; None for the default one.
            whole_backward: with zbv, compute each backward pass in one part: wanted with recomputing, which the second
                part would do once more, and with sharded weights.
        """
        self.stages = {stage.index: stage for stage in stages}
        self.schedule, self.interleave = schedule, interleave
        self._group, self._device = group, torch.device(device)
        self._whole_backward = whole_backward
        self.ranks, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self._last = stages[0].count - 1
        self._forms: dict[Any, tuple[_Form, ...]] = {}
        self._flights: dict[tuple[int, int], _Flight] = {}
        self._sent: list[tuple[Any, torch.Tensor]] = []
        expected = stages_of_rank(schedule, self.ranks, interleave, self.rank)
        if tuple(self.stages) != expected:
            raise ValueError(f"Rank {self.rank} has the stages {tuple(self.stages)} instead of {expected}.")

    @property
    def has_last_stage(self) -> bool:
        """Whether results are computed here."""
        return self._last in self.stages

    def train(
        self, batches: Sequence[Any], compute: Compute, passing: Passing = lambda micro: contextlib.nullcontext()
    ) -> list[torch.Tensor]:
        """Go forward and backward through all microbatches; return their losses where the last stage is, else [].

        Args:
            batches: the microbatches, the same on all ranks.
            compute: called for each microbatch in each stage of this rank. Everywhere but in the last stage the call
                never returns to it from the model.
            passing: a microbatch's number -> a context in which its passes are computed.
        """
        order = orders(self.schedule, self.ranks, self.interleave, len(batches), self._whole_backward)
        losses: dict[int, torch.Tensor] = {}
        keys = [_signature(batch) for batch in batches]
        for action in order[self.rank]:
            flight = self._flights.setdefault((action.stage, action.micro), _Flight())
            match_key = (True, keys[action.micro])
            if action.kind is Kind.RECEIVE_FORWARD:
                self._receive(action.stage, flight, match_key)
            elif action.kind is Kind.FORWARD:
                with passing(action.micro):
                    self._forward(action, flight, batches[action.micro], compute)
                if flight.loss is not None:
                    losses[action.micro] = flight.loss.detach()
            elif action.kind is Kind.SEND_FORWARD:
                self._send(action.stage, flight.leaving, match_key)
            elif action.kind is Kind.RECEIVE_BACKWARD:
                self._receive_gradients(action.stage, flight)
            elif action.kind is Kind.SEND_BACKWARD:
                self._post(action.stage - 1, flight.input_gradients)
                flight.input_gradients = ()
            elif action.kind is Kind.BACKWARD_WEIGHT:
                assert flight.weights is not None
                with passing(action.micro):
                    flight.weights()
                flight.weights = None
            else:
                with passing(action.micro):
                    self._backward(action, flight)
        self._finish()
        return [losses[micro] for micro in sorted(losses)]

    def evaluate(self, batches: Sequence[Any], compute: Compute) -> list[Any]:
        """Go forward through all microbatches, without gradients; return what ``compute`` returned in the last stage."""
        results: list[Any] = []
        keys = [_signature(batch) for batch in batches]
        with torch.no_grad(), plain_attention():
            for index in self.stages:
                for micro, batch in enumerate(batches):
                    flight = self._flights.setdefault((index, micro), _Flight())
                    if index and self._rank_of(index - 1) != self.rank:
                        self._receive(index, flight, (False, keys[micro]))
                    self._forward(Action(Kind.FORWARD, index, micro), flight, batch, compute)
                    if index == self._last:
                        results.append(flight.loss)
                    elif self._rank_of(index + 1) != self.rank:
                        self._send(index, flight.leaving, (False, keys[micro]))
                    del self._flights[index, micro]
        self._finish()
        return results

    def clear(self) -> None:
        """Forget everything under way, after a step was broken off on all ranks; shapes are told anew."""
        self._flights.clear()
        self._sent.clear()
        self._forms.clear()
        for stage in self.stages.values():
            stage.clear()

    # -- computing -----------------------------------------------------------------------------------------------

    def _forward(self, action: Action, flight: _Flight, batch: Any, compute: Compute) -> None:
        for work in flight.arriving:
            work.wait()
        stage = self.stages[action.stage]
        ran = stage.run(flight.received, lambda module: compute(module, batch, action.micro, action.stage))
        flight.leaves, flight.leaving, flight.loss = ran.leaves, ran.leaving, ran.result
        flight.received = flight.arriving = ()
        if action.stage < self._last and self._rank_of(action.stage + 1) == self.rank:
            following = self._flights.setdefault((action.stage + 1, action.micro), _Flight())
            # A copy: the next stage may write into what it gets, and this one's backward pass may still need it.
            following.received = [t.detach().clone().requires_grad_(t.requires_grad) for t in ran.leaving]

    def _backward(self, action: Action, flight: _Flight) -> None:
        for work in flight.returning:
            work.wait()
        outputs: list[torch.Tensor] = []
        gradients: list[torch.Tensor | None] = []
        if flight.loss is not None:
            outputs, gradients = [flight.loss], [None]
        else:
            for tensor, gradient in zip(flight.leaving, flight.gradients, strict=True):
                if tensor.requires_grad:
                    outputs.append(tensor)
                    gradients.append(gradient)
        wanted = [leaf for leaf in flight.leaves if leaf.requires_grad]
        if not outputs:
            flight.weights = _nothing
            found: Sequence[torch.Tensor | None] = [None] * len(wanted)
        elif action.kind is Kind.BACKWARD_INPUT:
            weights = self.stages[action.stage].module.parameters()
            found, flight.weights = input_gradients(outputs, gradients, wanted, weights)
        else:
            torch.autograd.backward(outputs, gradients)
            found = [leaf.grad for leaf in wanted]
        given = [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(wanted, found, strict=True)]
        if action.stage and self._rank_of(action.stage - 1) == self.rank:
            before = self._flights[action.stage - 1, action.micro]
            rest = iter(given)
            before.gradients = [next(rest) if t.requires_grad else None for t in before.leaving]
        else:
            flight.input_gradients = given
        flight.leaves = flight.leaving = flight.gradients = flight.returning = ()
        flight.loss = None

    # -- exchanging ----------------------------------------------------------------------------------------------

    def _rank_of(self, stage: int) -> int:
        return rank_of_stage(self.schedule, self.ranks, stage)

    def _send(self, stage: int, tensors: Sequence[torch.Tensor], key: Any) -> None:
        forms = tuple(_Form(tuple(t.shape), t.dtype, t.requires_grad) for t in tensors)
        known = self._forms.get((stage, key))
        if known is None:
            self._forms[stage, key] = forms
            self._post(stage + 1, [_header(forms)])
        elif known != forms:
            raise JobError(
                "What passes from one stage to the next has another shape than for a batch of the same shape before; "
                "use pp=1 for a model whose shapes follow from its values."
            )
        self._post(stage + 1, tensors)

    def _post(self, stage: int, tensors: Sequence[torch.Tensor]) -> None:
        self._sent = [(work, tensor) for work, tensor in self._sent if not work.is_completed()]
        for tensor in tensors:
            own = tensor.detach().contiguous()
            work = dist.isend(own, group=self._group, group_dst=self._rank_of(stage))
            self._sent.append((work, own))

    def _receive(self, stage: int, flight: _Flight, key: Any) -> None:
        forms = self._forms.get((stage - 1, key))
        if forms is None:
            header = torch.empty(_HEADER, dtype=torch.int64)
            for work in self._expect(stage - 1, [header]):
                work.wait()
            self._forms[stage - 1, key] = forms = _forms_of(header)
        flight.received = [torch.empty(form.shape, dtype=form.dtype, device=self._device) for form in forms]
        flight.arriving = self._expect(stage - 1, flight.received)
        training = key[0]
        for tensor, form in zip(flight.received, forms, strict=True):
            tensor.requires_grad_(form.requires_grad and training)

    def _receive_gradients(self, stage: int, flight: _Flight) -> None:
        flight.gradients = [
            torch.empty(t.shape, dtype=t.dtype, device=t.device) if t.requires_grad else None for t in flight.leaving
        ]
        flight.returning = self._expect(stage + 1, [g for g in flight.gradients if g is not None])

    def _expect(self, stage: int, tensors: Sequence[torch.Tensor]) -> list[Any]:
        return [dist.irecv(t.detach(), group=self._group, group_src=self._rank_of(stage)) for t in tensors]

    def _finish(self) -> None:
        for work, _ in self._sent:
            work.wait()
        self._sent.clear()
        self._flights.clear()


def _nothing() -> None:
    """The weights' part of a backward pass that has none."""


def _signature(batch: Any) -> Any:
    """What the shapes of everything that follows from a microbatch are known by."""
    return tuple((tuple(t.shape), t.dtype) for t in pytree.tree_leaves(batch) if isinstance(t, torch.Tensor))


def _header(forms: Sequence[_Form]) -> torch.Tensor:
    words = [len(forms)]
    for form in forms:
        words += [_DTYPES.index(form.dtype), int(form.requires_grad), len(form.shape), *form.shape]
    if len(words) > _HEADER:
        raise JobError(
            f"{len(forms)} tensors pass between two stages, which is more than fits; give other split_points."
        )
    return torch.tensor(words + [0] * (_HEADER - len(words)), dtype=torch.int64)


def _forms_of(header: torch.Tensor) -> tuple[_Form, ...]:
    words = iter(header.tolist())
    forms = []
    for _ in range(next(words)):
        dtype, requires_grad, dims = next(words), next(words), next(words)
        forms.append(_Form(tuple(next(words) for _ in range(dims)), _DTYPES[dtype], bool(requires_grad)))
    return tuple(forms)
