"""The tensor axis: the workers of a replica hold a part of each large weight, and compute each layer together.

How a batch travels, in a transformer's block with two workers::

    worker 0                       worker 1
    x (whole)                      x (whole)
    q, k, v of heads 0..h/2        q, k, v of heads h/2..h      column-parallel: weights split by outputs
    attention of its heads         attention of its heads
    its columns of out @ …         its columns of out @ …       row-parallel: weights split by inputs
    ------------------ sum of both: x + out (whole) ------------------
    half of the hidden units       the other half               column-parallel, elementwise activation
    ------------------ sum of both (row-parallel) --------------------

What moves, a microbatch: for each such pair of layers one all-reduce of the activations forward and one backward. A
vocabulary-parallel embedding adds one forward, a vocabulary-parallel head one backward and four numbers a token for its
cross-entropy. A layer that is split alone (convolutions, by output channels) is put together at once: one all-gather
forward, one all-reduce backward. Experts of a mixture, where two tensors hold all of them, are split inside each expert
as a pair of layers is: whoever routes where, all workers compute a part of the same. With ``sequence_parallel`` an
all-reduce becomes a reduce-scatter and an all-gather, and what lies between (norms, residuals) is computed and held by
1/t. What is held: 1/t of each split weight, of its gradient and of the optimizer's state, and 1/t of the activations
between column and row; all of what is replicated, whose gradients come out whole and alike on every worker. ``traffic``
gives the bytes.

How it is done. Parameters are replaced by their local part, under the same names; to the model's code each looks whole
(``tensor_cut.Cut``), and the code of the model itself runs: heads, views, splits and masks of models that nobody here
has seen keep their meaning, and an operation without a rule puts its operands together first. The layout
(``tensor_search``) is found by rehearsals of the model on a small batch, and the last one is compared with the model as
it is, forward and backward.

Why not DTensor throughout, which does the same by ``parallelize_module``: on a CPU its dispatch costs about 120 µs an
operation, forward and backward, against 5 µs here (measured with torch 2.13: autograd sees only plain local tensors
here), and a transformer's block has some 40 of them. The words of its plans (``ColwiseParallel``, ``RowwiseParallel``)
are understood in ``Job(tensor_plan=…)``.

Random numbers: replicated dropout needs the same stream on every worker of a team; dropout of split activations draws
from a stream of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from shoal.axes import tensor_rules  # noqa: F401 - gives split tensors their rules
from shoal.axes.tensor_cut import Team, guard_functions, plain
from shoal.axes.tensor_layout import (
    Candidate,
    Exchange,
    Style,
    TensorLayout,
    apply_hugging_face_plan,
    apply_override,
    candidates,
    hugging_face_plan,
    reasons,
    regions,
    sharing,
)  # fmt: skip
from shoal.axes.tensor_modules import localise, swap
from shoal.axes.tensor_search import Example, Search, decide_embeddings, differs, refuse_heads
from shoal.axes.tensor_static import guess
from shoal.comm.table import Region
from shoal.errors import JobError

__all__ = ["Region", "TensorLayout", "apply", "find_layout", "local_gradient", "materialise", "plain", "traffic"]


def find_layout(
    model: nn.Module, ways: int, override: Any = None, sequence_parallel: bool = False, own_cross_entropy: bool = False,
    example: Example | None = None, samples: int = 0,
) -> TensorLayout:  # fmt: skip
    """How ``model`` is split in ``ways``.

    Args:
        override: ``Job.tensor_plan``: module path pattern -> "colwise", "rowwise", "embedding", "replicate" or torch's
        ParallelStyle.
        own_cross_entropy: without an example: the model's output goes straight into F.cross_entropy.
        example: runs the model forward on a small batch, up to the loss, and returns that. With it the layout is found,
            and checked, by rehearsals; without it, by the kinds and names of modules.
        samples: in the example's batch.
    Raises:
        PlanError: heads that cannot be shared evenly; says what would fit. JobError: an override that names nothing, or
        a style that there is not.
    """
    found = candidates(model, ways)
    shared = sharing(model)
    apply_hugging_face_plan(found, hugging_face_plan(model))
    apply_override(model, found, override)
    heads = {path: int(c.module.num_heads) for path, c in found.items() if c.role == "heads"}  # type: ignore[arg-type]
    for path, count in heads.items():
        if count % ways:
            refuse_heads(ways, path, count, heads.values())
    decide_embeddings(found, lambda name: shared.get(name, [name]))
    loss_parallel, difference = own_cross_entropy, None
    exchanges: tuple[Exchange, ...] = ()
    if example is None:
        guess(model, found, ways, own_cross_entropy)
        _keep_ties_alike(found, shared, ways)
    else:
        search = Search(model, found, ways, example, sequence_parallel)
        search.run()
        while _keep_ties_alike(found, shared, ways):
            search.run()
        if any(c.role != "whole" for c in found.values()):
            difference = differs(model, search)
            if difference is not None and search.leave_experts(f"split, the model computed {difference}"):
                search.run()
                difference = differs(model, search)
        loss_parallel, exchanges, sequence_parallel = search.loss_parallel, search.exchanges, search.sequence
    if difference is not None:
        for candidate in found.values():
            candidate.role, candidate.why = "whole", f"split, the model computed {difference}"
    return _layout(model, found, shared, ways, loss_parallel, sequence_parallel, exchanges, samples)


def _layout(
    model: nn.Module, found: dict[str, Candidate], shared: dict[str, list[str]], ways: int, loss_parallel: bool, sequence: bool,
    exchanges: Any, samples: int,
) -> TensorLayout:  # fmt: skip
    styles: dict[str, Style] = {}
    shards: dict[str, tuple[Region, ...]] = {}
    split = []
    for path, candidate in found.items():
        splits = candidate.splits(ways)
        if not splits:
            continue
        styles[path] = Style(candidate.role, splits, candidate.gather)
        words = {"column": "by outputs", "row": "by inputs", "embedding": "by vocabulary", "heads": "by heads",
                 "experts": "inside each expert"}  # fmt: skip
        split.append(
            f"{path or type(model).__name__}: {words[candidate.role]}{', then put together' if candidate.gather else ''}"
        )
        for one in splits:
            name = f"{path}.{one.parameter}" if path else one.parameter
            for other in shared.get(name, [name]):
                shards[other] = regions(one, ways)
                owner, _, leaf = other.rpartition(".")
                if owner not in found and other != name:
                    # A module of another kind holds the same parameter.
                    before = styles[owner].splits if owner in styles else ()
                    styles[owner] = Style("tied", (*before, replace(one, parameter=leaf)))
    why = None
    if not styles:
        wrong = next((c.why for c in found.values() if c.why.startswith("split, ")), "")
        missing = (
            f"it has no linear, convolution, embedding or attention layer that {ways} workers could share with profit"
        )
        why = f"tp={ways} splits nothing in this model: {wrong or missing}."
    left = tuple(reasons(model, found, list(styles)))
    return TensorLayout(
        ways,
        shards,
        styles,
        tuple(split),
        left,
        why,
        loss_parallel,
        sequence,
        tuple(exchanges) if styles else (),
        samples,
    )


def _keep_ties_alike(found: dict[str, Candidate], shared: dict[str, list[str]], ways: int) -> bool:
    """Parameters that are one are split as one, or not at all; whether that changed anything."""
    changed = False
    for names in {id(n): n for n in shared.values() if len(n) > 1}.values():
        owners = [(found.get(n.rpartition(".")[0]), n.rpartition(".")[2]) for n in names]
        ways_split = {
            next(((s.dim, s.widths) for s in c.splits(ways) if s.parameter == leaf), None)
            for c, leaf in owners if c is not None
        }  # fmt: skip
        if len(ways_split) > 1:
            for candidate, _ in owners:
                if candidate is not None and candidate.role != "whole":
                    candidate.role, candidate.gather = "whole", False
                    candidate.why = "it shares its weight with a layer that is not split alike"
                    changed = True
    return changed


# -- carrying it out ---------------------------------------------------------------------------------------------


def apply(model: nn.Module, layout: TensorLayout, mesh: Any) -> nn.Module:
    """Replace the split parameters by this worker's part, and let the modules compute with their team.

    Args:
        model: the whole model or a part of it (a pipeline's stage) under the same module paths; its parameters may be
        on the meta device.
        mesh: a one-dimensional DeviceMesh of the team, or a process group.
    Returns:
        The same module. Its parameters are plain local tensors under the model's own names.
    """
    group = mesh.get_group() if hasattr(mesh, "get_group") else mesh
    rank = torch.distributed.get_rank(group)
    localise(model, layout, rank)
    guard_functions()
    swap(model, layout, Team(layout.ways, rank, group, layout.sequence_parallel))
    return model


def materialise(model: nn.Module, local: Callable[[str], torch.Tensor]) -> None:
    """Give every parameter its local tensor, which is used where it lies; tied parameters stay tied."""
    made: dict[int, nn.Parameter] = {}
    for path, module in model.named_modules():
        for leaf, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            if id(parameter) not in made:
                tensor = local(f"{path}.{leaf}" if path else leaf)
                if tensor.shape != parameter.shape:
                    raise JobError(
                        f"{path}.{leaf} got a part of the shape {tuple(tensor.shape)} for {tuple(parameter.shape)}."
                    )
                new = nn.Parameter(tensor, requires_grad=parameter.requires_grad)
                made[id(parameter)] = made[id(new)] = new
            module._parameters[leaf] = made[id(parameter)]


def local_gradient(parameter: torch.Tensor) -> torch.Tensor | None:
    """The gradient of a local parameter: of its part, or, of a replicated one, whole and the same on every worker."""
    return parameter.grad


def traffic(layout: TensorLayout, samples: int) -> dict[str, int]:
    """Bytes that one worker sends in a forward and backward pass over ``samples`` samples, by collective (ring
    algorithms).

    For n bytes and t workers: an all-reduce sends 2 (t-1)/t · n, an all-gather and a reduce-scatter (t-1)/t · n.
    """
    sent: dict[str, int] = {}
    factor = samples / layout.samples if layout.samples else 0.0
    for exchange in layout.exchanges:
        share = (layout.ways - 1) / layout.ways * (2 if exchange.collective == "all_reduce" else 1)
        sent[exchange.collective] = sent.get(exchange.collective, 0) + round(
            share * exchange.nbytes * exchange.count * factor
        )
    return sent
