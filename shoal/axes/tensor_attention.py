"""Attention by heads, and the vocabulary-parallel cross-entropy, of split tensors; see ``tensor_cut``."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from shoal.axes.tensor_cut import Cut, Team, Widths, ranges_of

_MULTI_HEAD = inspect.signature(F.multi_head_attention_forward)
_CROSS_ENTROPY = inspect.signature(F.cross_entropy)


def scaled_dot_product_attention(team: Team, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Every head by itself. Heads may share keys and values (grouped heads), if each worker holds whole groups."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given: dict[str, Any] = {name: args[k] if k < len(args) else kwargs.get(name) for k, name in enumerate(names)}
    extra = {k: v for k, v in kwargs.items() if k not in names}
    query, key, value, mask = (given[n] for n in names[:4])
    if not (isinstance(query, Cut) and isinstance(key, Cut) and isinstance(value, Cut)):
        return NotImplemented
    at = query.split_dim - query.ndim
    if at > -3 or any(v.split_dim - v.ndim != at for v in (key, value)) or key.widths != value.widths:
        return NotImplemented
    if query.widths != key.widths:
        times = query.whole_size // key.whole_size
        grouped = tuple(tuple(w * times for w in block) for block in key.widths)
        if not extra.get("enable_gqa") or at != -3 or query.widths != grouped:
            return NotImplemented
    masks = _masks(team, mask, at, query.widths)
    if masks is None:
        return NotImplemented
    p = given["dropout_p"] or 0.0
    causal = bool(given["is_causal"])
    rows = zip(query.parts, key.parts, value.parts, masks, strict=True)
    with _dropping(team, p):
        p = 0.0 if team.rehearsal else p
        parts = tuple(
            F.scaled_dot_product_attention(q, k, v, attn_mask=m, dropout_p=p, is_causal=causal, **extra)
            for q, k, v, m in rows
        )
    return query.like(parts, parts[0].ndim + at)


def _dropping(team: Team, p: float) -> contextlib.AbstractContextManager[None]:
    from shoal.axes.tensor_rules import own_stream

    return own_stream(team) if p and not team.rehearsal else contextlib.nullcontext()


def _masks(team: Team, mask: Any, at: int, widths: Widths) -> tuple[Any, ...] | None:
    """Each member's part of an attention mask, or None where it is split otherwise than the heads."""
    if isinstance(mask, Cut):
        fits = mask.split_dim - mask.ndim == at and mask.widths == widths
        return mask.parts if fits else None
    if mask is None:
        return (None,) * len(team.members)
    if mask.ndim >= -at and mask.shape[at] != 1:
        return team.enter_part(mask, mask.ndim + at, widths)
    return (team.enter(mask),) * len(team.members)


