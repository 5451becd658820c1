"""What is split and how: the layout of the tensor axis, which layers can be split at all, and what the user asks for.
Pure values."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from shoal.axes.tensor_cut import Widths, even_widths, ranges_of
from shoal.comm.table import Region
from shoal.errors import JobError, did_you_mean

# Layers that gather by themselves pay for two exchanges a pass; embeddings pay for one as large as their output.
LEAST_ALONE = 1 << 14
LEAST_SIDE = 64
LEAST_EMBEDDING = 1 << 18

ROLES = ("column", "row", "embedding", "heads", "experts", "whole")
_STYLES = {
    "colwise": "column", "column": "column", "rowwise": "row", "row": "row", "embedding": "embedding", "vocabulary": "embedding",
    "embedding_rowwise": "embedding", "replicate": "whole", "replicated": "whole", "whole": "whole",
}  # fmt: skip
_FROM_HUGGING_FACE = {
    "colwise": "column", "colwise_rep": "column", "colwise_gather_output": "column", "rowwise": "row", "rowwise_rep": "row",
    "embedding_rowwise": "embedding",
}  # fmt: skip


@dataclass(frozen=True)
class Split:
    """How one parameter is split: along ``dim``, into the widths by block and worker."""

    parameter: str
    dim: int
    widths: Widths


@dataclass(frozen=True)
class Style:
    """How one module computes: its role, its split parameters, and whether its output is put together at once."""

    role: str
    splits: tuple[Split, ...]
    gather: bool = False


@dataclass(frozen=True)
class Exchange:
    """One collective of a pass over ``TensorLayout.samples`` samples; ``nbytes`` of the whole tensor, ``count`` of
    them."""

    collective: str
    backward: bool
    nbytes: int
    count: int


@dataclass(frozen=True)
class TensorLayout:
    """How a model is split in ``ways``.

    Attributes:
        shards: parameter name (every name it has) -> the region of each worker; all other parameters are replicated.
        styles: module path -> how it computes.
        split: what is split, for people; ``replicated``: (module path, why it stays whole).
        why: one sentence where nothing can be split.
        loss_parallel: the model's output stays split by class until the cross-entropy.
        sequence_parallel: what lies between split layers is split along the sequence.
        exchanges, samples: what a forward and backward pass over a trial batch exchanges; empty where none was tried.
    """

    ways: int
    shards: Mapping[str, tuple[Region, ...]]
    styles: Mapping[str, Style]
    split: tuple[str, ...] = ()
    replicated: tuple[tuple[str, str], ...] = ()
    why: str | None = None
    loss_parallel: bool = False
    sequence_parallel: bool = False
    exchanges: tuple[Exchange, ...] = ()
    samples: int = 0


@dataclass
class Candidate:
    """A module that can be split.

    Attributes:
        out_dim, in_dim: of its weight; ``feature``: the dim of activations that it works on.
        role: "" until it is decided.
        blocks: lengths that the outputs consist of, each of which is split by itself.
    """

    path: str
    module: nn.Module
    kind: str
    out_dim: int = 0
    in_dim: int = 1
    feature: int = -1
    role: str = ""
    fixed: bool = False
    gather: bool = False
    blocks: tuple[int, ...] = ()
    tried: set[tuple[int, ...]] = field(default_factory=set)
    why: str = ""

    @property
    def weight(self) -> torch.Tensor:
        if self.kind == "experts":
            return self.module.down_proj  # type: ignore[return-value]
        return self.module.weight if self.kind != "heads" else self.module.out_proj.weight  # type: ignore[return-value, union-attr]

    @property
    def does_its_own_exchanges(self) -> bool:
        """Whether it gives whole tensors, by whatever happens inside of it."""
        return self.kind in ("heads", "experts")

    @property
    def outputs(self) -> int:
        return int(self.weight.shape[self.out_dim])

    def splits(self, ways: int) -> tuple[Split, ...]:
        """Its parameters' splits in its role."""
        if self.role == "heads":
            return _heads_splits(self.module, ways)  # type: ignore[arg-type]
        if self.role == "experts":
            own = even_widths(self.weight.shape[2], ways)
            return Split("gate_up_proj", 1, (own, own)), Split("down_proj", 2, (own,))
        if self.role == "row":
            return (Split("weight", self.in_dim, (even_widths(self.weight.shape[self.in_dim], ways),)),)
        if self.role == "embedding":
            return (Split("weight", 0, (even_widths(self.weight.shape[0], ways),)),)
        if self.role != "column":
            return ()
        widths = tuple(even_widths(n, ways) for n in self.blocks or (self.outputs,))
        bias = (Split("bias", 0, widths),) if getattr(self.module, "bias", None) is not None else ()
        return (Split("weight", self.out_dim, widths), *bias)


