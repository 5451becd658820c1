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
from collections.abc import Mapping, Sequence
from pathlib import Path

from shoal.cluster.cache import cache_dir

_ALWAYS = ("-O3", "-march=native", "-shared", "-fPIC")
_TIMEOUT_S = 120.0
_ARGUMENTS = {"P": ctypes.c_void_p, "N": ctypes.c_int64}


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


def operators(source: Path, functions: Mapping[str, str]) -> ctypes.CDLL | None:
    """The library of a C file whose functions are there for float and for double; None where it cannot be built.

    ``functions``: what each takes, a letter for each argument: P a pointer, N a 64-bit whole number. Where the file is
    ``winograd.c`` and one is called ``forward``, they are ``shoal_winograd_forward_f32`` and ``_f64``, and return nothing.
    """
    try:
        library = build(source.stem, [source, *sorted(source.parent.glob("*.h"))])
    except (OSError, subprocess.SubprocessError):
        return None
    for name, takes in functions.items():
        for kind in ("f32", "f64"):
            function = getattr(library, f"shoal_{source.stem}_{name}_{kind}")
            function.argtypes, function.restype = [_ARGUMENTS[letter] for letter in takes], None
    return library


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
