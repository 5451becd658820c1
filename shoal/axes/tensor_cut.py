"""A tensor of which this worker holds a part, and the group that holds all of it.

``Cut`` tells the model's own code the shape of the whole tensor, while what is computed is the local part. An operation
that has a rule (``tensor_rules``) works on the parts where they are; any other first puts the whole tensor together, on
every worker alike. So a layout decides how fast a model is, never whether it is right.

Gradients follow from two facts. A replicated value that goes into a split computation gets only a part of its gradient
there, so it goes in by ``Team.enter``, whose backward pass adds the parts up. A split value that is put together is
used alike by everyone, so each takes its own part of the gradient back.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NoReturn

import torch
import torch.distributed as dist
from torch.utils import _pytree as pytree

from shoal.comm.parts import take_ranges
from shoal.errors import JobFailed

Widths = tuple[tuple[int, ...], ...]

# Newer torch warns of the older names.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Unsplit(JobFailed):
    """An operation that a split tensor cannot take part in; ``origins`` are the layers that it comes from."""

    def __init__(self, what: str, origins: frozenset[str]) -> None:
        super().__init__(
            f"The model uses {what} on a tensor that is split over workers, where its effect would be lost; leave the layer "
            'that makes the tensor whole with tensor_plan={"path.of.the.layer": "replicate"}.'
        )
        self.what = what
        self.origins = origins


def even_widths(total: int, ways: int) -> tuple[int, ...]:
    """Cut ``total`` into ``ways`` widths as torch.chunk does, but never fewer: the first ones are the wider ones."""
    return tuple(total // ways + (t < total % ways) for t in range(ways))


def ranges_of(widths: Widths, t: int) -> tuple[tuple[int, int], ...]:
    """Where the parts of worker ``t`` lie in the whole dim: one range a block."""
    ranges, begin = [], 0
    for block in widths:
        low = begin + sum(block[:t])
        ranges.append((low, low + block[t]))
        begin += sum(block)
    return tuple(ranges)


def assemble(parts: Sequence[torch.Tensor], dim: int, widths: Widths) -> torch.Tensor:
    """Put the workers' parts together: the inverse of ``take_ranges`` for all of them."""
    if len(widths) == 1:
        return torch.cat(list(parts), dim)
    split = [part.split([block[t] for block in widths], dim) for t, part in enumerate(parts)]
    return torch.cat([split[t][b] for b in range(len(widths)) for t in range(len(parts))], dim)


