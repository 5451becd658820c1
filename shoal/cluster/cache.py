"""Where shoal remembers things between runs, and JSON files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def cache_dir(environment: Mapping[str, str] | None = None) -> Path:
    """Return the directory for what may be thrown away: measurements, downloads, compiled code.

    ``$SHOAL_CACHE``, else ``$XDG_CACHE_HOME/shoal``, else ``~/.cache/shoal``; for a user without a home, a directory
    of their own among the temporary files. It need not exist: whoever writes makes it.
    """
    env = os.environ if environment is None else environment
    if env.get("SHOAL_CACHE"):
        return Path(os.path.abspath(os.path.expanduser(env["SHOAL_CACHE"])))
    # the XDG rules say that a relative path there is to be ignored
    if os.path.isabs(env.get("XDG_CACHE_HOME", "")):
        return Path(env["XDG_CACHE_HOME"]) / "shoal"
    home = os.path.expanduser(env.get("HOME") or "~")
    if not os.path.isabs(home):
        return Path(tempfile.gettempdir()) / f"shoal-{os.getuid()}"
    return Path(home) / ".cache" / "shoal"


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in a file; None where it is missing, unreadable, damaged, or no object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object so that a reader sees the old file or the new one, never a part; make the directory.

    Raises:
        OSError: the file cannot be written.
        TypeError: the value is not JSON.
    """
    text = json.dumps(value, indent=2) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
