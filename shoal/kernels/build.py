"""Building C files into a library: once for each source, compiler, processor and set of flags, kept in the cache folder."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from shoal.cluster.cache import cache_dir

_ALWAYS = ("-O3", "-march=native", "-shared", "-fPIC")
_TIMEOUT_S = 120.0


def build(name: str, sources: Sequence[Path], flags: Sequence[str] = ()) -> ctypes.CDLL:
    """Compile C files, unless that was done before, and load the library.

    Args:
        name: what the library's file is called.
        sources: the C files, and headers that they include; only those that end in ``.c`` are compiled.
        flags: for the compiler, beside optimisation for this very processor.

    Raises:
        OSError: there is no compiler, this is not Linux, ``SHOAL_NATIVE=0`` is set, or the library does not load.
        subprocess.SubprocessError: the compiler failed or took too long.
    """
    if os.environ.get("SHOAL_NATIVE") == "0":
        raise FileNotFoundError("SHOAL_NATIVE=0 asks for the torch path")
    if sys.platform != "linux":
        raise FileNotFoundError("native code is only built on Linux")
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise FileNotFoundError("no C compiler")
    command = [compiler, *_ALWAYS, *flags]
    text = b"".join(source.read_bytes() for source in sources)
    key = hashlib.sha256(text + " ".join([*command, _processor()]).encode()).hexdigest()[:16]
    library = cache_dir() / "native" / f"{name}-{key}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
            made = Path(scratch) / library.name
            subprocess.run(
                [*command, *(str(s) for s in sources if s.suffix == ".c"), "-o", str(made), "-lm"],
                check=True, capture_output=True, timeout=_TIMEOUT_S,
            )  # fmt: skip
            made.replace(library)
    return ctypes.CDLL(str(library))


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
