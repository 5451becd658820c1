"""TensorFlow's own virtual environment, made when first needed: its pins do not go well with torch's."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
VENV = HERE / ".venv-tensorflow"
REQUIREMENTS = HERE / "requirements-tensorflow.txt"


def tensorflow_python() -> Path:
    """Return the interpreter of ``benchmarks/.venv-tensorflow``; make it where it is missing or out of date.

    Raises RuntimeError with one sentence where TensorFlow cannot be installed.
    """
    python = VENV / "bin" / "python"
    made_of = VENV / "made-of.txt"
    wanted = REQUIREMENTS.read_text(encoding="utf-8")
    if python.exists() and made_of.exists() and made_of.read_text(encoding="utf-8") == wanted:
        return python
    print(f"Installing TensorFlow into {VENV} (about 1.5 GB on disk) …", file=sys.stderr, flush=True)
    if VENV.exists():
        shutil.rmtree(VENV)
    commands: list[list[str]] = [
        [sys.executable, "-m", "venv", str(VENV)],
        [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", str(REQUIREMENTS)],
    ]
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            said = done.stderr.strip().splitlines()
            raise RuntimeError(f"TensorFlow cannot be installed here: {said[-1] if said else command}")
    made_of.write_text(wanted, encoding="utf-8")
    return python


if __name__ == "__main__":
    print(tensorflow_python())
