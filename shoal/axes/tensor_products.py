"""Linear layers, products, embeddings and convolutions of split tensors; see ``tensor_cut``.

Column-parallel: the weight is split along its outputs; the input enters, the output is split. Row-parallel: the weight
is split along its inputs; the split input meets it, and the parts of the output are summed over the team.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from shoal.axes.tensor_cut import Cut, Team, Widths, ranges_of


def _entering(team: Team, x: torch.Tensor) -> torch.Tensor:
    """The whole input of a split layer, on every worker."""
    if not isinstance(x, Cut):
        return team.enter(x)
    if team.report is not None and x.split_dim == x.parts[0].ndim - 1:
        team.report("gather", "a layer that needs all of it", x.origins, ())
    return x.whole(entering=True)


def _meeting(team: Team, x: torch.Tensor, dim: int, widths: Widths) -> tuple[torch.Tensor, ...]:
    """The members' parts of a row-parallel layer's input."""
    if isinstance(x, Cut):
        if x.split_dim == dim and x.widths == widths:
            return x.parts
        if team.report is not None:
            team.report("gather", "a layer that is split otherwise", x.origins, ())
        x = x.whole()
    return team.enter_part(x, dim, widths)


def _sum_up(team: Team, parts: list[torch.Tensor], bias: torch.Tensor | None, shape: tuple[int, ...] = ()) -> Any:
    """The sum over the team, and the bias once; along the sequence each worker keeps a part, where that is asked
    for."""
    if isinstance(bias, Cut):
        bias = bias.whole()
    if team.sequence and parts[0].ndim == 3 and parts[0].shape[1] >= team.ways:
        cut = team.reduce_scatter(parts, 1)
        if bias is None:
            return cut
        entered = team.enter(bias)
        cut.parts = tuple(p + entered for p in cut.parts)
        return cut
    total = team.reduce(parts, fresh=True)
    if bias is None:
        return total
    if shape:
        bias = bias.view(shape)
    return total + bias


def linear(team: Team, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, weight, bias = _bind(args, kwargs, ("input", "weight", "bias"))
    if not isinstance(weight, Cut):
        if not isinstance(x, Cut) or x.split_dim == x.parts[0].ndim - 1 or isinstance(bias, Cut):
            return NotImplemented
        weight, bias = team.enter(weight), None if bias is None else team.enter(bias)
        return x.like(tuple(F.linear(p, weight, bias) for p in x.parts), x.split_dim)
    if weight.parts[0].ndim != 2:
        return NotImplemented
    if weight.split_dim == 1:
        inputs = _meeting(team, x, x.ndim - 1, weight.widths)
        return _sum_up(team, [F.linear(p, w) for p, w in zip(inputs, weight.parts, strict=True)], bias)
    x = _entering(team, x)
    biases = _biases(team, bias, weight.widths)
    parts = tuple(F.linear(x, w, b) for w, b in zip(weight.parts, biases, strict=True))
    return weight.like(parts, x.ndim - 1)


def _biases(team: Team, bias: Any, widths: Widths) -> tuple[torch.Tensor | None, ...]:
    if bias is None:
        return (None,) * len(team.members)
    if isinstance(bias, Cut) and bias.widths == widths:
        return bias.parts
    whole = bias.whole() if isinstance(bias, Cut) else bias
    return team.enter_part(whole, 0, widths)


def addmm(team: Team, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """bias + x @ weight, as in Hugging Face's Conv1D, whose weight is (inputs, outputs)."""
    if len(args) != 3 or kwargs or not isinstance(args[2], Cut) or isinstance(args[1], Cut) and args[1].split_dim == 0:
        return NotImplemented
    bias, x, weight = args
    if weight.split_dim == 0:
        inputs = _meeting(team, x, 1, weight.widths)
        return _sum_up(team, [p @ w for p, w in zip(inputs, weight.parts, strict=True)], bias)
    x = _entering(team, x)
    biases = _biases(team, bias, weight.widths)
    parts = (x @ w if b is None else torch.addmm(b, x, w) for b, w in zip(biases, weight.parts, strict=True))
    return weight.like(tuple(parts), 1)


