"""Taking gradients out of a worker's parameters into the arena, as soon as they are there."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import nn

from shoal.comm import dense
from shoal.comm.store import Store
from shoal.comm.table import align
from shoal.errors import ShoalError
from shoal.train.embedding import Embeddings
from shoal.train.row_tables import RowGradients


@dataclass(frozen=True)
class Target:
    """Where the gradient of a parameter goes.

    Attributes:
        parameter: the model's own object.
        index: of its gradient in the worker's stripe; None where it is not the owner.
        echo: index of the echo that it is, where another rank owns the weight; None otherwise.

    With neither, the gradient is dropped: nobody trains it, or another rank has the same.
    """

    parameter: nn.Parameter
    index: int | None = None
    echo: int | None = None


class Sharded(Protocol):
    """Parameters whose gradients torch sums and shards by itself: see ``shoal.axes.zero``."""

    def touched(self) -> dict[str, bool]: ...
    def begin(self) -> None: ...


@dataclass(frozen=True)
class Shards:
    """The sharded parameters of a worker.

    Attributes:
        sharded: what knows which of them a backward pass has reached.
        own: (index in the table, parameter) of each one's part that is this worker's; several parameters where a weight
            has a place in several stages of this worker.
        parts: name -> indices in the table of all its parts.
        echoes: (index of the echo, parameter) of each one whose part another worker owns.
        echo_parts: name -> indices of the echoes of all its parts.
    """

    sharded: Sharded
    own: list[tuple[int, nn.Parameter]]
    parts: dict[str, Sequence[int]]
    echoes: list[tuple[int, nn.Parameter]] = field(default_factory=list)
    echo_parts: dict[str, Sequence[int]] = field(default_factory=dict)


class SparseRows:
    """A place for a gradient of which most rows are zero: only those that were written to are cleared before the next."""

    def __init__(self, place: torch.Tensor, embeddings: Embeddings | None, marks: torch.Tensor | None = None) -> None:
        """``marks``: a byte for each line of the place, which ``take`` keeps: 0 where the line is."""
        self._place, self._embeddings, self._marks = place, embeddings, marks
        # None: any row may hold something; a predecessor's, say.
        self._written: list[torch.Tensor] | None = None
        # The marks are those of the rows that were written, and no others.
        self._exact = False

    def forget(self) -> None:
        """Something else was written to the place."""
        self._written = None

    def take(self, parameter: torch.Tensor, gradient: torch.Tensor) -> bool:
        """Copy a dense gradient there of which it is known what may not be zero, and nothing else; False where it is not."""
        embeddings = self._embeddings
        rows = None if embeddings is None else embeddings.rows(parameter, gradient)
        if embeddings is None or rows is None:
            return False
        marks, last = self._marks, self._written
        if last is None:
            self._place.copy_(gradient)
            if marks is not None:
                marks.zero_()
                embeddings.mark_rows(marks, self._place, rows)
        else:
            old = last[0] if len(last) == 1 else torch.cat([rows[:0], *last])
            embeddings.exchange_rows(self._place, gradient, old, rows, marks, self._exact)
        self._exact = marks is not None and (last is None or self._exact)
        self._written = [rows]
        embeddings.give_back(gradient)
        return True

    def write(self, gradient: torch.Tensor, adds: bool) -> None:
        """Put a sparse gradient there, or add it to what is there, row by row in its own order."""
        self._exact = False
        at, values = gradient._indices()[0], gradient._values()
        if not adds:
            if self._written is None:
                self._place.zero_()
            else:
                for old in self._written:
                    self._place.index_fill_(0, old, 0.0)
            self._written = []
        self._place.index_add_(0, at, values)
        if self._written is not None:
            # torch's indices are the batch's own, where the next one may be written.
            self._written.append(at.clone())


@dataclass
class Place:
    """Where a gradient goes now, and what is known of what lies there; ``lines``: the marks that are kept of it."""

    tensor: torch.Tensor
    rows: SparseRows
    lines: torch.Tensor | None


class GivenUp(ShoalError):
    """A backward pass was broken off: see ``Gradients.is_void``."""


class Gradients:
    """The gradients of one worker. Hooks take each one as it comes, so that no second copy of them builds up."""

    is_void: Callable[[], bool] | None = None
    """Asked with every gradient: whether what is computed counts for nothing any more; then GivenUp leaves the pass."""

    def __init__(
        self, store: Store, stripe: int, targets: Sequence[Target], shards: Shards | None = None,
        rows: RowGradients | None = None, embeddings: Embeddings | None = None, marks: bool = False,
    ) -> None:  # fmt: skip
        """Have the gradients of these parameters go where they belong.

        Args:
            rows: what takes the gradients of embeddings whose rows are no parameters; embeddings: makes others'.
            marks: say which lines of embeddings' gradients may not be zero; nobody else writes to the stripe.
        """
        self._marks = marks
        self._own = [target for target in targets if target.index is not None]
        # Of each gradient, whether it was seen to be finite when it was taken.
        self.finite = np.zeros(len(store.table.trained), dtype=bool)
        self._store = store
        self._shards = shards
        self._rows, self._embeddings = rows, embeddings
        self._held: dict[int, dict[int, Place]] = {}
        self.move_to(stripe)
        self._own_echoes = [t.echo for t in targets if t.echo is not None]
        self._own_echoes += [echo for echo, _ in shards.echoes] if shards is not None else []
        for target in targets:
            self._hook(target)

    def move_to(self, stripe: int) -> None:
        """From now on gradients go to this stripe, which others may have written to meanwhile."""
        store = self._store
        self._touched, self._marked = store.touched[stripe], store.marked[stripe]
        self._stripe = stripe
        self._echoed = store.echoed[stripe]
        if stripe not in self._held:
            self._held[stripe] = {target.index: self._place(target.index) for target in self._own if target.index is not None}
        self._places = self._held[stripe]
        for place in self._places.values():
            place.rows.forget()

    def _place(self, index: int) -> Place:
        tensor = self._store.gradient(self._stripe, index)
        lines = self._lines_of(index) if self._marks else None
        return Place(tensor, SparseRows(tensor, self._embeddings, lines), lines)

    def begin(self) -> None:
        """Forget what was gathered: a step begins, or begins again."""
        self._echoed[self._own_echoes] = 0
        self.finite[:] = False
        if self._shards is not None:
            self._shards.sharded.begin()
        if self._rows is not None:
            self._rows.begin()

    def _hook(self, target: Target) -> None:
        if target.index is not None:
            hook = self._keep_own(target.index)
        elif target.echo is not None:
            hook = self._keep_echo(target.echo)
        else:

            def hook(p: torch.Tensor) -> None:
                p.grad = None

        target.parameter.register_post_accumulate_grad_hook(hook)

    def _keep_own(self, index: int) -> Callable[[torch.Tensor], None]:
        take = dense.load().take

        def keep(p: torch.Tensor) -> None:
            if self.is_void is not None and self.is_void():
                raise GivenUp("What is computed counts for nothing any more.")
            place = self._places[index]
            finite, sparse = self._put(p, place, bool(self._touched[index]), take)
            self._touched[index] = 1
            self.finite[index] = finite
            self._marked[index] = sparse and place.lines is not None
            p.grad = None

        return keep

    def _keep_echo(self, echo: int) -> Callable[[torch.Tensor], None]:
        tensor, take = self._store.echo(self._stripe, echo), dense.load().take
        place = Place(tensor, SparseRows(tensor, self._embeddings, None), None)

        def keep(p: torch.Tensor) -> None:
            self._put(p, place, bool(self._echoed[echo]), take)
            self._echoed[echo] = 1
            p.grad = None

        return keep

    @staticmethod
    def _put(p: torch.Tensor, place: Place, adds: bool, take: Callable[..., bool | None]) -> tuple[bool, bool]:
        """Bring a gradient to its place; whether it was seen to be finite, and whether by those of its rows that may not be 0."""
        gradient = p.grad
        assert gradient is not None
        if gradient.is_sparse and gradient.sparse_dim() == 1:
            place.rows.write(gradient, adds)
        elif adds:
            place.tensor.add_(gradient)
            place.rows.forget()
        elif place.rows.take(p, gradient):
            return False, True
        else:
            place.rows.forget()
            return bool(take(place.tensor, gradient)), False
        return False, False

    def _lines_of(self, index: int) -> torch.Tensor | None:
        spec = self._store.table.parameters[index]
        return self._store.marks(self._stripe, spec.offset, align(spec.offset + spec.nbytes))

    def collect(self) -> None:
        """Take what no hook could: sharded gradients are complete only when the backward pass is over."""
        if self._rows is not None:
            self._rows.publish()
        if self._shards is None:
            return
        own, echoes = self._shards.own, self._shards.echoes
        self._take((self._store.gradient(self._stripe, index), index, parameter) for index, parameter in own)
        self._take((self._store.echo(self._stripe, echo), echo, parameter) for echo, parameter in echoes)
        for name, reached in self._shards.sharded.touched().items():
            if reached:
                # Whoever reached it speaks for all: the sum is complete on every rank, and the mark is the same byte.
                self._touched[list(self._shards.parts.get(name, ()))] = 1
                self._echoed[list(self._shards.echo_parts.get(name, ()))] = 1

    @staticmethod
    def _take(entries: Iterable[tuple[torch.Tensor, int, nn.Parameter]]) -> None:
        from shoal.axes.zero import local_gradient

        taken: set[int] = set()
        for place, at, parameter in entries:
            gradient = local_gradient(parameter)
            if gradient is not None and gradient.numel():
                if at in taken:
                    place.add_(gradient)
                else:
                    place.copy_(gradient)
                taken.add(at)

    def withdraw_rows(self) -> None:
        """Take back the gradients of rows that ``collect`` has published."""
        if self._rows is not None:
            self._rows.withdraw()

    @property
    def rows_squared(self) -> float:
        """The squared norm of the gradients of rows that were published last."""
        return self._rows.squared if self._rows is not None else 0.0


    @property
    def bad_row(self) -> str | None:
        """The first of these whose gradient is no number, in words; None where there is none."""
        return self._rows.bad if self._rows is not None else None


def examine(store: Store, stripe: int, own: np.ndarray) -> tuple[float, str | None]:
    """The squared norm of a stripe's gradients, and the name of a parameter whose gradient is no number.

    ``own``: of each trained parameter, whether it is looked at.
    """
    squared = 0.0
    for index in np.flatnonzero(store.touched[stripe] & own):
        gradient = store.gradient(stripe, int(index))
        norm = float(torch.linalg.vector_norm(gradient))
        if not math.isfinite(norm) and not dense.load().finite(gradient):
            return math.nan, store.table.parameters[index].name
        squared += norm * norm
    return squared, None


def find_bad(store: Store, stripe: int, own: np.ndarray, finite: np.ndarray) -> str | None:
    """The same without the norm; ``finite``: of each trained parameter, whether its gradient is known to be."""
    for index in np.flatnonzero(store.touched[stripe] & own & ~finite):
        if not dense.load().finite(store.gradient(stripe, int(index))):
            return store.table.parameters[index].name
    return None
