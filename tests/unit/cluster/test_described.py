"""Clusters from files, and a sentence for each kind of mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.cluster import Cluster, Machine
from shoal.errors import RequestError

GOOD = """
link_gbit_s = 10
memory_limit = "2GB"
[[machines]]
name = "big"
count = 2
cores = 16
memory_gb = 64
bandwidth_gb_s = 20.5
matmul_gflop_s = 900
[[machines]]
cores = 2
memory_gb = 0.5
link_gbit_s = 2.5
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "cluster.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_machines_are_read_with_their_units(tmp_path: Path) -> None:
    cluster = Cluster.from_toml(written(tmp_path, GOOD))
    big = {"cores": 16, "memory_bytes": 64 * 10**9, "bandwidth_gb_s": 20.5, "matmul_gflop_s": 900.0}
    assert cluster.machines == (
        Machine(name="big-1", **big),  # type: ignore[arg-type]
        Machine(name="big-2", **big),  # type: ignore[arg-type]
        Machine(name="machine-2", cores=2, memory_bytes=5 * 10**8),
    )
    assert (cluster.link_gbit_s, cluster.memory_limit_bytes, cluster.cores) == (2.5, 2 * 10**9, 34)


def test_the_least_is_cores_and_memory(tmp_path: Path) -> None:
    cluster = Cluster.from_toml(str(written(tmp_path, "[[machines]]\ncores = 1\nmemory_gb = 1")))
    assert cluster == Cluster(machines=(Machine(name="machine-1", cores=1, memory_bytes=10**9),))


ONE = "[[machines]]\ncores = 2\nmemory_gb = 4\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cores = ", "not valid TOML"),
        ("", "no machines"),
        ("machines = []", "no machines"),
        ("machines = 3", "no machines"),
        ("machine = 3", 'Did you mean "machines"'),
        ("[[machines]]\nmemory_gb = 4", "cores is missing in machine 1 of"),
        (ONE + "[[machines]]\ncores = 4", "memory_gb is missing in machine 2 of"),
        ("[[machines]]\ncores = 2\nmemory = 4", 'Did you mean "memory_gb"'),
        (ONE + "count = 0", "count is 0"),
        (ONE + "count = 1000000000", "from 1 to 100000"),
        (ONE + "name = 3", "name is 3"),
        (ONE + "name = ''", "name is ''"),
        (ONE + "bandwidth_gb_s = 0", "bandwidth_gb_s is 0"),
        (ONE + "matmul_gflop_s = '900 GF'", "without a unit"),
        (ONE + "link_gbit_s = nan", "link_gbit_s is nan"),
        ("link_gbit_s = true\n" + ONE, "link_gbit_s is True in the cluster file"),
        ("memory_limit = 'lots'\n" + ONE, "no amount of memory"),
        ("[[machines]]\ncores = 2.5\nmemory_gb = 4", "cores is 2.5"),
        ("[[machines]]\ncores = 2\nmemory_gb = -4", "memory_gb is -4"),
    ],
)
def test_each_mistake_gets_one_line(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(RequestError) as caught:
        Cluster.from_toml(written(tmp_path, text))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="There is no cluster file .*nowhere.toml"):
        Cluster.from_toml(tmp_path / "nowhere.toml")
    with pytest.raises(RequestError, match="cannot be read"):
        Cluster.from_toml(tmp_path)
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(RequestError, match="not UTF-8"):
        Cluster.from_toml(tmp_path / "bytes.toml")
