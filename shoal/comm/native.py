"""The C helpers of the arena: built by the machine's own compiler when first used, with a fallback that needs none.

``load()`` returns an object with four functions. The fallback gives the same answers: it sums in the same order with
torch, and waits through the same futex system call.
"""

from __future__ import annotations

import ctypes
import functools
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch

from shoal.kernels.build import build

_SOURCES = [Path(__file__).with_name(name) for name in ("native.c", "lines.c", "dense.c", "rounds.c", "letters.c", "waiting.h")]
# No fused multiply-add: the C path must round exactly as torch does.
_FLAGS = ("-ffp-contract=off", "-fno-math-errno")
_SYS_FUTEX = {"x86_64": 202, "aarch64": 98}


@functools.cache
def _pointers(count: int) -> type[ctypes.Array[ctypes.c_void_p]]:
    # Nobody else holds such a type: it would be garbage, and made anew, whenever Python collects some.
    return ctypes.c_void_p * count


def addresses(tensors: Sequence[torch.Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    """Where tensors lie, as C takes it."""
    return _pointers(len(tensors))(*[tensor.data_ptr() for tensor in tensors])


class Native(Protocol):
    """What the arena needs from below; addresses are those of this process."""

    name: str

    def post(self, address: int, value: int) -> None:
        """Store a 32-bit value that everything written before it precedes, and wake the sleepers."""

    def wait_all(self, address: int, stride: int, n: int, target: int, spin_s: float, timeout_s: float) -> int:
        """Wait until n words have reached target; -1, or the index of the first that has not after timeout_s."""

    def wait_any(self, words: int, stride: int, fellows: int, fellow_stride: int, n: int, spin_s: float) -> int:
        """Look for a word that differs from its fellow, for spin_s at most; the index of the first, or -1."""

    def sum_into(self, out: torch.Tensor, sources: Sequence[torch.Tensor], scale: float) -> None:
        """out = (sources[0] + sources[1] + ...) * scale, elementwise in that order; all 1-D and contiguous."""


class _Compiled:
    name = "c"

    def __init__(self, lib: ctypes.CDLL) -> None:
        self.library = lib
        self._post = lib.shoal_post
        self._post.argtypes = [ctypes.c_void_p, ctypes.c_uint32]
        self._post.restype = None
        self._wait = lib.shoal_wait_all
        self._wait.argtypes = [
            ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_uint32, ctypes.c_int64, ctypes.c_int64,
        ]  # fmt: skip
        self._wait.restype = ctypes.c_int
        self._wait_any = lib.shoal_wait_any
        self._wait_any.argtypes = [
            ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_int64,
        ]  # fmt: skip
        self._wait_any.restype = ctypes.c_int
        self._sum = {
            torch.float32: (lib.shoal_sum_f32, ctypes.c_float),
            torch.float64: (lib.shoal_sum_f64, ctypes.c_double),
        }
        for function, kind in self._sum.values():
            function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, kind]
            function.restype = None

    def post(self, address: int, value: int) -> None:
        self._post(address, value & 0xFFFFFFFF)

    def wait_all(self, address: int, stride: int, n: int, target: int, spin_s: float, timeout_s: float) -> int:
        return int(self._wait(address, stride, n, target & 0xFFFFFFFF, int(spin_s * 1e9), int(timeout_s * 1e9)))

    def wait_any(self, words: int, stride: int, fellows: int, fellow_stride: int, n: int, spin_s: float) -> int:
        return int(self._wait_any(words, stride, fellows, fellow_stride, n, int(spin_s * 1e9)))

    def sum_into(self, out: torch.Tensor, sources: Sequence[torch.Tensor], scale: float) -> None:
        entry = self._sum.get(out.dtype)
        if entry is None:
            torch_sum(out, sources, scale)
            return
        entry[0](out.data_ptr(), addresses(sources), len(sources), out.numel(), scale)


class _Fallback:
    name = "torch"

    def __init__(self) -> None:
        number = _SYS_FUTEX.get(platform.machine()) if sys.platform == "linux" else None
        self._number = number
        if number is not None:
            self._syscall = ctypes.CDLL(None, use_errno=True).syscall

    def post(self, address: int, value: int) -> None:
        ctypes.c_uint32.from_address(address).value = value & 0xFFFFFFFF
        if self._number is not None:
            self._syscall(self._number, ctypes.c_void_p(address), 1, 0x7FFFFFFF, None, None, 0)

    def wait_all(self, address: int, stride: int, n: int, target: int, spin_s: float, timeout_s: float) -> int:
        deadline = time.monotonic() + timeout_s
        for i in range(n):
            word = ctypes.c_uint32.from_address(address + i * stride)
            while (seen := word.value) != target & 0xFFFFFFFF and (seen - target) & 0x80000000:
                left = deadline - time.monotonic()
                if left <= 0:
                    return i
                if self._number is None:
                    time.sleep(0.0001)
                    continue
                nap = (ctypes.c_long * 2)(int(left), int(left % 1 * 1e9))
                self._syscall(self._number, ctypes.c_void_p(address + i * stride), 0, seen, nap, None, 0)
        return -1

    def wait_any(self, words: int, stride: int, fellows: int, fellow_stride: int, n: int, spin_s: float) -> int:
        def word(address: int) -> int:
            return int(ctypes.c_uint32.from_address(address).value)

        # Looked at once: there is no spinning in Python.
        differs = (i for i in range(n) if word(words + i * stride) != word(fellows + i * fellow_stride))
        return next(differs, -1)

    def sum_into(self, out: torch.Tensor, sources: Sequence[torch.Tensor], scale: float) -> None:
        torch_sum(out, sources, scale)


def torch_sum(out: torch.Tensor, sources: Sequence[torch.Tensor], scale: float) -> None:
    """Write the sum of some tensors, times a factor, wherever they lie."""
    total = sources[0]
    for source in sources[1:]:
        total = total + source
    torch.mul(total, scale, out=out)


@functools.lru_cache(maxsize=1)
def load() -> Native:
    """Return the compiled helpers, built now if they never were, or the fallback where there is no compiler.

    ``SHOAL_NATIVE=0`` asks for the fallback.
    """
    # The fallback stores words with plain moves, which is enough only where stores are not reordered.
    try:
        return _Compiled(build("arena", _SOURCES, _FLAGS))
    except (OSError, subprocess.SubprocessError):
        return _Fallback()