class Team:
    """The workers that share a split: what they exchange. ``members`` are those whose parts this process holds.

    In a run that is one, and the parts travel by ``group``. In a rehearsal (``group`` None) one process holds all
    parts; then every exchange is plain arithmetic, and ``report`` hears what could not stay split.
    """

    def __init__(self, ways: int, rank: int = 0, group: Any = None, sequence: bool = False) -> None:
        self.ways = ways
        self.rank = rank
        self.group = group
        self.sequence = sequence
        self.rehearsal = group is None
        self.members: tuple[int, ...] = tuple(range(ways)) if group is None else (rank,)
        self.report: Callable[[str, str, frozenset[str], tuple[int, ...]], None] | None = None
        self.count: Callable[[str, bool, int], None] | None = None
        self._entered: tuple[Any, int, torch.Tensor] | None = None

    # -- between replicated and split ----------------------------------------------------------------------------

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """A replicated value on its way into a split computation: the same value; its gradient is summed over the
        team."""
        if not x.requires_grad or not torch.is_grad_enabled():
            return x
        # Query, key and value enter with the same tensor one after the other: one sum for the three.
        last = self._entered
        if last is not None and last[0]() is x and last[1] == x._version:
            return last[2]
        self._counts("all_reduce", True, x)
        entered: torch.Tensor = x if self.rehearsal else _Enter.apply(x, self)
        self._entered = (weakref.ref(x), x._version, entered)
        return entered

    def enter_part(self, x: torch.Tensor, dim: int, widths: Widths) -> tuple[torch.Tensor, ...]:
        """Each member's part of a replicated value."""
        entered = self.enter(x)
        return tuple(take_ranges(entered, dim, ranges_of(widths, t)) for t in self.members)

    def reduce(self, parts: Sequence[torch.Tensor], fresh: bool = False) -> torch.Tensor:
        """The sum of everybody's part, replicated; in place where the part is ``fresh``: nobody else reads it."""
        if self.rehearsal:
            self._counts("all_reduce", False, parts[0])
            total = parts[0]
            for part in parts[1:]:
                total = total + part
            return total
        # Somebody who watches operations (recompute=selective) may keep what they make: then it is not ours to overwrite.
        fresh = fresh and not torch._C._len_torch_dispatch_stack()
        result: torch.Tensor = _Reduce.apply(parts[0], self, fresh)
        return result

    def reduce_scatter(self, parts: Sequence[torch.Tensor], dim: int) -> Cut:
        """The sum of everybody's part, cut along ``dim``."""
        widths = (even_widths(parts[0].shape[dim], self.ways),)
        if self.rehearsal:
            self._counts("reduce_scatter", False, parts[0])
            self._counts("all_gather", True, parts[0])
            total = sum(parts[1:], parts[0])
            cut = Cut(tuple(take_ranges(total, dim, ranges_of(widths, t)) for t in self.members), dim, widths, self)
            cut.along_sequence = True
            return cut
        return Cut((_ReduceScatter.apply(parts[0], self, dim, widths),), dim, widths, self)

    def gather(self, cut: Cut, entering: bool = False) -> torch.Tensor:
        """The whole tensor on every worker; ``entering`` a split computation, so that its gradient must be summed."""
        if self.rehearsal:
            whole = assemble(cut.parts, cut.split_dim, cut.widths)
            self._counts("all_gather", False, whole)
            if entering:
                self._counts("reduce_scatter", True, whole)
            return whole
        gathered: torch.Tensor = _Gather.apply(cut.parts[0], self, cut.split_dim, cut.widths, entering)
        return gathered

    def _counts(self, collective: str, backward: bool, x: torch.Tensor) -> None:
        if self.count is not None and (x.requires_grad or not backward):
            self.count(collective, backward, x.numel() * x.element_size())

    # -- the exchanges themselves --------------------------------------------------------------------------------

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum in place."""
        dist.all_reduce(x, group=self.group)
        return x

    def all_gather(self, part: torch.Tensor, dim: int, sizes: Sequence[int]) -> list[torch.Tensor]:
        """Everybody's part, by worker; ``sizes`` along ``dim`` may differ."""
        rows, most = part.movedim(dim, 0), max(sizes)
        if rows.shape[0] < most:
            rows = torch.cat([rows, rows.new_zeros(most - rows.shape[0], *rows.shape[1:])])
        rows = rows.contiguous()
        everything = rows.new_empty(self.ways * most, *rows.shape[1:])
        _all_gather_single(everything, rows, group=self.group)
        return [everything[t * most : t * most + sizes[t]].movedim(0, dim) for t in range(self.ways)]

    def sum_and_scatter(self, x: torch.Tensor, dim: int, widths: Widths) -> torch.Tensor:
        """This worker's part of the sum of everybody's ``x``."""
        if len(widths) == 1 and len(set(widths[0])) == 1:
            rows = x.movedim(dim, 0).contiguous()
            own = rows.new_empty(widths[0][self.rank], *rows.shape[1:])
            _reduce_scatter_single(own, rows, group=self.group)
            return own.movedim(0, dim)
        return take_ranges(self.all_reduce(_own_copy(x)), dim, ranges_of(widths, self.rank))


