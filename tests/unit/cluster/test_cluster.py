"""The nouns: amounts of memory, sums over machines, rows for people, and this very machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from shoal.cluster import Cluster, Machine
from shoal.cluster.cluster import parse_memory
from shoal.errors import RequestError


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2GB", 2 * 10**9),
        ("2gb", 2 * 10**9),
        ("2GiB", 2 * 2**30),
        ("1.5 GB", 1_500_000_000),
        (" 512MB ", 512 * 10**6),
        ("3M", 3 * 10**6),
        ("10kB", 10_000),
        ("7", 7),
        ("7B", 7),
        ("1TB", 10**12),
        (123, 123),
    ],
)
def test_memory_is_read_with_its_unit(text: str | int, size: int) -> None:
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["", "GB", "2XB", "-2GB", "0", 0, -1, True, "2 GB 3", "1e9", "nan", None, 1.5])
def test_what_is_no_memory_says_how_to_write_it(text: object) -> None:
    with pytest.raises(RequestError, match="such as 2GB"):
        parse_memory(text)  # type: ignore[arg-type]


def test_a_cluster_sums_its_machines() -> None:
    big, small = (
        Machine(name="big", cores=8, memory_bytes=64 * 10**9),
        Machine(name="small", cores=2, memory_bytes=10**9),
    )
    cluster = Cluster(machines=(big, small), link_gbit_s=10.0, memory_limit_bytes=2 * 10**9)
    assert (cluster.cores, cluster.memory_bytes) == (10, 65 * 10**9)
    assert cluster.describe() == [
        ("machines", "2"),
        ("cores", "10"),
        ("memory", "65.0 GB"),
        ("big", "cores 8, memory 64.0 GB"),
        ("small", "cores 2, memory 1.0 GB"),
        ("link", "10 Gbit/s"),
        ("limit per worker", "2.0 GB"),
    ]
    with pytest.raises(RequestError, match="without machines"):
        Cluster(machines=())


def test_a_machine_describes_what_is_known() -> None:
    machine = Machine(
        name="here",
        cores=2,
        memory_bytes=24 * 10**9,
        memory_available_bytes=10**7,
        numa_nodes=((0, 1),),
        cpu_model="A processor",
        instruction_sets=("avx2", "fma"),
        bandwidth_gb_s=11.14,
        matmul_gflop_s=59.7,
    )
    assert Cluster(machines=(machine,)).describe() == [
        ("processor", "A processor"),
        ("cores", "2"),
        ("memory", "24.0 GB, 10.0 MB free"),
        ("NUMA nodes", "1"),
        ("instructions", "avx2 fma"),
        ("memory copy", "11.1 GB/s"),
        ("fp32 matmul", "60 GFLOP/s"),
    ]


def test_this_machine_is_found_and_its_rates_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path))
    unmeasured = Cluster.local(measure=False)
    assert unmeasured.machines[0].bandwidth_gb_s is None and not list(tmp_path.iterdir())
    first = Cluster.local("2GB")
    assert 1 <= first.cores <= (os.cpu_count() or 1)
    assert 0 < (first.machines[0].memory_available_bytes or 0) <= first.memory_bytes
    assert first.memory_limit_bytes == 2 * 10**9
    assert (first.machines[0].bandwidth_gb_s or 0) > 0 and (first.machines[0].matmul_gflop_s or 0) > 0
    again = Cluster.local(measure=False)
    assert again.machines[0].bandwidth_gb_s == first.machines[0].bandwidth_gb_s
    assert again.machines[0].matmul_gflop_s == first.machines[0].matmul_gflop_s
    with pytest.raises(RequestError, match="no amount of memory"):
        Cluster.local("lots", measure=False)


def test_finding_without_measuring_needs_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from shoal.cluster import Cluster; Cluster.local(measure=False); sys.exit('torch' in sys.modules)"
    )
    environment = {"PYTHONPATH": ":".join(path for path in sys.path if path), "SHOAL_CACHE": str(tmp_path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0