def _heads_splits(module: nn.MultiheadAttention, ways: int) -> tuple[Split, ...]:
    widths = even_widths(module.num_heads, ways)
    own = tuple(w * module.head_dim for w in widths)
    found = [Split("out_proj.weight", 1, (own,))]
    if module.in_proj_weight is not None:
        found.append(Split("in_proj_weight", 0, (own,) * 3))
    else:
        found += [Split(name, 0, (own,)) for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight")]
    if module.in_proj_bias is not None:
        found.append(Split("in_proj_bias", 0, (own,) * 3))
    return tuple(found)


def is_experts(module: nn.Module) -> bool:
    """Whether it is what Hugging Face's mixtures of experts have: the experts' networks, all in two tensors.

    ``gate_up_proj`` (experts, 2 × hidden units, width), gates first, and ``down_proj`` (experts, width, hidden units).
    """
    parameters = module._parameters
    if set(parameters) != {"gate_up_proj", "down_proj"} or not type(module).__module__.startswith("transformers."):
        return False
    wanted = {"has_gate": True, "is_concatenated": True, "is_transposed": False, "has_bias": False}
    if any(getattr(module, name, None) is not value for name, value in wanted.items()):
        return False
    up, down = parameters["gate_up_proj"], parameters["down_proj"]
    return up is not None and down is not None and up.shape == (down.shape[0], 2 * down.shape[2], down.shape[1])


def candidates(model: nn.Module, ways: int) -> dict[str, Candidate]:
    """Every module that could be split ``ways`` ways, by path."""
    found: dict[str, Candidate] = {}
    inside: set[int] = set()
    for path, module in model.named_modules():
        candidate: Candidate | None = None
        if id(module) in inside:
            continue
        if isinstance(module, nn.MultiheadAttention):
            inside |= {id(m) for m in module.modules()}
            own = type(module).forward is nn.MultiheadAttention.forward
            if own and module.bias_k is None and not module.add_zero_attn:
                candidate = Candidate(path, module, "heads", role="heads")
        elif is_experts(module):
            if module.down_proj.shape[2] >= ways:  # type: ignore[union-attr, index, operator]
                candidate = Candidate(path, module, "experts", role="experts")
        elif "weight" not in module._parameters or module._parameters["weight"] is None:
            continue
        elif isinstance(module, nn.Linear):
            candidate = Candidate(path, module, "linear")
        elif type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils":
            candidate = Candidate(path, module, "linear", out_dim=1, in_dim=0)
        elif isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and module.groups == 1:
            candidate = Candidate(path, module, "convolution", feature=1)
        elif isinstance(module, nn.Embedding) and not (module.max_norm or module.sparse or module.scale_grad_by_freq):
            candidate = Candidate(path, module, "embedding", role="embedding")
        if candidate is not None and (candidate.does_its_own_exchanges or max(candidate.weight.shape[:2]) >= ways):
            found[path] = candidate
    return found


def small(weight: torch.Tensor) -> bool:
    """Whether a linear layer by itself computes too little for what its exchanges cost."""
    return weight.numel() < LEAST_ALONE or min(weight.shape) < LEAST_SIDE


def sharing(model: nn.Module) -> dict[str, list[str]]:
    """Parameter name -> all names of the same parameter, itself included."""
    by_id: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        by_id.setdefault(id(parameter), []).append(name)
    return {name: names for names in by_id.values() for name in names}


def regions(split: Split, ways: int) -> tuple[Region, ...]:
    """The region of each worker."""
    return tuple(Region(split.dim, ranges_of(split.widths, t)) for t in range(ways))


# -- what somebody asks for --------------------------------------------------------------------------------------


def hugging_face_plan(model: nn.Module) -> dict[str, str]:
    """Module path pattern -> role, from a Hugging Face model's own tensor-parallel plan; {} where it has none."""
    plan: dict[str, str] = {}
    for prefix, module in model.named_modules():
        lead = f"{prefix}." if prefix else ""
        config_plan = getattr(getattr(module, "config", None), "base_model_tp_plan", None)
        if config_plan and getattr(module, "base_model_prefix", None) is not None:
            base = module.base_model_prefix
            inner = (
                f"{base}."
                if isinstance(base, str) and base and isinstance(getattr(module, base, None), nn.Module)
                else ""
            )
            plan |= {lead + inner + pattern: style for pattern, style in config_plan.items()}
        own = getattr(type(module), "_tp_plan", None)
        if isinstance(own, Mapping):
            plan |= {lead + pattern: style for pattern, style in own.items()}
    return {pattern: _FROM_HUGGING_FACE[s] for pattern, s in plan.items() if s in _FROM_HUGGING_FACE}


def apply_hugging_face_plan(found: dict[str, Candidate], plan: Mapping[str, str]) -> None:
    for path, candidate in found.items():
        general = re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", path)
        role = plan.get(path) or plan.get(general)
        if role is not None and fits_role(candidate, role):
            candidate.role = role


def fits_role(candidate: Candidate, role: str) -> bool:
    allowed = {kind: (kind, "whole") for kind in ("heads", "experts", "embedding")}
    return role in allowed.get(candidate.kind, ("column", "row", "whole"))


def style_name(style: Any) -> str:
    """The role that a word or one of torch's ParallelStyle objects asks for; JobError for any other."""
    if isinstance(style, str):
        if style in _STYLES:
            return _STYLES[style]
        raise JobError(
            f'tensor_plan has the style "{style}", which is none of {", ".join(sorted(_STYLES))}.'
            f"{did_you_mean(style, _STYLES)}"
        )
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel

    for kind, role in ((ColwiseParallel, "column"), (RowwiseParallel, "row"), (SequenceParallel, "whole")):
        if type(style) is kind:
            return role
    raise JobError(
        f"tensor_plan has a {type(style).__name__}; give colwise, rowwise, embedding or replicate, or torch's ColwiseParallel or "
        "RowwiseParallel."
    )


def matches(pattern: str, path: str) -> bool:
    """Whether a pattern names a module or one that it lies in."""
    parts = path.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[: k + 1]), pattern) for k in range(len(parts)))