def baddbmm(team: Team, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """beta · added + alpha · (a @ b)."""
    added, a, b = _bind(args, kwargs, ("input", "batch1", "batch2"))
    if "out" in kwargs or len(args) > 3 or not (isinstance(a, Cut) or isinstance(b, Cut)):
        return NotImplemented
    product = matmul(team, torch.bmm, (a, b), {})
    if not isinstance(product, Cut):
        return (
            NotImplemented
            if product is NotImplemented
            else kwargs.get("beta", 1) * added + kwargs.get("alpha", 1) * product
        )
    from shoal.axes.tensor_rules import elementwise

    def add(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return kwargs.get("beta", 1) * p + kwargs.get("alpha", 1) * q

    return elementwise(team, add, (added, product), {})


def matmul(team: Team, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A product of matrices, or of stacks of them, by which dim of which is split."""
    if len(args) != 2 or kwargs:
        return NotImplemented
    a, b = args
    if a.ndim < 2 or b.ndim < 2:
        return NotImplemented
    ndim = max(a.ndim, b.ndim)
    letters = [chr(ord("A") + k) for k in range(ndim - 2)]
    names_a, names_b = [*letters[ndim - a.ndim :], "i", "j"], [*letters[ndim - b.ndim :], "j", "k"]
    return _contract(team, [(a, names_a), (b, names_b)], [*letters, "i", "k"], lambda p, q: torch.matmul(p, q))


def einsum(team: Team, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    equation, *operands = args
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = list(operands[0])
    equation = str(equation).replace(" ", "") if isinstance(equation, str) else ""
    if "->" not in equation or "..." in equation:
        return NotImplemented
    left, right = equation.split("->")
    terms = [list(term) for term in left.split(",")]
    if any(len(set(term)) != len(term) for term in terms):
        return NotImplemented
    pairs = list(zip(operands, terms, strict=True))
    return _contract(team, pairs, list(right), lambda *parts: torch.einsum(equation, *parts))


def _contract(
    team: Team, operands: list[tuple[Any, list[str]]], out: list[str], function: Callable[..., torch.Tensor]
) -> Any:
    """A product whose operands' dims have letters: split along one letter, summed over the team where that is summed
    over."""
    cuts = [(x, names) for x, names in operands if isinstance(x, Cut)]
    letter, widths = cuts[0][1][cuts[0][0].split_dim], cuts[0][0].widths
    total = cuts[0][0].whole_size
    columns = []
    for x, names in operands:
        if isinstance(x, Cut):
            if names[x.split_dim] != letter or x.widths != widths:
                return NotImplemented
            columns.append(x.parts)
        elif letter in names and x.shape[names.index(letter)] == total:
            columns.append(team.enter_part(x, names.index(letter), widths))
        elif letter in names and x.shape[names.index(letter)] != 1:
            return NotImplemented
        else:
            columns.append((team.enter(x),) * len(team.members))
    parts = [function(*row) for row in zip(*columns, strict=True)]
    return Cut(tuple(parts), out.index(letter), widths, team) if letter in out else team.reduce(parts)


def embedding(team: Team, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """By vocabulary (rows that a worker does not hold count as zero, then all is summed) or by width."""
    names = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
    ids, weight, padding, max_norm, _, by_frequency, sparse = _bind(args, kwargs, names)
    if not isinstance(weight, Cut) or isinstance(ids, Cut) or max_norm is not None or by_frequency or sparse:
        return NotImplemented
    if weight.split_dim == 1:
        return weight.like(tuple(F.embedding(ids, w, padding) for w in weight.parts), ids.ndim)
    parts = []
    if padding is not None and padding < 0:
        padding += weight.whole_size
    for member, w in zip(team.members, weight.parts, strict=True):
        ((low, high),) = ranges_of(weight.widths, member)
        elsewhere = (ids < low) | (ids >= high)
        own_padding = padding - low if padding is not None and low <= padding < high else None
        rows = F.embedding((ids - low).masked_fill(elsewhere, 0), w, own_padding)
        parts.append(rows.masked_fill(elsewhere.unsqueeze(-1), 0.0))
    return _sum_up(team, parts, None)


def convolution(team: Team, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """By output channels, or, where the input comes split by channels, by input channels."""
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    x, weight, bias, stride, padding, dilation, groups = _bind(args, kwargs, names)
    if not isinstance(weight, Cut) or groups not in (None, 1) or x.ndim != weight.ndim:
        return NotImplemented
    options = {"stride": stride or 1, "padding": 0 if padding is None else padding, "dilation": dilation or 1}
    if weight.split_dim == 1:
        inputs = _meeting(team, x, 1, weight.widths)
        parts = [func(p, w, None, **options) for p, w in zip(inputs, weight.parts, strict=True)]
        if isinstance(bias, Cut):
            bias = bias.whole()
        total = team.reduce(parts)
        return total if bias is None else total + bias.view(1, -1, *[1] * (total.ndim - 2))
    if weight.split_dim != 0:
        return NotImplemented
    x = _entering(team, x)
    biases = _biases(team, bias, weight.widths)
    return weight.like(
        tuple(func(x, w, b, **options) for w, b in zip(weight.parts, biases, strict=True)), 1
    )  # fmt: skip


def _bind(args: tuple[Any, ...], kwargs: dict[str, Any], names: tuple[str, ...]) -> tuple[Any, ...]:
    return tuple(args[k] if k < len(args) else kwargs.get(name) for k, name in enumerate(names))


def swapped_matmul(team: Team, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return matmul(team, func, args[::-1], kwargs)


PRODUCT_RULES: dict[str, Callable[..., Any]] = {
    "linear": linear, "addmm": addmm, "matmul": matmul, "bmm": matmul, "mm": matmul, "__matmul__": matmul,
    "__rmatmul__": swapped_matmul, "einsum": einsum, "baddbmm": baddbmm, "embedding": embedding, "conv1d": convolution,
    "conv2d": convolution, "conv3d": convolution,
}  # fmt: skip
