"""The nouns: a Machine, and a Cluster of them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from shoal.cluster.gpus import Gpu
from shoal.errors import RequestError

_UNITS = {
    "": 1, "b": 1,
    "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip


def parse_memory(text: str | int) -> int:
    """Return a number of bytes: ``"2GB"`` is 2 × 10⁹, ``"2GiB"`` 2 × 2³⁰, ``"1.5 GB"`` and plain bytes work too.

    Raises:
        RequestError: it is no amount of memory, or none at all.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        number, unit = float(text), ""
    else:
        match = (
            re.fullmatch(r"\s*([0-9]{1,15}(?:\.[0-9]{1,9})?)\s*([A-Za-z]*)\s*", text) if isinstance(text, str) else None
        )
        number, unit = (float(match[1]), match[2].lower()) if match else (0.0, "")
    if unit not in _UNITS or number * _UNITS[unit] < 1:
        raise RequestError(f"{text!r} is no amount of memory; give a number and a unit, such as 2GB, 512MB or 1.5GiB.")
    return int(text) if isinstance(text, int) else int(number * _UNITS[unit])


@dataclass(frozen=True, kw_only=True)
class Machine:
    """One machine: what a process on it may really use.

    Attributes:
        name: what people call it.
        cores: cores that may be used: affinity and container quotas are taken off.
        memory_bytes: memory that may be used, by all processes together.
        memory_available_bytes: what of it was free when it was looked at; None for a machine from a file.
        numa_nodes: for each NUMA node the numbers of its usable processors; empty where it is not known.
        cpu_model: as the processor calls itself; "" where it is not known.
        instruction_sets: those that matter to tensors, such as ``avx2`` and ``avx512_vnni``.
        bandwidth_gb_s: memory copied in a second with all cores, in 10⁹ bytes, each counted once; None: not measured.
        matmul_gflop_s: fp32 matrix multiplication with all cores, in 10⁹ operations a second; None: not measured.
        gpus: the NVIDIA GPUs that its driver shows; plans with ``device=cuda`` use them.
    """

    name: str
    cores: int
    memory_bytes: int
    memory_available_bytes: int | None = None
    numa_nodes: tuple[tuple[int, ...], ...] = ()
    cpu_model: str = ""
    instruction_sets: tuple[str, ...] = ()
    bandwidth_gb_s: float | None = None
    matmul_gflop_s: float | None = None
    gpus: tuple[Gpu, ...] = ()

    def describe(self) -> list[tuple[str, str]]:
        """Return (name, value) rows for people; what is not known is left out."""
        memory = _gb(self.memory_bytes)
        if self.memory_available_bytes is not None:
            memory += f", {_gb(self.memory_available_bytes)} free"
        rows = [
            ("processor", self.cpu_model),
            ("cores", str(self.cores)),
            ("memory", memory),
            ("GPUs", ", ".join(f"{gpu.name} ({_gb(gpu.memory_bytes)})" for gpu in self.gpus)),
            ("NUMA nodes", str(len(self.numa_nodes)) if self.numa_nodes else ""),
            ("instructions", " ".join(self.instruction_sets)),
            ("memory copy", f"{self.bandwidth_gb_s:.1f} GB/s" if self.bandwidth_gb_s else ""),
            ("fp32 matmul", f"{self.matmul_gflop_s:.0f} GFLOP/s" if self.matmul_gflop_s else ""),
        ]
        return [(name, value) for name, value in rows if value]


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Machines and the link between them.

    Attributes:
        machines: at least one.
        link_gbit_s: how fast the slowest link between two of them is; None where there is none or nobody knows.
        memory_limit_bytes: what each worker may use, or None.
    """

    machines: tuple[Machine, ...]
    link_gbit_s: float | None = None
    memory_limit_bytes: int | None = None

    def __post_init__(self) -> None:
        if not self.machines:
            raise RequestError("A cluster without machines cannot run anything; give at least one machine.")

    @classmethod
    def local(cls, memory_limit: str | int | None = None, measure: bool = True) -> Cluster:
        """Return this machine as a cluster.

        Args:
            memory_limit: what each worker may use, such as ``"2GB"`` or a number of bytes.
            measure: measure memory bandwidth and matmul rate if that was never done here (about a second). With
                False only remembered numbers are used, and torch is not imported.

        Raises:
            RequestError: ``memory_limit`` is no amount of memory.
        """
        from shoal.cluster.local import find_machine
        from shoal.cluster.measure import with_rates

        limit = None if memory_limit is None else parse_memory(memory_limit)
        return cls(machines=(with_rates(find_machine(), measure=measure),), memory_limit_bytes=limit)

    @classmethod
    def from_toml(cls, path: str | Path) -> Cluster:
        """Return the cluster that a file describes; the keys are in ``described.py``. Raises RequestError."""
        from shoal.cluster.described import read_cluster

        return read_cluster(Path(path))

    @property
    def cores(self) -> int:
        """Usable cores of all machines together."""
        return sum(machine.cores for machine in self.machines)

    @property
    def memory_bytes(self) -> int:
        """Usable memory of all machines together."""
        return sum(machine.memory_bytes for machine in self.machines)

    def describe(self) -> list[tuple[str, str]]:
        """Return (name, value) rows for people: for one machine all about it, for more a row each."""
        if len(self.machines) == 1:
            rows = self.machines[0].describe()
        else:
            rows = [
                ("machines", str(len(self.machines))),
                ("cores", str(self.cores)),
                ("memory", _gb(self.memory_bytes)),
            ]
            for machine in self.machines:
                rows.append((machine.name, ", ".join(f"{name} {value}" for name, value in machine.describe())))
        if self.link_gbit_s is not None:
            rows.append(("link", f"{self.link_gbit_s:g} Gbit/s"))
        if self.memory_limit_bytes is not None:
            rows.append(("limit per worker", _gb(self.memory_limit_bytes)))
        return rows


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 10**8 else f"{size / 1e6:.1f} MB"