class Cut(torch.Tensor):
    """A tensor that is split along one dim over a team.

    Attributes:
        parts: the members' local tensors (in a run: one).
        split_dim: which dim is split, counted from the front.
        widths: by block and worker. A dim may consist of blocks (query, key and value side by side) that are each split
        by themselves.
        origins: in a rehearsal, the layers whose split this comes from; none for what is cut along the sequence, which
            may be put together anywhere.
    """

    parts: tuple[torch.Tensor, ...]
    split_dim: int
    widths: Widths
    team: Team
    origins: frozenset[str]
    along_sequence = False
    handler: ClassVar[Callable[..., Any]]  # set by tensor_rules, which needs this class

    @staticmethod
    def __new__(
        cls: type[Cut], parts: tuple[torch.Tensor, ...], dim: int, widths: Widths, team: Team,
        origins: frozenset[str] = frozenset(),
    ) -> Cut:  # fmt: skip
        first = parts[0]
        size = list(first.shape)
        size[dim] = sum(map(sum, widths))
        self: Cut = torch.Tensor._make_wrapper_subclass(cls, size, dtype=first.dtype, device=first.device)  # type: ignore[attr-defined]
        self.parts, self.split_dim, self.widths, self.team, self.origins = parts, dim, widths, team, origins
        return self

    def __init__(self, *args: Any) -> None:
        pass

    @property
    def whole_size(self) -> int:
        return sum(map(sum, self.widths))

    def like(self, parts: tuple[torch.Tensor, ...], dim: int, widths: Widths | None = None) -> Cut:
        """A tensor that was made from this one."""
        return Cut(parts, dim, self.widths if widths is None else widths, self.team, self.origins)

    def whole(self, entering: bool = False) -> torch.Tensor:
        return self.team.gather(self, entering)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Cut(dim={self.split_dim}, widths={self.widths}, parts={[tuple(p.shape) for p in self.parts]})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return cls.handler(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> NoReturn:
        # Only code that goes round torch's functions gets here, such as an autograd.Function of the user's own.
        cuts = [v for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, Cut)]
        raise Unsplit(f"{func}", frozenset().union(*(c.origins for c in cuts)))


def plain(value: Any) -> Any:
    """A value with every split tensor in it put together; every worker of the team must come here."""
    if isinstance(value, Cut):
        return value.whole()
    if isinstance(value, torch.Tensor):
        return value
    return pytree.tree_map(lambda v: v.whole() if isinstance(v, Cut) else v, value)


def guard_functions() -> Callable[[], None]:
    """Let no split tensor into an autograd function of the model's own, where its gradient would be lost without a
    word.

    Such a function goes round torch's functions, so it is met at the one door that all of them have: in a rehearsal it
    is reported, in a run it gets the whole tensor. Returns what undoes it.
    """
    original = torch.autograd.Function.__dict__["apply"]
    if getattr(original.__func__, "knows_split_tensors", False):
        return lambda: None

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        cuts = [v for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, Cut)]
        if cuts and cuts[0].team.rehearsal:
            raise Unsplit(cls.__name__, frozenset().union(*(c.origins for c in cuts)))
        if cuts:
            args, kwargs = pytree.tree_map(plain, (args, kwargs))
        return original.__get__(None, cls)(*args, **kwargs)

    apply.knows_split_tensors = True  # type: ignore[attr-defined]

    def undo() -> None:
        torch.autograd.Function.apply = original  # type: ignore[method-assign]

    torch.autograd.Function.apply = classmethod(apply)  # type: ignore[assignment, method-assign]
    return undo


def _own_copy(x: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor that nobody else reads: autograd may hand the same gradient to several."""
    return x.clone(memory_format=torch.contiguous_format)


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, team: Team) -> torch.Tensor:
        ctx.team = team
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        return ctx.team.all_reduce(_own_copy(gradients[0])), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: torch.Tensor, team: Team, fresh: bool) -> torch.Tensor:
        if fresh and part.is_contiguous():
            ctx.mark_dirty(part)
            return team.all_reduce(part)
        return team.all_reduce(_own_copy(part))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        return gradients[0], None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: torch.Tensor, team: Team, dim: int, widths: Widths) -> torch.Tensor:
        ctx.team, ctx.dim, ctx.widths = team, dim, widths
        return team.sum_and_scatter(part, dim, widths)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        sizes = [sum(block[t] for block in ctx.widths) for t in range(ctx.team.ways)]
        return assemble(ctx.team.all_gather(gradients[0], ctx.dim, sizes), ctx.dim, ctx.widths), None, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: torch.Tensor, team: Team, dim: int, widths: Widths, entering: bool) -> torch.Tensor:
        ctx.team, ctx.dim, ctx.widths, ctx.entering = team, dim, widths, entering
        sizes = [sum(block[t] for block in widths) for t in range(team.ways)]
        return assemble(team.all_gather(part, dim, sizes), dim, widths)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        team, gradient = ctx.team, gradients[0]
        if ctx.entering:
            own = team.sum_and_scatter(gradient, ctx.dim, ctx.widths)
        else:
            own = take_ranges(gradient, ctx.dim, ranges_of(ctx.widths, team.rank))
        return own, None, None, None, None
