"""The gradient of an embedding table, with the bits of torch's kernel in a fraction of its time.

On CPUs torch adds each row by a tensor operation of its own: 0.33 ms for 5,120 rows of 16 numbers, most of it overhead. Here
one loop in C adds the same numbers in the same order. It takes the place of the kernel itself, below autograd, so hooks, tied
tables and second derivatives see nothing of it.

Most rows of such a gradient are zero. Whoever takes a gradient away can ask which ones may not be (``rows``), copy no more than
these, and give the table back, of which then only these are cleared for the next gradient.
"""

from __future__ import annotations

import ctypes
import mmap
import warnings
import weakref
from typing import Any

import torch

from shoal.comm import native

_OPERATOR = "embedding_dense_backward"
_HEAP_BYTES = 32 << 20
"""Up to here memory comes from the heap, and is kept there (see ``allocator.py``); beyond, it is mapped anew each time anyway."""
_MOST_KEPT = 8
_LINE_BYTES = 64
_NONE = torch.empty(0, dtype=torch.int64)


class _Table:
    """A gradient that was made, and the rows that something was added to. Its storage has another owner while it is in use."""

    def __init__(self, table: torch.Tensor) -> None:
        self.table = table
        self.rows = _NONE
        self._storage = table.untyped_storage()
        self._owners = self._count()

    @property
    def unused(self) -> bool:
        return self._count() == self._owners

    def _count(self) -> int:
        return int(torch._C._storage_Use_Count(self._storage._cdata))