def apply_override(model: nn.Module, found: dict[str, Candidate], override: Any) -> None:
    """Fix the roles that ``Job(tensor_plan=…)`` names; the last pattern that fits a module counts."""
    if override is None:
        return
    if not isinstance(override, Mapping):
        raise JobError(
            f"tensor_plan is a {type(override).__name__}; give a mapping from module paths to styles, "
            'such as {"*.fc1": "colwise"}.'
        )
    paths = [path for path, _ in model.named_modules()]
    for pattern, style in override.items():
        role = style_name(style)
        meant = [path for path in paths if matches(pattern, path)]
        if not meant:
            raise JobError(f'tensor_plan names "{pattern}", which no module is called.{did_you_mean(pattern, paths)}')
        able = [
            found[path]
            for path in meant
            if path in found and (role == "whole" or fits_role(found[path], _of(found[path], role)))
        ]
        if not able and role != "whole":
            raise JobError(f'tensor_plan asks for {style} of "{pattern}", where no layer can be split so.')
        for candidate in able:
            candidate.role, candidate.fixed = _of(candidate, role), True
            if role == "whole":
                candidate.why = "tensor_plan says so"


def _of(candidate: Candidate, role: str) -> str:
    """torch's RowwiseParallel on an embedding means its rows; any split of attention is by heads, and of experts inside."""
    if role == "whole":
        return role
    return candidate.kind if candidate.kind in ("embedding", "heads", "experts") else role


def reasons(model: nn.Module, found: Mapping[str, Candidate], split: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(module path, why it stays whole) for each module with parameters of its own that is not split."""
    done = set(split)
    for path, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False)]
        if not own or path in done or any(s and path.startswith(f"{s}.") for s in split):
            continue
        candidate = found.get(path)
        if candidate is not None:
            yield path, candidate.why or "nothing that it is followed by can work on a part of its output"
        elif "Norm" in type(module).__name__:
            yield path, "it normalises whole vectors, and has few weights"
        elif isinstance(module, (nn.Linear, nn.Embedding, nn.MultiheadAttention)) or hasattr(module, "groups"):
            yield path, "its kind, or its size, cannot be split"
        else:
            yield path, f"a {type(module).__name__} has no rule by which its own parameters could be split"
