"""Measure how fast a machine copies memory and multiplies matrices, once, and remember it."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import time
from collections.abc import Callable
from pathlib import Path

from shoal.cluster.cache import cache_dir, read_json, write_json
from shoal.cluster.cluster import Machine

_BUDGET_S = 0.3
_COPY_BYTES = 128 * 2**20
_MATRIX = 1024


def fingerprint(machine: Machine) -> str:
    """Return 16 hexadecimal digits that stay the same as long as measurements on this machine mean the same.

    From the processor, its instruction sets, usable cores and memory (in whole GiB, because the kernel's own share
    differs a little from boot to boot), and the version of torch, which is not imported for this.
    """
    try:
        torch_version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        torch_version = "none"
    memory_gib = round(machine.memory_bytes / 2**30)
    parts = [machine.cpu_model, machine.instruction_sets, machine.cores, memory_gib, torch_version]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def with_rates(machine: Machine, measure: bool = True, directory: Path | None = None) -> Machine:
    """Return the machine with its measured rates: remembered ones, else measured now if ``measure`` says so.

    Args:
        machine: the one this process runs on.
        measure: whether to measure where nothing is remembered; else the rates stay None.
        directory: where they are remembered; None is ``cache_dir()``.
    """
    path = (cache_dir() if directory is None else directory) / "machines" / f"{fingerprint(machine)}.json"
    known = read_json(path) or {}
    bandwidth_gb_s, matmul_gflop_s = _rate(known.get("bandwidth_gb_s")), _rate(known.get("matmul_gflop_s"))
    if bandwidth_gb_s is None or matmul_gflop_s is None:
        if not measure:
            return machine
        bandwidth_gb_s, matmul_gflop_s = measure_rates(machine)
        # a cache that cannot be written costs a second next time, no more
        with contextlib.suppress(OSError):
            rates = {"bandwidth_gb_s": bandwidth_gb_s, "matmul_gflop_s": matmul_gflop_s}
            write_json(path, {"cpu_model": machine.cpu_model, "cores": machine.cores, **rates})
    return dataclasses.replace(machine, bandwidth_gb_s=bandwidth_gb_s, matmul_gflop_s=matmul_gflop_s)


def measure_rates(machine: Machine) -> tuple[float, float]:
    """Return (memory copy in 10⁹ bytes a second, fp32 matmul in 10⁹ operations a second) with all usable cores.

    The best of the repetitions counts, because whatever else runs can only slow one down. Takes under a second after
    torch is imported, and twice 128 MiB at most. The number of torch's threads is put back.
    """
    import torch

    free_bytes = machine.memory_available_bytes or machine.memory_bytes
    copy_floats = max(min(_COPY_BYTES, free_bytes // 16), 2**20) // 4
    threads_before = torch.get_num_threads()
    torch.set_num_threads(machine.cores)
    try:
        with torch.no_grad():
            # filled, not just allocated: the first touch of a page is the kernel's work
            source, target = torch.ones(copy_floats), torch.zeros(copy_floats)
            copy_s = _best_s(lambda: target.copy_(source))
            left, right = torch.ones(_MATRIX, _MATRIX), torch.ones(_MATRIX, _MATRIX)
            product = torch.empty(_MATRIX, _MATRIX)
            matmul_s = _best_s(lambda: torch.mm(left, right, out=product))
    finally:
        torch.set_num_threads(threads_before)
    return copy_floats * 4 / copy_s / 1e9, 2 * _MATRIX**3 / matmul_s / 1e9


def _best_s(work: Callable[[], object]) -> float:
    """Return the shortest of several times, one run first to warm up, for about ``_BUDGET_S`` altogether."""
    work()
    best_s = float("inf")
    end_s = time.perf_counter() + _BUDGET_S
    while best_s == float("inf") or time.perf_counter() < end_s:
        start_s = time.perf_counter()
        work()
        best_s = min(best_s, max(time.perf_counter() - start_s, 1e-9))
    return best_s


def _rate(value: object) -> float | None:
    """Return a remembered rate, or None where it is none (a file that somebody edited)."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0 else None
