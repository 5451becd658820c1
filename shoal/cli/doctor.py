"""``shoal doctor``: what this machine has, and what would make the missing parts available."""

from __future__ import annotations

import ctypes
import errno
import importlib.metadata
import mmap
import os
import platform
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

from shoal.cli.answer import Answer, table
from shoal.cli.options import JsonFlag
from shoal.errors import ShoalError

PACKAGES = (
    "torch", "numpy", "safetensors", "typer", "rich", "cloudpickle", "torchmetrics", "matplotlib", "psutil", "pillow",
)  # fmt: skip
_FUTEX_CALLS: Mapping[str, int] = MappingProxyType({"x86_64": 202, "aarch64": 98, "riscv64": 98})
_FUTEX_WAKE = 1


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that shoal can use.

    Attributes:
        name: what.
        available: whether it is there.
        found: what was found, or what happens without it.
        remedy: what would make it available; '' where it is.
    """

    name: str
    available: bool
    found: str
    remedy: str = ""


def doctor(json: JsonFlag = False) -> Answer:
    """Say what this machine has and what is missing."""
    versions = {"python": platform.python_version(), "shoal": version_of("shoal")}
    versions |= {name: version_of(name) for name in PACKAGES}
    machine = _machine_rows()
    checks = [check() for check in CHECKS]
    checks += [
        Check(name=name, available=False, found="not installed", remedy=f"pip install {name}")
        for name in PACKAGES
        if versions[name] is None
    ]
    result = {"machine": [list(row) for row in machine], "versions": versions, "checks": [asdict(c) for c in checks]}
    lines = ["this machine", *_indented(table(machine)), "", "versions"]
    lines += _indented(table([(name, found or "not installed") for name, found in versions.items()]))
    lines += ["", "what shoal can use"]
    lines += _indented(table([("yes" if c.available else "no", c.name, c.found) for c in checks]))
    remedies = [f"  {c.name}: {c.remedy}" for c in checks if c.remedy]
    return Answer(result, lines + (["", "to make the rest available", *remedies] if remedies else []))


def version_of(package: str) -> str | None:
    """Return the version of a package that is installed, or imported from where its sources lie; else None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return getattr(sys.modules.get(package), "__version__", None)


def _machine_rows() -> list[tuple[str, ...]]:
    from shoal.cluster.local import find_cores

    try:
        from shoal.cluster import Cluster

        described: Any = Cluster.local().describe()
    except (ShoalError, ImportError, OSError) as error:
        return [("cores", str(find_cores())), ("not measured", str(error))]
    rows = described.items() if isinstance(described, Mapping) else described
    return [tuple(str(cell) for cell in row) for row in rows]


def _compiler() -> Check:
    command = next((found for name in ("c++", "g++", "clang++", "cc", "gcc") if (found := shutil.which(name))), None)
    if command:
        return Check(name="C/C++ compiler", available=True, found=command)
    return Check(
        name="C/C++ compiler",
        available=False,
        found="none: torch operations are used instead of native ones, with the same answers",
        remedy="install one, such as: apt install g++",
    )


def _memfd() -> Check:
    name = "anonymous shared memory (memfd)"
    try:
        descriptor = os.memfd_create("shoal-doctor")
        try:
            os.ftruncate(descriptor, mmap.PAGESIZE)
            mmap.mmap(descriptor, mmap.PAGESIZE).close()
        finally:
            os.close(descriptor)
    except (AttributeError, OSError) as error:
        return Check(
            name=name,
            available=False,
            found=f"no ({error}): several workers then need torch's process groups",
            remedy="run on Linux, or let the container make memfd_create calls",
        )
    return Check(name=name, available=True, found="works")


def _futex() -> Check:
    name = "waiting without burning a core (futex)"
    number = _FUTEX_CALLS.get(platform.machine())
    if sys.platform != "linux" or number is None:
        return Check(
            name=name, available=False, found="not on this kind of machine", remedy="run on Linux on x86-64 or ARM"
        )
    call = ctypes.CDLL(None, use_errno=True).syscall
    woken = call(number, ctypes.byref(ctypes.c_uint32(0)), _FUTEX_WAKE, 1, None, None, 0)
    if woken == 0:
        return Check(name=name, available=True, found="works")
    return Check(
        name=name,
        available=False,
        found=errno.errorcode.get(ctypes.get_errno(), "refused"),
        remedy="let the container make futex calls",
    )


def _shared_directory() -> Check:
    try:
        found = os.statvfs("/dev/shm")
    except OSError:
        return Check(name="/dev/shm", available=False, found="not there; shoal's own memory does not need it")
    size_mb = found.f_blocks * found.f_frsize / 1e6
    return Check(name="/dev/shm", available=True, found=f"{size_mb:,.0f} MB; shoal's own memory does not need it")


def _tensorboard() -> Check:
    version = version_of("tensorboardX")
    if version:
        return Check(name="tensorboardX (--tensorboard)", available=True, found=version)
    return Check(
        name="tensorboardX (--tensorboard)", available=False, found="not installed", remedy="pip install tensorboardX"
    )


def _npm() -> Check:
    command = shutil.which("npm")
    if command:
        return Check(name="npm", available=True, found=command)
    return Check(
        name="npm",
        available=False,
        found="none: only the official archive is left to fetch CIFAR-10 from",
        remedy="install Node.js with npm, if the official archive cannot be reached",
    )


def _gpu() -> Check:
    driver = shutil.which("nvidia-smi") is not None or os.path.exists("/dev/nvidiactl")
    try:
        import torch

        device = torch.accelerator.current_accelerator(check_available=True)
        build = str(torch.__version__)
    except ImportError:
        device, build = None, "not installed"
    if device is not None:
        if device.type != "cuda":
            return Check(name="GPU", available=True, found=f"{device.type}, seen by torch; plans do not use it")
        names = ", ".join(torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count()))
        return Check(name="GPU", available=True, found=f"{names}; plans with device=cuda train on it")
    if driver:
        remedy = f"an NVIDIA driver is here but torch {build} sees no GPU: install a torch with CUDA"
    else:
        remedy = "a GPU, its driver, and a torch built for it; shoal does all it does without"
    return Check(name="GPU", available=False, found="none seen", remedy=remedy)


def _indented(lines: list[str]) -> list[str]:
    return [f"  {line}" for line in lines]


CHECKS: tuple[Callable[[], Check], ...] = (
    _compiler, _memfd, _futex, _shared_directory, _tensorboard, _npm, _gpu,
)  # fmt: skip
"""Every check, in the order shown."""
