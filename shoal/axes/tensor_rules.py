"""What each torch function does to a split tensor: elementwise functions, shapes, reductions; see ``tensor_cut``.

A rule gets (team, function, args, kwargs) and returns the result, or NotImplemented where the parts alone cannot give
it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils import _pytree as pytree

from shoal.axes.tensor_cut import Cut, Team, Unsplit
from shoal.axes.tensor_shapes import SHAPE_RULES

Rule = Callable[[Team, Any, tuple[Any, ...], dict[str, Any]], Any]


def _names(text: str) -> list[str]:
    return text.split()


_ELEMENTWISE = _names(
    """
    abs add sub rsub subtract mul multiply div divide true_divide floor_divide remainder fmod pow float_power
    neg negative exp exp2 expm1 log log2 log10 log1p sqrt rsqrt reciprocal square sign sin cos tan tanh atan
    sigmoid erf relu relu6 gelu silu elu selu celu leaky_relu softplus softsign mish hardswish
    hardsigmoid hardtanh hardshrink softshrink tanhshrink threshold logsigmoid clamp clamp_min clamp_max clip
    where masked_fill maximum minimum lerp addcmul addcdiv nan_to_num floor ceil round trunc to type float
    double half bfloat16 contiguous clone detach eq ne lt le gt ge isnan isinf isfinite logical_and logical_or
    logical_not zeros_like ones_like empty_like full_like logit xlogy copysign hypot requires_grad_ alias
    bitwise_and bitwise_or bitwise_not sinc erfc __radd__ __rsub__ __rmul__ __rtruediv__ __rpow__
    __rdiv__ __and__ __or__ __invert__ __pow__ __truediv__
    """
)
_INPLACE = _names(
    """
    add_ sub_ mul_ div_ relu_ tanh_ sigmoid_ exp_ neg_ pow_ clamp_ clamp_min_ clamp_max_ masked_fill_ hardtanh_
    leaky_relu_ elu_ silu_ sqrt_ __iadd__ __isub__ __imul__ __itruediv__
    """
)
# Their argument ``dim`` is the second, but for those in _DIM_IS_ARGUMENT.
_ALONG = _names(
    """
    softmax log_softmax sum mean var std amax amin argmax argmin logsumexp cumsum cumprod norm normalize glu topk sort
    argsort all any prod
    """
)
_DIM_IS_ARGUMENT = {"norm": 2, "normalize": 2, "topk": 2}
_BY_CHANNEL = _names(
    """
    max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d
    adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d interpolate boolean_dispatch _max_pool1d _max_pool2d _max_pool3d
    """
)
# Of the wrapper itself: these tell the size of the whole.
_OF_WHOLE = frozenset(
    ["size", "dim", "numel", "nelement", "ndimension", "__len__", "is_floating_point", "is_complex", "element_size"]
)
_GET_OF_WHOLE = frozenset(
    _names("shape ndim dtype device layout is_sparse is_cuda is_meta is_quantized is_nested itemsize")
)
_OF_PART = frozenset(
    ["stride", "is_contiguous", "get_device", "new_zeros", "new_ones", "new_empty", "new_full", "new_tensor"]
)


def apply_rule(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Carry out a torch function of which at least one argument is split."""
    name = func.__name__
    with torch._C.DisableTorchFunctionSubclass():
        if name == "__get__":
            return _attribute(func, args[0])
        if name in _OF_WHOLE:
            return func(*args, **kwargs)
        if name in _OF_PART and isinstance(args[0], Cut):
            return func(args[0].parts[0], *args[1:], **kwargs)
        rule = RULES.get(name) if kwargs.get("out") is None else None
        if rule is not None:
            cut = next(v for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, Cut)) if not (
                args and isinstance(args[0], Cut)
            ) else args[0]  # fmt: skip
            result = rule(cut.team, func, args, kwargs)
            if result is not NotImplemented:
                return _with_origins(result, args, kwargs) if cut.team.rehearsal else result
        return _put_together(func, name, args, kwargs)


