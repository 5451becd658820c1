"""Rates are measured once, remembered by what the machine is, and never in the way."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
import torch

from shoal.cluster.cache import read_json, write_json
from shoal.cluster.cluster import Machine
from shoal.cluster.measure import fingerprint, measure_rates, with_rates

MACHINE = Machine(name="here", cores=2, memory_bytes=4 * 2**30, memory_available_bytes=2**26, cpu_model="chip")


def remembered(directory: Path, machine: Machine) -> Path:
    return directory / "machines" / f"{fingerprint(machine)}.json"


def test_a_fingerprint_is_what_the_machine_is_and_not_how_it_is_used() -> None:
    same = dataclasses.replace(MACHINE, name="there", memory_available_bytes=1, bandwidth_gb_s=3.0)
    assert fingerprint(same) == fingerprint(MACHINE)
    assert len(fingerprint(MACHINE)) == 16
    for change in ({"cores": 3}, {"memory_bytes": 8 * 2**30}, {"cpu_model": "other"}, {"instruction_sets": ("avx2",)}):
        assert fingerprint(dataclasses.replace(MACHINE, **change)) != fingerprint(MACHINE)  # type: ignore[arg-type]


def test_measuring_gives_rates_and_puts_the_threads_back() -> None:
    before = torch.get_num_threads()
    bandwidth_gb_s, matmul_gflop_s = measure_rates(dataclasses.replace(MACHINE, cores=before + 1))
    assert 0 < bandwidth_gb_s < 100_000 and 0 < matmul_gflop_s < 10_000_000
    assert torch.get_num_threads() == before


def test_what_is_remembered_is_not_measured_again(tmp_path: Path) -> None:
    write_json(remembered(tmp_path, MACHINE), {"bandwidth_gb_s": 1.25, "matmul_gflop_s": 7})
    machine = with_rates(MACHINE, directory=tmp_path)
    assert (machine.bandwidth_gb_s, machine.matmul_gflop_s) == (1.25, 7.0)


@pytest.mark.parametrize("known", [{}, {"bandwidth_gb_s": "fast", "matmul_gflop_s": 7}, {"bandwidth_gb_s": 0}])
def test_what_is_not_rightly_remembered_is_measured_and_mended(tmp_path: Path, known: dict[str, object]) -> None:
    path = remembered(tmp_path, MACHINE)
    write_json(path, known)
    assert with_rates(MACHINE, measure=False, directory=tmp_path) == MACHINE
    machine = with_rates(MACHINE, directory=tmp_path)
    mended = read_json(path) or {}
    assert (mended["bandwidth_gb_s"], mended["matmul_gflop_s"]) == (machine.bandwidth_gb_s, machine.matmul_gflop_s)


def test_a_cache_that_cannot_be_written_is_no_obstacle(tmp_path: Path) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    assert (with_rates(MACHINE, directory=in_the_way).bandwidth_gb_s or 0) > 0
    assert os.listdir(tmp_path) == ["file"]
