"""A server's part of the dense parameters, in memory of its own, and the job's optimizer over it.

Parameters are cut into *pieces*: runs of elements of one parameter where the optimizer treats every element alike, whole
parameters otherwise. A piece is what is placed, pulled, pushed and moved as one.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import math
import mmap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
import torch
from torch import nn

from shoal.errors import JobFailed, NotBuiltError, RequestError
from shoal.process.failure import first_line
from shoal.ps.lbfgs import BatchLBFGS, vectors_of

logger = logging.getLogger(__name__)

PIECE_BYTES = 1 << 20
# Where a piece begins; and from so many bytes on memory is asked for by large pages.
_ALIGN, _LARGE_BYTES = 64, 4 << 20
_BESIDE_NUMBERS = ("params", "param_names")
"""What a group of torch's holds beside its hyperparameters."""

Numbers = dict[str, Any]
Number = int | float
Groups = Annotated[tuple[dict[str, Number | tuple[Number, ...]], ...], msgspec.Meta(max_length=1 << 16)]
"""Hyperparameters as they are sent: of each group, numbers and rows of numbers. Of so few kinds that a small message cannot take
much memory when it is read."""
Form = Mapping[str, Any]
"""What an optimizer keeps of a piece, by key: tensors and numbers like those that belong there."""


@dataclass(frozen=True)
class Piece:
    """Elements ``start`` to ``stop`` of a parameter.

    Attributes:
        number: which piece it is, among those of all servers.
        name: the parameter's, in the model.
        group: the optimizer's group that the parameter is in.
        shape: the parameter's where the piece is all of it and the optimizer looks at its form; None: elements in a row.
    """

    number: int
    name: str
    start: int
    stop: int
    dtype: torch.dtype
    group: int = 0
    shape: tuple[int, ...] | None = None

    @property
    def numel(self) -> int:
        return self.stop - self.start

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @property
    def key(self) -> str:
        """What the ring knows it by: the same under any number of servers."""
        return f"{self.name}[{self.start}:{self.stop}]"