def _attribute(func: Any, cut: Cut) -> Any:
    name = func.__self__.__name__
    if name in _GET_OF_WHOLE:
        return func(cut)
    if name in ("T", "mT"):
        return RULES["transpose"](cut.team, torch.transpose, (cut, -2, -1), {})
    if name == "data":
        return cut.like(tuple(p.detach() for p in cut.parts), cut.split_dim)
    return func(cut.parts[0])


def _put_together(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """No rule: every worker computes it on the whole."""
    cuts = [v for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, Cut)]
    origins = frozenset().union(*(c.origins for c in cuts))
    changes = name in ("__setitem__", "copy_") or (name.endswith("_") and not name.endswith("__"))
    if (changes and args and isinstance(args[0], Cut)) or isinstance(kwargs.get("out"), Cut):
        raise Unsplit(name, origins)
    team = cuts[0].team
    if team.report is not None:
        team.report("gather", name, origins, ())
    whole_args, whole_kwargs = pytree.tree_map(lambda v: v.whole() if isinstance(v, Cut) else v, (args, kwargs))
    return func(*whole_args, **whole_kwargs)


def _with_origins(result: Any, args: Any, kwargs: Any) -> Any:
    origins: frozenset[str] = frozenset().union(
        *(v.origins for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, Cut))
    )
    for value in pytree.tree_leaves(result):
        if isinstance(value, Cut) and not value.along_sequence:
            value.origins = value.origins | origins
    return result


# -- elementwise -------------------------------------------------------------------------------------------------


