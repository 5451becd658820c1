"""What a process may really use, on machines laid out as files."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

import pytest

import shoal
from shoal.cluster.local import (
    find_affinity,
    find_cores,
    find_machine,
    find_memory,
    find_numa_nodes,
    find_processor,
)

FOUR = frozenset(range(4))
NO_LIMIT_V1 = "9223372036854771712"


def lay_out(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("max 100000", 4), ("200000 100000", 2), ("250000 100000", 2), ("50000 100000", 1), ("900000 100000", 4), ("", 4)],
)
def test_a_v2_quota_counts_in_whole_cores(tmp_path: Path, quota: str, cores: int) -> None:
    lay_out(tmp_path, {"proc/self/cgroup": "0::/job\n", "sys/fs/cgroup/job/cpu.max": quota + "\n"})
    assert find_cores(tmp_path, FOUR) == cores


def test_the_smallest_quota_on_the_way_up_counts(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/outer/inner\n",
        "sys/fs/cgroup/outer/cpu.max": "100000 50000\n",
        "sys/fs/cgroup/outer/inner/cpu.max": "300000 100000\n",
        "sys/fs/cgroup/other/cpu.max": "100000 100000\n",
    }
    assert find_cores(lay_out(tmp_path, files), FOUR) == 2


@pytest.mark.parametrize("folder", ["cpu,cpuacct", "cpu"])
@pytest.mark.parametrize(("quota", "cores"), [("-1", 4), ("150000", 1), ("300000", 3)])
def test_a_v1_quota_counts_too(tmp_path: Path, folder: str, quota: str, cores: int) -> None:
    files = {
        "proc/self/cgroup": "9:memory:/\n4:cpu,cpuacct:/docker/abc\n0::/\n",
        f"sys/fs/cgroup/{folder}/cpu.cfs_quota_us": quota,
        f"sys/fs/cgroup/{folder}/cpu.cfs_period_us": "100000",
    }
    assert find_cores(lay_out(tmp_path, files), FOUR) == cores


def test_without_cgroups_the_affinity_counts(tmp_path: Path) -> None:
    assert find_cores(tmp_path, FOUR) == 4
    assert find_cores(tmp_path, frozenset()) == 1


def test_the_real_affinity_is_asked() -> None:
    if not hasattr(os, "sched_getaffinity"):
        pytest.skip("this system has no affinity")
    before = os.sched_getaffinity(0)
    one = min(before)
    os.sched_setaffinity(0, {one})
    try:
        assert find_affinity() == {one}
        assert find_machine().cores == find_cores() == 1
    finally:
        os.sched_setaffinity(0, before)


def test_nobody_else_counts_cores() -> None:
    """A container's cores are not its machine's: threads for all of these would only take turns."""
    sources = Path(shoal.__file__).parent.rglob("*.py")
    counting = [path.relative_to(Path(shoal.__file__).parent) for path in sources if "cpu_count(" in path.read_text()]
    assert counting == [Path("cluster/local.py")]


MEMINFO = "MemTotal:       8000000 kB\nMemFree:  100 kB\nMemAvailable:   6000000 kB\n"


def test_memory_without_a_limit_is_the_machines(tmp_path: Path) -> None:
    files = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "0::/job\n",
        "sys/fs/cgroup/job/memory.max": "max\n",
        "sys/fs/cgroup/job/memory.current": "5000000000\n",
    }
    assert find_memory(lay_out(tmp_path, files)) == (8_192_000_000, 6_144_000_000)


def test_a_v2_memory_limit_bounds_both(tmp_path: Path) -> None:
    files = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "0::/job\n",
        "sys/fs/cgroup/job/memory.max": "2000000000\n",
        "sys/fs/cgroup/job/memory.current": "1500000000\n",
        "sys/fs/cgroup/job/memory.stat": "anon 1\ninactive_file 400000000\n",
    }
    assert find_memory(lay_out(tmp_path, files)) == (2_000_000_000, 900_000_000)


def test_a_v1_memory_limit_bounds_both_and_its_parent_has_none(tmp_path: Path) -> None:
    files = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "4:memory:/job\n0::/\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": NO_LIMIT_V1,
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "7999999999",
        "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "1000000000",
        "sys/fs/cgroup/memory/job/memory.usage_in_bytes": "1200000000",
    }
    assert find_memory(lay_out(tmp_path, files)) == (1_000_000_000, 0)


def test_memory_is_found_without_proc(tmp_path: Path) -> None:
    total, available = find_memory(tmp_path)
    assert 0 < available <= total


def test_numa_nodes_hold_usable_processors_in_order(tmp_path: Path) -> None:
    node = "sys/devices/system/node"
    files = {
        f"{node}/node10/cpulist": "2\n",
        f"{node}/node2/cpulist": "0-1,3,8-9\n",
        f"{node}/node3/cpulist": "16-31\n",
    }
    lay_out(tmp_path, {**files, f"{node}/node4/cpulist": "\n"})
    assert find_numa_nodes(tmp_path, FOUR) == ((0, 1, 3), (2,))
    assert find_numa_nodes(tmp_path / "nowhere", FOUR) == ()


def test_the_processor_is_read_on_x86_and_arm(tmp_path: Path) -> None:
    flags = "fpu avx512_vnni avx2 amx_tile fma avx512f"
    x86 = f"processor: 0\nmodel name\t: A  Chip: fast\nflags\t\t: {flags}\n\nmodel name: other\n"
    found = find_processor(lay_out(tmp_path / "x86", {"proc/cpuinfo": x86}))
    assert found == ("A  Chip: fast", ("fma", "avx2", "avx512f", "avx512_vnni", "amx_tile"))
    arm = "processor: 0\nFeatures\t: fp asimd sve bf16\n"
    assert find_processor(lay_out(tmp_path / "arm", {"proc/cpuinfo": arm})) == (
        platform.machine(),
        ("asimd", "bf16", "sve"),
    )
    assert find_processor(tmp_path)[1] == ()


def test_a_whole_machine_is_put_together(tmp_path: Path) -> None:
    files = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "0::/\n",
        "sys/fs/cgroup/cpu.max": "150000 100000\n",
        "proc/cpuinfo": "model name: X\nflags: avx2\n",
        "sys/devices/system/node/node0/cpulist": "0-3\n",
    }
    machine = find_machine(lay_out(tmp_path, files), affinity=frozenset({1, 2}))
    assert (machine.cores, machine.memory_bytes, machine.numa_nodes) == (1, 8_192_000_000, ((1, 2),))
    assert (machine.cpu_model, machine.instruction_sets) == ("X", ("avx2",))
    assert machine.bandwidth_gb_s is None


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_this_machine_agrees_with_psutil() -> None:
    psutil = pytest.importorskip("psutil")
    machine = find_machine()
    assert machine.memory_bytes <= psutil.virtual_memory().total
    assert machine.cores <= len(psutil.Process().cpu_affinity())
