"""Memory that several processes share and that has no name.

A memfd lives exactly as long as somebody holds it: whatever is killed, nothing is left behind, and it does not count
against the size of /dev/shm. Its pages are reserved when it is made, so that running out of memory is an error here and
not a SIGBUS in the middle of a step.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys
from pathlib import Path

import numpy as np
import torch

from shoal.cluster.local import find_memory
from shoal.comm.codecs import bytes_of
from shoal.errors import RequestError

_MAPPED_BELOW, _AT_ONCE = 1 << 16, 1 << 30


def supported() -> bool:
    """Whether this system has anonymous shared memory that can be handed to other processes."""
    return sys.platform == "linux" and hasattr(os, "memfd_create")


class Memory:
    """A mapped block: ``bytes`` to use (a 1-D uint8 tensor over all of it), ``address`` where it begins here.

    ``fd`` is the descriptor to hand on, -1 where nobody else can have the block.
    """

    fd = -1

    def __init__(self, mapped: mmap.mmap) -> None:
        self._map = mapped
        self.bytes = torch.frombuffer(mapped, dtype=torch.uint8)
        self.address: int = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        # What a block that has no descriptor keeps of notes that grow: see ``shoal.comm.journal``.
        self.growing: dict[int, dict[int, bytearray]] = {}

    def tensor(self, offset: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """Return a 1-D view of ``numel`` elements that begins ``offset`` bytes in."""
        width = torch.empty(0, dtype=dtype).element_size()
        return self.bytes[offset : offset + numel * width].view(dtype)

    def write(self, address: int, data: memoryview) -> None:
        """Put bytes where they belong; ``address``: in the block, as this process sees it."""
        at = address - self.address
        if data:
            self.bytes[at : at + len(data)].numpy()[:] = np.frombuffer(data, np.uint8)

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is plain bytes in a row within the block."""
        plain = tensor.is_contiguous() and tensor.device.type == "cpu"
        return plain and 0 <= tensor.data_ptr() - self.address < self.bytes.numel()

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Fill a tensor, by ``write`` where that can be."""
        alike = (target.dtype, target.shape, target.device) == (source.dtype, source.shape, source.device)
        if alike and source.is_contiguous() and self.holds(target):
            self.write(target.data_ptr(), bytes_of(source))
        else:
            target.copy_(source)

    def let_go(self, address: int, nbytes: int) -> None:
        """Of memory that others keep: count it no longer to this process's. It stays as it is, and comes back when it is read."""

    def close(self) -> None:
        """Give the descriptor back, once; the mapping goes when the last view of it does."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


class PrivateMemory(Memory):
    """A block of this process's own, all zero, on any system."""

    def __init__(self, size: int) -> None:
        super().__init__(mmap.mmap(-1, max(size, mmap.PAGESIZE)))


class SharedMemory(Memory):
    """A block of shared memory without a name."""

    def __init__(self, fd: int, size: int) -> None:
        super().__init__(mmap.mmap(fd, size))
        self.fd = fd
        self.size = size

    def write(self, address: int, data: memoryview) -> None:
        # By way of the descriptor: mapping its pages one by one takes twice as long as copying what goes there.
        at = address - self.address
        if self.fd < 0 or len(data) < _MAPPED_BELOW:
            super().write(address, data)
            return
        while data:
            written = os.pwrite(self.fd, data[:_AT_ONCE], at)
            data, at = data[written:], at + written

    def let_go(self, address: int, nbytes: int) -> None:
        first = (address - self.address) // mmap.PAGESIZE * mmap.PAGESIZE
        # Whole pages: of a shared mapping nothing is lost, whoever else has something there.
        self._map.madvise(mmap.MADV_DONTNEED, first, min(address - self.address + nbytes, len(self._map)) - first)

    def give_back(self, offset: int, nbytes: int) -> None:
        """Give pages back, from the beginning of one on: what is there is zero from now on, for everybody. OSError."""
        self._map.madvise(mmap.MADV_REMOVE, offset, -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE)

    @classmethod
    def create(cls, size: int, label: str = "shoal") -> SharedMemory:
        """Make and reserve ``size`` bytes, all zero; RequestError where the machine does not have them."""
        size = max(size, mmap.PAGESIZE)
        # Asked beforehand: a memfd has no limit of its own, so the kernel would look for victims before it said no.
        if size > find_memory(Path("/"))[1]:
            raise _too_much(size)
        fd = os.memfd_create(label, os.MFD_CLOEXEC)
        try:
            os.posix_fallocate(fd, 0, size)
        except OSError as error:
            os.close(fd)
            if error.errno in (errno.ENOSPC, errno.ENOMEM):
                raise _too_much(size) from None
            raise
        return cls(fd, size)

    @classmethod
    def attach(cls, fd: int, size: int) -> SharedMemory:
        """Map the first ``size`` bytes behind a file descriptor that another process handed over."""
        return cls(fd, max(size, mmap.PAGESIZE))


def _too_much(size: int) -> RequestError:
    return RequestError(
        f"The run needs {size / 2**20:.0f} MiB of shared memory and the machine cannot give them; "
        "use fewer workers or a smaller model."
    )