def multi_head_attention(team: Team, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What ``nn.MultiheadAttention`` calls: query, key and value, every head, and the output layer, row-parallel."""
    bound = _MULTI_HEAD.bind(*args, **kwargs)
    bound.apply_defaults()
    a = bound.arguments
    separate, weight = a["use_separate_proj_weight"], a["in_proj_weight"]
    needed = [a["q_proj_weight"], a["k_proj_weight"], a["v_proj_weight"]] if separate else [weight]
    inputs = [a["query"], a["key"], a["value"]]
    if not all(isinstance(v, Cut) and v.split_dim == 0 for v in needed) or not isinstance(a["out_proj_weight"], Cut):
        return NotImplemented
    if any(a[k] is not None for k in ("bias_k", "bias_v", "static_k", "static_v")) or a["add_zero_attn"]:
        return NotImplemented
    if any(v.split_dim == v.ndim - 1 for v in inputs if isinstance(v, Cut)):
        return NotImplemented
    heads = a["num_heads"]
    block = needed[0].widths[0]
    head_dim = a["embed_dim_to_check"] // heads
    if any(w % head_dim for w in block):
        return NotImplemented
    batched = a["query"].ndim == 3
    same = inputs[0] is inputs[1] and inputs[1] is inputs[2]
    entered = [v.whole(entering=True) if isinstance(v, Cut) else team.enter(v) for v in inputs[: 1 if same else 3]]
    entered = [v if batched else v.unsqueeze(1) for v in entered]
    contexts, attention = [], []
    bias = a["in_proj_bias"]
    for place, member in enumerate(team.members):
        q, k, v = _project(a, entered, place, member, separate, bias, needed)
        context, weights = _attend(team, a, q, k, v, head_dim, ranges_of((block,), member)[0], block)
        contexts.append(context if batched else context.squeeze(1))
        attention.append(weights)
    out_weight = a["out_proj_weight"]
    from shoal.axes.tensor_products import _sum_up

    output = _sum_up(
        team, [F.linear(c, w) for c, w in zip(contexts, out_weight.parts, strict=True)], a["out_proj_bias"]
    )
    if not a["need_weights"]:
        return output, None
    # (batch, heads, target, source)
    cut = Cut(tuple(attention), 1, (tuple(w // head_dim for w in block),), team)
    mean = a["average_attn_weights"]
    shown = team.reduce([p.sum(1) for p in cut.parts]) / heads if mean else cut.whole()
    return output, shown if batched else shown.squeeze(0)


def _project(
    a: dict[str, Any],
    entered: list[torch.Tensor],
    place: int,
    member: int,
    separate: bool,
    bias: Any,
    needed: list[Cut],
) -> list[torch.Tensor]:
    """A member's query, key and value: (length, batch, its heads' width)."""
    if separate:
        weights = [w.parts[place] for w in needed]
        sizes = [w.shape[0] for w in weights]
    else:
        sizes = [block[member] for block in needed[0].widths]
        if len(entered) == 1:
            own_bias = None if bias is None else bias.parts[place]
            return list(F.linear(entered[0], needed[0].parts[place], own_bias).split(sizes, -1))
        weights = list(needed[0].parts[place].split(sizes, 0))
    biases = [None] * 3 if bias is None else list(bias.parts[place].split(sizes, 0))
    sources = entered if len(entered) == 3 else entered * 3
    return [F.linear(x, w, b) for x, w, b in zip(sources, weights, biases, strict=True)]


def _attend(
    team: Team, a: dict[str, Any], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, head_dim: int,
    own: tuple[int, int], block: tuple[int, ...],
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """Attention of one member's heads: the context (length, batch, width) and, where asked for, (batch, heads, target,
    source)."""
    length, batch = q.shape[:2]
    q, k, v = (x.reshape(x.shape[0], batch, -1, head_dim).permute(1, 2, 0, 3) for x in (q, k, v))
    mask = a["attn_mask"]
    low, high = own[0] // head_dim, own[1] // head_dim
    if mask is not None and mask.ndim == 3:
        mask = team.enter(mask).reshape(batch, a["num_heads"], length, -1)[:, low:high]
    elif mask is not None:
        mask = team.enter(mask)
    padding = a["key_padding_mask"]
    causal = bool(a["is_causal"]) and padding is None and not a["need_weights"]
    if causal:
        mask = None
    merged = _merge_masks(mask, padding, q.dtype)
    p = a["dropout_p"] if a["training"] and not team.rehearsal else 0.0
    with _dropping(team, p):
        if not a["need_weights"]:
            context = F.scaled_dot_product_attention(q, k, v, merged, p, causal)
            return context.permute(2, 0, 1, 3).reshape(length, batch, -1), None
        scores = (q * math.sqrt(1.0 / head_dim)) @ k.transpose(-2, -1)
        weights = F.softmax(scores if merged is None else scores + merged, -1)
        weights = F.dropout(weights, p) if p else weights
        return (weights @ v).permute(2, 0, 1, 3).reshape(length, batch, -1), weights


def _merge_masks(mask: Any, padding: Any, dtype: torch.dtype) -> Any:
    """One mask to add to the scores, broadcast over (batch, heads, target, source); True means: do not look."""
    parts = []
    for m in (mask, None if padding is None else padding.reshape(-1, 1, 1, padding.shape[-1])):
        if m is not None:
            parts.append(torch.zeros_like(m, dtype=dtype).masked_fill(m, -math.inf) if m.dtype == torch.bool else m)
    return None if not parts else parts[0] if len(parts) == 1 else parts[0] + parts[1]


# -- cross-entropy -----------------------------------------------------------------------------------------------


def cross_entropy(team: Team, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Over logits that are split by class, without putting them together: four numbers a row are exchanged."""
    bound = _CROSS_ENTROPY.bind(*args, **kwargs)
    bound.apply_defaults()
    a = bound.arguments
    logits, target = a["input"], a["target"]
    if not isinstance(logits, Cut) or isinstance(target, Cut) or a["weight"] is not None or target.is_floating_point():
        return NotImplemented
    if logits.split_dim != (1 if logits.ndim > 1 else 0) or len(logits.widths) != 1:
        return NotImplemented
    if team.rehearsal:
        if team.report is not None:
            team.report("loss", "cross_entropy", logits.origins, ())
        return func(logits.whole(), *args[1:], **kwargs) if args else NotImplemented
    part = logits.parts[0]
    rows = part.movedim(logits.split_dim, -1).reshape(-1, part.shape[logits.split_dim])
    low = ranges_of(logits.widths, team.rank)[0][0]
    flat = target.reshape(-1)
    losses = _SplitCrossEntropy.apply(rows, flat, team, low, logits.whole_size, a["ignore_index"], a["label_smoothing"])
    if a["reduction"] == "none":
        return losses.view(target.shape)
    total = losses.sum()
    return total / (flat != a["ignore_index"]).sum() if a["reduction"] == "mean" else total


