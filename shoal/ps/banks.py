"""Publications in shared memory, for readers on the run's own machine: nothing is compared, sent or encrypted, and copied once.

The publisher writes whole publications into *banks* in turn and says which one holds which by a number; a reader maps the memory
and copies out of the bank that it was told of. A number is taken away long before its bank is written to again (one whole
publication comes in between), so who finds the same number after copying as before has a whole copy, on any processor. Who does
not has been overtaken, and is told of a newer one.

Whoever has the read key is told where the memory is; the system lets only processes of the run's own user open it there.
"""

from __future__ import annotations

import logging
import mmap
import os
from pathlib import Path

import numpy as np

from shoal.comm.memory import SharedMemory
from shoal.errors import RequestError
from shoal.ps.wire import Shared

logger = logging.getLogger(__name__)

BANKS = 3
_LABEL = "shoal-published"
_HEAD_BYTES = mmap.PAGESIZE
_BOOT = Path("/proc/sys/kernel/random/boot_id")


class Banks:
    """The publisher's side."""

    def __init__(self, size: int) -> None:
        """Make them; where the machine does not have the memory to share, they are this process's own, and two."""
        self._size = size
        self._memory: SharedMemory | None = None
        self._pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        try:
            self._memory = SharedMemory.create(_HEAD_BYTES + BANKS * self._pages, _LABEL)
        except (OSError, RequestError) as error:
            logger.info("Readers get the weights by way of sockets: %s", error)
            self._banks = [np.zeros(size, np.uint8) for _ in range(2)]
            self._numbers = np.zeros(2, np.int64)
        else:
            self._banks, self._numbers = _views(self._memory.bytes.numpy(), BANKS, size, self._pages)
        self.newest = 0

    @property
    def bytes(self) -> np.ndarray:
        """The last publication."""
        return self._banks[self.newest]

    @property
    def next(self) -> np.ndarray:
        """Where the next one is to be written; what is there is older, or nothing."""
        return self._banks[self._after(self.newest)]

    def publish(self, number: int) -> None:
        """What was written into ``next`` is publication ``number``."""
        self.newest = self._after(self.newest)
        self._numbers[self.newest] = number
        self._numbers[self._after(self.newest)] = 0

    @property
    def described(self) -> Shared | None:
        """What a reader needs to find them; None where they are not shared."""
        if self._memory is None:
            return None
        found = os.fstat(self._memory.fd)
        return Shared(_boot(), os.getpid(), self._memory.fd, found.st_dev, found.st_ino, self._size, BANKS)

    def close(self) -> None:
        """Nobody finds them any more; who has them keeps them."""
        if self._memory is not None:
            self._memory.close()

    def _after(self, bank: int) -> int:
        return (bank + 1) % len(self._banks)


class SeenBanks:
    """A reader's side."""

    def __init__(self, mapped: mmap.mmap, described: Shared) -> None:
        pages = -(-described.size // mmap.PAGESIZE) * mmap.PAGESIZE
        self.described = described
        self._banks, self._numbers = _views(np.frombuffer(mapped, np.uint8), described.banks, described.size, pages)

    @classmethod
    def find(cls, described: Shared | None, size: int) -> SeenBanks | None:
        """Map what a publisher describes; None where it is not here, not to be had, or not for ``size`` bytes."""
        if described is None or described.boot != _boot() or described.size < size or not 1 < described.banks <= BANKS:
            return None
        length = _HEAD_BYTES + described.banks * (-(-described.size // mmap.PAGESIZE) * mmap.PAGESIZE)
        try:
            fd = os.open(f"/proc/{described.pid}/fd/{described.fd}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            found = os.fstat(fd)
            # The number of a process may be another one's here, or by now.
            if (found.st_dev, found.st_ino) != (described.device, described.inode) or found.st_size < length:
                return None
            return cls(mmap.mmap(fd, length, prot=mmap.PROT_READ), described)
        except OSError:
            return None
        finally:
            os.close(fd)

    def bytes_of(self, bank: int) -> np.ndarray:
        """A bank, not to be written to. IndexError where there is none of that number."""
        return self._banks[bank]

    def holds(self, bank: int, number: int) -> bool:
        """Whether a publication is in a bank still."""
        return int(self._numbers[bank]) == number


def _views(raw: np.ndarray, count: int, size: int, pages: int) -> tuple[list[np.ndarray], np.ndarray]:
    # Each number on a cache line of its own.
    numbers = raw[:_HEAD_BYTES].view(np.int64)[:: 64 // 8][:count]
    return [raw[at : at + size] for at in (_HEAD_BYTES + k * pages for k in range(count))], numbers


def _boot() -> str:
    """What tells this machine, since it was started, from all others."""
    try:
        return _BOOT.read_text().strip()
    except OSError:
        return ""
