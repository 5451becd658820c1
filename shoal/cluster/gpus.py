"""The NVIDIA GPUs of this machine, as their driver names them; torch is not needed to see them."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from dataclasses import dataclass

_TIMEOUT_S = 20.0


@dataclass(frozen=True)
class Gpu:
    """One GPU; ``memory_bytes``: all that it has."""

    name: str
    memory_bytes: int


def find_gpus() -> tuple[Gpu, ...]:
    """Return the GPUs that this process may use, in order; none where there is no driver."""
    return _visible(_all_gpus(), os.environ.get("CUDA_VISIBLE_DEVICES"))


@functools.lru_cache(maxsize=1)
def _all_gpus() -> tuple[Gpu, ...]:
    command = shutil.which("nvidia-smi")
    if command is None:
        return ()
    asked = [command, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(asked, capture_output=True, text=True, timeout=_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return read_list(said.stdout) if said.returncode == 0 else ()


def read_list(text: str) -> tuple[Gpu, ...]:
    """Read what nvidia-smi lists: "NVIDIA H100 80GB HBM3, 81559" a line, memory in MiB."""
    found = []
    for line in text.splitlines():
        name, _, memory = line.rpartition(",")
        if name and memory.strip().isdigit():
            found.append(Gpu(name.strip(), int(memory) << 20))
    return tuple(found)


def _visible(gpus: tuple[Gpu, ...], wanted: str | None) -> tuple[Gpu, ...]:
    """Those that CUDA_VISIBLE_DEVICES leaves; names other than numbers are not looked up, and leave as many as there are."""
    if wanted is None:
        return gpus
    names = [name.strip() for name in wanted.split(",") if name.strip()]
    numbers = [int(name) for name in names if name.isdigit()]
    if len(numbers) == len(names):
        return tuple(gpus[number] for number in numbers if number < len(gpus))
    return gpus[: len(names)]