class Embeddings:
    """Our loop in the place of torch's kernel, until this object is let go or ``end`` is called."""

    def __init__(self, library: ctypes.CDLL, original: Any) -> None:
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        self._adders = {torch.float32: library.shoal_add_rows_f32, torch.float64: library.shoal_add_rows_f64}
        for adder in self._adders.values():
            adder.argtypes, adder.restype = [pointer, pointer, pointer, number, number, number, number], None
        self._clear = library.shoal_clear_rows
        self._clear.argtypes, self._clear.restype = [pointer, pointer, number, number, number], None
        self._mark = library.shoal_mark_rows
        self._mark.argtypes, self._mark.restype = [pointer, pointer, number, number, number, number], None
        self._exchange = library.shoal_exchange_rows
        self._exchange.argtypes = [pointer, pointer, pointer, number, pointer, number, number, number, pointer, number]
        self._exchange.restype = None
        self._original = original
        # Made for somebody, by address; and given back.
        self._made: dict[int, _Table] = {}
        self._returned: list[_Table] = []
        # Of one table only where its storage's owners can be counted.
        self._counts = hasattr(torch._C, "_storage_Use_Count")
        self._held = torch.library.Library("aten", "IMPL")
        here = weakref.ref(self)

        def backward(keys: Any, gradient: torch.Tensor, indices: torch.Tensor, *rest: Any) -> torch.Tensor:
            own = here()
            found = None if own is None else own._backward(gradient, indices, *rest)
            return original.call_boxed(keys, gradient, indices, *rest) if found is None else found  # type: ignore[no-any-return]

        with warnings.catch_warnings():
            # torch warns that a kernel is overridden; that is what this is for.
            warnings.simplefilter("ignore", UserWarning)
            self._held.impl(_OPERATOR, backward, "CPU", with_keyset=True, allow_override=True)

    def end(self) -> None:
        """Put torch's kernel back."""
        self._held._destroy()

    def rows(self, parameter: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor | None:
        """The rows of a parameter's gradient outside of which it is zero; None where that is not known.

        Only of a gradient that came straight from the kernel: nobody has added to it, or changed it, or may have.
        """
        made = self._made.get(gradient.data_ptr())
        known = made is not None and made.table.shape == gradient.shape and gradient._version == 0 and gradient.is_contiguous()
        hooks = getattr(parameter, "_post_accumulate_grad_hooks", None) or ()
        if not known or parameter._backward_hooks or len(hooks) > 1:
            return None
        assert made is not None
        return made.rows

    def give_back(self, gradient: torch.Tensor) -> None:
        """Say that a gradient of which ``rows`` are known is not needed any more."""
        made = self._made.pop(gradient.data_ptr())
        if len(self._returned) < _MOST_KEPT and made.table.nbytes <= _HEAP_BYTES:
            self._returned.append(made)

    def exchange_rows(
        self, target: torch.Tensor, source: torch.Tensor, old: torch.Tensor, rows: torch.Tensor,
        marks: torch.Tensor | None, exact: bool,
    ) -> None:  # fmt: skip
        """Copy some rows of one contiguous table to another of the same shape, in the place of others, which become zero.

        Args:
            marks: uint8, one for each line of the target: becomes 0 for the old rows' lines, 1 for the new ones'.
            exact: 1 where there are old rows now, and nowhere else.
        """
        size = source.stride(0) * source.element_size()
        self._exchange(
            target.data_ptr(), source.data_ptr(), old.data_ptr(), old.numel(), rows.data_ptr(), rows.numel(), size, len(source),
            None if marks is None else marks.data_ptr(), exact,
        )  # fmt: skip

    def clear_rows(self, table: torch.Tensor, rows: torch.Tensor) -> None:
        """Set some rows of a contiguous table to zero."""
        size = table.stride(0) * table.element_size()
        self._clear(table.data_ptr(), rows.data_ptr(), rows.numel(), size, len(table))

    def mark_rows(self, marks: torch.Tensor, table: torch.Tensor, rows: torch.Tensor) -> None:
        """Set the marks (uint8) of the lines in which rows of a contiguous table lie."""
        size = table.stride(0) * table.element_size()
        self._mark(marks.data_ptr(), rows.data_ptr(), rows.numel(), size, len(table), 1)

    def _backward(
        self, gradient: torch.Tensor, indices: torch.Tensor, count: int, skipped: int, by_frequency: bool
    ) -> torch.Tensor | None:
        adder = self._adders.get(gradient.dtype)
        if adder is None or by_frequency or indices.dtype != torch.int64:
            return None
        width, size = gradient.size(-1), gradient.element_size()
        rows, added = indices.contiguous().view(-1), gradient.contiguous()
        made = None
        if self._counts and rows.numel() * 2 * max(_LINE_BYTES, width * size) <= count * width * size:
            made = self._cleared(count, width, gradient.dtype) or _Table(_zeros(count, width, gradient.dtype))
        table = _zeros(count, width, gradient.dtype) if made is None else made.table
        address = table.data_ptr()
        adder(address, added.data_ptr(), rows.data_ptr(), rows.numel(), width, count, skipped)
        if made is None:
            return table
        # Who made the indices may write the next batch there, while these rows are still to be cleared.
        made.rows = rows.clone()
        if len(self._made) >= _MOST_KEPT:
            self._made.pop(next(iter(self._made)))
        self._made[address] = made
        # Another tensor, so that autograd finds that nobody else holds it.
        return table.detach()

    def _cleared(self, count: int, width: int, dtype: torch.dtype) -> _Table | None:
        """A table that was given back, all zeros again; None where there is none."""
        for at, made in enumerate(self._returned):
            if made.table.shape == (count, width) and made.table.dtype == dtype and made.unused:
                del self._returned[at]
                self.clear_rows(made.table, made.rows)
                return made
        return None


def quicken_embeddings() -> Embeddings | None:
    """Let this process compute the gradients of embedding tables by our own loop, until the result is let go.

    None, and nothing changed, without a compiler or where torch does not hand out the kernel that is to be replaced.
    """
    library = getattr(native.load(), "library", None)
    get_kernel = getattr(torch.library, "get_kernel", None)
    if library is None or get_kernel is None:
        return None
    return Embeddings(library, get_kernel(f"aten::{_OPERATOR}", "CPU"))


def _zeros(count: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """A table of zeros. Of a large one, rows that nobody writes to take no memory: the batch reaches few of them."""
    nbytes = count * width * dtype.itemsize
    if nbytes <= _HEAP_BYTES:
        return torch.zeros((count, width), dtype=dtype)
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype).view(count, width)
