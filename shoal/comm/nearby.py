"""Which processes of a job share a machine, and the shared memory through which those speak.

Processes that something else started have no ancestor that could hand a descriptor down. The first one on each machine makes
a block of shared memory, the others open it by the number of its process and its descriptor, and all forget the descriptor
then: the block lives as long as they do, and has no name. Where that is not allowed, or not on Linux, they speak through
sockets like processes of different machines.
"""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from shoal.comm.memory import SharedMemory, supported
from shoal.comm.port import Port
from shoal.comm.region import RegionLayout
from shoal.errors import RequestError

MACHINE = "SHOAL_MACHINE"
"""A name in the environment that tells the machines of a job apart where nothing else does, such as in a test."""
_SEATS = 16
_MARK_BYTES = 16
_PAGE = 4096


def machine_key() -> str:
    """What processes have in common that can share memory: the booted kernel, and the namespace of process numbers."""
    parts = [socket.gethostname(), os.environ.get(MACHINE, "")]
    for path in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        try:
            parts.append(os.readlink(path) if "ns" in path else Path(path).read_text().strip())
        except OSError:
            parts.append("")
    return "|".join(parts)


def neighbours(keys: Sequence[str], rank: int) -> list[int]:
    """The ranks on the machine of a rank, itself among them, by everybody's ``machine_key``."""
    return [other for other, key in enumerate(keys) if key == keys[rank]]


def open_port(
    keys: Sequence[str], rank: int, deadline_s: float, gather: Callable[[Any, str], list[Any]]
) -> Port | None:
    """Open the memory that the ranks of this machine share; all processes of the job call it together.

    Args:
        keys: everybody's ``machine_key``.
        gather: (a value, what it is) -> everybody's values, by rank.

    Returns this rank's port; None, for all ranks of a machine alike, where it is alone there or the memory cannot be shared.
    """
    here = neighbours(keys, rank)
    layout = RegionLayout(world_size=len(here), seats=_SEATS)
    size = _PAGE + layout.bytes
    made: SharedMemory | None = None
    offer: tuple[int, int, bytes] | None = None
    if here[0] == rank and len(here) > 1 and supported():
        mark = secrets.token_bytes(_MARK_BYTES)
        try:
            made = SharedMemory.create(size, "shoal-nearby")
            made.bytes.numpy()[:_MARK_BYTES] = memoryview(mark)
            offer = (os.getpid(), made.fd, mark)
        except (RequestError, OSError):
            made = None
    offers = gather(offer, "the memory of each machine")
    memory = made if here[0] == rank else _take_up(offers[here[0]], size)
    opened = gather(memory is not None, "the shared memory to be opened")
    if memory is not None:
        # From here on the mappings alone keep it.
        memory.close()
    if memory is None or not all(opened[other] for other in here):
        return None
    port = Port(memory.bytes[_PAGE:], here.index(rank), len(here), deadline_s=deadline_s, layout=layout)
    port.world = port.names = tuple(here)
    return port


def _take_up(offer: tuple[int, int, bytes] | None, size: int) -> SharedMemory | None:
    if offer is None or not supported():
        return None
    process, descriptor, mark = offer
    try:
        fd = os.open(f"/proc/{process}/fd/{descriptor}", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        memory = SharedMemory.attach(fd, size)
    except (OSError, ValueError):
        os.close(fd)
        return None
    if memory.bytes[:_MARK_BYTES].numpy().tobytes() != mark:
        # A process of the same number, but not the one that was meant.
        memory.close()
        return None
    return memory
