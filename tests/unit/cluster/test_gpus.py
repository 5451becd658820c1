"""GPUs, as their driver lists them."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.cluster import gpus
from shoal.cluster.cluster import Machine
from shoal.cluster.gpus import Gpu


def test_what_the_driver_lists_is_read_and_what_may_be_seen_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 81559'\necho 'NVIDIA A10, 23028'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    gpus._all_gpus.cache_clear()
    h100, a10 = Gpu("NVIDIA H100 80GB HBM3", 81559 << 20), Gpu("NVIDIA A10", 23028 << 20)
    try:
        for visible, expected in (
            (None, (h100, a10)),
            ("1", (a10,)),
            ("", ()),
            ("1,0", (a10, h100)),
            ("GPU-0b", (h100,)),
        ):
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
            if visible is not None:
                monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
            assert gpus.find_gpus() == expected
    finally:
        gpus._all_gpus.cache_clear()
    machine = Machine(name="big", cores=1, memory_bytes=10**9, gpus=(h100,))
    assert ("GPUs", "NVIDIA H100 80GB HBM3 (85.5 GB)") in machine.describe()


def test_a_driver_that_fails_has_no_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'No devices were found'\nexit 6\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    gpus._all_gpus.cache_clear()
    try:
        assert gpus.find_gpus() == ()
    finally:
        gpus._all_gpus.cache_clear()
