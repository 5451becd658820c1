"""Find what this machine has, and what of it this process may really use.

Everything is read below a ``root``, so that tests can lay out a machine of their own. Sources: cgroups(7),
the kernel's cgroup-v1 and cgroup-v2 documents, proc(5), sysfs-devices-node.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from shoal.cluster.cluster import Machine
from shoal.cluster.gpus import find_gpus

_INSTRUCTION_SETS = (
    "sse4_2", "avx", "f16c", "fma", "avx2", "avx_vnni", "avx512f", "avx512bw", "avx512dq", "avx512vl",
    "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16", "amx_fp16",
    "asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2", "sme",
)  # fmt: skip
_ROOT = Path("/")


def find_machine(root: Path = _ROOT, affinity: frozenset[int] | None = None) -> Machine:
    """Return this machine, nothing measured yet.

    Args:
        root: where ``proc`` and ``sys`` are.
        affinity: processors that this process may run on; None asks the system.
    """
    if sys.platform == "darwin" and root == _ROOT:
        return _find_mac()
    allowed = find_affinity() if affinity is None else affinity
    model, instruction_sets = find_processor(root)
    memory_bytes, available_bytes = find_memory(root)
    return Machine(
        name=platform.node() or "this machine",
        cores=find_cores(root, allowed),
        memory_bytes=memory_bytes,
        memory_available_bytes=available_bytes,
        numa_nodes=find_numa_nodes(root, allowed),
        cpu_model=model,
        instruction_sets=instruction_sets,
        gpus=find_gpus() if root == _ROOT else (),
    )


def find_affinity() -> frozenset[int]:
    """Return the numbers of the processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def find_cores(root: Path = _ROOT, affinity: frozenset[int] | None = None) -> int:
    """Return how many cores may be kept busy: the affinity, or a cgroup's CPU quota where that is less.

    A quota of 2.5 cores counts as 2, one below 1 as 1.

    Args:
        root, affinity: as in ``find_machine``.
    """
    cores = len(find_affinity() if affinity is None else affinity)
    for group in _groups(root, "cpu"):
        quota = _cpu_quota(group)
        if quota is not None:
            cores = min(cores, int(quota))
    return max(cores, 1)


def find_memory(root: Path) -> tuple[int, int]:
    """Return (usable, free) memory in bytes, the limits of cgroups included.

    Page cache counts as free where the kernel would drop it first (``inactive_file``).
    """
    info = _key_values(root / "proc/meminfo")
    total = info.get("MemTotal", 0) * 1024
    available = info.get("MemAvailable", info.get("MemFree", 0)) * 1024
    if not total:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        available = total
    for group in _groups(root, "memory"):
        limit = _number(group / "memory.max") or _number(group / "memory.limit_in_bytes")
        # cgroup v1 writes "no limit" as a number near 2^63
        if not limit or limit >= 2**60:
            continue
        used = _number(group / "memory.current") or _number(group / "memory.usage_in_bytes") or 0
        stat = _key_values(group / "memory.stat")
        used -= stat.get("total_inactive_file", stat.get("inactive_file", 0))
        total = min(total, limit)
        available = min(available, max(limit - max(used, 0), 0))
    return total, min(available, total)


def find_numa_nodes(root: Path, affinity: frozenset[int]) -> tuple[tuple[int, ...], ...]:
    """Return for each NUMA node the usable processors on it; nodes without one are left out."""
    nodes = []
    for folder in (root / "sys/devices/system/node").glob("node[0-9]*"):
        usable = sorted(_number_list(_text(folder / "cpulist")) & affinity)
        if usable:
            nodes.append((int(folder.name.removeprefix("node")), tuple(usable)))
    return tuple(processors for _, processors in sorted(nodes))


def find_processor(root: Path) -> tuple[str, tuple[str, ...]]:
    """Return (model name, instruction sets that matter to tensors) of the first processor."""
    model, flags = "", frozenset[str]()
    for line in _text(root / "proc/cpuinfo").splitlines():
        key, _, value = (part.strip() for part in line.partition(":"))
        if key == "model name" and not model:
            model = value
        # "flags" on x86, "Features" on Arm
        if key in ("flags", "Features") and not flags:
            flags = frozenset(value.split())
    return model or platform.machine(), tuple(name for name in _INSTRUCTION_SETS if name in flags)


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Give the folders of the control groups that hold this process, each one's parents included.

    In a container the path in ``/proc/self/cgroup`` may be the host's, where only the root is mounted; the folders
    that do not exist then simply hold no limits.
    """
    mount = root / "sys/fs/cgroup"
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            bases = [mount, mount / "unified"]
        elif controller in controllers.split(","):
            bases = [mount / controllers, mount / controller]
        else:
            continue
        inner = Path(path.lstrip("/"))
        for base in bases:
            yield from (base / part for part in (inner, *inner.parents) if ".." not in part.parts)


def _cpu_quota(group: Path) -> float | None:
    """Return how many cores' time a group may use, or None."""
    words = _text(group / "cpu.max").split()
    if len(words) == 2 and words[0].isdigit() and words[1].isdigit() and int(words[1]):
        return int(words[0]) / int(words[1])
    quota, period = _number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us")
    # cgroup v1 writes "no quota" as -1
    return quota / period if quota and quota > 0 and period else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    try:
        return int(_text(path))
    except ValueError:
        return None


def _key_values(path: Path) -> dict[str, int]:
    """Return the numbers in a file of lines like ``MemTotal:  123 kB`` or ``inactive_file 123``."""
    values = {}
    for line in _text(path).splitlines():
        words = line.replace(":", " ").split()
        if len(words) >= 2 and words[1].isdigit():
            values[words[0]] = int(words[1])
    return values


def _number_list(text: str) -> frozenset[int]:
    """Return the numbers in a list like ``0-3,8,10-11``."""
    numbers: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first.isdigit():
            numbers.update(range(int(first), int(last if last.isdigit() else first) + 1))
    return frozenset(numbers)


def _find_mac() -> Machine:
    """Return a Mac, by sysctl. Untested: no Mac has run this yet."""

    def sysctl(name: str) -> str:
        try:
            return subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, timeout=5).stdout.strip()
        except (OSError, subprocess.TimeoutExpired):
            return ""

    memory = sysctl("hw.memsize")
    memory_bytes = int(memory) if memory.isdigit() else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found = {"avx2": "hw.optional.avx2_0", "avx512f": "hw.optional.avx512f", "bf16": "hw.optional.arm.FEAT_BF16"}
    return Machine(
        name=platform.node() or "this machine",
        cores=find_cores(),
        memory_bytes=memory_bytes,
        cpu_model=sysctl("machdep.cpu.brand_string") or platform.machine(),
        instruction_sets=tuple(name for name, key in found.items() if sysctl(key) == "1"),
    )