def elementwise(team: Team, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Each part by itself; a replicated operand that is as long as the split dim is split likewise."""
    first = next((v for v in args if isinstance(v, Cut)), None)
    if first is None:
        first = next(v for v in kwargs.values() if isinstance(v, Cut))
    at, widths = first.split_dim - first.parts[0].ndim, first.widths
    columns = []
    names = list(kwargs)
    for value in [*args, *kwargs.values()]:
        if not isinstance(value, torch.Tensor):
            columns.append((value,) * len(team.members))
        elif isinstance(value, Cut):
            if value.split_dim - value.parts[0].ndim != at or value.widths != widths:
                return NotImplemented
            columns.append(value.parts)
        elif value.ndim >= -at and value.shape[at] != 1:
            if value.shape[at] != first.whole_size:
                return NotImplemented
            columns.append(team.enter_part(value, value.ndim + at, widths))
        else:
            columns.append((team.enter(value),) * len(team.members))
    count = len(args)
    parts = tuple(
        func(*row[:count], **dict(zip(names, row[count:], strict=True))) for row in zip(*columns, strict=True)
    )
    if not isinstance(parts[0], torch.Tensor):
        return NotImplemented
    return Cut(parts, parts[0].ndim + at, widths, team, first.origins)


def inplace(team: Team, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if not isinstance(args[0], Cut):
        return NotImplemented
    result = elementwise(team, func, args, kwargs)
    return result if result is NotImplemented else args[0]


def convert(team: Team, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``to`` and ``type_as``, where the split tensor may also be the one whose type is taken."""
    rest = tuple(v.parts[0] if isinstance(v, Cut) else v for v in args[1:])
    named = {k: v.parts[0] if isinstance(v, Cut) else v for k, v in kwargs.items()}
    if not isinstance(args[0], Cut):
        return func(args[0], *rest, **named)
    return args[0].like(tuple(func(p, *rest, **named) for p in args[0].parts), args[0].split_dim)


def dropout(team: Team, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Each part from a stream of its own; the common stream moves on alike on every worker."""
    x = args[0]
    p = args[1] if len(args) > 1 else kwargs.get("p", 0.5)
    training = args[2] if len(args) > 2 else kwargs.get("training", True)
    if not training or p == 0.0 or team.rehearsal:
        return x
    with own_stream(team):
        return x.like(tuple(torch.nn.functional.dropout(part, p) for part in x.parts), x.split_dim)


@contextlib.contextmanager
def own_stream(team: Team) -> Iterator[None]:
    """Random numbers that differ between workers, without the common stream of the workers drifting apart."""
    seed = int(torch.randint(2**62, ()))
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed + team.rank)
    try:
        yield
    finally:
        torch.set_rng_state(state)


# -- along some dims ---------------------------------------------------------------------------------------------


def along(team: Team, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A function along given dims (softmax, sum, argmax): each part by itself where the split dim is none of them."""
    x = args[0]
    if not isinstance(x, Cut) or any(isinstance(v, Cut) for v in (*args[1:], *kwargs.values())):
        return NotImplemented
    ndim = x.parts[0].ndim
    name = func.__name__
    place = _DIM_IS_ARGUMENT.get(name, 1)
    dims = kwargs.get("dim", args[place] if len(args) > place else None)
    if dims is None or isinstance(dims, bool) or not (isinstance(dims, int) or len(dims)):
        return NotImplemented
    dims = [d % ndim for d in ([dims] if isinstance(dims, int) else dims)]
    if x.split_dim in dims:
        if name != "sum":
            return NotImplemented
        return team.reduce([func(p, *args[1:], **kwargs) for p in x.parts])
    results = [func(p, *args[1:], **kwargs) for p in x.parts]
    first = results[0] if isinstance(results[0], torch.Tensor) else results[0][0]
    dim = x.split_dim if first.ndim == ndim else x.split_dim - sum(d < x.split_dim for d in dims)
    if isinstance(results[0], torch.Tensor):
        return x.like(tuple(results), dim)
    # max and topk give a named tuple; its fields, in order, are what nearly all code asks for.
    return type(results[0])([x.like(tuple(r[i] for r in results), dim) for i in range(len(results[0]))])


def normalize(team: Team, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """layer_norm and rms_norm over the last dims, where the split dim stands before them."""
    x, shape = args[0], args[1] if len(args) > 1 else kwargs.get("normalized_shape")
    if not isinstance(x, Cut) or shape is None or x.split_dim >= x.parts[0].ndim - len(shape):
        return NotImplemented
    rest = tuple(team.enter(v) if isinstance(v, torch.Tensor) else v for v in args[1:])
    named = {k: team.enter(v) if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
    if any(isinstance(v, Cut) for v in (*rest, *named.values())):
        return NotImplemented
    return x.like(tuple(func(p, *rest, **named) for p in x.parts), x.split_dim)


def by_channel(team: Team, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Pooling and resizing: every channel by itself."""
    x = args[0]
    if not isinstance(x, Cut) or x.split_dim != 1 or x.parts[0].ndim < 3 or kwargs.get("return_indices"):
        return NotImplemented
    results = tuple(func(p, *args[1:], **kwargs) for p in x.parts)
    return x.like(results, 1) if isinstance(results[0], torch.Tensor) else NotImplemented


def _rules() -> dict[str, Rule]:
    from shoal.axes.tensor_attention import ATTENTION_RULES
    from shoal.axes.tensor_products import PRODUCT_RULES

    rules: dict[str, Rule] = {
        name: elementwise for name in _ELEMENTWISE if not name.endswith("_") or name.endswith("__")
    }
    rules["requires_grad_"] = elementwise
    rules |= {name: inplace for name in _INPLACE}
    rules |= {"to": convert, "type_as": convert, "dropout": dropout, "layer_norm": normalize, "rms_norm": normalize}
    rules |= {name: along for name in _ALONG}
    rules |= {name: by_channel for name in _BY_CHANNEL}
    return rules | SHAPE_RULES | PRODUCT_RULES | ATTENTION_RULES


RULES: dict[str, Rule] = _rules()
Cut.handler = staticmethod(apply_rule)
