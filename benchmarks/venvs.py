"""Virtual environments of peers whose pins do not go well with shoal's own, made when first needed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def peer_python(name: str) -> Path:
    """Return the interpreter of ``benchmarks/.venv-NAME``; make it where it is missing or ``requirements-NAME.txt`` has changed.

    Raises RuntimeError with one sentence where the requirements cannot be installed.
    """
    venv, requirements = HERE / f".venv-{name}", HERE / f"requirements-{name}.txt"
    python, made_of = venv / "bin" / "python", venv / "made-of.txt"
    wanted = requirements.read_text(encoding="utf-8")
    if python.exists() and made_of.exists() and made_of.read_text(encoding="utf-8") == wanted:
        return python
    print(
        f"Installing the peers in {requirements.name} into {venv} (some minutes, a gigabyte or two) …",
        file=sys.stderr,
        flush=True,
    )
    if venv.exists():
        shutil.rmtree(venv)
    commands: list[list[str]] = [
        [sys.executable, "-m", "venv", str(venv)],
        [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", str(requirements)],
    ]
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            said = done.stderr.strip().splitlines()
            raise RuntimeError(f"{requirements.name} cannot be installed here: {said[-1] if said else command}")
    made_of.write_text(wanted, encoding="utf-8")
    return python


if __name__ == "__main__":
    print(peer_python(sys.argv[1]))