class _SplitCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        target: torch.Tensor,
        team: Team,
        low: int,
        classes: int,
        ignore: int,
        smoothing: float,
    ) -> torch.Tensor:
        if x.dtype in (torch.bfloat16, torch.float16):
            x = x.float()
        most = x.amax(1)
        own = (target >= low) & (target < low + x.shape[1])
        index = (target - low).masked_fill(~own, 0)
        at_target = x.gather(1, index.unsqueeze(1)).squeeze(1).masked_fill(~own, 0.0)
        sums = torch.exp(x - most.unsqueeze(1)).sum(1)
        stats = torch.stack([most, sums, at_target, x.sum(1) if smoothing else at_target], 0)
        everyone = torch.stack(team.all_gather(stats.unsqueeze(0), 0, [1] * team.ways)).squeeze(1)
        most = everyone[:, 0].amax(0)
        log_sum = most + (everyone[:, 1] * torch.exp(everyone[:, 0] - most)).sum(0).log()
        losses = log_sum - everyone[:, 2].sum(0)
        if smoothing:
            losses = (1 - smoothing) * losses + smoothing * (log_sum - everyone[:, 3].sum(0) / classes)
        counted = target != ignore
        ctx.save_for_backward(x, log_sum, index, own, counted)
        ctx.smoothing, ctx.classes, ctx.dtype = smoothing, classes, x.dtype
        return losses.masked_fill(~counted, 0.0)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        x, log_sum, index, own, counted = ctx.saved_tensors
        scale = gradients[0].masked_fill(~counted, 0.0)
        slope = (x - log_sum.unsqueeze(1)).exp_()
        if ctx.smoothing:
            slope -= ctx.smoothing / ctx.classes
        slope.scatter_add_(1, index.unsqueeze(1), (ctx.smoothing - 1) * own.unsqueeze(1).to(slope.dtype))
        return slope.mul_(scale.unsqueeze(1)), None, None, None, None, None, None


ATTENTION_RULES: dict[str, Callable[..., Any]] = {
    "scaled_dot_product_attention": scaled_dot_product_attention, "multi_head_attention_forward": multi_head_attention,
    "cross_entropy": cross_entropy,
}  # fmt: skip
