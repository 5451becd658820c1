"""A layout without a trial batch, from the kinds and names of modules. Whatever it guesses is computed right; a bad
guess is only slow."""

from __future__ import annotations

from torch import nn

from shoal.axes.tensor_layout import Candidate, small

# Layers that are used one after the other with elementwise functions between them, by the names that libraries give them.
_PAIRS = (
    ("linear1", "linear2"),
    ("fc1", "fc2"),
    ("c_fc", "c_proj"),
    ("w1", "w2"),
    ("up_proj", "down_proj"),
    ("dense_h_to_4h", "dense_4h_to_h"),
)
_GATES = {"down_proj": ("gate_proj",), "w2": ("w3",)}
_ELEMENTWISE = (
    nn.ReLU,
    nn.GELU,
    nn.SiLU,
    nn.Tanh,
    nn.Sigmoid,
    nn.ELU,
    nn.LeakyReLU,
    nn.Dropout,
    nn.Identity,
    nn.Softplus,
    nn.Mish,
)


def guess(model: nn.Module, found: dict[str, Candidate], ways: int, own_cross_entropy: bool) -> None:
    """Decide every role that is open."""
    for path, module in model.named_modules():
        lead = f"{path}." if path else ""
        for first, second in _PAIRS:
            _pair(found, [lead + first, *(lead + gate for gate in _GATES.get(second, ()))], lead + second)
        heads = getattr(module, "num_heads", None)
        if isinstance(heads, int) and heads % ways == 0 and lead + "qkv" in found and lead + "proj" in found:
            qkv = found[lead + "qkv"]
            if qkv.outputs % 3 == 0 and _pair(found, [lead + "qkv"], lead + "proj"):
                qkv.blocks = (qkv.outputs // 3,) * 3
        if type(module) is nn.Sequential:
            _sequence(found, lead, module)
    for candidate in found.values():
        if not candidate.role:
            candidate.role = "whole"
            if candidate.kind == "convolution" or (candidate.kind == "linear" and not small(candidate.weight)):
                candidate.role, candidate.gather = ("column", True) if candidate.outputs >= ways else ("whole", False)
    _head(model, found, own_cross_entropy)


def _pair(found: dict[str, Candidate], columns: list[str], row: str) -> bool:
    named = [found[c] for c in columns if c in found]
    if not named or row not in found or found[row].role or any(c.role for c in named):
        return False
    if any(c.outputs != found[row].weight.shape[found[row].in_dim] and "qkv" not in c.path for c in named):
        return False
    for c in named:
        c.role = "column"
    found[row].role = "row"
    return True


def _sequence(found: dict[str, Candidate], lead: str, module: nn.Sequential) -> None:
    before: str | None = None
    for name, child in module.named_children():
        path = lead + name
        if path in found and found[path].kind == "linear":
            before = None if before is not None and _pair(found, [before], path) else path
        elif not isinstance(child, _ELEMENTWISE):
            before = None


def _head(model: nn.Module, found: dict[str, Candidate], own_cross_entropy: bool) -> None:
    """The last linear layer's output stays split where it goes into the cross-entropy."""
    columns = [c for c in found.values() if c.kind == "linear" and c.role == "column"]
    rows = [c for c in found.values() if c.role == "row"]
    last = list(found.values())[-1] if found else None
    for candidate in columns:
        tied = candidate is last or not rows
        if tied:
            candidate.gather = not own_cross_entropy
