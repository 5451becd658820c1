"""A cluster described in a TOML file, for machines that are somewhere else.

::

    link_gbit_s = 10            # optional: the slowest link between two machines
    memory_limit = "2GB"        # optional: what each worker may use

    [[machines]]
    name = "big"                # optional
    count = 2                   # optional: so many of this kind
    cores = 16
    memory_gb = 64              # 10⁹ bytes
    bandwidth_gb_s = 20.0       # optional: memory copied in a second, 10⁹ bytes
    matmul_gflop_s = 900        # optional: fp32, 10⁹ operations a second
    link_gbit_s = 25            # optional: this machine's own link; the cluster's is the slowest of all
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shoal.cluster.cluster import Cluster, Machine, parse_memory
from shoal.errors import RequestError, did_you_mean

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_MACHINE_KEYS = ("name", "count", "cores", "memory_gb", "bandwidth_gb_s", "matmul_gflop_s", "link_gbit_s")
_CLUSTER_KEYS = ("link_gbit_s", "memory_limit", "machines")
_MOST_MACHINES = 100_000


def read_cluster(path: Path) -> Cluster:
    """Return the cluster that a file describes.

    Raises:
        RequestError: the file cannot be read, is no TOML, or says something that makes no sense.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RequestError(f"There is no cluster file {path}; check the path.") from None
    except OSError as error:
        raise RequestError(f"The cluster file {path} cannot be read ({error.strerror}); check the path.") from None
    except UnicodeDecodeError:
        raise RequestError(f"The cluster file {path} is not UTF-8 text; save it as such.") from None
    except tomllib.TOMLDecodeError as error:
        raise RequestError(f"The cluster file {path} is not valid TOML ({error}); correct it there.") from None
    where = f"the cluster file {path}"
    _check_keys(values, _CLUSTER_KEYS, where)
    described = values.get("machines")
    if not isinstance(described, list) or not described or not all(isinstance(entry, dict) for entry in described):
        raise RequestError(f"There are no machines in {where}; add [[machines]] with cores and memory_gb.")
    machines: list[Machine] = []
    links = [_positive(values, "link_gbit_s", where)]
    for index, entry in enumerate(described, start=1):
        here = f"machine {index} of {where}"
        machines += _machines(entry, index, here)
        links.append(_positive(entry, "link_gbit_s", here))
    return Cluster(
        machines=tuple(machines),
        link_gbit_s=min((link for link in links if link is not None), default=None),
        memory_limit_bytes=parse_memory(values["memory_limit"]) if "memory_limit" in values else None,
    )


def _machines(entry: Mapping[str, Any], index: int, where: str) -> list[Machine]:
    """Return the machines that one ``[[machines]]`` stands for."""
    _check_keys(entry, _MACHINE_KEYS, where)
    for key in ("cores", "memory_gb"):
        if key not in entry:
            raise RequestError(f"{key} is missing in {where}; add it.")
    name = entry.get("name", f"machine-{index}")
    if not isinstance(name, str) or not name.strip():
        raise RequestError(f"name is {name!r} in {where}; give a text, or leave it out.")
    count = _whole(entry, "count", where) if "count" in entry else 1
    memory_gb = _positive(entry, "memory_gb", where) or 0.0
    machine = {
        "cores": _whole(entry, "cores", where),
        "memory_bytes": int(memory_gb * 1e9),
        "bandwidth_gb_s": _positive(entry, "bandwidth_gb_s", where),
        "matmul_gflop_s": _positive(entry, "matmul_gflop_s", where),
    }
    names = [name] if count == 1 else [f"{name}-{number}" for number in range(1, count + 1)]
    return [Machine(name=each, **machine) for each in names]  # type: ignore[arg-type]


def _check_keys(values: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    for key in values:
        if key not in known:
            raise RequestError(
                f'"{key}" in {where} is no key.{did_you_mean(key, known)} The keys are {", ".join(known)}.'
            )


def _whole(values: Mapping[str, Any], key: str, where: str) -> int:
    value = values[key]
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _MOST_MACHINES:
        raise RequestError(f"{key} is {value!r} in {where}; give a whole number from 1 to {_MOST_MACHINES}.")
    return value


def _positive(values: Mapping[str, Any], key: str, where: str) -> float | None:
    value = values.get(key)
    if value is None:
        return None
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
        raise RequestError(f"{key} is {value!r} in {where}; give a number above 0, without a unit.")
    return float(value)