def cut(
    name: str, shape: Sequence[int], dtype: torch.dtype, group: int, first: int, elementwise: bool,
    most_bytes: int = PIECE_BYTES,
) -> list[Piece]:  # fmt: skip
    """The pieces of one parameter, numbered from ``first``."""
    numel = math.prod(shape)
    if not elementwise:
        return [Piece(first, name, 0, numel, dtype, group, tuple(shape))]
    most = max(1, most_bytes // dtype.itemsize)
    return [
        Piece(first + k, name, low, min(low + most, numel), dtype, group) for k, low in enumerate(range(0, numel, most))
    ]


MakeOptimizer = Callable[[Sequence[tuple[Piece, nn.Parameter]]], torch.optim.Optimizer]
"""Makes the job's kind of optimizer, with its groups in order, over these parameters."""


class DensePart:
    """The pieces of one server: weights, and what the optimizer keeps of each."""

    def __init__(self, pieces: Iterable[Piece], make_optimizer: MakeOptimizer) -> None:
        """All weights are zero until they are put there."""
        self._make_optimizer = make_optimizer
        self.pieces: dict[int, Piece] = {}
        self._weights: dict[int, nn.Parameter] = {}
        self._optimizer: torch.optim.Optimizer | None = None
        self._forms: dict[tuple[int, torch.dtype, int], Form] = {}
        self.take_up(pieces)

    def take_up(self, pieces: Iterable[Piece]) -> None:
        """Hold these pieces, too; those that come anew are zero and have no optimizer state."""
        new = [piece for piece in pieces if piece.number not in self.pieces]
        for piece, weights in zip(new, _zeros(new), strict=True):
            self.pieces[piece.number] = piece
            self._weights[piece.number] = nn.Parameter(weights)
        self._renew()

    def give_up(self, numbers: Iterable[int]) -> None:
        """Hold these pieces no longer, nor their memory: what lay beside them in one block is copied to a smaller one."""
        blocks: dict[int, None] = {}
        for number in numbers:
            if self._optimizer is not None:
                # One that looks at whole tensors is the same object afterwards.
                self._optimizer.state.pop(self._weights[number], None)
            blocks[_block_of(self._weights[number])] = None
            del self.pieces[number], self._weights[number]
        for block in blocks:
            # One after the other, so that there is never more than one of them twice.
            left = [piece for number, piece in self.pieces.items() if _block_of(self._weights[number]) == block]
            for piece, place in zip(left, _zeros(left), strict=True):
                self._weights[piece.number].data = place.copy_(self._weights[piece.number].data)
        self._renew()
        if blocks:
            _return_freed_memory()

    def _renew(self) -> None:
        before = self._optimizer
        ordered = sorted(self.pieces)
        self._optimizer = self._make_optimizer([(self.pieces[n], self._weights[n]) for n in ordered]) if ordered else None
        if before is None or self._optimizer is None:
            return
        for number in ordered:
            if self._weights[number] in before.state:
                self._optimizer.state[self._weights[number]] = before.state[self._weights[number]]
        for new, old in zip(self._optimizer.param_groups, before.param_groups, strict=False):
            new.update({key: value for key, value in old.items() if key not in ("params", "param_names")})

    # -- the weights ---------------------------------------------------------------------------------------------

    def weight(self, number: int) -> torch.Tensor:
        """The elements of a piece, in a row: a view."""
        return self._weights[number].detach().view(-1)

    def put(self, number: int, values: torch.Tensor) -> None:
        """Set a piece's weights."""
        self.weight(number).copy_(values.reshape(-1))

    def apply(
        self, gradients: Mapping[int, torch.Tensor], scale: float, groups: Sequence[Numbers] | None = None, lr_factor: float = 1.0
    ) -> None:
        """One step of the optimizer over the pieces that have a gradient; the others are left alone.

        Args:
            gradients: by piece, elements in a row; not changed.
            scale: what they are multiplied by.
            groups: hyperparameters to use from now on, one mapping for each group of the optimizer.
            lr_factor: what learning rates are multiplied by, in this step alone.
        """
        optimizer = self._optimizer
        if optimizer is None:
            return
        before = self.groups if groups else ()
        self.take_groups(groups or ())
        if isinstance(optimizer, BatchLBFGS):
            # All parameters take part in a step, also those without a gradient.
            gradients = {n: gradients.get(n, torch.zeros_like(self.weight(n))) for n in sorted(self.pieces)}
        try:
            with _scaled(optimizer, lr_factor):
                self._step(optimizer, gradients, scale)
        except (RuntimeError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            logger.exception("The optimizer has failed.")
            # What came with this push may have been what it failed at.
            self.take_groups(before)
            failed = f"{type(optimizer).__name__} has failed with {type(error).__name__}"
            raise JobFailed(f"{failed}: {first_line(error)}.") from None

    def _step(self, optimizer: torch.optim.Optimizer, gradients: Mapping[int, torch.Tensor], scale: float) -> None:
        # Apart, because torch's fused SGD takes a list in which all or none have a momentum.
        for begun in (True, False):
            chosen = [n for n in gradients if (self._weights[n] in optimizer.state) == begun]
            for number in chosen:
                gradient = gradients[number].view_as(self._weights[number])
                self._weights[number].grad = gradient if scale == 1.0 else gradient * scale
            try:
                if chosen:
                    optimizer.step()
            finally:
                for number in chosen:
                    self._weights[number].grad = None

    def take_groups(self, groups: Sequence[Numbers]) -> None:
        """Use these hyperparameters from now on, one mapping for each group of the optimizer."""
        if self._optimizer is not None:
            _set_numbers(self._optimizer, groups)

    def vectors(self, gradients: Mapping[int, torch.Tensor], scale: float) -> Iterator[list[torch.Tensor]]:
        """Of each piece what L-BFGS remembers, and the gradient times ``scale``. RequestError where it is not the optimizer."""
        if not isinstance(self._optimizer, (BatchLBFGS, type(None))):
            raise RequestError(f"The optimizer here is {type(self._optimizer).__name__}, not L-BFGS.")
        for number, weights in sorted(self._weights.items()):
            assert self._optimizer is not None
            gradient = gradients[number] * scale if number in gradients else torch.zeros_like(self.weight(number))
            yield [*(vector.view(-1) for vector in vectors_of(self._optimizer, weights)), gradient.view(-1)]

    # -- keeping and moving --------------------------------------------------------------------------------------

    def state(self, number: int) -> dict[str, Any]:
        """What the optimizer keeps of a piece: tensors (views) and plain numbers; empty before its first step."""
        if self._optimizer is None:
            return {}
        found = self._optimizer.state.get(self._weights[number], {})
        for key, value in found.items():
            if not isinstance(value, (torch.Tensor, int, float, bool, type(None))):
                raise NotBuiltError(
                    f"{type(self._optimizer).__name__} keeps a {type(value).__name__} ({key}) for a parameter, which servers "
                    "cannot save; take another optimizer, or a plan without ps."
                )
        return dict(found)

    def put_state(self, number: int, state: Mapping[str, Any]) -> None:
        """Put it back: copied. Where there is none it is what a new optimizer begins with."""
        assert self._optimizer is not None
        if state:
            own = {key: v.clone() if isinstance(v, torch.Tensor) else v for key, v in state.items()}
            self._optimizer.state[self._weights[number]] = own
            return
        weights, piece = self._weights[number], self.pieces[number]
        self._optimizer.state.pop(weights, None)
        if piece.shape is None:
            # Adagrad makes its sums when it is made, and in older torch only then.
            fresh = self._make_optimizer([(piece, weights)]).state
            self._optimizer.state.update({weights: fresh[weights]} if weights in fresh else {})

    def form(self, number: int) -> Form | None:
        """What the optimizer keeps of a piece; None where that cannot be known before its first step."""
        piece = self.pieces[number]
        if piece.shape is not None:
            return self.state(number) or None
        known = (piece.numel, piece.dtype, piece.group)
        if known not in self._forms:
            probe = nn.Parameter(torch.zeros(piece.numel, dtype=piece.dtype))
            optimizer = self._make_optimizer([(piece, probe)])
            _set_numbers(optimizer, self.groups)
            probe.grad = torch.zeros_like(probe)
            optimizer.step()
            self._forms[known] = {key: value for key, value in optimizer.state.get(probe, {}).items()}
        return self._forms[known]

    @property
    def fixed(self) -> list[set[str]]:
        """The names of the hyperparameters that are no numbers, and of what a group holds beside them: nobody sends these."""
        groups = self._optimizer.param_groups if self._optimizer is not None else []
        return [{*_BESIDE_NUMBERS, *group} - set(own) for group, own in zip(groups, self.groups, strict=True)]

    @property
    def groups(self) -> list[Numbers]:
        """The hyperparameters in use that are numbers."""
        return plain_groups(self._optimizer) if self._optimizer is not None else []

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self.pieces.values())


@contextlib.contextmanager
def _scaled(optimizer: torch.optim.Optimizer, factor: float) -> Iterator[None]:
    """Learning rates times ``factor`` meanwhile."""
    kept = [(group, group["lr"]) for group in optimizer.param_groups] if factor != 1.0 else []
    try:
        for group, lr in kept:
            group["lr"] = lr * factor
        yield
    finally:
        for group, lr in kept:
            group["lr"] = lr


def _return_freed_memory() -> None:
    """Let the system have what the optimizer kept of pieces that are gone: between that of others, glibc holds on to it."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _block_of(weights: torch.Tensor) -> int:
    """Where the block begins that some weights lie in, as ``_zeros`` has made it."""
    return weights.untyped_storage().data_ptr()


def _zeros(pieces: Sequence[Piece]) -> Iterator[torch.Tensor]:
    """A tensor of zeros for each piece, all in one block, which is mapped by large pages where the system has such."""
    sizes = [-(-piece.nbytes // _ALIGN) * _ALIGN for piece in pieces]
    if (total := sum(sizes)) >= _LARGE_BYTES:
        memory = mmap.mmap(-1, total, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(AttributeError, OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
        block = torch.frombuffer(memory, dtype=torch.uint8)
    else:
        block = torch.zeros(total, dtype=torch.uint8)
    at = 0
    for piece, size in zip(pieces, sizes, strict=True):
        own = block[at : at + piece.nbytes].view(piece.dtype)
        yield own if piece.shape is None else own.view(piece.shape)
        at += size


def plain_groups(optimizer: torch.optim.Optimizer) -> list[Numbers]:
    """The hyperparameters of an optimizer that are numbers, or several: what can change while it runs, and be sent."""

    def plain(value: Any) -> bool:
        return all(map(is_number, value)) if isinstance(value, (tuple, list)) else is_number(value)

    return [
        {key: value for key, value in group.items() if key not in _BESIDE_NUMBERS and plain(value)}
        for group in optimizer.param_groups
    ]


def is_number(value: Any) -> bool:
    """Whether something is a number; true and false are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _set_numbers(optimizer: torch.optim.Optimizer, groups: Sequence[Numbers]) -> None:
    for group, numbers in zip(optimizer.param_groups, groups, strict=False):
        group.update(numbers)
